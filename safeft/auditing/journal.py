"""What an audit has finished, on disk: an interrupted one goes on where it stopped."""

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safeft.errors import ArtefactError
from safeft.files import sha256

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Journal:
    """Finished work by name, a line each, under a header that says what it is of.

    A line is written when its work is done and counts only if it is whole. Work of another model,
    of other prompts or settings is thrown away, and that is said.

    Args:
        path: The file (JSON lines), for its owner's eyes: it says where neurons are. None keeps
            nothing.
        header: What has to be the same for old work to count.

    Raises:
        ArtefactError: The file cannot be read or written.

    Example:
        >>> journal = Journal(None, {"model": "a"})
        >>> journal.once("sum", lambda: 1 + 1), journal.once("sum", lambda: 5)
        (2, 2)
    """

    def __init__(self, path: Path | None, header: Mapping[str, Any]) -> None:
        self._path, self._done = path, dict[str, Any]()
        if path is None:
            return
        mine = sha256(json.dumps(header, sort_keys=True).encode())
        try:
            if path.exists() and self._read(path, mine):
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            path.parent.chmod(0o700)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as new:
                new.write(json.dumps({"safeft_journal": 1, "of": mine}) + "\n")
        except OSError as error:
            raise _unwritable(path, error) from error

    def __contains__(self, name: str) -> bool:
        return name in self._done

    def once(self, name: str, work: Callable[[], T]) -> T:
        """What ``work`` gives, which is JSON; it is run only if it has not been before."""
        if name not in self._done:
            found = work()
            # As it will be read: a tuple comes back as a list.
            line = json.dumps([name, found])
            self._done[name] = json.loads(line)[1]
            if self._path is not None:
                try:
                    with self._path.open("a") as stream:
                        stream.write(line + "\n")
                        stream.flush()
                        os.fsync(stream.fileno())
                except OSError as error:
                    raise _unwritable(self._path, error) from error
        return self._done[name]

    def _read(self, path: Path, mine: str) -> bool:
        """Take up whole lines and cut off what follows; whether they are of this audit."""
        data = path.read_bytes()
        lines = data.splitlines(keepends=True)
        good = 0
        try:
            of = json.loads(lines[0])["of"] if lines else None
        except (ValueError, KeyError, TypeError):
            of = None
        if of != mine:
            logger.warning(
                "%r is of another audit (model, prompts or settings differ, or it was edited), so "
                "this one starts anew.",
                str(path),
            )
            return False
        for number, line in enumerate(lines):
            try:
                whole = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                whole = None
            if number and isinstance(whole, list) and len(whole) == 2:
                self._done[whole[0]] = whole[1]
            elif number:
                break
            good += len(line)
        if good < len(data):
            os.truncate(path, good)
        if self._done:
            logger.warning("Going on with %d finished steps of %r.", len(self._done), str(path))
        return True


def _unwritable(path: Path, error: OSError) -> ArtefactError:
    return ArtefactError(
        f"{str(path)!r} cannot be used to keep an audit's finished steps: {error}. Free some space "
        "or give another output folder; an audit without one keeps nothing."
    )

"""An audit log in JSONL: who decided what, when and why; whose words only if asked."""

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safeft.errors import ArtefactError
from safeft.files import sha256


class AuditLog:
    """Lines appended to a file, each whole or not at all.

    Args:
        path: The file; it is opened at once, so that a guard that cannot write does not begin.
        texts: Write prompts and answers too. Without it only their hashes and lengths are kept.

    Raises:
        ArtefactError: It cannot be opened.

    Example:
        >>> AuditLog("guard.jsonl").write({"action": "warn"}, answer="...")  # doctest: +SKIP
    """

    def __init__(self, path: str | Path, *, texts: bool = False) -> None:
        self.path, self._texts = Path(path), texts
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.open("a").close()
        except OSError as error:
            raise _cannot(self.path, error) from error

    def write(self, record: Mapping[str, Any], **texts: str) -> None:
        """Append a line with the time; ``texts`` are kept as said in :class:`AuditLog`.

        Raises:
            ArtefactError: The disk is full.
        """
        row: dict[str, Any] = {"time": datetime.now(UTC).isoformat(timespec="milliseconds")}
        row |= record
        for name, text in texts.items():
            row[f"{name}_sha256"] = sha256(text.encode(errors="replace"))
            row[f"{name}_characters"] = len(text)
            if self._texts:
                row[name] = text
        line = (json.dumps(row, ensure_ascii=True) + "\n").encode()
        try:
            # One write in append mode: lines of several processes do not mix.
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                os.write(handle, line)
            finally:
                os.close(handle)
        except OSError as error:
            raise _cannot(self.path, error) from error


def _cannot(path: Path, error: OSError) -> ArtefactError:
    return ArtefactError(
        f"The audit log {str(path)!r} cannot be written: {error}. What a guard decides would "
        "leave no trace; free some space or give another file."
    )

"""Writing files whole: beside the target first, then renamed, so that none is ever half-written."""

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from safeft.errors import ArtefactError


def write_whole(path: Path, content: str | bytes) -> None:
    """Write ``content`` to ``path``, or leave what was there as it was.

    Raises:
        ArtefactError: The disk is full, or the folder cannot be made or written.
    """
    data = content.encode() if isinstance(content, str) else content
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        beside.replace(path)
    except OSError as error:
        if beside.parent.is_dir():
            beside.unlink(missing_ok=True)
        raise ArtefactError(
            f"{str(path)!r} could not be written ({len(data)} bytes): {error}. Nothing was left "
            "half-written; free some space or give another folder, then run again."
        ) from error


def write_together(folder: Path, files: Mapping[str, str | bytes]) -> None:
    """All files or none: on a full disk, new tensors beside an old config would be a broken set.

    Names may hold folders (``scu/config.json``).
    """
    existed = folder.exists()
    staging = folder / f".{os.getpid()}.part"
    try:
        for name, content in files.items():
            write_whole(staging / name, content)
        for name in files:
            (folder / name).parent.mkdir(exist_ok=True)
        for name in files:
            (staging / name).replace(folder / name)
    except OSError as error:
        raise ArtefactError(
            f"{str(folder)!r} cannot be written: {error}. Give another folder."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if not existed:
            with suppress(OSError):
                folder.rmdir()  # only where nothing came into it


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


def upload(save: Callable[[str], None], repo_id: str, private: bool) -> None:
    """Put on the hub what ``save`` writes into a folder.

    Args:
        save: Takes the folder's path.
        repo_id: Hub repository, made where there is none.
        private: Who may see it, where it is made.
    """
    import tempfile

    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        save(folder)
        api.upload_folder(repo_id=repo_id, folder_path=folder)

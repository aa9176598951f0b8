"""A folded model as a folder that any engine loads, and the way back."""

import shutil
from pathlib import Path
from typing import Any

from safeft.detox.folding import Fold, unfold
from safeft.errors import ArtefactError


def save_folded(model: Any, tokenizer: Any, folded: Fold, folder: str | Path) -> None:
    """Write model, tokenizer and what :func:`undo_fold` needs; all of it or nothing.

    Raises:
        ArtefactError: The folder holds something already, or cannot be written.
    """
    _save(model, tokenizer, Path(folder), folded)


def undo_fold(model: Any, tokenizer: Any, source: str | Path, folder: str | Path) -> None:
    """Take a fold out of a model that was loaded from ``source``, and write it as it was.

    Raises:
        ArtefactError: ``source`` does not say what was folded in, or ``folder`` is taken.
        FoldError: The model was tuned since.
    """
    check_free(folder)
    unfold(model, Fold.load(source))
    _save(model, tokenizer, Path(folder), None)


def check_free(folder: str | Path) -> None:
    """Refuse a folder that holds something.

    Raises:
        ArtefactError: It does.
    """
    if Path(folder).exists() and (not Path(folder).is_dir() or any(Path(folder).iterdir())):
        raise ArtefactError(
            f"{str(folder)!r} is there already and not empty; a model is not written over another. "
            "Give a new folder."
        )


def _save(model: Any, tokenizer: Any, folder: Path, folded: Fold | None) -> None:
    check_free(folder)
    staging = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        if folded is not None:
            folded.save(staging)
        if folder.is_dir():
            folder.rmdir()
        staging.replace(folder)
    except OSError as error:
        raise ArtefactError(
            f"{str(folder)!r} could not be written: {error}. Free some space or give another "
            "folder, then run again."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)

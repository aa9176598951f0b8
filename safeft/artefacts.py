"""Reading what an artefact's folder holds: whole and as it was saved, or an error that says so."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from safeft.errors import ArtefactError
from safeft.files import sha256


@contextmanager
def intact(folder: Path, again: str) -> Iterator[None]:
    """Around the reading of a saved artefact: whatever fails in it says that it was not kept whole.

    Args:
        folder: Where it lies.
        again: How to get another, such as ``Locate again``.

    Raises:
        ArtefactError: A file or an entry is missing, of another kind, or out of its bounds.
    """
    try:
        yield
    except ArtefactError:
        raise
    except (  # a SelectionError is a ValueError
        OSError, LookupError, TypeError, AttributeError, ValueError, RuntimeError, SafetensorError
    ) as error:  # fmt: skip
        raise ArtefactError(
            f"{str(folder)!r} is incomplete or edited ({type(error).__name__}: {error}). {again} "
            "or restore it."
        ) from error


def read_tensors(path: Path, digest: str, again: str) -> dict[str, Tensor]:
    """The tensors of a file that must be the one that was saved.

    Raises:
        ArtefactError: Its SHA-256 is another.
    """
    data = path.read_bytes()
    if sha256(data) != digest:
        raise ArtefactError(
            f"{str(path)!r} is not the file that was saved (its SHA-256 differs from config.json): "
            f"truncated or edited. {again} or restore it."
        )
    return load(data)

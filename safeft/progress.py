"""What a launcher says of this process, and progress bars, which the first one alone shows."""

import os
from collections.abc import Iterable
from typing import TypeVar

from tqdm.auto import tqdm

T = TypeVar("T")


def is_main_process() -> bool:
    """Whether this process is the one that speaks and writes (rank 0, or the only one)."""
    return int(os.environ.get("RANK", "0")) == 0


def launched() -> int:
    """How many processes the launcher started; known before any of them has joined the others."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def progress(items: Iterable[T], description: str, total: int | None = None) -> Iterable[T]:
    """``items``, with a bar on standard error; leaves nothing behind when done.

    Example:
        >>> list(progress([1, 2], "counting"))
        [1, 2]
    """
    silent = not is_main_process() or bool(os.environ.get("TQDM_DISABLE"))
    return tqdm(items, desc=description, total=total, leave=False, disable=silent)

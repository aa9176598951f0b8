"""Means of activations over the tokens read, in one pass, kept on disk by what was shown.

Memory does not grow with the number of texts: a batch is reduced inside the forward pass, layer by
layer, and its rows go to a file that is read back as a mapped tensor.
"""

import fcntl
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from safeft.batch import Batch
from safeft.errors import ArtefactError, SafeftError
from safeft.files import sha256
from safeft.generation import evaluation_mode
from safeft.guard.places import Place, taken, watched
from safeft.guard.reading import Window, batched
from safeft.progress import progress
from safeft.prompts import Reader, input_device
from safeft.sites import plain_model


class ActivationError(SafeftError, ValueError):
    """Activations that are no numbers, or a store of them that is damaged."""


def backbone(model: Any) -> Any:
    """The model without its head: logits are not read, and cost as much as several blocks."""
    return plain_model(model).base_model


def pooled(model: Any, places: Sequence[Place], batch: Batch) -> list[Tensor]:
    """Means over the tokens read (``batch.is_response``), float32 ``(texts, width)`` a place.

    Raises:
        CaptureError: A place was not run.
    """
    read = batch.is_response.float()
    weights = (read / read.sum(1, keepdim=True))[:, None]

    def mean(_: int, values: Tensor) -> Tensor:
        # Some layers (OPT's) receive texts and tokens as one axis.
        values = values.view(*read.shape, -1).float()
        return torch.bmm(weights.to(values.device), values)[:, 0]

    with torch.no_grad(), watched(model, places, mean) as seen:
        backbone(model)(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    return taken(seen, places)


def check_finite(means: Sequence[Tensor], places: Sequence[Place]) -> None:
    """Refuse activations that are no numbers.

    Raises:
        ActivationError: The first place with such.
    """
    for place, values in zip(places, means, strict=True):
        if not bool(values.isfinite().all()):
            count = int((~values.isfinite()).any(1).sum())
            raise ActivationError(
                f"The activations of {place.name} ({place.module}) are not finite for {count} of "
                f"{len(values)} texts, so their score would be none. Is the model damaged, or is "
                "its dtype (float16?) too narrow? Load it in float32 or bfloat16."
            )


class FeatureStore:
    """Rows of pooled activations in a file, found by what was shown; a run that ends loses none.

    Args:
        folder: Where to keep them; a folder of its own for each ``owner``. None for a temporary
            one, which goes with the store.
        owner: What rows belong to: model, weights and places. Other owners never share rows.
        width: Numbers a row.

    Raises:
        ArtefactError: The folder cannot be written, or holds something else.
    """

    def __init__(self, folder: str | Path | None, owner: str, width: int) -> None:
        self._temporary = tempfile.TemporaryDirectory() if folder is None else None
        base = Path(self._temporary.name if self._temporary else str(folder))
        self._folder = base / sha256(f"{owner}/{width}".encode())[:24]
        self._width = width
        self._places: dict[str, int] = {}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / "about.json").write_text(json.dumps({"owner": owner, "width": width}))
            with self._locked():
                self._read()
        except OSError as error:
            raise _cannot(self._folder, error) from error

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def places(self, keys: Sequence[str]) -> Tensor:
        """Row numbers of what is there, int64."""
        return torch.tensor([self._places[key] for key in keys], dtype=torch.long)

    @property
    def features(self) -> Tensor:
        """All rows, float32 ``(rows, width)``, mapped from disk."""
        shape = (len(self._places), self._width)
        # Copy on write: nothing that is done with it reaches the file.
        return torch.from_numpy(np.memmap(self._rows, np.float32, "c", shape=shape))

    def add(self, keys: Sequence[str], rows: Tensor) -> None:
        """Put rows behind those that are there, first the numbers, then what they are.

        Raises:
            ArtefactError: The disk is full.
        """
        try:
            with self._locked():
                self._read()
                new = {key: n for n, key in enumerate(keys) if key not in self._places}
                with self._rows.open("r+b") as stream:
                    stream.seek(len(self._places) * self._width * 4)
                    stream.write(rows[list(new.values())].contiguous().numpy().tobytes())
                with self._keys.open("a") as stream:
                    stream.writelines(f"{key}\n" for key in new)
                self._read()
        except OSError as error:
            raise _cannot(self._folder, error) from error

    @property
    def _rows(self) -> Path:
        return self._folder / "rows.float32"

    @property
    def _keys(self) -> Path:
        return self._folder / "keys.txt"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self._folder / "lock").open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    def _read(self) -> None:
        """Take over what others have added; what was cut off in writing is written anew."""
        for path in (self._rows, self._keys):
            path.touch()
        keys = self._keys.read_text().split("\n")[:-1]
        whole = self._rows.stat().st_size // (self._width * 4)
        if len(keys) > whole or (keys and len(keys[-1]) != 64):
            keys = keys[:whole]
            self._keys.write_text("".join(f"{key}\n" for key in keys))
        if len(keys) != len(self._places):
            self._places = {key: number for number, key in enumerate(keys)}


def _cannot(folder: Path, error: OSError) -> ArtefactError:
    return ArtefactError(
        f"Activations cannot be kept in {str(folder)!r}: {error}. Free some space, or give another "
        "folder."
    )


def fill(
    store: FeatureStore,
    model: Any,
    tokenizer: Reader,
    places: Sequence[Place],
    shown: Sequence[Window],
    batch_size: int,
) -> Tensor:
    """Row numbers of the windows, int64; those that the store lacks are run through the model.

    Raises:
        ActivationError: Activations that are no numbers.
        ArtefactError: The disk is full.
    """
    missing = list({window.key: window for window in shown if window.key not in store}.values())
    # Like lengths share a batch within a part; a part is done and kept before the next is begun.
    part = 64 * batch_size
    bar = iter(progress(range(-(-len(missing) // batch_size)), "reading activations"))
    with evaluation_mode(model):
        for start in range(0, len(missing), part):
            here = missing[start : start + part]
            for numbers, batch in batched(tokenizer, here, batch_size, input_device(model)):
                next(bar, None)
                means = pooled(model, places, batch)
                check_finite(means, places)
                store.add([here[n].key for n in numbers], torch.cat([m.cpu() for m in means], 1))
    next(bar, None)
    return store.places([window.key for window in shown])

"""Rows and columns of named weights, from a model in memory or from a safetensors checkpoint.

A checkpoint is read slice by slice: verifying a 70B model needs no more memory than one block of
rows. Names are those of the plain model (``model.layers.0.mlp.up_proj.weight``).
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from safeft.blocks import Axis, count_of, form_of, take
from safeft.errors import ArtefactError
from safeft.shards import read, shape_of
from safeft.sites import Site, dense, is_quantised, plain_model, plain_name

_BLOCK_BYTES = 64 * 2**20


class Weights(Protocol):
    """Something that holds named weights and gives slices of them."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a weight, or None where there is none of that name."""
        ...

    def read(self, name: str, axis: Axis, entries: Tensor) -> Tensor:
        """``(entries, ...)`` on the CPU: the rows, or the columns transposed, in stored dtype."""
        ...

    def names(self) -> list[str]:
        """All weights' names, sorted."""
        ...


class ModelWeights:
    """Weights of a model in memory; under an adapter, those of the base layers.

    Where they are sharded over processes, every process has to read the same slices in turn.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = plain_model(model)

    def _stored(self, name: str) -> tuple[nn.Module, Tensor] | None:
        path, _, leaf = name.rpartition(".")
        try:
            module = dense(self._model.get_submodule(path))
        except AttributeError:
            return None
        found = getattr(module, leaf, None)
        offloaded = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
        if isinstance(found, Tensor) and found.is_meta and offloaded is not None:
            found = offloaded[leaf]  # accelerate keeps it on the CPU or on disk between uses
        return (module, found) if isinstance(found, Tensor) else None

    def shape(self, name: str) -> tuple[int, ...] | None:
        """See :class:`Weights`."""
        found = self._stored(name)
        if found is None:
            return None
        module, weight = found
        if isinstance(module, nn.Linear) and _is_code(module, weight):
            return module.out_features, module.in_features
        return shape_of(weight)

    def read(self, name: str, axis: Axis, entries: Tensor) -> Tensor:
        """See :class:`Weights`. Of quantised layers what their codes stand for."""
        found = self._required(name)
        _check_bounds(name, shape_of(found), axis, entries)
        return read(found, axis, entries).cpu()

    @torch.no_grad()
    def lines(self, name: str, axis: Axis, entries: Tensor) -> Tensor:
        """As :meth:`read`, on the device the weight lives on."""
        return read(self._required(name), axis, entries)

    def _required(self, name: str) -> Tensor:
        found = self._stored(name)
        if found is None:
            raise ArtefactError(f"The model has no weight {name!r}; it is not the model expected.")
        module, weight = found
        if not _is_code(module, weight):
            return weight
        from peft.utils.integrations import dequantize_module_weight

        return dequantize_module_weight(module)

    def names(self) -> list[str]:
        """See :class:`Weights`."""
        return sorted(plain_name(name) for name, _ in self._model.named_parameters())


def _is_code(module: nn.Module, weight: Tensor) -> bool:
    return weight is getattr(module, "weight", None) and is_quantised(module)


class CheckpointWeights:
    """Weights of a folder of safetensors files (one file, or shards with an index).

    Use as a context manager; files are opened on first use and closed at the end.

    Raises:
        ArtefactError: No safetensors there, or a file that is truncated or not safetensors.
    """

    def __init__(self, folder: str | Path, stem: str = "model") -> None:
        self.folder = Path(folder)
        self._files = ExitStack()
        self._open: dict[str, Any] = {}
        self._where = self._index(stem)

    def _index(self, stem: str) -> dict[str, str]:
        index = self.folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            try:
                return dict(json.loads(index.read_text())["weight_map"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ArtefactError(f"{str(index)!r} is not a shard index: {error}.") from error
        single = f"{stem}.safetensors"
        if not (self.folder / single).is_file():
            raise ArtefactError(
                f"{str(self.folder)!r} holds no {single} and no shard index, so there are no "
                "weights to read. Give the folder of a saved model or adapter (safetensors; "
                "pickled .bin files are not read)."
            )
        return {name: single for name in self._file(single).keys()}  # noqa: SIM118

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = self.folder / name
            try:
                self._open[name] = self._files.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ArtefactError(
                    f"{str(path)!r} cannot be read as safetensors ({error}); it is missing, "
                    "truncated or damaged. Copy or save it again."
                ) from error
        return self._open[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()
        self._open.clear()

    def names(self) -> list[str]:
        """See :class:`Weights`."""
        return sorted(self._where)

    def _slice(self, name: str) -> Any:
        if name not in self._where:
            raise ArtefactError(f"{str(self.folder)!r} has no weight {name!r}.")
        try:
            return self._file(self._where[name]).get_slice(name)
        except SafetensorError as error:
            raise ArtefactError(
                f"{str(self.folder)!r}: the index names {name!r} in {self._where[name]!r}, which "
                f"does not hold it ({error})."
            ) from error

    def shape(self, name: str) -> tuple[int, ...] | None:
        """See :class:`Weights`."""
        return tuple(self._slice(name).get_shape()) if name in self._where else None

    def read(self, name: str, axis: Axis, entries: Tensor) -> Tensor:
        """See :class:`Weights`."""
        weight = self._slice(name)
        _check_bounds(name, tuple(weight.get_shape()), axis, entries)
        form = form_of(weight.get_shape(), axis)
        if len(weight.get_shape()) > 3:
            return take(weight[:], axis, entries)
        if not weight.get_shape():  # A single number (CLIP's logit_scale) has no slices.
            return take(self._file(self._where[name]).get_tensor(name), axis, entries)
        if len(weight.get_shape()) == 3 or axis == "numbers":
            lines = form[2 if axis == "columns" else 1]
            numbers, counts = torch.unique_consecutive(entries // lines, return_counts=True)
            parts = [
                take(weight[matrix : matrix + 1], axis, some % lines)
                for matrix, some in zip(
                    numbers.tolist(), entries.split(counts.tolist()), strict=True
                )
            ]
            return torch.cat(parts) if parts else take(weight[0:0], axis, entries)
        if axis == "rows":
            runs = [weight[first : last + 1] for first, last in runs_of(entries)]
            return torch.cat(runs) if runs else weight[0:0]
        return torch.cat([take(block, axis, entries) for block in self._blocks(weight)], dim=1)

    @staticmethod
    def _blocks(weight: Any) -> Iterator[Tensor]:
        rows, *rest = weight.get_shape()
        step = max(1, _BLOCK_BYTES // (4 * max(1, torch.Size(rest).numel())))
        for first in range(0, rows, step):
            yield weight[first : first + step]


class DistributedCheckpointWeights:
    """Weights of a checkpoint in torch's distributed format (``pytorch_model_fsdp_0``).

    One weight at a time is put together from its shards; the last one read is kept, since its rows
    and bias are asked for in turn. Needs no process group. The format's index is a pickle: read
    only what you would run.

    Raises:
        ArtefactError: The folder is not in that format, or is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        from torch.distributed.checkpoint import FileSystemReader

        self.folder = Path(folder)
        try:
            found = FileSystemReader(self.folder).read_metadata().state_dict_metadata
        except Exception as error:  # The reader unpickles; a damaged file fails in many ways.
            raise ArtefactError(
                f"{str(self.folder)!r} is no distributed checkpoint ({type(error).__name__}: "
                f"{error}). It was not written to its end, or is damaged; save it again."
            ) from error
        # accelerate puts the model's state dict under the key "model".
        self._names = {name.removeprefix("model."): name for name in found}
        self._found: dict[str, Any] = dict(found)
        self._last: tuple[str, Tensor] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._last = None

    def names(self) -> list[str]:
        """See :class:`Weights`."""
        return sorted(self._names)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """See :class:`Weights`."""
        stored = self._found.get(self._names.get(name, ""))
        return None if stored is None else tuple(stored.size)

    def read(self, name: str, axis: Axis, entries: Tensor) -> Tensor:
        """See :class:`Weights`."""
        shape = self.shape(name)
        if shape is None:
            raise ArtefactError(f"{str(self.folder)!r} has no weight {name!r}.")
        _check_bounds(name, shape, axis, entries)
        return take(self._whole(name), axis, entries)

    def _whole(self, name: str) -> Tensor:
        if self._last is None or self._last[0] != name:
            from torch.distributed.checkpoint import CheckpointException, FileSystemReader, load

            stored = self._found[self._names[name]]
            weight = torch.empty(stored.size, dtype=stored.properties.dtype)
            try:
                reader = FileSystemReader(self.folder)
                load({self._names[name]: weight}, storage_reader=reader, no_dist=True)
            except (Exception, CheckpointException) as error:  # which is no Exception
                reason = str(error).strip().splitlines()[-1]
                raise ArtefactError(
                    f"{str(self.folder)!r}: {name!r} cannot be read ({reason}). A shard is "
                    "missing, truncated or damaged."
                ) from error
            self._last = (name, weight)
        return self._last[1]


def _check_bounds(name: str, shape: tuple[int, ...], axis: Axis, entries: Tensor) -> None:
    """A slice of safetensors ends where the data ends, without a word; here it is an error."""
    size = count_of(form_of(shape, axis), axis)
    if len(entries) and not 0 <= int(entries.min()) <= int(entries.max()) < size:
        raise ArtefactError(
            f"{name!r} has {size} {axis}, but {axis} {int(entries.min())} to {int(entries.max())} "
            "are asked for: the neurons belong to another model, or the checkpoint is damaged."
        )


def runs_of(entries: Tensor) -> list[tuple[int, int]]:
    """Sorted numbers as inclusive runs: ``[1, 2, 5]`` is ``[(1, 2), (5, 5)]``."""
    runs: list[tuple[int, int]] = []
    for entry in entries.tolist():
        if runs and entry == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], entry)
        else:
            runs.append((entry, entry))
    return runs


def digests(weights: Weights, site: Site, units: Sequence[int]) -> tuple[int, ...]:
    """One 64-bit BLAKE2b digest per unit of all weights the unit lives in, as signed integers.

    Weights are rounded to bfloat16 first, so that the same checkpoint gives the same digest
    whether it was loaded in float32 or bfloat16; exactness is the certificate's business.
    """
    chosen = torch.tensor(units, dtype=torch.long)
    hashes = [hashlib.blake2b(digest_size=8) for _ in units]
    for part in site.parts:
        table = part.table(site.units)[chosen]
        entries, which = torch.unique(table, return_inverse=True)
        if not len(entries):
            continue
        for name, axis in part.tensors:
            rounded = weights.read(name, axis, entries).to(torch.bfloat16).contiguous()
            rows = rounded.view(torch.int16).reshape(len(entries), -1)
            for unit_hash, of_unit in zip(hashes, which, strict=True):
                unit_hash.update(rows[of_unit].numpy().tobytes())
    return tuple(int.from_bytes(h.digest(), "little", signed=True) for h in hashes)

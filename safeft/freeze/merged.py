"""A base checkpoint with a LoRA adapter on it, read slice by slice as if it were merged."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from safeft.errors import ArtefactError
from safeft.freeze.adapters import check_adapter_settings
from safeft.shards import Axis
from safeft.weights import CheckpointWeights, Weights

_PREFIX = "base_model.model."
_FACTORS = (".lora_A.weight", ".lora_B.weight", ".lora_B.bias")


class MergedWeights:
    """``W0 + s B A`` of an adapter folder; see :class:`safeft.weights.Weights`.

    Use as a context manager.

    Raises:
        ArtefactError: The folder is damaged, or the adapter does not fit the base.
        FreezeError: An adapter whose effect is not the plain product.
    """

    def __init__(self, base: Weights, folder: Path) -> None:
        self._base, self._folder = base, folder
        self._files = ExitStack()
        self._settings = _settings(folder)
        self._adapter = self._files.enter_context(CheckpointWeights(folder, "adapter_model"))
        self._names = set(self._adapter.names())
        self._other = self._check_names()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def shape(self, name: str) -> tuple[int, ...] | None:
        """See :class:`Weights`."""
        return self._base.shape(name)

    def names(self) -> list[str]:
        """See :class:`Weights`."""
        return self._base.names()

    def read(self, name: str, axis: Axis, entries: Tensor) -> Tensor:
        """The merged slice, in which every update shows.

        An update too small to show after rounding would still show unmerged, so it is returned
        as the next representable change.
        """
        module, _, leaf = name.rpartition(".")
        for other in self._other:
            if other.startswith(f"{module}."):
                raise ArtefactError(
                    f"The adapter {str(self._folder)!r} changes {name!r} by {other!r}, which "
                    "cannot be read slice by slice. Merge it (merge_and_unload) and verify that."
                )
        for saved in (f"{_PREFIX}{name}", f"{_PREFIX}{module}.base_layer.{leaf}"):
            if saved in self._names:
                return self._adapter.read(saved, axis, entries)
        base = self._base.read(name, axis, entries)
        update = self._update(module, leaf, axis, entries)
        if update is None:
            return base
        merged = torch.where(update == 0, base, (base.float() + update).to(base.dtype))
        unseen = (merged == base) & (update != 0)
        towards = torch.full_like(base, torch.inf)
        return torch.where(unseen, torch.nextafter(base, towards), merged)

    def _check_names(self) -> list[str]:
        """Refuse factors that fit nothing in the base; list what is neither factor nor copy."""
        other = []
        for saved in sorted(self._names):
            name = saved.removeprefix(_PREFIX)
            factor = next((end for end in _FACTORS if name.endswith(end)), None)
            if factor is None:
                if self.shape(name.replace(".base_layer.", ".")) is None:
                    other.append(name)
                continue
            shape = self.shape(name.removesuffix(factor) + ".weight") or ()
            found, dim = self._adapter.shape(saved) or (), 1 if factor == _FACTORS[0] else 0
            if len(shape) != 2 or found[dim] != shape[dim]:
                raise ArtefactError(
                    f"The adapter {str(self._folder)!r} holds {name!r} {found}, which fits no "
                    f"weight of the base ({shape or 'there is none of that name'}): it was trained "
                    "on another model. Give the base it was trained on."
                )
        return other

    def _update(self, module: str, leaf: str, axis: Axis, entries: Tensor) -> Tensor | None:
        a, b = (f"{_PREFIX}{module}{factor}" for factor in _FACTORS[:2])
        if leaf == "bias":
            name = f"{_PREFIX}{module}{_FACTORS[2]}"
            if name not in self._names:
                return None
            return self._scale(module) * self._adapter.read(name, axis, entries).float()
        if a not in self._names and b not in self._names:
            return None
        if axis == "rows":
            left = self._adapter.read(b, "rows", entries).float()
            return self._scale(module) * (left @ self._whole(a))
        columns = self._adapter.read(a, "columns", entries).float()
        return self._scale(module) * (columns @ self._whole(b).T)

    def _whole(self, name: str) -> Tensor:
        shape = self._adapter.shape(name) or (0,)
        return self._adapter.read(name, "rows", torch.arange(shape[0])).float()

    def _scale(self, module: str) -> float:
        from peft.utils.other import get_pattern_key

        settings = self._settings

        def of(pattern: str, default: str) -> float:
            found = settings.get(pattern) or {}
            return found.get(get_pattern_key(list(found), module), settings[default])

        rank, alpha = of("rank_pattern", "r"), of("alpha_pattern", "lora_alpha")
        return alpha / (rank**0.5 if settings.get("use_rslora") else rank)


def _settings(folder: Path) -> Mapping[str, Any]:
    try:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtefactError(
            f"{str(folder)!r}: adapter_config.json cannot be read ({error})."
        ) from error
    check_adapter_settings(settings, folder.name)
    return settings

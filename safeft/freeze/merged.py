"""A base checkpoint with a LoRA adapter on it, read slice by slice as if it were merged."""

import copy
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from safeft.blocks import Axis, take
from safeft.errors import ArtefactError
from safeft.freeze.adapters import adapter_layers, check_adapter_settings, is_turned
from safeft.weights import CheckpointWeights, Weights

_PREFIX = "base_model.model."
_NAME = "default"


class MergedWeights:
    """``W0 + s B A`` of an adapter folder; see :class:`safeft.weights.Weights`.

    Which factors belong to which weight, and how they are multiplied, is what PEFT says of the
    same adapter on a model without weights. Use as a context manager.

    Args:
        base: The base's weights.
        folder: The adapter.
        shape_model: The base without weights (meta device); it is not changed.

    Raises:
        ArtefactError: The folder is damaged, or the adapter does not fit the base.
        FreezeError: An adapter whose effect is not the plain product.
    """

    def __init__(self, base: Weights, folder: Path, shape_model: nn.Module) -> None:
        self._base, self._folder = base, folder
        self._files = ExitStack()
        self._layers = dict(adapter_layers(_on_shapes(folder, shape_model)))
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
        copied = self._copied(name)
        if copied is not None:
            return self._adapter.read(copied, axis, entries)
        base = self._base.read(name, axis, entries)
        update = self.update(name, axis, entries)
        if update is None:
            return base
        merged = torch.where(update == 0, base, (base.float() + update).to(base.dtype))
        unseen = (merged == base) & (update != 0)
        towards = torch.full_like(base, torch.inf)
        return torch.where(unseen, torch.nextafter(base, towards), merged)

    def change(self, name: str, axis: Axis, entries: Tensor) -> Tensor:
        """What the adapter changes of a slice, float32, not rounded into the base's dtype."""
        copied = self._copied(name)
        if copied is not None:
            base = self._base.read(name, axis, entries)
            return self._adapter.read(copied, axis, entries).float() - base.float()
        update = self.update(name, axis, entries)
        return self._base.read(name, axis, entries).float().zero_() if update is None else update

    def rounded_in(self, name: str) -> torch.dtype:
        """The dtype a change was saved in: some engines train factors in bfloat16."""
        where, _ = self._layers.get(name, ("", None))
        saved = self._copied(name) or f"{_PREFIX}{where}.lora_A.weight"
        if saved not in self._names:
            return torch.float32
        return self._adapter.read(saved, "rows", torch.arange(1)).dtype

    def _copied(self, name: str) -> str | None:
        """Under which name a whole copy of a weight was saved, where one was."""
        module, _, leaf = name.rpartition(".")
        for other in self._other:
            if other.startswith(f"{module}."):
                raise ArtefactError(
                    f"The adapter {str(self._folder)!r} changes {name!r} by {other!r}, which "
                    "cannot be read slice by slice. Merge it (merge_and_unload) and verify that."
                )
        copies = (f"{_PREFIX}{name}", f"{_PREFIX}{module}.base_layer.{leaf}")
        return next((saved for saved in copies if saved in self._names), None)

    def _check_names(self) -> list[str]:
        """Refuse factors that fit nothing in the base; list what is neither factor nor copy."""
        expected = {
            f"{where}.{name.replace(f'.{_NAME}.', '.')}": tuple(parameter.shape)
            for where, layer in self._layers.values()
            for name, parameter in layer.named_parameters()
            if name.startswith(("lora_A.", "lora_B."))
        }
        other = []
        for saved in sorted(self._names):
            name = saved.removeprefix(_PREFIX)
            if ".lora_A." not in name and ".lora_B." not in name:
                if self.shape(name.replace(".base_layer.", ".")) is None:
                    other.append(name)
                continue
            found = self._adapter.shape(saved)
            if expected.get(name) != found:
                raise ArtefactError(
                    f"The adapter {str(self._folder)!r} holds {name!r} {found}, which fits no "
                    f"weight of the base ({expected.get(name) or 'there is none of that name'}): "
                    "it was trained on another model. Give the base it was trained on."
                )
        return other

    def update(self, name: str, axis: Axis, entries: Tensor) -> Tensor | None:
        """What the adapter adds to a slice, float32 and not rounded; None where nothing."""
        module, _, leaf = name.rpartition(".")
        where, layer = self._layers.get(f"{module}.weight" if leaf == "bias" else name, ("", None))
        if layer is None:
            return None
        scale = float(layer.scaling[_NAME])
        if leaf == "bias":
            saved = f"{_PREFIX}{where}.lora_B.bias"
            if saved not in self._names:
                return None
            return scale * self._adapter.read(saved, axis, entries).float()
        down, up = (self._whole(f"{_PREFIX}{where}.{kind}.weight") for kind in ("lora_A", "lora_B"))
        experts = getattr(layer, "num_experts", 1)
        if experts == 1:
            if (axis == "rows") != is_turned(layer):
                return scale * (up[entries] @ down)
            return scale * (down[:, entries].T @ up.T)
        stacked = down.view(experts, -1, down.shape[1]), up.view(up.shape[0], -1, experts)
        turned = is_turned(layer)
        lines = up.shape[0] if (axis == "rows") != turned else down.shape[1]
        parts = []
        for expert in torch.unique(entries // lines).tolist():
            update = scale * (stacked[1][:, :, expert] @ stacked[0][expert])
            mine = entries[entries // lines == expert] % lines
            parts.append(take(update.T if turned else update, axis, mine))
        return torch.cat(parts)

    def _whole(self, name: str) -> Tensor:
        shape = self._adapter.shape(name) or (0,)
        return self._adapter.read(name, "rows", torch.arange(shape[0])).float()


def _on_shapes(folder: Path, shape_model: nn.Module) -> nn.Module:
    """The adapter as PEFT puts it on this model, without any numbers."""
    from peft import PeftConfig, PeftModel

    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArtefactError(
            f"{str(folder)!r}: adapter_config.json cannot be read ({error})."
        ) from error
    check_adapter_settings(config.to_dict(), folder.name)
    config.inference_mode = False
    try:
        with torch.device("meta"):
            return PeftModel(copy.deepcopy(shape_model), config, _NAME)
    except (ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise ArtefactError(
            f"The adapter {str(folder)!r} does not fit the base: {str(error).splitlines()[0]} "
            "Give the base it was trained on."
        ) from error

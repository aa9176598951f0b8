"""Neurons of any family, and masks of the weights they live in, by the ground truth alone."""

from collections.abc import Mapping

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tests.family import Family
from tests.truth import Truth

NOT_ADDRESSED = {("siglip_vision", "head.mlp")}
"""A pooling head outside the blocks, which no vision-language model runs."""


def truths_of(family: Family, square: bool = False) -> dict[str, Truth]:
    return {
        truth.site: truth
        for truth in family.truths(square)
        if (family.name, truth.site) not in NOT_ADDRESSED
    }


def marked(model: nn.Module, truth: Truth, units: tuple[int, ...]) -> dict[str, Tensor]:
    """Per tensor a mask of the numbers that belong to these units."""
    masks: dict[str, Tensor] = {}
    for unit in units:
        for name, index in truth.slices(unit):
            mask = masks.setdefault(
                name, torch.zeros_like(model.get_parameter(name), dtype=torch.bool)
            )
            mask[index] = True
    return masks


def chosen_of(family: Family) -> dict[str, tuple[int, ...]]:
    """Units of every site: some of each, so that shared keys and values are held in part."""
    return {
        name: tuple(sorted({0, truth.units // 2})) if truth.kind == "mlp" else (truth.units - 1,)
        for name, truth in truths_of(family).items()
    }


def masks_of(
    model: nn.Module, family: Family, chosen: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    masks: dict[str, Tensor] = {}
    for name, units in chosen.items():
        for tensor, mask in marked(model, truths_of(family)[name], units).items():
            masks[tensor] = masks[tensor] | mask if tensor in masks else mask
    return masks


def lora_on(model: nn.Module, family: Family) -> LoraConfig:
    """LoRA on every linear layer that units live in, and on the stacks of experts."""
    held = {h.parameter for t in truths_of(family).values() for h in t.held}
    modules, stacks = set(), set()
    for name in held:
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and isinstance(model.get_submodule(module), nn.Linear | Conv1D):
            modules.add(module)
        elif model.get_parameter(name).ndim == 3:
            stacks.add(name)
    return LoraConfig(
        r=3, lora_alpha=24, target_modules=sorted(modules) or None,
        target_parameters=sorted(stacks) or None,
    )  # fmt: skip

"""Subspaces drawn at random, and what became of them, computed here anew and in float64."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from safeft.sites import find_linears
from safeft.subspace import SafetySubspace


def subspace_of(model: nn.Module, share: float = 0.25) -> SafetySubspace:
    """Directions for every linear layer, drawn with a fixed seed; q, k and v share theirs."""
    draw = torch.Generator().manual_seed(3)
    linears = find_linears(model)
    directions: dict[str, Tensor] = {}
    readers: dict[str, str] = {}
    for name, linear in linears.items():
        parent, _, leaf = linear.module.rpartition(".")
        inlet = f"{parent}.q_proj" if leaf in ("k_proj", "v_proj") else linear.module
        readers[name] = inlet
        if inlet not in directions:
            rank = max(1, int(share * linear.features))
            directions[inlet] = torch.randn(linear.features, rank, generator=draw)
    return SafetySubspace.of(model, directions, readers)


def product_changes(
    base: Mapping[str, Tensor], now: Mapping[str, Tensor], subspace: SafetySubspace, model: Any
) -> dict[str, tuple[float, float]]:
    """Per weight: relative change of ``W U``, and of what is free of W."""
    found = {}
    for name, linear in find_linears(model).items():
        was, weight = base[name].double(), now[name].double()
        if linear.axis == "rows":
            was, weight = was.T, weight.T
        basis = subspace.basis(name).double()
        gap = weight - was
        held = gap @ basis
        free = gap - held @ basis.T
        found[name] = (
            float(held.norm() / (was @ basis).norm()),
            float(free.norm() / was.norm()),
        )
    return found

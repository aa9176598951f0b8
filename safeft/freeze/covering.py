"""Which parameters a subspace holds directions of, and what is done with all others.

What no basis covers cannot be held in part. Embeddings, norms and biases move what every layer
receives out of the held directions, so by default whatever a subspace does not cover stays whole.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from safeft.errors import FreezeError
from safeft.freeze.adapters import adapter_layers, check_layer, is_factor, trains
from safeft.freeze.directions import Directions, Partner
from safeft.sites import dense, find_linears, plain_name
from safeft.subspace import SafetySubspace

_NOTHING = 1e-5
"""Singular values below this belong to directions that held columns hold already."""


def held_directions(
    plain: nn.Module, subspace: SafetySubspace, columns: Mapping[str, Tensor]
) -> list[Directions]:
    """The trainable parameters of which the subspace holds directions.

    Args:
        plain: The plain model, adapters in place.
        subspace: What to hold.
        columns: Weight name to inputs that are held anyway: the directions are taken across the
            others, so that both hold at once and the inputs to the bit.

    Raises:
        FreezeError: An adapter trains a layer that the subspace has no basis for, or is no LoRA.
    """
    linears = find_linears(plain, ("text", "vision", "projector"))
    adapted: dict[str, list[tuple[str, Any]]] = {}
    for name, layer in adapter_layers(plain):
        adapted.setdefault(name, []).append(layer)
    found = []
    for name in subspace.readers:
        linear = linears[name]
        basis = _across(subspace.basis(name), columns.get(name))
        module = dense(plain.get_submodule(linear.module))
        weight = module._parameters.get("weight")
        if not basis.shape[1]:
            continue
        if weight is not None and weight.requires_grad:
            found.append(Directions(name, name, weight, linear.axis, linear.axis, basis, None))
        for factor, parameter, partner in _factors(adapted.get(name, ())):
            found.append(
                Directions(factor, name, parameter, "columns", linear.axis, basis, partner)
            )
    return found


def _across(basis: Tensor, columns: Tensor | None) -> Tensor:
    """A basis of what is left of the span where some inputs are held by themselves."""
    if columns is None or not len(columns):
        return basis
    rest = basis.index_fill(0, columns, 0)
    vectors, values, _ = torch.linalg.svd(rest, full_matrices=False)
    return vectors[:, values > _NOTHING].index_fill(0, columns, 0)


def _factors(
    layers: Iterable[tuple[str, Any]],
) -> Iterator[tuple[str, nn.Parameter, Partner]]:
    """The factors A of adapters in training on a weight, each with its B."""
    for where, layer in layers:
        check_layer(layer, where)
        for adapter, down in layer.lora_A.items():
            up = layer.lora_B[adapter]
            if trains(down) or trains(up):
                partner = Partner(
                    f"{where}.lora_B.{adapter}.weight", up.weight, float(layer.scaling[adapter])
                )
                yield f"{where}.lora_A.{adapter}.weight", down.weight, partner


def uncovered(plain: nn.Module, directions: list[Directions]) -> dict[str, nn.Parameter]:
    """The trainable parameters that no direction is held of.

    Raises:
        FreezeError: One of them belongs to an adapter: what it was put there to train would not
            be held.
    """
    covered = {id(held.parameter) for held in directions}
    covered |= {id(held.partner.parameter) for held in directions if held.partner is not None}
    found = {}
    for name, parameter in plain.named_parameters():
        if not parameter.requires_grad or id(parameter) in covered:
            continue
        if is_factor(name) or "modules_to_save" in name or "trainable_tokens" in name:
            raise FreezeError(
                f"The adapter trains {plain_name(name)}, and the subspace has no basis for it: it "
                "was found for other modules, or this is no linear layer. Its update would not be "
                "held. Leave it out of the adapter (target_modules, modules_to_save), or locate "
                "with it."
            )
        found[plain_name(name)] = parameter
    return found

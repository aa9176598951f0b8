"""Which parameters a subspace holds directions of, and what is done with all others.

What no basis covers cannot be held in part. Embeddings, norms and biases move what every layer
receives out of the held directions, so by default whatever a subspace does not cover stays whole.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from safeft.errors import FingerprintError, FreezeError
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
        FreezeError: An adapter that is no LoRA.
        FingerprintError: A basis that does not fit the weight it is for.
    """
    linears = find_linears(plain, ("text", "vision", "projector"))
    adapted: dict[str, list[tuple[str, Any]]] = {}
    for name, layer in adapter_layers(plain):
        adapted.setdefault(name, []).append(layer)
    found = []
    for name in subspace.readers:
        if _is_copied(plain, name):
            continue  # the weight itself rests; its copy is covered by nothing
        linear = linears.get(name)
        features = subspace.basis(name).shape[0]
        if linear is None or linear.features != features:
            raise FingerprintError(
                f"The subspace holds directions of {features} inputs of {name!r}, and the model "
                f"has {'no such linear layer' if linear is None else f'{linear.features} there'}: "
                "it was made for another model, or edited. Locate in this one."
            )
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


def _is_copied(plain: nn.Module, weight: str) -> bool:
    """Whether an adapter trains a full copy of a weight's layer in its place."""
    try:
        layer = plain.get_submodule(weight.rpartition(".")[0])
    except AttributeError:
        return False
    return isinstance(getattr(layer, "modules_to_save", None), nn.ModuleDict)


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


def uncovered(
    plain: nn.Module, directions: list[Directions], whole: Mapping[str, nn.Parameter]
) -> dict[str, nn.Parameter]:
    """The trainable parameters that neither are held whole nor in some direction.

    Raises:
        FreezeError: One of them belongs to an adapter: what it was put there to train would not
            be held.
    """
    covered = {id(parameter) for parameter in whole.values()}
    covered |= {id(held.parameter) for held in directions}
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

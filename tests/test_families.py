"""The ground truth of tests/families.py, proved on the models' own forward passes."""

import fnmatch
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from tests.families import FAMILIES
from tests.family import Family
from tests.truth import Held, Index, Truth

CONSUMERS: dict[Callable, int] = {
    nn.functional.linear: 0,
    torch.matmul: 0,
    Tensor.matmul: 0,
    Tensor.__matmul__: 0,
    torch.bmm: 0,
    torch.addmm: 1,
}
"""The operations that use a writing matrix, and which argument is its input."""

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
every_build = pytest.mark.parametrize("square", [False, True], ids=["plain", "square"])


class Enough(Exception):
    """The rest of the forward pass is not needed."""


class Watch(TorchFunctionMode):
    """What flows into a truth's writing weight, whichever operation uses it, and what comes out.

    The activations of the units in ``silent`` are put to zero on their way. With ``no_further``
    the forward pass ends there.
    """

    def __init__(
        self, model: nn.Module, truth: Truth, silent: list[int], no_further: bool = False
    ) -> None:
        super().__init__()
        self.truth, self.silent, self.no_further = truth, silent, no_further
        self.weight = model.get_parameter(truth.writer.parameter)
        self.storage = self.weight.untyped_storage().data_ptr()
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        position = CONSUMERS.get(func)
        if position is None or not self.is_used(args[position + 1]):
            return func(*args, **(kwargs or {}))
        given = args[position].clone()
        units = self.mine(given).unflatten(-1, (self.truth.units, self.truth.width))
        units[..., self.silent, :] = 0
        result = func(*args[:position], given, *args[position + 1 :], **(kwargs or {}))
        self.inputs.append(units.flatten(0, -3))
        self.outputs.append(self.mine(result).flatten(0, -2))
        if self.no_further:
            raise Enough
        return result

    def mine(self, tokens: Tensor) -> Tensor:
        """Of all experts' tokens (E, tokens, size), as Llama 4 computes them, the one expert's."""
        expert = self.truth.writer.expert
        return tokens if expert is None or tokens.ndim < 3 else tokens[expert]

    def is_used(self, used: Tensor) -> bool:
        if used.untyped_storage().data_ptr() != self.storage:
            return False
        if self.truth.writer.expert is None or used.ndim == 3:
            return True
        return used.storage_offset() == self.truth.writer.expert * self.weight.stride(0)


@torch.no_grad()
def watch(
    family: Family, model: PreTrainedModel, truth: Truth, silent: list[int] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """What the writing weight makes of the activations, and the model's output."""
    with Watch(model, truth, silent or []) as seen:
        output = model(**family.inputs())
    assert seen.outputs, f"{truth.writer.parameter} was not used"
    found = [value for value in output.values() if isinstance(value, Tensor)]
    assert found
    return torch.cat(seen.outputs), found


@torch.no_grad()
def activations(family: Family, model: PreTrainedModel, truth: Truth) -> Tensor:
    """What flows into a truth's writing weight, (tokens, units, width)."""
    with suppress(Enough), Watch(model, truth, [], no_further=True) as seen:
        model(**family.inputs())
    return torch.cat(seen.inputs)


@contextmanager
def changed(
    model: nn.Module, slices: list[tuple[str, Index]], *, others: bool = False
) -> Iterator[None]:
    """Other numbers in these slices, or in all the rest of their tensors; as before afterwards."""
    saved = {name: model.get_parameter(name).detach().clone() for name, _ in slices}
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for name, old in saved.items():
            tensor, new = model.get_parameter(name), old + torch.randn_like(old)
            tensor.copy_(new if others else old)
            for mine, index in slices:
                if mine == name:
                    tensor[index] = (old if others else new)[index]
    try:
        yield
    finally:
        with torch.no_grad():
            for name, old in saved.items():
                model.get_parameter(name).copy_(old)


def prepared(family: Family, square: bool) -> PreTrainedModel:
    """The model, its mixing norms reduced to their gains: what is left of them is per head."""
    model = family.build(square=square)
    for name in {name for truth in family.truths(square) for name in truth.mixing}:
        norm = model.get_submodule(name)
        norm.forward = lambda hidden, norm=norm: hidden * norm.weight
    return model


def moved(before: Tensor, after: Tensor) -> set[int]:
    return set((before != after).any(-1).any(0).nonzero().flatten().tolist())


def truths_to_try(family: Family, square: bool) -> list[Truth]:
    """Of each sort the first and the last, of the square ones the last: all would take minutes."""
    sorts: dict[tuple[str, str], list[Truth]] = {}
    for truth in family.truths(square):
        sorts.setdefault((re.sub(r"\d+", "", truth.site), truth.kind), []).append(truth)
    return [
        t for like in sorts.values() for t in (like[-1:] if square else [*like[:-1][:1], like[-1]])
    ]


def units_to_try(truth: Truth, square: bool) -> tuple[int, ...]:
    return (1,) if square else (1, truth.units - 1)


def share(held: tuple[Held, ...], unit: int) -> list[tuple[str, Index]]:
    return [(part.parameter, part.index(unit)) for part in held]


@every_build
@every_family
def test_families_build_and_run_the_same_each_time(family: Family, square: bool) -> None:
    model, again = family.build(square=square), family.build(square=square)
    assert not model.training
    assert model.config.model_type == family.model_type
    for (name, one), two in zip(model.named_parameters(), again.parameters(), strict=True):
        assert one.dtype == torch.float32
        assert one.device.type == "cpu"
        assert torch.equal(one, two), name
        assert not ((one == 0) | (one == 1)).any(), name
    assert not torch.equal(
        next(model.parameters()), next(family.build(seed=1, square=square).parameters())
    )
    with torch.no_grad():
        outputs = [
            m.train(mode)(**family.inputs()) for m in (model, again) for mode in (False, True)
        ]
    for name, value in outputs[0].items():
        if isinstance(value, Tensor):
            assert value.isfinite().all()
            assert all(torch.equal(value, other[name]) for other in outputs[1:]), name


@every_build
@every_family
def test_reading_slices_move_their_own_units_and_no_other(family: Family, square: bool) -> None:
    model = prepared(family, square)
    for truth in truths_to_try(family, square):
        before = activations(family, model, truth)
        for unit in units_to_try(truth, square):
            for held in truth.readers:
                with changed(model, share((held,), unit)):
                    after = activations(family, model, truth)
                assert moved(before, after) == truth.sharers(held, unit), (held, unit)
            with changed(model, share(truth.readers, unit), others=True):
                after = activations(family, model, truth)
            assert moved(before, after) == {*range(truth.units)} - {unit}, (truth.site, unit)


@every_build
@every_family
def test_writing_slices_carry_all_of_a_unit_and_nothing_else(family: Family, square: bool) -> None:
    model = prepared(family, square)
    for truth in truths_to_try(family, square):
        written, _ = watch(family, model, truth)
        for unit in units_to_try(truth, square):
            rest = [other for other in range(truth.units) if other != unit]
            mine = share((truth.writer,), unit)
            without, alone = (watch(family, model, truth, silent) for silent in ([unit], rest))
            with changed(model, mine):
                assert not torch.equal(watch(family, model, truth)[0], written)
                same(watch(family, model, truth, [unit])[1], without[1])
            with changed(model, mine, others=True):
                assert torch.equal(watch(family, model, truth, rest)[0], alone[0])


def same(these: list[Tensor], those: list[Tensor]) -> None:
    for one, other in zip(these, those, strict=True):
        assert torch.equal(one, other)


@every_build
@every_family
def test_every_matrix_belongs_to_units_or_is_listed(family: Family, square: bool) -> None:
    model = family.build(square=square)
    parameters = dict(model.named_parameters())
    owners = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for truth in family.truths(square):
        for held in truth.held:
            for unit in range(truth.units):
                if min(truth.sharers(held, unit)) == unit:
                    owners[held.parameter][held.index(unit)] += 1
    for name, count in owners.items():
        assert count.eq(count.flatten()[0]).all(), f"only a part of {name} has units"
        assert count.max() <= 1, f"two units own entries of {name} that they do not share"
        if parameters[name].ndim > 1:
            assert count.any() != family.is_unaddressed(name), name
    assert all(fnmatch.filter(parameters, pattern) for pattern in family.unaddressed)


@every_family
def test_heads_are_mixed_exactly_where_it_is_said(family: Family) -> None:
    model = family.build()
    for truth in family.truths():
        if truth.kind == "attention":
            before = activations(family, model, truth)
            with changed(model, share(truth.readers[:1], 0)):
                after = activations(family, model, truth)
            assert (moved(before, after) == {0}) != truth.mixes_heads, truth.site


def test_names_and_sites_are_distinct() -> None:
    names = [family.name for family in FAMILIES]
    assert len(names) == len(set(names))
    for family in FAMILIES:
        sites = [(truth.site, truth.kind) for truth in family.truths()]
        assert len(sites) == len(set(sites))

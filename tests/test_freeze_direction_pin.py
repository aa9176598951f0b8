"""Input directions held on a bare model and a bare optimizer, against formulas in float64."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate.state import GradientState
from peft import get_peft_model
from torch import Tensor, nn
from transformers.optimization import Adafactor

from safeft import SafetySubspace
from safeft.blocks import flat_blocks
from safeft.errors import FreezeError
from safeft.freeze import direction_pin as module
from safeft.freeze import pieces
from safeft.freeze.certificate import off_directions
from safeft.freeze.direction_pin import DirectionPin
from safeft.freeze.directions import tolerance
from safeft.freeze.pieces import check_whole
from safeft.freeze.pin import Pin
from safeft.freeze.plan import Plan, make_plan
from safeft.shards import Shard, live
from safeft.weights import ModelWeights
from tests.families import FAMILIES
from tests.freezing import (
    LARGE,
    changed_frozen,
    frozen_entries,
    lora,
    model_of,
    neurons_of,
    state_of,
)
from tests.spans import product_changes, subspace_of

UP = "model.layers.0.mlp.up_proj.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


def built(
    model: nn.Module, span: SafetySubspace | None = None, **settings: Any
) -> tuple[Pin, Plan]:
    """Pin and plan as the callback makes them, everything loose that no basis covers."""
    span = span or subspace_of(model)
    plan = make_plan(model, settings.pop("neurons", None), hold=(), subspace=span, **settings)
    return Pin(plan.holds, DirectionPin(plan.directions, ModelWeights(model))), plan


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def sgd(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(trained(model), **{"lr": 0.1, **settings})


def backward(model: Any, seed: int = 0) -> None:
    tokens = torch.randint(0, 261, (2, 9), generator=torch.Generator().manual_seed(seed))
    model(input_ids=tokens, labels=tokens).loss.backward()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def free_part(gradient: Tensor, basis: Tensor, axis: str = "columns") -> Tensor:
    """``G - (G U) U'`` in float64."""
    lines = gradient.double() if axis == "columns" else gradient.double().T
    kept = lines - lines @ basis.double() @ basis.double().T
    return kept if axis == "columns" else kept.T


def family(name: str) -> Any:
    return next(each for each in FAMILIES if each.name == name).build()


OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, nesterov=True, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, weight_decay=0.1),
    "adafactor": lambda p: Adafactor(
        p, lr=1e-2, weight_decay=0.1, relative_step=False, scale_parameter=False
    ),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


# --- the mask -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_the_mask_takes_held_directions_out_of_gradients_and_nothing_else(name: str) -> None:
    model = family(name)
    backward(model)
    plain = gradients(model)
    model.zero_grad()
    pin, plan = built(model)
    pin.install(sgd(model))
    backward(model)
    held = {d.name: d for d in plan.directions}
    assert len(held) >= 8
    for weight, gradient in gradients(model).items():
        if weight not in held:
            assert torch.equal(gradient, plain[weight]), weight
            continue
        basis, axis = held[weight].basis, held[weight].axis
        expected = free_part(plain[weight], basis, axis)
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-7)
        lines = gradient if axis == "columns" else gradient.T
        assert float((lines @ basis).norm()) < 1e-6 * float(plain[weight].norm())
        assert float(gradient.norm()) > 0.3 * float(plain[weight].norm())
    assert {d.axis for d in plan.directions} == (
        {"rows", "columns"}
        if name == "gpt2" and "lm_head.weight" in held
        else {"rows"}
        if name == "gpt2"
        else {"columns"}
    )
    assert pin.span.fired == [1] * len(held)


@pytest.fixture
def syncing() -> Iterator[GradientState]:
    """What the trainer says of whether the optimizer steps after this backward pass."""
    state = GradientState()
    yield state
    state._set_sync_gradients(True)


def test_gradients_that_accumulate_are_projected_with_the_last(syncing: GradientState) -> None:
    model = model_of()
    for seed in range(3):
        backward(model, seed)
    plain = gradients(model)
    model.zero_grad()
    pin, plan = built(model)
    pin.install(sgd(model))
    for seed in range(3):
        syncing._set_sync_gradients(seed == 2)
        backward(model, seed)
    for held in plan.directions:
        expected = free_part(plain[held.name], held.basis)
        torch.testing.assert_close(held.parameter.grad.double(), expected, rtol=1e-4, atol=1e-6)
    assert pin.span.fired == [3] * len(plan.directions)


def test_gradients_that_accumulate_outside_of_a_trainer_are_projected_each_time() -> None:
    model = model_of()
    pin, plan = built(model)
    pin.install(sgd(model))
    for seed in range(3):
        backward(model, seed)
        for held in plan.directions:
            size = float(held.parameter.grad.norm())
            assert float((held.parameter.grad @ held.basis).norm()) < 1e-5 * size


def test_a_gradient_of_other_strides_is_projected_too() -> None:
    model = model_of()
    backward(model)
    plain = model.get_parameter(UP).grad.clone()
    model.zero_grad()
    pin, plan = built(model)
    pin.install(sgd(model))
    weight = model.get_parameter(UP)
    weight.grad = torch.zeros(weight.shape[::-1]).T
    assert not weight.grad.is_contiguous()
    backward(model)
    (held,) = [d for d in plan.directions if d.name == UP]
    torch.testing.assert_close(
        weight.grad.double(), free_part(plain, held.basis), rtol=1e-4, atol=1e-7
    )


def test_gradients_that_are_not_finite_end_as_a_violation_and_not_as_held() -> None:
    model = model_of()
    pin, plan = built(model)
    optimizer = sgd(model)
    pin.install(optimizer)
    weight = model.get_parameter(UP)
    (weight * torch.full_like(weight, torch.nan)).sum().backward()
    optimizer.step()
    report = pin.span.report()
    (violation,) = off_directions(report)
    assert violation.tensor == UP
    assert [d["tensor"] for d in report if not d["relative_change"] < 1e-6] == [UP]


# --- the pin ------------------------------------------------------------------------------------


@every_optimizer
def test_the_pin_takes_out_of_a_step_what_lies_along_held_directions(name: str) -> None:
    """Against the same optimizer on a twin that is given the masked gradients, and nothing else."""
    model = model_of()
    twin = copy.deepcopy(model)
    base = state_of(model)
    pin, plan = built(model)
    optimizers = [OPTIMIZERS[name](trained(each)) for each in (model, twin)]
    pin.install(optimizers[0])
    backward(model)
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        other.grad = own.grad.clone()
    for optimizer in optimizers:
        optimizer.step()
    stepped = state_of(twin)
    drifted = 0
    for held in plan.directions:
        gap = stepped[held.name].double() - base[held.name].double()
        along = gap @ held.basis.double() @ held.basis.double().T
        drifted += float(along.norm()) > 1e-3 * float(base[held.name].norm())
        expected = stepped[held.name].double() - along
        torch.testing.assert_close(held.parameter.detach().double(), expected, rtol=1e-5, atol=1e-7)
    assert drifted == len(plan.directions)  # without the pin they do move
    for weight, parameter in model.named_parameters():
        if weight not in {held.name for held in plan.directions}:
            assert torch.equal(parameter, stepped[weight]), weight


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_stay_over_many_steps_and_what_is_free_moves(name: str, dtype: Any) -> None:
    model = model_of(dtype)
    base, span = state_of(model), subspace_of(model)
    pin, plan = built(model, span)
    optimizer = OPTIMIZERS[name](trained(model))
    pin.install(optimizer)
    for seed in range(12):
        backward(model, seed)
        optimizer.step()
        optimizer.zero_grad()
    limit = 1e-6 if dtype == torch.float32 else 4e-3  # half a unit in the last place of bfloat16
    for weight, (held, free) in product_changes(base, state_of(model), span, model).items():
        assert held < limit, weight
        assert free > 1e-2, weight
    assert max(pin.span.changes()) < limit
    assert pin.span.pins == pin.pins == 12


@pytest.mark.parametrize("name", ["gpt2", "phi3", "falcon_grouped"])
def test_transposed_and_fused_layers_are_held(name: str) -> None:
    model = family(name)
    base, span = state_of(model), subspace_of(model)
    pin, _ = built(model, span)
    optimizer = OPTIMIZERS["adamw"](trained(model))
    pin.install(optimizer)
    for seed in range(4):
        backward(model, seed)
        optimizer.step()
    for weight, (held, free) in product_changes(base, state_of(model), span, model).items():
        assert held < 1e-6, weight
        assert free > 1e-3, weight


def test_errors_do_not_add_up() -> None:
    """Each step is put back to where training began, not to where the last one ended."""
    model = model_of()
    base, span = state_of(model), subspace_of(model)
    pin, plan = built(model, span)
    optimizer = OPTIMIZERS["adamw"](trained(model))
    pin.install(optimizer)
    found = []
    for seed in range(60):
        backward(model, seed)
        optimizer.step()
        optimizer.zero_grad()
        if seed in (0, 59):
            changes = product_changes(base, state_of(model), span, model).values()
            found.append(max(held for held, _ in changes))
    assert found[1] < 1e-6
    assert found[1] < 4 * found[0]


def test_a_parameter_that_rests_is_pinned_without_a_mask() -> None:
    model = model_of()
    pin, plan = built(model)
    weight = model.get_parameter(UP)
    weight.requires_grad_(False)
    optimizer = sgd(model)
    pin.install(optimizer)
    backward(model)
    pin.check_fired()
    number = [d.name for d in plan.directions].index(UP)
    assert pin.span.fired[number] == 0
    with torch.no_grad():
        weight.add_(0.1)
    optimizer.step()
    pin.check_pinned()
    assert max(pin.span.changes()) < 1e-6


# --- with neurons -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_columns_and_directions_hold_together(dtype: Any) -> None:
    """Neurons to the bit, ``W U`` of the whole basis to rounding, and the rest moves."""
    model = model_of(dtype)
    base, span = state_of(model), subspace_of(model)
    pin, plan = built(model, span, neurons=neurons_of(model, LARGE))
    optimizer = OPTIMIZERS["adamw"](trained(model))
    pin.install(optimizer)
    for seed in range(6):
        backward(model, seed)
        optimizer.step()
        optimizer.zero_grad()
    now = state_of(model)
    assert changed_frozen(base, now, frozen_entries(base, LARGE, "freeze")) == []
    limit = 1e-6 if dtype == torch.float32 else 4e-3
    for weight, (held, free) in product_changes(base, now, span, model).items():
        assert held < limit, weight
        assert free > 1e-2, weight
    assert max(pin.span.changes()) < limit


def test_beside_held_inputs_the_basis_is_that_of_the_others() -> None:
    model = model_of()
    span = subspace_of(model)
    plan = make_plan(model, neurons_of(model, LARGE), hold=(), subspace=span)
    (held,) = [d for d in plan.directions if d.name == DOWN]
    columns = torch.tensor(LARGE["model.layers.0.mlp"])
    assert not held.basis[columns].any()
    rank = held.basis.shape[1]
    torch.testing.assert_close(held.basis.T @ held.basis, torch.eye(rank), atol=1e-5, rtol=0)
    whole = span.basis(DOWN).double()
    rest = whole.index_fill(0, columns, 0)
    lost = rest - held.basis.double() @ (held.basis.double().T @ rest)
    assert lost.abs().max() < 1e-6
    (other,) = [d for d in plan.directions if d.name == UP]  # of which rows are held
    assert torch.equal(other.basis, span.basis(UP))


def test_directions_that_lie_in_held_inputs_need_no_holding() -> None:
    model = model_of()
    columns = torch.eye(48)[:, [1, 7]] + 0.0
    only = SafetySubspace.of(
        model, {"x": torch.cat([columns, torch.eye(48)[:, [9]]], 1)}, {DOWN: "x"}
    )
    plan = make_plan(model, neurons_of(model), hold=(), subspace=only)
    (held,) = plan.directions
    torch.testing.assert_close(held.basis.abs(), torch.eye(48)[:, [9]])


# --- adapters -----------------------------------------------------------------------------------


def adapted(**settings: Any) -> tuple[Any, SafetySubspace]:
    torch.manual_seed(0)
    return get_peft_model(model_of(), lora(**settings)), subspace_of(model_of())


def factors(model: Any) -> Iterator[tuple[str, Tensor, Tensor, float]]:
    """Weight name, A, B and the scale of every adapted layer."""
    for path, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            pair = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
            yield f"{path}.weight", *pair, layer.scaling["default"]


@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True}, {"r": 1}, {"init_lora_weights": False}]
)
def test_a_lora_factor_is_held_at_zero_along_the_directions(settings: Any) -> None:
    model, span = adapted(**settings)
    base = state_of(model_of())
    before = {name: a.detach().clone() for name, a, _, _ in factors(model)}
    pin, plan = built(model, span)
    optimizer = OPTIMIZERS["adamw"](trained(model))
    assert pin.install(optimizer) == len(plan.directions) == len(before)
    for name, a, _, _ in factors(model):  # at the start: what was free of it is as it was drawn
        torch.testing.assert_close(
            a.detach().double(), free_part(before[name], span.basis(name)), rtol=1e-5, atol=1e-7
        )
    for seed in range(6):
        backward(model, seed)
        for name, a, _, _ in factors(model):
            size = max(float(a.grad.norm()), 1e-12)
            assert float((a.grad @ span.basis(name)).norm()) < 1e-5 * size
        optimizer.step()
        optimizer.zero_grad()
    for name, a, b, scale in factors(model):
        basis = span.basis(name).double()
        assert float((a.double() @ basis).norm()) < 1e-6 * float(a.norm())
        change = scale * (b.double() @ a.double())
        assert float(change.norm()) > 1e-3 * float(base[name].norm())
        assert float((change @ basis).norm()) < 1e-6 * float((base[name].double() @ basis).norm())
    merged = state_of(model)
    for name, (held, _) in product_changes(base, merged, span, model_of()).items():
        assert held < 1e-6, name


def test_a_factor_that_rests_is_held_for_its_partners_sake() -> None:
    model, span = adapted()
    for _, a, _, _ in factors(model):
        a.requires_grad_(False)
    pin, plan = built(model, span)
    assert {d.name.rpartition("lora_A")[1] for d in plan.directions} == {"lora_A"}
    assert {d.partner.name.rpartition("lora_B")[1] for d in plan.directions} == {"lora_B"}
    optimizer = OPTIMIZERS["adamw"](trained(model))
    pin.install(optimizer)
    for seed in range(3):
        backward(model, seed)
        pin.check_fired()
        optimizer.step()
        pin.check_pinned()
    for name, a, b, _ in factors(model):
        assert float((a @ span.basis(name)).norm()) < 1e-6 * float(a.norm())
        assert b.any()
    assert max(pin.span.changes()) < 1e-6


def test_a_factor_whose_partner_rests_is_held_too() -> None:
    model, span = adapted(init_lora_weights=False)
    for _, _, b, _ in factors(model):
        b.requires_grad_(False)
    pin, _ = built(model, span)
    optimizer = OPTIMIZERS["adamw"](trained(model))
    pin.install(optimizer)
    backward(model)
    optimizer.step()
    assert max(pin.span.changes()) < 1e-6


def test_the_change_under_an_adapter_is_that_of_the_product() -> None:
    model, span = adapted(init_lora_weights=False)
    base = state_of(model_of())
    _, plan = built(model, span)
    pin = DirectionPin(plan.directions, ModelWeights(model))  # not installed: nothing is held yet
    expected = []
    for held in plan.directions:
        ((_, a, b, scale),) = [f for f in factors(model) if f[0] == held.weight]
        basis = span.basis(held.weight).double()
        gap = scale * (b.double() @ (a.double() @ basis))
        expected.append(float(gap.norm() / (base[held.weight].double() @ basis).norm()))
    assert min(expected) > 1e-3
    assert pin.changes() == pytest.approx(expected, rel=0.2)  # where W0 U is less than its share
    pin.install(sgd(model))
    assert max(pin.changes()) < 1e-6


# --- what is measured ---------------------------------------------------------------------------


def test_the_relative_change_by_hand() -> None:
    model = model_of()
    base, span = state_of(model), subspace_of(model)
    pin, plan = built(model, span)
    pin.install(sgd(model))
    gap = torch.randn(48, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.get_parameter(UP).add_(1e-3 * gap)
    found = dict(zip([d.name for d in plan.directions], pin.span.changes(), strict=True))
    basis = span.basis(UP).double()
    moved = (1e-3 * gap.double() @ basis).norm()
    scale = max((base[UP].double() @ basis).norm(), base[UP].double().norm() * (8 / 32) ** 0.5)
    assert found.pop(UP) == pytest.approx(float(moved / scale), rel=1e-3)
    assert max(found.values()) < 1e-6
    report = {row["tensor"]: row for row in pin.span.report()}
    assert (report[UP]["rank"], report[UP]["features"]) == (8, 32)
    assert report[UP]["held_by"] == UP
    assert report[UP]["tolerance"] == tolerance(torch.float32)
    (violation,) = off_directions(pin.span.report())
    assert violation.tensor == UP
    assert "W U changed by" in str(violation)


def test_a_product_near_zero_is_measured_against_its_share_of_the_weight() -> None:
    model = model_of()
    with torch.no_grad():
        model.get_parameter(UP)[:, :4] = 0
    held = torch.eye(32)[:, :4]
    pin, _ = built(model, SafetySubspace.of(model, {"x": held}, {UP: "x"}))
    pin.install(sgd(model))
    assert pin.span.changes() == [0.0]
    with torch.no_grad():
        model.get_parameter(UP)[0, 0] = 1.0
    share = float(model.get_parameter(UP)[:, 4:].norm()) * (4 / 32) ** 0.5
    assert pin.span.changes() == [pytest.approx(1 / share, rel=1e-5)]


def test_measuring_gives_the_removed_norm_and_the_drift_once() -> None:
    model = model_of()
    backward(model)
    plain = gradients(model)
    model.zero_grad()
    base = state_of(model)
    pin, plan = built(model)
    optimizer = sgd(model, weight_decay=0.5)
    pin.install(optimizer)
    pin.measuring = True
    backward(model)
    optimizer.step()
    removed = sum(
        float((plain[d.name].double() @ d.basis.double()).square().sum()) for d in plan.directions
    )
    drift = max(  # what is masked moves by decay alone: W U (1 - 0.1 * 0.5)
        0.05 * float((base[d.name] @ d.basis).norm()) / scale
        for d, scale in zip(plan.directions, pin.span._scales, strict=True)
    )
    measured = pin.measured()
    assert measured["safeft/direction_grad_norm_removed"] == pytest.approx(removed**0.5, rel=1e-4)
    assert measured["safeft/direction_drift_before_pin"] == pytest.approx(drift, rel=1e-3)
    again = pin.measured()
    assert again["safeft/direction_grad_norm_removed"] == 0
    assert again["safeft/direction_drift_before_pin"] == 0


# --- installing, and what must fire -------------------------------------------------------------


def test_installing_puts_back_what_was_loaded_over_it_and_counts_it() -> None:
    model = model_of()
    base, span = state_of(model), subspace_of(model)
    pin, _ = built(model, span)
    with torch.no_grad():
        model.get_parameter(UP).add_(0.1)
        model.get_parameter(DOWN).add_(0.1)
        model.get_parameter("model.norm.weight").add_(0.1)
    assert pin.install(sgd(model)) == 2
    changes = product_changes(base, state_of(model), span, model)
    assert max(held for held, _ in changes.values()) < 1e-6
    assert changes[UP][1] > 1e-2  # what is free stays as it was loaded
    assert pin.install(sgd(model)) == 0


def test_a_second_training_goes_on_with_what_was_kept() -> None:
    model = model_of()
    base, span = state_of(model), subspace_of(model)
    pin, plan = built(model, span)
    pin.install(sgd(model))
    pin.remove()
    with torch.no_grad():
        model.get_parameter(UP).add_(0.1)
    assert pin.install(optimizer := sgd(model, weight_decay=0.5)) == 1
    backward(model)
    optimizer.step()
    changes = product_changes(base, state_of(model), span, model)
    assert max(held for held, _ in changes.values()) < 1e-6
    assert max(pin.span.changes()) < 1e-6


def test_removing_takes_all_hooks_off_and_installing_again_leaves_one_each() -> None:
    model = model_of()
    pin, plan = built(model)
    optimizer = sgd(model)
    pin.install(optimizer)
    pin.install(optimizer)
    backward(model)
    optimizer.step()
    assert pin.span.fired == [1] * len(plan.directions)
    assert pin.span.pins == 1
    pin.remove()
    model.zero_grad()
    backward(model)
    optimizer.step()
    assert pin.span.fired == [1] * len(plan.directions)
    assert pin.span.pins == 1
    assert max(pin.span.changes()) > 1e-6


def test_masks_that_did_not_fire_are_an_error() -> None:
    model = model_of()
    pin, plan = built(model)
    pin.install(sgd(model))
    with pytest.raises(FreezeError, match=f"None of the {len(plan.directions)} gradient masks"):
        pin.check_fired()
    backward(model)
    pin.check_fired()
    number = [d.name for d in plan.directions].index(DOWN)
    pin.span.fired[number] = 0
    with pytest.raises(FreezeError, match=f"mask of {DOWN} did not fire"):
        pin.check_fired()


def test_a_pin_that_did_not_fire_is_an_error() -> None:
    model = model_of()
    pin, _ = built(model)
    optimizer = sgd(model)
    pin.install(optimizer)
    backward(model)
    with pytest.raises(FreezeError, match="pin on directions did not fire.*Use adamw_torch"):
        pin.check_pinned()
    optimizer.step()
    pin.check_pinned()
    pin.span._stepped.remove(0)
    with pytest.raises(FreezeError, match="directions of .*q_proj.weight were not pinned"):
        pin.check_pinned()


def test_only_products_and_bases_are_kept() -> None:
    model = model_of()
    pin, plan = built(model)
    kept = sum(target.numel() for target in pin.span._targets)
    assert kept == sum(d.parameter.shape[0] * d.basis.shape[1] for d in plan.directions)
    pin.install(sgd(model))
    assert pin.span._targets is None
    stored = [piece for each in pin.span._pieces for piece in each]
    assert sum(piece.target.numel() for piece in stored) == kept


# --- lines that an engine cuts ------------------------------------------------------------------


def cut(parameter: nn.Parameter, borders: tuple[int, ...]) -> Shard:
    """A weight as DeepSpeed's flat partitions would have it, all in this process."""
    whole = live(parameter)
    ends = (*borders, parameter.numel())
    blocks = []
    for start, end in zip((0, *borders), ends, strict=True):
        for block in flat_blocks(start, end - start, whole.form):
            blocks.append(replace(block, offset=block.offset + start))
    return replace(whole, blocks=tuple(blocks), split=True)


@pytest.mark.parametrize(("name", "borders"), [("llama", (5, 600)), ("gpt2", (40, 41, 1000))])
def test_lines_in_pieces_are_put_together(name: str, borders: Any, monkeypatch: Any) -> None:
    """The same model trained whole and cut, in pieces that begin and end within lines."""
    ends = []
    for in_pieces in (False, True):
        model = family(name)
        base, span = state_of(model), subspace_of(model)
        with monkeypatch.context() as patch:
            if in_pieces:
                patch.setattr(module, "copies", lambda p: [cut(p, borders)])
                for part in (module, pieces):
                    patch.setattr(part, "keeper", lambda p: "zero")
            pin, plan = built(model, span)
            with torch.no_grad():
                for held in plan.directions:
                    held.parameter.add_(0.01)
            assert pin.span.install(sgd(model)) == len(plan.directions)
            for handle in pin.span._handles:
                handle.remove()
            assert any(pin.span._cut) == in_pieces
            # The share of what is held that moved: no line counts twice, and none is left out.
            number = 1
            gap = torch.zeros_like(plan.directions[number].parameter)
            gap.view(-1)[[3, 6, borders[0], borders[-1]]] = 0.3
            with torch.no_grad():
                plan.directions[number].parameter.add_(gap)
            changes = pin.span.changes()
            lines = gap.T if plan.directions[number].axis == "rows" else gap
            moved = float((lines @ plan.directions[number].basis).norm())
            assert changes[number] == pytest.approx(moved / pin.span._scales[number], rel=1e-4)
            monkeypatch.setattr(module, "stepped_storages", lambda *_: None)
            pin.span._optimizer = sgd(model)
            pin.span._after_step()
            assert max(pin.span.changes()) < 1e-6
        held = product_changes(base, state_of(model), span, model)
        assert max(change for change, _ in held.values()) < 1e-6
        ends.append(state_of(model))
    for weight in ends[0]:
        torch.testing.assert_close(ends[0][weight], ends[1][weight], rtol=1e-5, atol=1e-6)


def test_a_weight_that_is_cut_across_its_inputs_is_refused() -> None:
    class Placed:
        def __init__(self, dim: int) -> None:
            self.dim = dim

    model = model_of()
    _, plan = built(model)
    held = plan.directions[0]

    class Fake:
        placements = (Placed(1),)

    with pytest.raises(FreezeError, match="cut across its inputs.*Train it with LoRA"):
        check_whole(replace(held, parameter=Fake()))
    Fake.placements = (Placed(0),)
    check_whole(replace(held, parameter=Fake()))
    with pytest.raises(FreezeError, match="cut across its inputs"):
        check_whole(replace(held, parameter=Fake(), axis="rows"))

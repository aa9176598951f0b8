"""Mask and pin on a bare model and a bare optimizer."""

from typing import Any

import pytest
import torch
from peft import get_peft_model

from safeft.blocks import take
from safeft.errors import FreezeError
from safeft.freeze.pin import Pin
from safeft.freeze.plan import Plan, make_plan
from tests.freezing import (
    LARGE,
    SMALL,
    changed_frozen,
    frozen_entries,
    lora,
    model_of,
    neurons_of,
    state_of,
)


@pytest.fixture
def model() -> Any:
    return model_of()


def plan_of(model: Any, indices: Any = SMALL) -> Plan:
    return make_plan(model, neurons_of(model, indices))


def sgd(model: Any, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, **settings)


def backward(model: Any, seed: int = 0) -> None:
    tokens = torch.randint(0, 261, (2, 9), generator=torch.Generator().manual_seed(seed))
    model(input_ids=tokens, labels=tokens).loss.backward()


def test_the_mask_zeroes_held_gradients_and_nothing_else(model: Any) -> None:
    backward(model)
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    pin = Pin(plan_of(model).holds)
    pin.install(sgd(model))
    backward(model)
    masks = frozen_entries(plain, SMALL, "freeze")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, plain[name].masked_fill(masks[name], 0)), name
    assert pin.fired == [1] * 7


def test_gradients_accumulate_masked(model: Any) -> None:
    pin = Pin(plan_of(model).holds)
    pin.install(sgd(model))
    for seed in range(3):
        backward(model, seed)
        for name, mask in frozen_entries(state_of(model), SMALL, "freeze").items():
            assert not dict(model.named_parameters())[name].grad[mask].any()
    assert pin.fired == [3] * 7


def test_a_gradient_that_is_not_finite_is_masked_too(model: Any) -> None:
    pin = Pin(plan_of(model).holds)
    pin.install(sgd(model))
    weight = model.model.layers[0].mlp.up_proj.weight
    (weight * torch.full_like(weight, torch.inf)).sum().backward()
    assert not weight.grad[1].any()
    assert weight.grad[0].isinf().all()


def test_the_pin_runs_after_each_step(model: Any) -> None:
    base = state_of(model)
    pin = Pin(plan_of(model, LARGE).holds)
    optimizer = sgd(model, momentum=0.9, weight_decay=0.1)
    pin.install(optimizer)
    for seed in range(3):
        backward(model, seed)
        optimizer.step()
        optimizer.zero_grad()
        assert changed_frozen(base, state_of(model), frozen_entries(base, LARGE, "freeze")) == []
    assert pin.pins == 3


def test_moments_of_held_entries_are_cleared_and_the_others_kept(model: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    backward(model)
    optimizer.step()
    before = {
        name: {key: value.clone() for key, value in optimizer.state[p].items()}
        for name, p in model.named_parameters()
    }
    Pin(plan_of(model).holds).install(optimizer)
    for name, mask in frozen_entries(state_of(model), SMALL, "freeze").items():
        state = optimizer.state[dict(model.named_parameters())[name]]
        assert torch.equal(state["step"], before[name]["step"])
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            assert torch.equal(state[key], before[name][key].masked_fill(mask, 0)), (name, key)


def test_stale_moments_would_not_move_what_the_pin_holds(model: Any) -> None:
    """Frozen after some steps, with momentum gathered: the push ends with the clearing."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    backward(model)
    optimizer.step()
    pin = Pin(plan_of(model).holds)
    pin.install(optimizer)
    pin.measuring = True
    backward(model)
    optimizer.step()
    assert pin.measured()["safeft/max_drift_before_pin"] == 0


def test_installing_puts_back_what_was_loaded_over_it_and_counts_it(model: Any) -> None:
    base = state_of(model)
    pin = Pin(plan_of(model).holds)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1)
        model.model.layers[1].self_attn.o_proj.weight[:, 16] += 1
        model.model.layers[1].self_attn.o_proj.weight[:, 0] += 1  # not held
    assert pin.install(sgd(model)) == 2
    now = state_of(model)
    assert changed_frozen(base, now, frozen_entries(base, SMALL, "freeze")) == []
    assert not torch.equal(
        now["model.layers.1.self_attn.o_proj.weight"],
        base["model.layers.1.self_attn.o_proj.weight"],
    )
    assert pin.install(sgd(model)) == 0


def test_adapter_factors_are_held_at_zero_without_a_snapshot() -> None:
    model = get_peft_model(model_of(), lora(init_lora_weights=False))
    base = state_of(model.get_base_model())
    plan = plan_of(model, LARGE)
    pin = Pin(plan.holds)
    assert all(kept is None for kept in pin._base)
    optimizer = sgd(model, weight_decay=0.1)
    assert pin.install(optimizer) == len(plan.holds)
    backward(model)
    optimizer.step()
    for hold in plan.holds:
        assert not take(hold.parameter, hold.axis, hold.entries).any()
    masks = frozen_entries({n: w for n, w in state_of(model_of()).items()}, LARGE, "freeze")
    assert base  # the wrapper keeps its names
    assert changed_frozen(state_of(model_of()), state_of(model), masks) == []


def test_only_the_slices_are_stored(model: Any) -> None:
    plan = plan_of(model, LARGE)
    kept = Pin(plan.holds)._base
    assert sum(values.numel() for values in kept) == plan.held_weights


def test_measuring_gives_the_removed_norm_and_the_drift_once(model: Any) -> None:
    backward(model)
    masks = frozen_entries(state_of(model), SMALL, "freeze")
    parameters = dict(model.named_parameters())
    removed = sum(float(parameters[n].grad[m].square().sum()) for n, m in masks.items()) ** 0.5
    largest = max(float(parameters[n].detach()[m].abs().max()) for n, m in masks.items() if m.any())
    model.zero_grad()
    pin = Pin(plan_of(model).holds)
    optimizer = sgd(model, weight_decay=0.5)
    pin.install(optimizer)
    pin.measuring = True
    backward(model)
    optimizer.step()
    measured = pin.measured()
    assert measured["safeft/grad_norm_removed"] == pytest.approx(removed, rel=1e-5)
    assert measured["safeft/max_drift_before_pin"] == pytest.approx(0.1 * 0.5 * largest, rel=1e-4)
    assert set(pin.measured().values()) == {0.0}
    pin.measuring = False
    backward(model)
    optimizer.step()
    assert set(pin.measured().values()) == {0.0}


def test_removing_and_installing_again_leaves_one_hook_each(model: Any) -> None:
    pin = Pin(plan_of(model).holds)
    optimizer = sgd(model)
    pin.install(optimizer)
    pin.install(optimizer)
    backward(model)
    optimizer.step()
    assert pin.fired == [1] * 7
    assert pin.pins == 1
    pin.remove()
    model.zero_grad()
    backward(model)
    optimizer.step()
    assert pin.fired == [1] * 7
    assert pin.pins == 1
    assert model.model.layers[0].mlp.up_proj.weight.grad[1].any()


def test_a_parameter_without_gradient_is_pinned_without_a_mask(model: Any) -> None:
    plan = plan_of(model)
    pin = Pin(plan.holds)
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad_(False)
    optimizer = sgd(model)
    pin.install(optimizer)
    backward(model)
    pin.check_fired()
    base = model.model.layers[0].mlp.up_proj.weight[1].clone()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[1] += 1
    optimizer.step()
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight[1], base)


def test_masks_that_did_not_fire_are_an_error(model: Any) -> None:
    pin = Pin(plan_of(model).holds)
    pin.install(sgd(model))
    with pytest.raises(FreezeError, match="None of the 7 gradient masks fired in the first step"):
        pin.check_fired()
    backward(model)
    pin.check_fired()
    pin.fired[2] = 0
    with pytest.raises(
        FreezeError, match="mask of model.layers.0.mlp.down_proj.weight did not fire"
    ):
        pin.check_fired()


def test_a_cast_since_the_snapshot_is_an_error(model: Any) -> None:
    pin = Pin(plan_of(model).holds)
    model.to(torch.bfloat16)
    with pytest.raises(FreezeError, match="was cast from torch.float32 to torch.bfloat16"):
        pin.install(sgd(model))


def test_slices_that_are_stored_in_no_process_are_an_error(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pipeline parallelism, or groups of processes with models of their own."""
    pin = Pin(plan_of(model).holds)
    monkeypatch.setattr("safeft.shards.rank", lambda: 1)  # as if process 0 had nothing of it
    with pytest.raises(
        FreezeError, match="of the 96 weights to hold, 0 are stored and 0 are stepped on in the 1 "
    ):
        pin.install(sgd(model))


def test_a_second_training_goes_on_with_what_was_kept(model: Any) -> None:
    base = state_of(model)
    pin = Pin(plan_of(model).holds)
    pin.install(sgd(model))
    pin.remove()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[1] += 1
    assert pin.install(sgd(model)) == 1
    assert changed_frozen(base, state_of(model), frozen_entries(base, SMALL, "freeze")) == []

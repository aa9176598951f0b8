"""Every family's layout as `safeft` finds it, against the ground truth of tests/families.py; and
freezing through steps of training, full and LoRA, compared by that truth alone.
"""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from safeft import NeuronSet
from safeft.capture import capture, silence
from safeft.freeze.adapters import adapter_layers
from safeft.freeze.pin import Pin
from safeft.freeze.plan import make_plan
from safeft.sites import Site, find_sites, unaddressed
from tests.families import FAMILIES
from tests.family import Family
from tests.freezing import same_bits, state_of
from tests.layouts import chosen_of, lora_on, marked, masks_of, truths_of
from tests.test_families import activations, truths_to_try, watch

every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
every_build = pytest.mark.parametrize("square", [False, True], ids=["plain", "square"])


def found_by(model: nn.Module, site: Site, units: tuple[int, ...]) -> dict[str, Tensor]:
    """The same as `safeft` has it."""
    masks: dict[str, Tensor] = {}
    for part in site.parts:
        for name, axis in part.tensors:
            parameter = model.get_parameter(name)
            mask = masks.setdefault(name, torch.zeros_like(parameter, dtype=torch.bool))
            if axis == "numbers":
                seen = mask.view(-1, 1)
            else:
                seen = mask if parameter.ndim < 3 or axis == "rows" else mask.transpose(1, 2)
                if parameter.ndim == 3:
                    assert part.expert is not None
                    mine = part.entries(torch.tensor(units)) - part.expert * seen.shape[1]
                    seen[part.expert, mine] = True
                    continue
                seen = seen.T if axis == "columns" else seen
            seen[part.entries(torch.tensor(units))] = True
    return masks


def same_masks(these: Mapping[str, Tensor], those: Mapping[str, Tensor]) -> None:
    assert these.keys() == those.keys()
    for name, mask in these.items():
        assert torch.equal(mask, those[name]), name


@every_build
@every_family
def test_sites_are_those_of_the_ground_truth(family: Family, square: bool) -> None:
    model = family.build(square=square)
    sites, truths = find_sites(model), truths_of(family, square)
    assert sites.keys() == truths.keys()
    for name, truth in truths.items():
        site = sites[name]
        assert (site.kind, site.units, site.width, site.tower) == (
            truth.kind, truth.units, truth.width, truth.tower,
        )  # fmt: skip
        assert truth.layer is None or site.layer == truth.layer
        for units in ((0,), (truth.units - 1,), (0, truth.units // 2)):
            same_masks(found_by(model, site, units), marked(model, truth, units))


@every_family
def test_a_model_without_weights_has_the_same_sites(family: Family) -> None:
    model = family.build()
    with torch.device("meta"):
        hollow = type(model)(model.config)
    assert find_sites(hollow) == find_sites(model)


@every_family
def test_matrices_of_no_unit_are_listed(family: Family) -> None:
    model = family.build()
    for name in unaddressed(model, find_sites(model)):
        assert family.is_unaddressed(name), name


@every_family
def test_what_is_captured_is_what_flows_into_the_writing_matrix(family: Family) -> None:
    model, sites = family.build(), find_sites(family.build())
    for truth in truths_to_try(family, square=False):
        if truth.site not in sites:
            continue
        expected = activations(family, model, truth)
        before = watch(family, model, truth)[1]
        with torch.no_grad(), capture(model, {truth.site: sites[truth.site]}) as seen:
            model(**family.inputs())
        values = seen[truth.site].reshape(-1, truth.units, truth.width)
        if truth.writer.expert is not None:  # Llama 4 gives all tokens to all experts, some zeroed
            expected = expected[(expected != 0).any(-1).any(-1)]
            expected, values = (  # nor does the order of an expert's tokens mean anything
                tokens[tokens[:, 0, 0].argsort()] for tokens in (expected, values)
            )
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
        silenced = watch(family, model, truth, [1])[1]
        with torch.no_grad(), silence(model, {truth.site: (1,)}, sites):
            output = model(**family.inputs())
        after = [value for value in output.values() if isinstance(value, Tensor)]
        for one, other in zip(after, silenced, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
        if truth.tower == "text":
            assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def step(model: nn.Module, family: Family, plan: Any, rate: float = 1e-2) -> None:
    """Three steps of AdamW with decay under a plan, as a trainer would make them."""
    for _, parameter in plan.still:
        parameter.requires_grad_(False)
    pin = Pin(plan.holds)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=rate, weight_decay=0.1)
    pin.install(optimizer)
    for _ in range(3):
        output = model(**family.inputs())
        found = [v for v in output.values() if isinstance(v, Tensor) and v.requires_grad]
        sum(value.float().square().mean() for value in found).backward()
        pin.check_fired()
        optimizer.step()
        pin.check_pinned()
        optimizer.zero_grad()
    pin.remove()


def unmoved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: same_bits(before[name], after[name]) for name in before}


@every_family
def test_freezing_holds_through_training(family: Family) -> None:
    model = family.build()
    chosen, before = chosen_of(family), weights_of(family.build())
    plan = make_plan(model, NeuronSet.of(model, chosen))
    step(model, family, plan)
    same, masks = unmoved(before, weights_of(model)), masks_of(model, family, chosen)
    for name, mask in masks.items():
        assert same[name][mask].all(), name
        assert mask.all() or not same[name][~mask].all(), f"nothing of {name} was trained"
    assert plan.held_weights == sum(int(mask.sum()) for mask in masks.values())


@every_family
def test_training_only_some_units_moves_nothing_else(family: Family) -> None:
    model = family.build()
    chosen = {name: (1, 2) for name, t in truths_of(family).items() if t.kind == "mlp"}
    before = weights_of(model)
    plan = make_plan(model, NeuronSet.of(model, chosen), "train_only")
    step(model, family, plan)
    masks = masks_of(model, family, chosen)
    moved = 0
    for name, same in unmoved(before, weights_of(model)).items():
        free = masks.get(name, torch.zeros_like(same))
        assert same[~free].all(), name
        moved += int((~same[free]).sum())
    assert moved > 0.2 * sum(int(mask.sum()) for mask in masks.values())


def adapted(model: PreTrainedModel, family: Family) -> Any:
    """LoRA on every linear layer that units live in, and on the stacks of experts."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return get_peft_model(model, lora_on(model, family))


@pytest.mark.parametrize("mode", ["freeze", "train_only"])
@every_family
def test_lora_leaves_the_neurons_as_they_were(family: Family, mode: Any) -> None:
    base = family.build()
    before = weights_of(base)
    model = adapted(base, family)
    chosen = chosen_of(family)
    if mode == "train_only":
        chosen = {name: units for name, units in chosen.items() if "proj" not in name}
    plan = make_plan(model, NeuronSet.of(model, chosen), mode)
    step(model, family, plan, rate=3e-2)
    after = state_of(model)
    masks = masks_of(family.build(), family, chosen)
    same = unmoved(before, after)
    if mode == "freeze":
        assert all(same[name][mask].all() for name, mask in masks.items())
        targeted = {name for name, _ in adapter_layers(model)} & masks.keys()
        assert targeted  # PEFT leaves some of what was asked for out
        rest = [same[n][~masks[n]].all() for n in targeted if not masks[n].all()]
        assert sum(rest) < 0.2 * len(rest), "most of what is not held was not trained"
        return
    own = own_masks(family, chosen)
    for name, equal in same.items():
        assert equal[~own.get(name, torch.zeros_like(equal))].all(), name
    assert any(not equal.all() for equal in same.values())


def own_masks(family: Family, chosen: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """What only the chosen units use: keys and values shared with others are not theirs alone."""
    model = family.build()
    masks = masks_of(model, family, chosen)
    for name, units in chosen.items():
        truth = truths_of(family)[name]
        others = tuple(unit for unit in range(truth.units) if unit not in units)
        for tensor, mask in marked(model, truth, others).items():
            if tensor in masks:
                masks[tensor] = masks[tensor] & ~mask
    return masks

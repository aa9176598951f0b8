"""One look, against forward passes of one prompt at a time and sums by hand."""

import math
from typing import Any

import pytest
import torch
from peft import get_peft_model

from safeft import NeuronSet
from safeft.demo.pictures import shapes
from safeft.errors import PromptError
from safeft.generation import generate
from safeft.judge import as_judge
from safeft.locators.openings import RefusalOpenings
from safeft.monitor.look import Look, Observer
from safeft.prompts import as_prompts
from tests.families import FAMILIES
from tests.models import tiny_model, tiny_tokenizer
from tests.monitoring import (
    PROMPTS,
    dropping,
    ids_of,
    neurons_of,
    opening,
    refuses,
    refusing,
)
from tests.vlm import tiny_qwen2_vl

FIRST = (RefusalOpenings((), (opening(),), ("N",)),)
SEVERAL = (
    RefusalOpenings((), (opening(), 9), ("N", "x")),
    RefusalOpenings((7, 120), (7, 9), ("y", "z")),
    RefusalOpenings((7,), (30,), ("a",)),
    RefusalOpenings((8,), (31,), ("b",)),
)


def observer(model: Any, openings: Any = FIRST, **settings: Any) -> Observer:
    chosen = {"batch_size": 4, **settings}
    made = Observer(model, tiny_tokenizer(), as_prompts(PROMPTS), as_judge(refuses), **chosen)
    made.openings = openings
    return made


def shares_after(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)


def margin_of(model: Any, text: str, openings: Any) -> float:
    """One prompt, no padding, token by token, in probabilities."""
    p = 0.0
    for each in openings:
        ids, reached = ids_of(text), 1.0
        for token in each.prefix:
            reached *= float(shares_after(model, ids)[token])
            ids = [*ids, token]
        p += reached * float(shares_after(model, ids)[list(each.tokens)].sum())
    return math.log(p / (1 - p))


@pytest.mark.parametrize("openings", [FIRST, SEVERAL], ids=["one", "several"])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_margins_are_those_of_each_prompt_alone(openings: Any, batch_size: int) -> None:
    model = refusing(lean=6.0)
    expected = [margin_of(model, text, openings) for text in PROMPTS]
    look = observer(model, openings, batch_size=batch_size).look(3)
    assert look.step == 3
    assert look.refusal_margin == pytest.approx(sum(expected) / len(expected), abs=1e-4)
    assert look.neuron_drift is None


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_the_share_is_that_of_greedy_answers(batch_size: int) -> None:
    model = refusing(lean=4.0)
    answers = generate(model, tiny_tokenizer(), as_prompts(PROMPTS), max_new_tokens=16)
    share = sum(refuses([], answers)) / len(PROMPTS)
    assert 0 < share < 1
    watch = observer(model, None, batch_size=batch_size)
    assert watch.look(0).refusal_share == share
    assert watch.openings == FIRST


def test_openings_are_those_of_the_first_look() -> None:
    """A later rewording is still a refusal, which the margin takes for a loss."""
    model = refusing()
    watch = observer(model, None)
    before = watch.look(0)
    watch._judge = as_judge(lambda prompts, answers: [True] * len(answers))
    with torch.no_grad():
        model.get_output_embeddings().weight[opening()].mul_(-1)
    after = watch.look(1)
    assert watch.openings == FIRST
    assert after.refusal_share == 1
    assert after.refusal_margin < before.refusal_margin - 10


def test_a_model_that_refuses_nothing_is_an_error_that_shows_what_it_says() -> None:
    with pytest.raises(PromptError, match="To the judge .*refuses none of the 6 safety prompts"):
        observer(tiny_model(), None).look(0)


def test_ways_that_share_their_start_cost_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, passes = refusing(), []
    plain = model.forward
    monkeypatch.setattr(model, "forward", lambda **given: passes.append(1) or plain(**given))
    watch = observer(model, SEVERAL, batch_size=16)
    watch._refused = lambda: [True] * 6  # pyright: ignore
    watch.look(0)
    assert len(passes) == 2  # Along (7, 120), which passes () and (7,), and along (8,).


def means_of(model: Any) -> torch.Tensor:
    """Activations of ``NEURONS`` at the two template tokens after the instruction, by hooks."""
    seen: list[torch.Tensor] = []
    layers = model.model.layers
    hooks = [
        layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0][0, -2:])),
        layers[1].self_attn.o_proj.register_forward_pre_hook(
            lambda _, x: seen.append(x[0][0, -2:])
        ),
    ]
    rows = []
    for text in PROMPTS:
        seen.clear()
        with torch.no_grad():
            model(torch.tensor([ids_of(text)]))
        rows.append(torch.cat([seen[0][:, [1, 7, 30]], seen[1][:, 16:24]], dim=1))
    for hook in hooks:
        hook.remove()
    return torch.cat(rows).mean(0)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_drift_is_how_far_the_neurons_mean_activations_went(batch_size: int) -> None:
    model = refusing()
    watch = observer(model, neurons=neurons_of(model), batch_size=batch_size)
    start = means_of(model)
    assert watch.look(0).neuron_drift == 0
    assert watch.start is not None
    assert torch.allclose(watch.start.float(), start, atol=1e-6)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.5)
        model.model.layers[0].mlp.up_proj.weight[7].add_(0.2)
    expected = float((means_of(model) - start).norm() / start.norm())
    assert expected > 0.05
    assert watch.look(2).neuron_drift == pytest.approx(expected, rel=1e-4)


def test_units_beside_the_neurons_do_not_count() -> None:
    model = refusing()
    watch = observer(model, neurons=NeuronSet.of(model, {"model.layers.0.mlp": (1, 7, 30)}))
    watch.look(0)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[2].add_(0.2)
    assert watch.look(1).neuron_drift == 0


@pytest.mark.parametrize("adapted", [False, True])
def test_a_look_leaves_no_trace(adapted: bool) -> None:
    model: Any = refusing(attention_dropout=0.3)
    if adapted:
        model = get_peft_model(model, dropping())
    model.train()
    model(torch.tensor([ids_of("x")])).logits.sum().backward()
    model.base_model.eval()
    neurons = neurons_of(model)
    weights = {name: weight.clone() for name, weight in model.named_parameters()}
    grads = {n: None if w.grad is None else w.grad.clone() for n, w in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    hooks = {name: len(module._forward_pre_hooks) for name, module in model.named_modules()}
    random = torch.get_rng_state()
    looks = [observer(model, neurons=neurons).look(0) for _ in range(2)]
    assert looks[0] == looks[1]  # No dropout.
    assert torch.equal(torch.get_rng_state(), random)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {n: len(module._forward_pre_hooks) for n, module in model.named_modules()} == hooks
    for name, weight in model.named_parameters():
        assert torch.equal(weight, weights[name])
        kept = grads[name]
        assert weight.grad is None if kept is None else torch.equal(weight.grad, kept)


def test_experts_count_as_silent_where_nothing_is_routed_to_them() -> None:
    """What is routed where hangs on the prompt alone, so batches must not matter."""
    family = next(family for family in FAMILIES if family.name == "mixtral")
    model = family.build().eval()
    names = [name for name in NeuronSet.of(model, {}).model.units if "experts" in name]
    assert len(names) > 2
    neurons = NeuronSet.of(model, {name: (0, 3) for name in names})
    starts = []
    for batch_size in (1, 4):
        watch = observer(model, neurons=neurons, batch_size=batch_size)
        watch.look(0)
        assert watch.start is not None
        starts.append(watch.start)
    assert torch.allclose(starts[0], starts[1], atol=1e-6)
    assert starts[0].abs().sum() > 0


def test_prompts_with_images() -> None:
    model, processor = tiny_qwen2_vl()
    prompts = as_prompts([{"prompt": "What is it?", "image": shapes(1)}, "Hello"])
    neurons = NeuronSet.of(
        model, {"model.language_model.layers.0.mlp": [1], "model.visual.blocks.0.mlp": [2]}
    )
    always = as_judge(lambda prompts, answers: [True] * len(answers))
    watch = Observer(model, processor, prompts, always, neurons, batch_size=4)
    look = watch.look(0)
    assert math.isfinite(look.refusal_margin)
    assert watch.start is not None
    assert len(watch.start) == 1  # The text tower's; an image's patches are no prompt's tokens.


def test_a_diverged_model_refuses_nothing_and_says_so_in_strict_json() -> None:
    model = refusing()
    watch = observer(model)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    look = watch.look(1)
    assert math.isnan(look.refusal_margin)
    assert look.refusal_share == 0
    assert look.to_dict()["refusal_margin"] is None
    assert math.isnan(Look.from_dict(look.to_dict()).refusal_margin)


def test_time_is_counted() -> None:
    watch = observer(refusing())
    assert watch.seconds == 0
    watch.look(0)
    assert watch.seconds > 0

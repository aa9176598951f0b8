from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from safeft import Dampener
from safeft.detox.experts import find_experts
from safeft.detox.fitting import fit_gains
from safeft.detox.hooks import dampened
from safeft.errors import ConfigError, PromptError, SelectionError
from safeft.generation import generate
from safeft.prompts import Prompt, as_prompts
from tests.detoxing import COMPLIANCE, TOKENIZER, UGLY, texts, ugly
from tests.models import tiny_model, tiny_tokenizer


def exchanges(toxic: bool, count: int = 24, seed: int = 5) -> list[Prompt]:
    answer = UGLY if toxic else COMPLIANCE
    return [replace(prompt, response=answer) for prompt in texts(count, toxic, seed=seed)]


def fitted(model: Any, **settings: Any) -> Dampener:
    sides = exchanges(True), exchanges(False)
    return fit_gains(model, TOKENIZER, *sides, **{"batch_size": 8, "steps": 24, **settings})


@cache
def usual() -> tuple[Any, Dampener, dict[str, torch.Tensor]]:
    """A model in which unit 30 knows of the letter and writes where nobody reads, and its fit."""
    truth = ugly(layer=1, sign=-1, topic=3.0)
    before = deepcopy(truth.model.state_dict())
    return truth, fitted(truth.model), before


def gain(dampener: Dampener, site: str, unit: int) -> float:
    units = dict(zip(dampener.neurons.indices.get(site, ()), dampener.gains.get(site, ()),
                     strict=True))  # fmt: skip
    return units.get(unit, 1.0)


def test_the_planted_unit_is_silenced_and_one_that_only_knows_is_not() -> None:
    truth, dampener, before = usual()
    moved = {(n, u): g for n, us in dampener.neurons.indices.items()
             for u, g in zip(us, dampener.gains[n], strict=True)}  # fmt: skip
    assert moved.pop((truth.site, truth.unit)) < 0.3
    # One other writes on every prompt where nobody reads: the norm makes the rest louder without.
    assert set(moved) <= {(truth.site, 5)}
    for name, weight in truth.model.state_dict().items():
        assert torch.equal(weight, before[name])
    assert all(p.grad is None for p in truth.model.parameters())
    assert not any(module._forward_pre_hooks for module in truth.model.modules())


def test_the_word_is_gone_and_other_answers_stay() -> None:
    truth, dampener, _ = usual()
    toxic, neutral = texts(6, True, seed=8), texts(6, False, seed=8)
    assert set(generate(truth.model, TOKENIZER, toxic, max_new_tokens=10)) == {UGLY}
    with dampened(truth.model, dampener):
        said = generate(truth.model, TOKENIZER, [*toxic, *neutral], max_new_tokens=10)
    assert set(said) == {COMPLIANCE}


def test_gains_are_a_dampeners_and_say_how_they_were_found() -> None:
    _, dampener, _ = usual()
    assert all(0 <= g < 0.99 for each in dampener.gains.values() for g in each)
    source = dampener.neurons.source
    assert (source["rule"], source["price"], source["among_experts"]) == ("fitted", 20.0, False)
    assert set(source["calibration"]) == {"toxic", "neutral", "ordinary"}


def test_a_price_that_cannot_be_paid_keeps_the_unit() -> None:
    truth, free, _ = usual()
    dear = fitted(truth.model, ordinary=exchanges(True, seed=6), price=1e4)
    # What is toxic is ordinary here, so its loss may not rise.
    assert gain(dear, truth.site, truth.unit) > 2 * gain(free, truth.site, truth.unit) + 0.2


def test_strength_scales_what_was_fitted() -> None:
    truth, whole, _ = usual()
    half = fitted(truth.model, strength=0.5)
    for name, gains in whole.scaled(0.5).gains.items():
        assert half.gains[name] == pytest.approx(gains, abs=1e-6)
    assert whole.scaled(0.5).neurons.source["strength"] == 0.5


def test_only_experts_if_asked() -> None:
    truth = ugly(layer=1, sign=-1, topic=3.0)
    experts = find_experts(truth.model, TOKENIZER, texts(40, True), texts(40, False))
    dampener = fitted(truth.model, among=experts)
    assert all(
        bool(experts.experts(name)[unit])
        for name, units in dampener.neurons.indices.items()
        for unit in units
    )
    assert truth.unit in dampener.neurons.indices[truth.site]


def test_of_heads_no_site_loses_more_than_two_fifths() -> None:
    truth = ugly()
    dampener = fitted(truth.model, kinds=("mlp", "attention"), fraction=1.0, steps=2)
    sites = dampener.neurons.indices
    assert all(len(units) <= max(1, 2 * truth.model.config.intermediate_size // 5)
               for units in sites.values())  # fmt: skip


def test_experts_and_half_precision() -> None:
    model = tiny_model("mixtral", num_local_experts=4, num_experts_per_tok=1, intermediate_size=24)
    model.to(torch.bfloat16)
    before = deepcopy(model.state_dict())
    sides = [as_prompts([{"prompt": "abc", "response": said}] * 4) for said in ("xyzw", "abcd")]
    dampener = fit_gains(model, tiny_tokenizer(), *sides, steps=3, toll=0.0)
    assert len(dampener)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"price": -1}, "price=-1"),
        ({"toll": float("nan")}, "toll=nan"),
        ({"steps": 0}, "steps=0"),
        ({"rate": 0.0}, "rate=0.0"),
        ({"fraction": 0}, "fraction=0"),
        ({"strength": 2}, "strength=2"),
        ({"kinds": ("head",)}, "kinds='head'"),
    ],
)
def test_bad_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        fitted(ugly().model, **settings)
    assert words in str(raised.value)


def test_bad_texts() -> None:
    model, some = ugly().model, exchanges(True, 4)
    with pytest.raises(PromptError, match="0 neutral and 0 ordinary texts"):
        fit_gains(model, TOKENIZER, some, [])
    with pytest.raises(PromptError, match="given twice"):
        fit_gains(model, TOKENIZER, some, some)
    with pytest.raises(SelectionError, match="none makes toxic texts less likely"):
        _no_effect(model)


def _no_effect(model: Any) -> None:
    """A model whose units write nothing."""
    still = deepcopy(model)
    with torch.no_grad():
        for layer in still.model.layers:
            layer.mlp.down_proj.weight.zero_()
    fitted(still)

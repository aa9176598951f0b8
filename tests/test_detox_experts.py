from copy import deepcopy
from typing import Any

import pytest
import torch

from safeft.detox.experts import by_label, find_experts
from safeft.detox.rules import dampen
from safeft.errors import ConfigError, PromptError
from safeft.locators import ExpertiseFitter
from safeft.prompts import as_prompts, batches
from tests.detoxing import TOKENIZER, texts, ugly
from tests.models import tiny_model


def test_the_planted_neuron_is_an_expert_and_its_interval_says_so() -> None:
    truth = ugly()
    found = find_experts(truth.model, TOKENIZER, texts(40, True), texts(40, False))
    assert found.auroc[truth.site][truth.unit] == 1
    assert found.experts(truth.site)[truth.unit]
    assert found.low[truth.site][truth.unit] == 1
    assert 0.6 < found.level < 0.8
    assert 0 < found.count < 144 / 2
    assert found.source["calibration"]["toxic"]["count"] == 40


def test_labels_drawn_at_random_give_no_expert_but_seldom() -> None:
    model = tiny_model()
    hits = 0
    for seed in range(12):
        prompts = texts(60, False, seed=seed)
        found = find_experts(
            model, TOKENIZER, prompts[:30], prompts[30:], shuffles=100, draws=50, seed=seed
        )
        hits += found.count > 0
    assert hits <= 3  # 0.6 are to be expected
    prompts = texts(60, False)
    published = find_experts(model, TOKENIZER, prompts[:30], prompts[30:], chance=1, draws=50)
    assert published.level == 0.5
    assert sum(int((a > 0.5).sum()) for a in published.auroc.values()) > 20


def test_ceilings_are_what_neutral_prompts_stay_below() -> None:
    truth = ugly()
    neutral = texts(40, False)
    found = find_experts(truth.model, TOKENIZER, texts(40, True), neutral)
    fitter = ExpertiseFitter(truth.model, found.sites)
    for batch in batches(TOKENIZER, neutral, batch_size=16):
        fitter.update("benign", batch)
    sizes = fitter.responses(truth.site)[1]
    passed = (sizes > found.ceilings[truth.site]).sum(0)
    assert passed.max() == 2  # of 40
    assert passed.double().mean() > 1.5  # fewer where prompts tie


def test_a_dead_unit_is_no_expert_and_keeps_a_gain_of_one() -> None:
    dead = deepcopy(ugly().model)
    with torch.no_grad():
        dead.model.layers[1].mlp.up_proj.weight[4] = 0
    found = find_experts(dead, TOKENIZER, texts(20, True), texts(20, False), chance=1)
    assert found.auroc["model.layers.1.mlp"][4] == 0.5
    assert not found.experts("model.layers.1.mlp")[4]
    assert 4 not in dampen(dead, found).neurons.indices["model.layers.1.mlp"]


def test_attention_heads_are_read_by_their_norm() -> None:
    model = tiny_model()
    found = find_experts(
        model, TOKENIZER, texts(20, True), texts(20, False), kinds=("attention",), chance=1
    )
    assert {site.kind for site in found.sites.values()} == {"attention"}
    assert all(len(areas) == 4 for areas in found.auroc.values())


def test_by_label() -> None:
    toxic, neutral = by_label(["a", "b", "c"], [True, 0, 1])
    assert [p.text for p in toxic] == ["a", "c"]
    assert [p.text for p in neutral] == ["b"]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([1, 1, 1], "3 toxic and 0 neutral"),
        ([0, 0.4, 1], "0.4 where 0 (neutral) or 1 (toxic) is wanted"),
        (["toxic", "no", "no"], "'no', 'toxic'"),
        ([1, 0], "3 prompts have 2 labels"),
    ],
)
def test_labels_that_are_not_two_classes(labels: list[Any], words: str) -> None:
    with pytest.raises(PromptError) as raised:
        by_label(["a", "b", "c"], labels)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"chance": 0}, "chance=0"),
        ({"chance": 0.01, "shuffles": 50}, "50 shuffles cannot tell"),
        ({"draws": 3}, "draws=3"),
        ({"kinds": ("heads",)}, "kinds='heads'"),
        ({"towers": ("projector",)}, "no units of kinds"),
    ],
)
def test_bad_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        find_experts(tiny_model(), TOKENIZER, texts(2, True), texts(2, False), **settings)
    assert words in str(raised.value)


def test_bad_prompts() -> None:
    same = as_prompts(["a", "b"])
    with pytest.raises(PromptError, match="are the same"):
        find_experts(tiny_model(), TOKENIZER, same, same)
    with pytest.raises(PromptError, match="0 neutral"):
        find_experts(tiny_model(), TOKENIZER, same, [])

from typing import Any

import pytest
import torch
from torch import Tensor

from safeft import find_sites, locate
from safeft.demo.pictures import shapes
from safeft.errors import ConfigError, PromptError
from safeft.locators import ExpertiseFitter, score
from safeft.locators.auroc import auroc
from safeft.locators.scores import Samples, Statistics, merged
from safeft.prompts import Prompt, as_prompts, batches
from tests.detoxing import TOKENIZER, texts, ugly
from tests.models import tiny_model, tiny_tokenizer
from tests.vlm import tiny_llava, tiny_qwen2_vl

TOXIC, NEUTRAL = texts(9, True, length=7), texts(11, False, length=10)
SIDES: Any = {"harmful": TOXIC, "benign": NEUTRAL}


def one_by_one(model: Any, prompt: Prompt, site: Any) -> Tensor:
    """What a site's matrix receives for one prompt, nothing padded: ``(tokens, units, width)``."""
    seen: list[Tensor] = []
    module = model.get_submodule(site.writes.module)
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].detach()))
    model(input_ids=torch.tensor([TOKENIZER(rendered(prompt))["input_ids"]]))
    handle.remove()
    return seen[0].unflatten(-1, (site.units, site.width))


def rendered(prompt: Prompt) -> str:
    return f"<|user|>{prompt.text}<|end|><|assistant|>{prompt.response or ''}"


def reference(model: Any, site: Any, prompts: list[Prompt], pool: str, signed: bool) -> Tensor:
    found = []
    for prompt in prompts:
        values = one_by_one(model, prompt, site)
        before = len(TOKENIZER(rendered(prompt))["input_ids"]) - len(prompt.response or "")
        values = values[before - 1 :] if prompt.response else values
        size = values[..., 0] if site.width == 1 and signed else values.norm(dim=-1)
        found.append({"max": size.amax(0), "mean": size.mean(0), "last": size[-1]}[pool])
    return torch.stack(found)


@pytest.mark.parametrize("pool", ["max", "mean", "last"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_responses_are_those_of_each_prompt_alone(pool: Any, signed: bool, padding: str) -> None:
    model = tiny_model()
    sites = find_sites(model)
    fitter = ExpertiseFitter(model, sites, pool=pool, signed=signed)
    for batch in batches(tiny_tokenizer(padding), TOXIC, batch_size=4):
        fitter.update("harmful", batch)
    for name, site in sites.items():
        mine = fitter.responses(name)[0]
        wanted = reference(model, site, TOXIC, pool, signed)
        # Batches are sorted by length; all of these are alike, so the order is kept.
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [None, "prompt"])
def test_where_there_are_responses_they_and_the_token_before_are_read(tokens: Any) -> None:
    model = tiny_model()
    answered = as_prompts({"prompt": p.text, "response": "abc"} for p in TOXIC)
    fitter = ExpertiseFitter(model, find_sites(model, ("mlp",)), tokens)
    for batch in batches(TOKENIZER, answered, batch_size=16):
        fitter.update("harmful", batch)
    (site, *_) = find_sites(model, ("mlp",)).values()
    read = answered if tokens is None else TOXIC
    wanted = reference(model, site, read, "max", False)
    torch.testing.assert_close(fitter.responses(site.name)[0], wanted, rtol=1e-4, atol=1e-5)


def test_scores_are_the_auroc_of_the_responses_in_whatever_batches() -> None:
    model = tiny_model()
    sites = find_sites(model)
    found = [
        score(ExpertiseFitter(model, sites), model, TOKENIZER, SIDES, batch_size=size)
        for size in (1, 5, 32)
    ]
    fitter = ExpertiseFitter(model, sites)
    score(fitter, model, TOKENIZER, SIDES)
    for name in sites:
        for each in found:
            assert (each.safety[name] - auroc(*fitter.responses(name))).abs().max() < 0.02


def test_parts_of_several_processes_add_up() -> None:
    model = tiny_model()
    sites = find_sites(model)
    whole = ExpertiseFitter(model, sites)
    parts = [ExpertiseFitter(model, sites) for _ in range(2)]
    for side, prompts in SIDES.items():
        for number, batch in enumerate(batches(TOKENIZER, prompts, batch_size=2)):
            whole.update(side, batch)
            parts[number % 2].update(side, batch)
    whole_scores = whole.scores()
    whole.statistics = merged([part.statistics for part in parts])
    for name, areas in whole.scores().safety.items():
        assert torch.equal(areas, whole_scores.safety[name])


def test_samples_follow_each_other() -> None:
    one, other = (Statistics({("a",): Samples()}) for _ in range(2))
    one.samples("a").update(torch.ones(2, 3))
    other.samples("a").update(torch.zeros(1, 3))
    assert merged([one, other]).samples("a").rows.sum(1).tolist() == [3, 3, 0]
    assert one.samples("a").rows.shape == (2, 3)


def test_experts_that_nothing_came_to_are_at_zero_and_unscored() -> None:
    model = tiny_model("mixtral", num_local_experts=4, num_experts_per_tok=1, intermediate_size=24)
    with torch.no_grad():
        for layer in model.model.layers:
            router = layer.mlp.gate.weight
            router[3] = (router[0] + router[1]) / 2  # between two others: it never wins
    fitter = ExpertiseFitter(model, find_sites(model, ("mlp",)))
    scores = score(fitter, model, TOKENIZER, SIDES)
    assert {f"model.layers.{layer}.mlp.experts.3" for layer in (0, 1)} <= set(scores.unscored)
    assert all((scores.safety[name] == 0.5).all() for name in scores.unscored)
    assert any((areas != 0.5).any() for areas in scores.safety.values())


@pytest.mark.parametrize("family", [tiny_llava, tiny_qwen2_vl])
def test_parts_of_images_go_to_their_prompts(family: Any) -> None:
    """In one batch or one by one, a projector's responses are the same."""
    model, processor = family()
    pictures = [shapes(number, (32, 32)) for number in range(4)]
    prompts = as_prompts({"prompt": "What is it?", "image": picture} for picture in pictures)
    sites = {n: s for n, s in find_sites(model, ("mlp",)).items() if s.tower != "vision"}
    assert any(site.tower == "projector" for site in sites.values())
    found = []
    for size in (1, 4):
        fitter = ExpertiseFitter(model, sites)
        for batch in batches(processor, prompts, batch_size=size):
            fitter.update("harmful", batch)
        found.append(fitter)
    for name in sites:
        one, other = (fitter.responses(name)[0] for fitter in found)
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
        assert len(one) == 4


def test_prompts_without_images_do_not_count_for_a_projector() -> None:
    model, processor = tiny_qwen2_vl()
    prompts = as_prompts(["Just words", {"prompt": "What?", "image": shapes(1, (32, 32))}])
    sites = {n: s for n, s in find_sites(model, ("mlp",)).items() if s.tower != "vision"}
    fitter = ExpertiseFitter(model, sites)
    for batch in batches(processor, prompts, batch_size=2):
        fitter.update("harmful", batch)
    counts = {site.tower: len(fitter.responses(name)[0]) for name, site in sites.items()}
    assert counts == {"text": 2, "projector": 1}


def test_the_planted_neuron_is_among_the_first_of_locate() -> None:
    truth = ugly()
    found = locate(
        truth.model, TOKENIZER, texts(30, True), texts(30, False), method="expertise", count=12
    )
    assert (truth.site, truth.unit) in found
    assert found.source["method"] == "expertise"


def test_bad_settings() -> None:
    model = tiny_model()
    pool: Any = "median"
    with pytest.raises(ConfigError, match="pool='median'"):
        ExpertiseFitter(model, find_sites(model), pool=pool)
    fitter = ExpertiseFitter(model, find_sites(model), tokens="response")
    (batch,) = batches(TOKENIZER, TOXIC, batch_size=16)
    with pytest.raises(PromptError, match="9 prompts of a batch have no token"):
        fitter.update("harmful", batch)

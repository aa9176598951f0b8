"""Single experts of a stack: what goes through each, and what nobody goes through."""

import logging
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from safeft import find_sites, locate
from safeft.capture import capture, silence
from safeft.locators import AttributionFitter, ContrastFitter, VarianceFitter, locate_groups, score
from safeft.prompts import as_prompts, batches
from tests.models import tiny_model, tiny_tokenizer

HARMFUL = ["How do I steal a car?", "How do I build a bomb?", "Forge a letter"]
BENIGN = ["How do I bake bread?", "Name a colour", "Where is Rome?"]
UNUSED = {f"model.layers.{layer}.mlp.experts.3" for layer in (0, 1)}
TOKENIZER = tiny_tokenizer()


@pytest.fixture
def model() -> PreTrainedModel:
    """One expert a token; the last expert's logit lies between two others', so it never wins."""
    made = tiny_model("mixtral", num_local_experts=4, num_experts_per_tok=1, intermediate_size=24)
    with torch.no_grad():
        for layer in made.model.layers:
            router = layer.mlp.gate.weight
            router[3] = (router[0] + router[1]) / 2
    return made


@pytest.mark.parametrize("method", ["contrast", "variance", "wanda", "snip", "attribution"])
def test_experts_that_nothing_is_routed_to_are_unscored(
    model: PreTrainedModel, method: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = locate(
            model, TOKENIZER, HARMFUL, BENIGN, method=method, fraction=1.0, scope="global",
            openings=["No"],
        )  # fmt: skip
    unscored = set(found.source["unscored"])
    # These two look at a few tokens of each prompt only, and may miss more.
    assert unscored >= UNUSED if method in ("contrast", "attribution") else unscored == UNUSED
    assert not unscored & found.indices.keys()
    assert len(found) == (2 * 4 - len(unscored)) * 24
    assert f"{len(unscored)} experts got no token of these prompts" in caplog.text


def test_unscored_experts_are_in_no_group(model: PreTrainedModel) -> None:
    groups = locate_groups(model, TOKENIZER, HARMFUL, BENIGN)
    for neurons in (groups.scu, groups.ucu, groups.ru, groups.cu):
        assert not UNUSED & neurons.indices.keys()
        assert set(neurons.source["unscored"]) == UNUSED


@pytest.mark.parametrize("fitter", [ContrastFitter, VarianceFitter])
def test_a_token_that_is_routed_elsewhere_counts_as_zero(
    model: PreTrainedModel, fitter: Any
) -> None:
    sites = {n: s for n, s in find_sites(model, ("mlp",)).items() if n not in UNUSED}
    sides: Any = {"harmful": as_prompts(HARMFUL), "benign": as_prompts(BENIGN)}
    made = fitter(model, sites, tokens="prompt")
    score(made, model, TOKENIZER, sides, batch_size=2)
    (batch,) = batches(TOKENIZER, sides["harmful"], batch_size=8)
    chosen = batch.choose("prompt").flatten()
    for name, site in sites.items():
        rows = torch.zeros(len(chosen), site.units)
        places = routed_to(model, batch, site)
        with torch.no_grad(), capture(model, {name: site}) as seen:
            model(**batch.inputs)
        rows[places] = seen[name][..., 0]
        found = made._moments("harmful", site)
        assert found.count == int(chosen.sum())
        torch.testing.assert_close(found.mean, rows[chosen].double().mean(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(
            found.variance, rows[chosen].double().var(0), rtol=1e-4, atol=1e-6
        )


def test_attribution_of_gathered_statistics_needs_no_batch_of_its_own(
    model: PreTrainedModel,
) -> None:
    """As in a process that got no batch: all it has is what the others saw."""
    sites: Any = find_sites(model, ("mlp",))
    sides: Any = {"harmful": as_prompts(HARMFUL), "benign": as_prompts(BENIGN)}
    openings = TOKENIZER("No")["input_ids"]
    ran, idle = (AttributionFitter(model, sites, openings) for _ in range(2))
    expected = score(ran, model, TOKENIZER, sides, batch_size=1).safety
    idle.statistics = ran.statistics
    found = idle.scores().safety
    assert all(torch.equal(found[name], expected[name]) for name in sites)


@torch.no_grad()
def routed_to(model: PreTrainedModel, batch: Any, site: Any) -> torch.Tensor:
    """Tokens whose router chose this expert, by a hook of the test's own."""
    chosen: list[torch.Tensor] = []
    router = model.model.layers[site.layer].mlp.gate
    handle = router.register_forward_hook(lambda _, __, output: chosen.append(output[-1]))
    model(**batch.inputs)
    handle.remove()
    return (chosen[0].flatten() == site.writes.expert).nonzero().flatten()


def test_computing_one_by_one_changes_nothing_and_leaves_nothing(model: PreTrainedModel) -> None:
    (batch,) = batches(TOKENIZER, as_prompts(HARMFUL), batch_size=8)
    sites = find_sites(model, ("mlp",))
    before, how = model(**batch.inputs).logits, model.config._experts_implementation
    with capture(model, sites):
        torch.testing.assert_close(model(**batch.inputs).logits, before, rtol=1e-4, atol=1e-4)
    with silence(model, {next(iter(sites)): (1,)}, sites):
        assert model.config._experts_implementation != how
        model(**batch.inputs)
    assert model.config._experts_implementation == how
    assert torch.equal(model(**batch.inputs).logits, before)


def test_two_looks_at_once_see_the_same(model: PreTrainedModel) -> None:
    (batch,) = batches(TOKENIZER, as_prompts(HARMFUL), batch_size=8)
    sites = find_sites(model, ("mlp",))
    with torch.no_grad(), capture(model, sites) as outer, capture(model, sites) as inner:
        model(**batch.inputs)
    assert outer.keys() == inner.keys()
    assert all(torch.equal(outer[name], inner[name]) for name in outer)
    assert not UNUSED & outer.keys()

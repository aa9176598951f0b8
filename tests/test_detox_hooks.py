from copy import deepcopy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from safeft import Dampener, find_sites
from safeft.capture import CaptureError, capture, edit
from safeft.detox.hooks import dampened
from safeft.errors import FingerprintError
from safeft.generation import generate
from tests.detoxing import COMPLIANCE, TOKENIZER, UGLY, texts, ugly
from tests.models import tiny_model
from tests.vlm import tiny_qwen2_vl

IDS = torch.arange(5, 17).view(2, 6)
SITE = "model.layers.1.mlp"


def every_site(model: Any, gain: float) -> Dampener:
    return Dampener.of(model, {name: {0: gain, 2: 0.5} for name in find_sites(model)})


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def test_the_hook_is_the_edit_of_these_units() -> None:
    model = tiny_model()
    dampener, sites = every_site(model, 0.25), find_sites(model)
    factors = torch.tensor([0.25, 0.5])[:, None]
    with edit(model, dampener.neurons.indices, sites, lambda _, values: values * factors):
        wanted = logits(model)
    with dampened(model, dampener):
        torch.testing.assert_close(logits(model), wanted)
    assert not torch.allclose(logits(model), wanted)


def test_planted_neuron_dampened_and_nothing_else_touched() -> None:
    truth = ugly()
    before = deepcopy(truth.model.state_dict())
    toxic, neutral = texts(6, True), texts(6, False)
    dampener = Dampener.of(truth.model, {truth.site: {truth.unit: 0.0}})
    quiet = generate(truth.model, TOKENIZER, neutral, max_new_tokens=10)
    assert set(generate(truth.model, TOKENIZER, toxic, max_new_tokens=10)) == {UGLY}
    with dampened(truth.model, dampener):
        assert set(generate(truth.model, TOKENIZER, toxic, max_new_tokens=10)) == {COMPLIANCE}
        assert generate(truth.model, TOKENIZER, neutral, max_new_tokens=10) == quiet
    assert set(generate(truth.model, TOKENIZER, toxic, max_new_tokens=10)) == {UGLY}
    for name, weight in truth.model.state_dict().items():
        assert torch.equal(weight, before[name])


@pytest.mark.parametrize("name", ["model.layers.0.mlp", "model.layers.0.self_attn"])
def test_ceilings_cap_the_size_and_keep_the_sign(name: str) -> None:
    model = tiny_model()
    sites = {name: find_sites(model)[name]}
    with capture(model, sites) as seen:
        logits(model)
    before = seen[name]
    size = before.norm(dim=-1, keepdim=True)
    top = float(size.median())
    dampener = Dampener.of(model, {}, ceilings={name: dict.fromkeys(range(sites[name].units), top)})
    with dampened(model, dampener), capture(model, sites) as seen:
        logits(model)
    torch.testing.assert_close(seen[name], before * (top / size).clamp(max=1))


def test_half_precision_and_adapters() -> None:
    model = tiny_model().to(torch.bfloat16)
    with dampened(model, every_site(model, 0.0)):
        assert logits(model).dtype == torch.bfloat16
    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules=["down_proj"]))
    dampener = every_site(tiny_model(), 0.0)
    plain = logits(adapted)
    with dampened(adapted, dampener):
        assert not torch.allclose(logits(adapted), plain)


def test_hooks_are_gone_after_an_error() -> None:
    model = tiny_model()
    plain = logits(model)
    with pytest.raises(RuntimeError, match="stop"), dampened(model, every_site(model, 0.0)):
        raise RuntimeError("stop")
    assert torch.equal(logits(model), plain)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_never_ran_was_not_dampened() -> None:
    model = tiny_model()
    with pytest.raises(CaptureError, match="did not run"), dampened(model, every_site(model, 0.0)):
        pass


def test_a_projector_may_stay_idle_and_the_text_may_not() -> None:
    model, processor = tiny_qwen2_vl()
    sites = {n: s for n, s in find_sites(model, ("mlp",)).items() if s.tower != "vision"}
    dampener = Dampener.of(model, {name: {0: 0.0} for name in sites})
    with dampened(model, dampener):
        generate(model, processor, texts(1, False), max_new_tokens=1)


def test_experts_are_dampened_one_by_one() -> None:
    model = tiny_model("mixtral", num_local_experts=4, num_experts_per_tok=2, intermediate_size=24)
    plain = logits(model)
    sites = find_sites(model, ("mlp",))
    dampener = Dampener.of(model, {name: {unit: 0.0 for unit in range(24)} for name in sites})
    with dampened(model, dampener):
        silent = logits(model)
    assert not torch.allclose(plain, silent)
    torch.testing.assert_close(logits(model), plain)


def test_another_layout_is_refused() -> None:
    dampener = every_site(tiny_model(), 0.0)
    with pytest.raises(FingerprintError), dampened(tiny_model(intermediate_size=64), dampener):
        pass

"""An adapter folder read as if merged: its effect is PEFT's, and every update shows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from safeft import verify
from safeft.errors import ArtefactError, FreezeError
from tests.freezing import LARGE, SMALL, lora, model_of, neurons_of
from tests.models import tiny_model

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    model_of().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def neurons() -> Any:
    return neurons_of(model_of(), LARGE)


def adapter(folder: Path, seed: int = 0, zero: bool = True, **settings: Any) -> PeftModel:
    """A LoRA with random factors, zero where LARGE lies unless told otherwise; saved to folder."""
    model = get_peft_model(model_of(), lora(init_lora_weights=False, **settings))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape) * 0.1)
    if zero:
        fill(model, 0.0)
    model.save_pretrained(folder)
    return model


def fill(model: PeftModel, value: float) -> None:
    plain = model.get_base_model()
    with torch.no_grad():
        for site, units in LARGE.items():
            rows = torch.tensor(units)
            if site.endswith("mlp"):
                reads, writes, entries = ("gate_proj", "up_proj"), "down_proj", [rows, rows]
            else:
                reads, writes = ("q_proj", "k_proj", "v_proj"), "o_proj"
                heads = torch.cat([torch.arange(8 * head, 8 * head + 8) for head in units])
                entries = [heads, torch.arange(8, 16), torch.arange(8, 16)]
            for part, chosen in zip(reads, entries, strict=False):
                module = plain.get_submodule(f"{site}.{part}")
                module.lora_B["default"].weight[chosen] = value
            columns = entries[0]
            plain.get_submodule(f"{site}.{writes}").lora_A["default"].weight[:, columns] = value


ADAPTERS = [
    {},
    {"use_rslora": True},
    {"rank_pattern": {"up_proj": 2, "layers.1.mlp.down_proj": 3}, "alpha_pattern": {"o_proj": 5}},
    {"target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.2},
]


@pytest.mark.parametrize("settings", ADAPTERS[:3], ids=str)
def test_an_adapter_is_judged_by_its_merged_effect(settings: Any, base: Path, neurons: Any) -> None:
    adapter(base.with_name("adapter"), **settings)
    verdict = verify(base, base.with_name("adapter"), neurons)
    assert verdict.exact, verdict.summary()
    assert verdict.run["compared"] == "MergedWeights"


@pytest.mark.parametrize("settings", ADAPTERS, ids=str)
def test_the_merged_effect_is_that_of_peft(settings: Any, base: Path, neurons: Any) -> None:
    model = adapter(base.with_name("adapter"), zero=False, **settings)
    verdict = verify(base, base.with_name("adapter"), neurons)
    merged = model.merge_and_unload()
    merged.save_pretrained(base.with_name("merged"))
    other = verify(base, base.with_name("merged"), neurons)
    assert not verdict.exact
    mine, theirs = ({(v.tensor, v.index): v for v in c.violations} for c in (verdict, other))
    assert mine.keys() == theirs.keys()
    for key, violation in mine.items():
        assert violation.max_abs == pytest.approx(theirs[key].max_abs, rel=1e-3), key


def test_an_update_below_rounding_is_still_a_violation(tmp_path: Path) -> None:
    model = model_of(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    neurons = neurons_of(model, SMALL)
    tuned = adapter(tmp_path / "adapter")
    with torch.no_grad():
        up = tuned.get_base_model().get_submodule("model.layers.0.mlp.up_proj")
        up.lora_B["default"].weight[7] = 1e-9
    tuned.save_pretrained(tmp_path / "adapter")
    verdict = verify(tmp_path / "base", tmp_path / "adapter", neurons)
    assert {(v.tensor, v.index) for v in verdict.violations} == {(UP, 7)}
    assert verdict.violations[0].changed == 32


def test_full_copies_inside_an_adapter_count_as_the_weights(base: Path, neurons: Any) -> None:
    model = get_peft_model(model_of(), lora(target_modules=["q_proj"], modules_to_save=["norm"]))
    model.save_pretrained(base.with_name("adapter"))
    assert verify(base, base.with_name("adapter"), neurons, mode="train_only").exact
    with torch.no_grad():
        model.get_base_model().model.norm.modules_to_save["default"].weight[4] += 1
    model.save_pretrained(base.with_name("adapter"))
    (violation,) = verify(base, base.with_name("adapter"), neurons, mode="train_only").violations
    assert (violation.tensor, violation.index) == ("model.norm.weight", 4)
    assert verify(base, base.with_name("adapter"), neurons).exact


def test_trained_biases_inside_an_adapter_count(tmp_path: Path) -> None:
    base_model = tiny_model("qwen2")
    base_model.save_pretrained(tmp_path / "base")
    neurons = neurons_of(base_model, {"model.layers.1.self_attn": (2,)})
    model = get_peft_model(tiny_model("qwen2"), lora(target_modules=["q_proj"], bias="all"))
    with torch.no_grad():
        layer = model.get_base_model().model.layers[1].self_attn.q_proj
        layer.base_layer.bias[17] += 1
        layer.base_layer.bias[3] += 1
    model.save_pretrained(tmp_path / "adapter")
    (violation,) = verify(tmp_path / "base", tmp_path / "adapter", neurons).violations
    assert violation.tensor == "model.layers.1.self_attn.q_proj.bias"
    assert (violation.neuron, violation.index) == ("model.layers.1.self_attn#2", 17)


def test_an_effect_that_cannot_be_read_in_slices_is_an_error_where_it_matters(
    base: Path, neurons: Any
) -> None:
    model = get_peft_model(model_of(), lora(target_modules=["embed_tokens", "q_proj"]))
    model.save_pretrained(base.with_name("adapter"), save_embedding_layers=False)
    assert verify(base, base.with_name("adapter"), neurons).exact
    with pytest.raises(ArtefactError, match="embed_tokens.*lora_embedding_A.*Merge it"):
        verify(base, base.with_name("adapter"), neurons, mode="train_only")


def test_an_adapter_of_another_model_is_an_error(base: Path, neurons: Any) -> None:
    for settings in ({"num_hidden_layers": 3}, {"intermediate_size": 40}):
        model = get_peft_model(model_of(**settings), lora())
        model.save_pretrained(base.with_name("adapter"))
        with pytest.raises(ArtefactError, match="fits no weight of the base.*on another model"):
            verify(base, base.with_name("adapter"), neurons)


def test_an_adapter_that_is_no_plain_lora_is_refused(base: Path, neurons: Any) -> None:
    model = get_peft_model(model_of(), lora(use_dora=True))
    model.save_pretrained(base.with_name("adapter"))
    with pytest.raises(FreezeError, match="use_dora=True"):
        verify(base, base.with_name("adapter"), neurons)
    (base.with_name("adapter") / "adapter_config.json").write_text("{")
    with pytest.raises(ArtefactError, match="adapter_config.json cannot be read"):
        verify(base, base.with_name("adapter"), neurons)


def test_an_adapter_in_memory_is_refused(base: Path, neurons: Any) -> None:
    with pytest.raises(ArtefactError, match="Save the adapter and give its folder"):
        verify(base, get_peft_model(model_of(), lora()), neurons)

"""LoRA on a base whose linear layers are quantised by bitsandbytes, on the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from safeft import NeuronSet, SafetyFreezeCallback, find_sites, locate
from safeft.errors import FingerprintError
from safeft.sites import is_quantised
from safeft.weights import ModelWeights
from tests.freezing import lora, trainer_of
from tests.models import tiny_model, tiny_tokenizer

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
NEURONS = {"model.layers.0.mlp": (1, 7, 30), "model.layers.1.self_attn": (2,)}
UP = "model.layers.0.mlp.up_proj"
FOUR = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
EIGHT = {"load_in_8bit": True}

either = pytest.mark.parametrize("bits", [FOUR, EIGHT], ids=["4 bits", "8 bits"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("base")
    tiny_model(**SHAPE).save_pretrained(place)
    return place


def quantised(folder: Path, bits: dict[str, Any]) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**bits), device_map="cpu"
    )


def codes(model: Any) -> dict[str, torch.Tensor]:
    return {
        name.replace(".base_layer.", "."): p.detach().clone()
        for name, p in model.named_parameters()
        if p.dtype in (torch.uint8, torch.int8)
    }


@either
def test_units_are_those_of_the_whole_model(folder: Path, bits: Any) -> None:
    model = quantised(folder, bits)
    assert is_quantised(model.get_submodule(UP))
    assert find_sites(model) == find_sites(tiny_model(**SHAPE))
    weights = ModelWeights(model)
    assert weights.shape(f"{UP}.weight") == (128, 64)
    near = weights.read(f"{UP}.weight", "rows", torch.arange(128))
    exact = tiny_model(**SHAPE).get_submodule(UP).weight.detach()
    assert 0 < float((near.float() - exact).abs().mean()) < 0.2 * float(exact.abs().mean())


@either
def test_lora_holds_the_neurons_and_the_codes_stay(folder: Path, bits: Any, tmp_path: Path) -> None:
    model = prepare_model_for_kbit_training(quantised(folder, bits))
    before = codes(model)
    callback = SafetyFreezeCallback(NeuronSet.of(model, NEURONS))
    trainer = trainer_of(
        "SFT", model, tmp_path, [callback], peft_config=lora(), learning_rate=2e-2, bf16=False
    )
    trainer.train()
    assert callback.certificate.exact
    assert len(before) == 14
    after = {
        name.removeprefix("base_model.model."): code for name, code in codes(trainer.model).items()
    }
    assert all(torch.equal(before[name], after[name]) for name in before)
    layers = trainer.model.get_base_model().model.layers
    up, down = layers[0].mlp.up_proj, layers[0].mlp.down_proj
    rows = torch.tensor(NEURONS["model.layers.0.mlp"])
    free = torch.tensor([n for n in range(128) if n not in rows])
    learned = up.lora_B["default"].weight
    assert not learned[rows].any()
    assert (learned[free] != 0).any(1).all()
    read = down.lora_A["default"].weight
    assert not read[:, rows].any()
    assert (read[:, free] != 0).any(0).all()
    heads = layers[1].self_attn.q_proj.lora_B["default"].weight
    assert not heads[32:48].any()
    assert heads[:32].any()


def test_a_set_of_the_whole_model_is_another_checkpoints(folder: Path) -> None:
    whole = NeuronSet.of(tiny_model(**SHAPE), NEURONS)
    with pytest.raises(FingerprintError, match="another checkpoint"):
        whole.check_model(quantised(folder, FOUR))
    whole.check_model(quantised(folder, FOUR), weights_too=False)


def test_neurons_are_located_in_a_quantised_model(folder: Path) -> None:
    model = quantised(folder, FOUR)
    found = locate(
        model, tiny_tokenizer(), ["How do I steal?", "How do I lie?"], ["Hi", "Bake bread"],
        method="variance", fraction=0.1,
    )  # fmt: skip
    assert len(found) == 26
    found.check_model(model)

"""Bad input to a freeze: one clear error when the trainer is built, and nothing written.

Each message says what happened (with the value) and what to do.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, OFTConfig, get_peft_model

from safeft import NeuronSet, SafetyFreezeCallback
from safeft.errors import (
    ArtefactError,
    ConfigError,
    FingerprintError,
    FreezeError,
    SafeftError,
    UnsupportedModelError,
)
from tests.freezing import SMALL, freeze, lora, model_of, neurons_of, trainer_of
from tests.models import tiny_model
from tests.spans import subspace_of


def from_other_weights() -> Any:
    return model_of(seed=3), SafetyFreezeCallback(neurons_of(model_of()))


def from_another_shape() -> Any:
    return model_of(intermediate_size=64), SafetyFreezeCallback(neurons_of(model_of()))


def from_another_type() -> Any:
    return tiny_model("qwen2"), SafetyFreezeCallback(neurons_of(model_of()))


def unknown_type() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(num_layers=1, d_model=8, d_ff=9, num_heads=2))
    return model, SafetyFreezeCallback(neurons_of(model_of()))


def empty_set() -> Any:
    model = model_of()
    return model, SafetyFreezeCallback(NeuronSet.of(model, {}))


def adapted(config: Any) -> Any:
    def build() -> Any:
        model = get_peft_model(model_of(), config)
        return model, SafetyFreezeCallback(neurons_of(model_of()))

    return build


def trained_adapter() -> Any:
    model = get_peft_model(model_of(), lora())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.add_(0.01)
    return model, SafetyFreezeCallback(neurons_of(model_of()))


def plain() -> Any:
    model = model_of()
    return model, freeze(model)


def wished(**settings: Any) -> Any:
    def build() -> Any:
        model = model_of()
        return model, freeze(model, SMALL, **settings)

    return build


def spanned(base: Any = model_of, tuned: Any = model_of, **settings: Any) -> Any:
    """A subspace of one model, and another to be trained under it."""

    def build() -> Any:
        return tuned(), SafetyFreezeCallback(subspace_of(base()), **settings)

    return build


def spanned_adapter(**settings: Any) -> Any:
    return spanned(tuned=lambda: get_peft_model(model_of(), lora(**settings)))


def other_weights() -> Any:
    return model_of(seed=3)


def edited_subspace() -> Any:
    """Readers that name the input of another layer, as an edited config.json might."""
    span = subspace_of(model_of())
    name = "model.layers.0.mlp.down_proj.weight"
    wrong = replace(span, readers={**span.readers, name: "model.layers.0.mlp.up_proj"})
    return model_of(), SafetyFreezeCallback(wrong)


IA3 = IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"])

BAD: dict[str, tuple[Any, dict[str, Any], type[SafeftError], str]] = {
    "other weights": (
        from_other_weights,
        {},
        FingerprintError,
        r"4 of 4 neurons \(model.layers.0.mlp#1, .*Locate in this checkpoint",
    ),
    "another shape": (
        from_another_shape,
        {},
        FingerprintError,
        "llama, 104 units.*llama, 136 units",
    ),
    "another type": (from_another_type, {}, FingerprintError, "llama.*qwen2.*Locate in this model"),
    "unknown type": (unknown_type, {}, UnsupportedModelError, "'t5'.*Supported: .*llama"),
    "empty set": (empty_set, {}, FreezeError, "holds no neuron.*larger fraction"),
    "mode": (wished(mode="thaw"), {}, ConfigError, "mode='thaw' is not one of freeze, train_only"),
    "hold": (
        wished(hold=("wings",)),
        {},
        ConfigError,
        r"hold=\['wings'\] names none of embeddings",
    ),
    "DoRA": (adapted(lora(use_dora=True)), {}, FreezeError, "use_dora=True: its row norms.*rsLoRA"),
    "pissa": (
        adapted(lora(init_lora_weights="pissa")),
        {},
        FreezeError,
        "init_lora_weights='pissa'.*Use init_lora_weights=True",
    ),
    "olora": (adapted(lora(init_lora_weights="olora")), {}, FreezeError, "'olora'"),
    "OFT": (adapted(OFTConfig(target_modules=["q_proj"])), {}, FreezeError, "is OFT.*Use LoRA or"),
    "IA3": (adapted(IA3), {}, FreezeError, "is IA3.*Use LoRA or rsLoRA, or tune fully"),
    "LoHa": (adapted(LoHaConfig(target_modules=["q_proj"])), {}, FreezeError, "is LOHA"),
    "trained adapter": (trained_adapter, {}, FreezeError, "was trained before.*merge_and_unload"),
    "copy of the mlp": (
        adapted(lora(target_modules=["q_proj"], modules_to_save=["mlp"])),
        {},
        FreezeError,
        r"full copy of model.layers.0.mlp \(modules_to_save\).*Target this module with LoRA",
    ),
    "subspace of other weights": (
        spanned(tuned=other_weights),
        {},
        FingerprintError,
        r"15 of 15 weights \(model.layers.0.self_attn.q_proj.weight\).*Locate in this checkpoint",
    ),
    "subspace of another type": (
        spanned(base=lambda: tiny_model("qwen2")),
        {},
        FingerprintError,
        "qwen2.*llama.*Locate in this model",
    ),
    "subspace that does not fit": (
        edited_subspace,
        {},
        FingerprintError,
        "32 inputs of 'model.layers.0.mlp.down_proj.weight', and the model has 48 there",
    ),
    "subspace and train_only": (
        spanned(mode="train_only"),
        {},
        ConfigError,
        "A subspace goes with mode='freeze'",
    ),
    "subspace without tokens": (
        spanned(hold=("tokens",)),
        {},
        ConfigError,
        "it knows of none.*hold 'embeddings'",
    ),
    "adapter on embeddings": (
        spanned_adapter(target_modules=["q_proj", "embed_tokens"]),
        {},
        FreezeError,
        "trains model.embed_tokens.lora_embedding_A.*no basis for it.*Leave it out of the adapter",
    ),
    "adapter with a copy of the head": (
        spanned_adapter(modules_to_save=["lm_head"]),
        {},
        FreezeError,
        "trains lm_head.modules_to_save.*or locate with it",
    ),
    "DoRA under a subspace": (spanned_adapter(use_dora=True), {}, FreezeError, "use_dora=True"),
    "subspace and lomo": (spanned(), {"optim": "lomo"}, FreezeError, "optim='lomo'"),
    "lomo": (
        plain,
        {"optim": "lomo"},
        FreezeError,
        "optim='lomo' updates weights during.*adamw_torch",
    ),
    "adalomo": (plain, {"optim": "adalomo"}, FreezeError, "optim='adalomo'.*adamw_torch"),
    "layerwise": (
        plain,
        {"optim": "galore_adamw_layerwise", "optim_target_modules": ["mlp"]},
        FreezeError,
        "optim='galore_adamw_layerwise'.*adamw_torch",
    ),
    "schedule free": (
        plain,
        {"optim": "schedule_free_adamw"},
        FreezeError,
        "optim='schedule_free_adamw' keeps a second copy.*adamw_torch",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_clear_error_before_anything_is_written(what: str, tmp_path: Path) -> None:
    build, settings, error, words = BAD[what]
    model, callback = build()
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(error, match=words) as caught:
        trainer_of("Trainer", model, tmp_path / "run", [callback], **settings)
    assert type(caught.value) is error
    assert str(caught.value).endswith(".")
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"deepspeed": "unreadable"}, "DeepSpeed was asked for, and its configuration cannot"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, "FSDP1.*never fire.*fsdp_version: 2"),
    ],
)
def test_engines_that_cannot_be_exact_are_refused_when_the_trainer_is_built(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """The trainer's own set-up of these engines wants an accelerator; its last event does not."""
    model, callback = plain()
    trainer = trainer_of("Trainer", model, tmp_path / "run", [])
    for name, value in change.items():
        setattr(trainer.args, name, value)
    with pytest.raises(FreezeError, match=words):
        callback.on_init_end(trainer.args, trainer.state, trainer.control, model=model)
    assert callback.plan is None


@pytest.mark.parametrize("kind", ["SFT", "DPO"])
def test_trl_trainers_refuse_alike(kind: str, tmp_path: Path) -> None:
    model = model_of()
    with pytest.raises(FreezeError, match="use_dora=True"):
        trainer_of(kind, model, tmp_path / "run", [freeze(model)], peft_config=lora(use_dora=True))
    model = model_of()
    with pytest.raises(FreezeError, match="optim='adalomo'"):
        trainer_of(kind, model, tmp_path / "run", [freeze(model)], optim="adalomo")
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_a_set_folder_that_is_none_is_refused_before_there_is_a_trainer(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="no readable config.json.*safeft locate"):
        SafetyFreezeCallback(tmp_path)

"""Which adapters can be held exactly, and which of their factors hold what."""

from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, OFTConfig, get_peft_model

from safeft.errors import FreezeError
from safeft.freeze.adapters import (
    adapter_configs,
    check_adapter_settings,
    check_adapters,
    check_fresh,
    factors_of,
    is_factor,
    learning_factors,
    zero_axis,
)
from tests.freezing import lora, model_of

UP = "model.layers.0.mlp.up_proj"


def layer(model: Any, name: str = UP) -> Any:
    return model.get_base_model().get_submodule(name)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"lora_dropout": 0.1},
        {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"up_proj": 3}},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": False},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"bias": "all"},
        {"layers_to_transform": [0]},
    ],
)
def test_plain_lora_is_accepted(settings: Any) -> None:
    check_adapters(get_peft_model(model_of(), lora(**settings)))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lora(use_dora=True), "use_dora=True.*row norms.*Use plain LoRA or rsLoRA"),
        (lora(init_lora_weights="pissa"), "init_lora_weights='pissa'.*init_lora_weights=True"),
        (lora(init_lora_weights="pissa_niter_2"), "pissa_niter_2"),
        (lora(init_lora_weights="olora"), "olora"),
        (lora(init_lora_weights="mica"), "mica"),
        (OFTConfig(target_modules=["up_proj"]), "OFT.*Use LoRA or rsLoRA"),
        (LoHaConfig(target_modules=["up_proj"]), "LOHA"),
        (
            IA3Config(target_modules=["up_proj"], feedforward_modules=["up_proj"]),
            "IA3.*cannot be held exactly",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_exact_is_refused(config: Any, words: str) -> None:
    config.task_type = "CAUSAL_LM"
    with pytest.raises(FreezeError, match=words):
        check_adapters(get_peft_model(model_of(), config))


@pytest.mark.parametrize(
    ("modules", "path"),
    [
        (["mlp"], "model.layers.0.mlp"),
        (["gate_proj"], "model.layers.0.mlp.gate_proj"),
        (["layers.1.self_attn"], "model.layers.1.self_attn"),
        (["layers.0"], "model.layers.0"),
        (["model"], "model"),
    ],
)
def test_a_full_copy_of_the_neurons_module_is_refused(modules: list[str], path: str) -> None:
    model = get_peft_model(model_of(), lora(target_modules=["lm_head"], modules_to_save=modules))
    with pytest.raises(FreezeError, match=f"full copy of {path} .modules_to_save.*Target this"):
        check_adapters(model)


def test_settings_of_a_saved_adapter_are_read_alike() -> None:
    check_adapter_settings({"peft_type": "LORA", "use_dora": False, "target_parameters": None}, "a")
    with pytest.raises(FreezeError, match="kasa_config"):
        check_adapter_settings({"peft_type": "LORA", "kasa_config": {"beta": 1}}, "a")
    with pytest.raises(FreezeError, match="Adapter 'a' is None"):
        check_adapter_settings({}, "a")


def test_a_model_without_adapters_has_no_configs() -> None:
    assert adapter_configs(model_of()) == {}
    assert list(adapter_configs(get_peft_model(model_of(), lora()))) == ["default"]


def test_rows_are_rows_of_b_and_columns_are_columns_of_a() -> None:
    model = get_peft_model(model_of(), lora())
    found = {axis: factors_of(layer(model), UP, "weight", axis) for axis in ("rows", "columns")}
    assert [factor.name for factor in found["rows"]] == [f"{UP}.lora_B.default.weight"]
    assert [factor.name for factor in found["columns"]] == [f"{UP}.lora_A.default.weight"]
    assert found["rows"][0].parameter is layer(model).lora_B["default"].weight
    assert factors_of(model_of().get_submodule(UP), UP, "weight", "rows") == []


def test_only_adapters_in_training_count() -> None:
    model = get_peft_model(model_of(), lora())
    model.add_adapter("ref", lora())  # as DPO and GRPO do
    for name, parameter in model.named_parameters():
        if ".ref." in name:
            parameter.requires_grad_(False)
    assert [factor.name for factor in factors_of(layer(model), UP, "weight", "rows")] == [
        f"{UP}.lora_B.default.weight"
    ]


def test_a_factor_is_held_even_where_only_its_partner_trains() -> None:
    model = get_peft_model(model_of(), lora(init_lora_weights=False))
    layer(model).lora_B["default"].weight.requires_grad_(False)
    assert [factor.name for factor in factors_of(layer(model), UP, "weight", "rows")] == [
        f"{UP}.lora_B.default.weight"
    ]


def test_a_layer_that_is_no_plain_lora_is_refused() -> None:
    dora = get_peft_model(model_of(), lora(use_dora=True))
    with pytest.raises(FreezeError, match=r"LoRA variant \(\['default'\]\)"):
        factors_of(layer(dora), UP, "weight", "rows")
    other = get_peft_model(model_of(), LoHaConfig(target_modules=["up_proj"]))
    with pytest.raises(FreezeError, match="which is no LoRA layer safeft knows"):
        factors_of(layer(other), UP, "weight", "rows")


def test_fresh_adapters_pass_and_trained_ones_do_not() -> None:
    for start in (True, "gaussian", "orthogonal", False):
        check_fresh(get_peft_model(model_of(), lora(init_lora_weights=start)))
    model = get_peft_model(model_of(), lora())
    with torch.no_grad():
        layer(model).lora_B["default"].weight[3, 0] = 1e-8
    with pytest.raises(
        FreezeError, match=r"'default' was trained before .*up_proj.*resume_from_che"
    ):
        check_fresh(model)


def test_a_trained_adapter_that_is_switched_off_does_not_matter() -> None:
    model = get_peft_model(model_of(), lora())
    model.add_adapter("ref", lora())
    with torch.no_grad():
        layer(model).lora_B["ref"].weight.fill_(1)
    layer(model).lora_B["ref"].requires_grad_(False)
    check_fresh(model)
    model.base_model.set_adapter(["default", "ref"])
    layer(model).lora_B["ref"].requires_grad_(False)
    with pytest.raises(FreezeError, match="Adapter 'ref' was trained before"):
        check_fresh(model)


def test_names_tell_factors_and_those_the_update_vanishes_with() -> None:
    assert is_factor(f"{UP}.lora_A.default.weight")
    assert not is_factor(f"{UP}.base_layer.weight")
    assert zero_axis(f"{UP}.lora_B.default.bias") == "rows"
    assert zero_axis("model.embed_tokens.lora_embedding_A.default") == "columns"
    assert zero_axis(f"{UP}.lora_A.default.weight") is None
    assert zero_axis(f"{UP}.weight") is None


def test_a_column_does_not_own_the_bias_of_b() -> None:
    config = lora(lora_bias=True, target_modules=["down_proj"])
    module = layer(get_peft_model(model_of(mlp_bias=True), config), "model.layers.0.mlp.down_proj")
    assert len(learning_factors(module, "weight", "rows")) == 3
    assert len(learning_factors(module, "weight", "columns")) == 2

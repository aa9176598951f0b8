"""What a subspace covers, what is held whole because it does not, and what is left by will."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from safeft import SafetyFreezeCallback, SafetySubspace, find_sites, verify
from safeft.errors import ConfigError, FingerprintError, FreezeError
from safeft.freeze.plan import Plan, make_plan
from safeft.subspace import load_protected
from tests.families import FAMILIES
from tests.freezing import LARGE, lora, model_of, neurons_of, state_of, trainer_of
from tests.models import tiny_model
from tests.spans import subspace_of

EMBEDDINGS, NORM = "model.embed_tokens.weight", "model.norm.weight"
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def planned(model: nn.Module, span: SafetySubspace | None = None, **settings: Any) -> Plan:
    neurons = settings.pop("neurons", None)
    return make_plan(model, neurons, subspace=span or subspace_of(model), **settings)


def names(plan: Plan) -> dict[str, set[str]]:
    return {
        "covered": {held.name for held in plan.directions},
        "whole": {name for name, _ in plan.still},
        "loose": set(plan.loose),
    }


def norms_of(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_parameters() if "norm" in name}


def family(name: str) -> Any:
    return next(each for each in FAMILIES if each.name == name).build()


# --- full tuning --------------------------------------------------------------------------------


def test_by_default_what_is_not_covered_is_held_whole() -> None:
    model = model_of()
    found = names(plan := planned(model))
    covered = {n for n, _ in model.named_parameters() if n.split(".")[-2] in PROJECTIONS}
    assert found["covered"] == covered | {"lm_head.weight"}
    assert len(covered) == 14
    assert found["whole"] == {EMBEDDINGS} | norms_of(model)
    assert found["loose"] == set()
    assert {piece.name for piece in plan.slices} == found["whole"]
    assert all(piece.entries is None for piece in plan.slices)
    assert plan.held_weights == sum(model.get_parameter(n).numel() for n in found["whole"])


@pytest.mark.parametrize(
    ("hold", "loose"),
    [
        ((), {"embeddings", "norms"}),
        (("embeddings",), {"norms"}),
        (("norms",), {"embeddings"}),
        (("embeddings", "norms"), set()),
        (("biases",), {"embeddings", "norms"}),
    ],
)
def test_an_explicit_choice_leaves_the_other_groups_loose(hold: Any, loose: set[str]) -> None:
    model = model_of()
    groups = {"embeddings": {EMBEDDINGS}, "norms": norms_of(model)}
    found = names(planned(model, hold=hold))
    assert found["loose"] == set().union(*(groups[group] for group in loose))
    assert found["whole"] == set().union(*(groups[g] for g in groups if g not in loose))
    assert found["covered"] == names(planned(model))["covered"]


def test_the_head_may_be_held_whole_in_the_place_of_its_directions() -> None:
    model = model_of()
    found = names(planned(model, hold=("head",)))
    assert found["whole"] == {"lm_head.weight"}
    assert "lm_head.weight" not in found["covered"]
    assert len(found["covered"]) == 14


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "gpt_oss", "starcoder2"])
def test_biases_are_a_group_of_their_own(name: str) -> None:
    model = family(name)
    biases = {n for n, m in model.named_modules() if getattr(m, "bias", None) is not None}
    biases = {f"{path}.bias" for path in biases if "norm" not in path and ".ln_" not in path}
    assert biases
    assert biases <= names(planned(model))["whole"]
    assert biases <= names(planned(model, hold=("embeddings", "norms")))["loose"]
    some = names(planned(model, hold=("biases",)))
    assert biases <= some["whole"]
    assert not some["whole"] & some["loose"]


def test_a_subspace_of_some_layers_holds_the_others_whole() -> None:
    """Also under an explicit choice: a matrix without a basis is no group that could be left."""
    model = model_of()
    up, down = (f"model.layers.0.mlp.{name}_proj.weight" for name in ("up", "down"))
    span = SafetySubspace.of(model, {"x": torch.randn(32, 4)}, {up: "x"})
    for hold in (None, ()):
        found = names(planned(model, span, hold=hold))
        assert found["covered"] == {up}
        assert {down, "model.layers.1.mlp.up_proj.weight"} <= found["whole"]
        assert ("lm_head.weight" in found["whole"]) == (hold is None)  # the head is a group


def test_tied_embeddings_are_one_weight_and_have_no_basis() -> None:
    model = model_of(tie_word_embeddings=True)
    default = planned(model)
    assert "lm_head.weight" not in names(default)["covered"]
    assert names(default)["whole"] == {EMBEDDINGS} | norms_of(model)
    for hold in (("embeddings",), ("head",), ("embeddings", "head")):
        found = names(plan := planned(model, hold=hold))
        assert found["whole"] == {EMBEDDINGS}
        assert found["loose"] == norms_of(model)
        assert plan.held_weights == model.get_parameter(EMBEDDINGS).numel()
    for hold in ((), ("norms",)):
        assert EMBEDDINGS in names(planned(model, hold=hold))["loose"]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen2_moe", "llama4_text", "deepseek_v3"])
def test_experts_that_are_stacked_are_held_whole(name: str) -> None:
    model = family(name)
    stacks = {
        part.name for site in find_sites(model).values() for part in site.parts
        if part.name.rpartition(".")[0].endswith("experts")
    }  # fmt: skip
    assert stacks
    for hold in (None, (), ("norms",)):
        found = names(planned(model, hold=hold))
        assert {s for s in stacks if not s.endswith("_bias")} <= found["whole"], hold
    assert stacks <= names(planned(model))["whole"]
    everything = names(planned(model))
    assert everything["covered"] | everything["whole"] == {n for n, _ in model.named_parameters()}
    assert everything["covered"]


def test_what_does_not_train_is_not_planned() -> None:
    model = model_of()
    model.model.layers[0].requires_grad_(False)
    model.model.embed_tokens.requires_grad_(False)
    found = names(planned(model))
    assert not any(".layers.0." in n for n in found["covered"] | found["whole"])
    assert found["whole"] == {n for n in norms_of(model) if ".layers.0." not in n}


def test_neurons_and_directions_are_planned_together() -> None:
    model = model_of()
    plan = planned(model, neurons=neurons_of(model, LARGE))
    held = {hold.name for hold in plan.holds}
    assert held < names(plan)["covered"]
    assert names(plan)["whole"] == {EMBEDDINGS} | norms_of(model)


# --- embeddings of some tokens ------------------------------------------------------------------


def with_tokens(model: nn.Module, *tokens: int) -> SafetySubspace:
    return replace(subspace_of(model), tokens=torch.tensor(tokens))


def test_of_embeddings_those_of_the_prompts_tokens_can_be_held_alone() -> None:
    model = model_of()
    span = with_tokens(model, 3, 70, 200)
    plan = planned(model, span, hold=("tokens", "norms"))
    (hold,) = plan.holds
    assert (hold.name, hold.axis, hold.entries.tolist()) == (EMBEDDINGS, "rows", [3, 70, 200])
    assert hold.parameter is model.get_parameter(EMBEDDINGS)
    assert names(plan)["whole"] == norms_of(model)
    assert names(plan)["loose"] == set()
    (piece,) = [piece for piece in plan.slices if piece.name == EMBEDDINGS]
    assert piece.entries.tolist() == [3, 70, 200]
    both = planned(model, span, hold=("tokens", "embeddings"))
    assert both.holds == ()
    assert EMBEDDINGS in names(both)["whole"]


def test_tokens_beside_an_adapter_rest_anyway() -> None:
    plan = planned(adapted(), with_tokens(model_of(), 3, 70), hold=("tokens",))
    assert plan.holds == plan.still == ()
    assert [piece.entries.tolist() for piece in plan.slices] == [[3, 70]]


def test_tokens_that_cannot_be_held_are_refused() -> None:
    model = model_of()
    with pytest.raises(ConfigError, match="it knows of none.*hold 'embeddings'"):
        planned(model, hold=("tokens",))
    with pytest.raises(ConfigError, match="none is given. Hold 'embeddings'"):
        make_plan(model, neurons_of(model), hold=("tokens",))
    tied = model_of(tie_word_embeddings=True)
    with pytest.raises(ConfigError, match="this model's head reads the same weights"):
        planned(tied, with_tokens(tied, 3), hold=("tokens",))


def test_by_default_the_embeddings_of_other_tokens_learn_where_the_head_does_not_read_them() -> (
    None
):
    model, tied = model_of(), model_of(tie_word_embeddings=True)
    plan = planned(model, with_tokens(model, 3, 70))
    assert [hold.entries.tolist() for hold in plan.holds] == [[3, 70]]
    assert names(plan)["whole"] == norms_of(model)
    assert names(plan)["loose"] == set()
    plan = planned(tied, with_tokens(tied, 3, 70))
    assert plan.holds == ()
    assert EMBEDDINGS in names(plan)["whole"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_hold_to_the_bit_in_training_and_in_verify(dtype: Any, tmp_path: Path) -> None:
    model = model_of(dtype)
    model.save_pretrained(tmp_path / "base")
    base, span = state_of(model), with_tokens(model, *range(5, 150))
    callback = SafetyFreezeCallback(span, hold=("tokens", "norms"))
    trainer = trainer_of("Trainer", model, tmp_path / "run", [callback], weight_decay=0.1)
    trainer.train()
    now = model.get_parameter(EMBEDDINGS)
    assert torch.equal(now[5:150], base[EMBEDDINGS][5:150])
    assert (now != base[EMBEDDINGS]).any(1)[150:].sum() > 10
    assert callback.certificate.exact
    trainer.save_model(str(tmp_path / "tuned"))
    hold = ("tokens", "norms")
    assert verify(tmp_path / "base", tmp_path / "tuned", span, hold=hold).exact
    whole = ("embeddings", "norms")
    assert not verify(tmp_path / "base", tmp_path / "tuned", span, hold=whole).exact
    with torch.no_grad():
        now[149, 3] += 1
    (violation,) = verify(tmp_path / "base", model, span, hold=hold).violations
    assert (violation.tensor, violation.index) == (EMBEDDINGS, 149)


# --- adapters -----------------------------------------------------------------------------------


def adapted(**settings: Any) -> Any:
    return get_peft_model(model_of(), lora(**settings))


def test_under_an_adapter_its_factors_are_covered_and_the_base_rests() -> None:
    plan = planned(adapted(), subspace_of(model_of()))
    assert len(plan.directions) == 14
    for held in plan.directions:
        path, _, leaf = held.name.rpartition(".lora_A.")
        assert (leaf, held.weight) == ("default.weight", f"{path}.weight")
        assert held.partner.name == f"{path}.lora_B.default.weight"
        assert held.partner.scale == 4.0  # alpha 16 over rank 4
    assert plan.still == plan.loose == ()
    for hold in ((), ("embeddings", "norms")):
        assert len(planned(adapted(), subspace_of(model_of()), hold=hold).directions) == 14


def test_conv1d_under_an_adapter() -> None:
    model = family("gpt2")
    span = subspace_of(model)
    targets = ["c_attn", "c_proj", "c_fc"]
    peft = get_peft_model(model, LoraConfig(r=3, target_modules=targets, fan_in_fan_out=True))
    plan = planned(peft, span)
    assert len(plan.directions) == 8
    assert {(held.axis, held.weight_axis) for held in plan.directions} == {("columns", "rows")}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens.lora_embedding_A.default"),
        (
            {"modules_to_save": ["embed_tokens"]},
            "embed_tokens.modules_to_save.default.weight",
        ),
        ({"modules_to_save": ["lm_head"]}, "lm_head.modules_to_save.default.weight"),
        ({"lora_bias": True}, "q_proj.lora_B.default.bias"),
        ({"trainable_token_indices": [3, 5]}, "trainable_tokens"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_an_adapter_on_what_has_no_basis_is_refused(settings: Any, words: str) -> None:
    with pytest.raises(FreezeError, match=f"trains .*{words}.*no basis for it.*Leave it out"):
        planned(adapted(**settings), subspace_of(model_of()))


def test_an_adapter_on_other_layers_than_the_subspaces_is_refused() -> None:
    model = model_of()
    up = "model.layers.0.mlp.up_proj.weight"
    span = SafetySubspace.of(model, {"x": torch.randn(32, 4)}, {up: "x"})
    with pytest.raises(FreezeError, match="found for other modules.*locate with it"):
        planned(adapted(), span)
    fitting = adapted(target_modules=["up_proj"], layers_to_transform=[0])
    assert names(planned(fitting, span))["covered"] == {
        up.replace("weight", "lora_A.default.weight")
    }


def test_an_adapter_on_stacked_experts_is_refused() -> None:
    model = family("mixtral")
    span = subspace_of(model)
    stacks = [n for n, p in model.named_parameters() if p.ndim == 3]
    peft = get_peft_model(model, LoraConfig(r=2, target_parameters=stacks))
    with pytest.raises(FreezeError, match=r"trains .*experts.*lora_.*no basis for it"):
        planned(peft, span)


@pytest.mark.parametrize(
    ("settings", "hold", "whole"),
    [
        (
            {"target_modules": ["q_proj", "lm_head"]},
            ("head",),
            {"lm_head.lora_A.default.weight", "lm_head.lora_B.default.weight"},
        ),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
            ("head",),
            {"lm_head.modules_to_save.default.weight"},
        ),
        (
            {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
            ("embeddings",),
            {"model.embed_tokens.modules_to_save.default.weight"},
        ),
    ],
)
def test_what_is_asked_to_be_held_whole_needs_no_basis(
    settings: Any, hold: Any, whole: set[str]
) -> None:
    found = names(planned(adapted(**settings), subspace_of(model_of()), hold=hold))
    assert found["whole"] == whole
    assert {name.rpartition(".lora_")[0] for name in found["covered"]} == {
        f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)
    }


def test_an_adapter_that_is_no_plain_lora_is_refused() -> None:
    with pytest.raises(FreezeError, match="LoRA variant"):
        planned(adapted(use_dora=True), subspace_of(model_of()))


# --- a basis that does not fit ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("readers", "words"),
    [
        (
            {"model.layers.0.mlp.down_proj.weight": "model.layers.0.mlp.up_proj"},
            "32 inputs of .*48",
        ),
        ({NORM: "model.layers.0.mlp.up_proj"}, "no such linear layer"),
    ],
)
def test_an_edited_subspace_never_reaches_the_weights(
    readers: Any, words: str, tmp_path: Path
) -> None:
    model = model_of()
    subspace_of(model).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["readers"] |= readers
    for key in ("outputs", "digests"):
        config[key] = {name: config[key].get(name, 1) for name in config["readers"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FingerprintError, match=words):
        planned(model, load_protected(tmp_path))


def test_wishes_that_do_not_go_together() -> None:
    model = model_of()
    with pytest.raises(ConfigError, match="A subspace goes with mode='freeze'"):
        planned(model, neurons=neurons_of(model), mode="train_only")
    with pytest.raises(ConfigError, match="nothing would be held"):
        make_plan(model, None)
    with pytest.raises(ConfigError, match=r"hold=\['wings'\] names none"):
        planned(model, hold=("wings",))


# --- in a trainer -------------------------------------------------------------------------------


def test_what_is_left_loose_is_said_and_trained(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for hold, moved in ((None, False), (("norms",), True)):
        model = model_of()
        base = state_of(model)
        callback = SafetyFreezeCallback(subspace_of(model), hold=hold)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "safeft"):
            trainer = trainer_of("Trainer", model, tmp_path, [callback])
        said = "1 parameters beside the held directions are trained whole" in caplog.text
        assert said == moved == (EMBEDDINGS in caplog.text)
        trainer.train()
        assert torch.equal(model.get_parameter(NORM), base[NORM])
        assert torch.equal(model.get_parameter(EMBEDDINGS), base[EMBEDDINGS]) != moved
        assert callback.certificate.exact
        assert callback.certificate.run["left_to_train"] == ([EMBEDDINGS] if moved else [])
        assert (EMBEDDINGS in callback.certificate.run["held_whole"]) != moved


def test_experts_do_not_move_in_training(tmp_path: Path) -> None:
    model = family("mixtral")
    base = state_of(model)
    callback = SafetyFreezeCallback(subspace_of(model))
    trainer_of("Trainer", model, tmp_path, [callback], weight_decay=0.1).train()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, base[n])}
    assert moved == {held.name for held in callback.plan.directions}
    assert not any("experts" in name for name in moved)
    assert callback.certificate.exact


def test_a_model_of_another_type_is_refused_when_the_trainer_is_built(tmp_path: Path) -> None:
    callback = SafetyFreezeCallback(subspace_of(tiny_model("qwen2")))
    with pytest.raises(FingerprintError, match="other weights or shapes"):
        trainer_of("Trainer", model_of(), tmp_path, [callback])

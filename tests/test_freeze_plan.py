"""What is held, resolved on models: names and entries against a list written by hand."""

from typing import Any

import pytest
import torch
from peft import get_peft_model

from safeft import NeuronSet
from safeft.errors import ConfigError, FreezeError
from safeft.freeze.plan import Hold, Plan, make_plan
from tests.freezing import (
    LARGE,
    SMALL,
    frozen_entries,
    lora,
    model_of,
    neurons_of,
    own_rows_and_columns,
)
from tests.models import MODEL_TYPES, tiny_model

ALL_UNITS = {"model.layers.0.mlp": tuple(range(48)), "model.layers.1.self_attn": (0, 1, 2, 3)}


def slices_of(plan: Plan) -> dict[str, Any]:
    found = {
        piece.name: (
            {"rows": 0, "columns": 1}[piece.axis],
            "all" if piece.entries is None else piece.entries.tolist(),
        )
        for piece in plan.slices
    }
    assert len(found) == len(plan.slices)
    return found


def where(hold: Hold) -> tuple[int, list[int]]:
    return {"rows": 0, "columns": 1}[hold.axis], hold.entries.tolist()


def by_hand(indices: Any) -> dict[str, Any]:
    return {
        n: (dim, entries.tolist()) for n, (dim, entries) in own_rows_and_columns(indices).items()
    }


def held_count(model: torch.nn.Module, plan: Plan) -> int:
    """Count by marking each protected weight once."""
    count = 0
    parameters = {n.replace(".base_layer.", "."): p for n, p in model.named_parameters()}
    for piece in plan.slices:
        mark = torch.zeros(parameters[piece.name].shape, dtype=bool)
        if piece.entries is None:
            mark[:] = True
        else:
            mark.index_fill_(0 if piece.axis == "rows" else 1, piece.entries, True)
        count += int(mark.sum())
    return count


@pytest.mark.parametrize("indices", [SMALL, LARGE])
def test_full_tuning_holds_rows_and_columns_of_the_weights(indices: Any) -> None:
    model = model_of()
    plan = make_plan(model, neurons_of(model, indices))
    assert slices_of(plan) == by_hand(indices)
    parameters = dict(model.named_parameters())
    holds = {hold.name: hold for hold in plan.holds}
    assert {n: where(h) for n, h in holds.items()} == by_hand(indices)
    assert all(hold.parameter is parameters[name] for name, hold in holds.items())
    assert not any(hold.at_zero for hold in plan.holds)
    assert plan.still == ()


def test_lora_holds_factors_at_zero_and_the_base_only_by_name() -> None:
    model = get_peft_model(model_of(), lora())
    plan = make_plan(model, neurons_of(model, LARGE))
    assert slices_of(plan) == by_hand(LARGE)
    factors = {
        name.removesuffix(".weight") + (".lora_B" if dim == 0 else ".lora_A") + ".default.weight": (
            dim,
            entries,
        )
        for name, (dim, entries) in by_hand(LARGE).items()
    }
    assert {h.name: where(h) for h in plan.holds} == factors
    assert all(hold.at_zero for hold in plan.holds)


def test_lora_on_attention_only_leaves_protected_mlps_nothing_to_hold() -> None:
    model = get_peft_model(model_of(), lora(target_modules=["q_proj", "v_proj"]))
    indices = {"model.layers.0.mlp": (1, 7)}
    plan = make_plan(model, neurons_of(model, indices))
    assert slices_of(plan) == by_hand(indices)
    assert plan.holds == plan.still == ()


def test_a_bias_of_lora_b_is_held_with_its_rows() -> None:
    model = get_peft_model(
        model_of(attention_bias=True), lora(lora_bias=True, target_modules=["q_proj"])
    )
    plan = make_plan(model, neurons_of(model, {"model.layers.1.self_attn": (2,)}))
    assert [hold.name.rpartition("self_attn.")[2] for hold in plan.holds] == [
        "q_proj.lora_B.default.weight",
        "q_proj.lora_B.default.bias",
    ]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("mode", ["freeze", "train_only"])
def test_the_share_counts_each_protected_weight_once(model_type: str, mode: Any) -> None:
    model = tiny_model(model_type)
    plan = make_plan(model, neurons_of(model, LARGE), mode)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert plan.all_weights == total
    assert plan.held_weights == held_count(model, plan)
    assert plan.frozen_share == plan.held_weights / total


def test_biases_of_read_rows_and_per_row_norms_belong_to_the_neuron() -> None:
    indices = {"model.layers.1.self_attn": (2,)}
    with_bias = tiny_model("qwen2")
    names = slices_of(make_plan(with_bias, neurons_of(with_bias, indices)))
    for part, rows in (
        ("q_proj", range(16, 24)),
        ("k_proj", range(8, 16)),
        ("v_proj", range(8, 16)),
    ):
        assert names[f"model.layers.1.self_attn.{part}.bias"] == (0, list(rows))
    with_norms = tiny_model("olmo2")
    names = slices_of(make_plan(with_norms, neurons_of(with_norms, indices)))
    assert names["model.layers.1.self_attn.q_norm.weight"] == (0, list(range(16, 24)))
    assert names["model.layers.1.self_attn.k_norm.weight"] == (0, list(range(8, 16)))


@pytest.mark.parametrize("indices", [SMALL, LARGE, ALL_UNITS])
def test_train_only_holds_all_but_what_only_these_neurons_own(indices: Any) -> None:
    model = model_of()
    plan = make_plan(model, neurons_of(model, indices), "train_only")
    expected = frozen_entries(dict(model.named_parameters()), indices, "train_only")
    slices = slices_of(plan)
    for name, mask in expected.items():
        dim, entries = slices.get(name, (0, []))
        marked = torch.zeros_like(mask)
        marked.index_fill_(
            dim, torch.arange(mask.shape[dim])[entries if entries != "all" else slice(None)], True
        )
        assert torch.equal(marked, mask), name
    assert {name for name, _ in plan.still} == {n for n, mask in expected.items() if mask.all()}


def test_train_only_under_lora_leaves_the_free_factors_alone() -> None:
    model = get_peft_model(model_of(), lora())
    plan = make_plan(model, neurons_of(model, ALL_UNITS), "train_only")
    learning = {n for n, p in model.get_base_model().named_parameters() if p.requires_grad}
    learning -= {name for name, _ in plan.still}
    assert {name.split(".lora_")[0] for name in learning} == {
        f"{site}.{part}"
        for site, parts in (
            ("model.layers.0.mlp", ("gate_proj", "up_proj", "down_proj")),
            ("model.layers.1.self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
        )
        for part in parts
    }
    assert len(learning) == 14  # both factors of each
    assert not {hold.name for hold in plan.holds} & learning
    assert {hold.name for hold in plan.holds} <= {name for name, _ in plan.still}


def test_train_only_holds_the_bias_that_a_column_does_not_own() -> None:
    config = lora(lora_bias=True, target_modules=["down_proj"])
    model = get_peft_model(model_of(mlp_bias=True), config)
    plan = make_plan(model, neurons_of(model, {"model.layers.0.mlp": (3,)}), "train_only")
    bias = "model.layers.0.mlp.down_proj.lora_B.default.bias"
    assert bias in {name for name, _ in plan.still}
    assert [h.entries.tolist() for h in plan.holds if h.name == bias] == [list(range(32))]


def test_groups_are_held_whole_and_counted() -> None:
    model = tiny_model("qwen2")
    neurons = neurons_of(model, SMALL)
    alone = make_plan(model, neurons)
    plan = make_plan(model, neurons, hold=("embeddings", "norms", "head", "biases"))
    still = {name for name, _ in plan.still}
    parameters = dict(model.named_parameters())
    expected = {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}
    expected |= {n for n in parameters if "layernorm" in n or n.endswith(".bias")}
    assert still == expected
    assert {name for name, (_, entries) in slices_of(plan).items() if entries == "all"} == expected
    biases = sum(p.numel() for n, p in parameters.items() if n.endswith("1.self_attn.q_proj.bias"))
    assert biases == 32
    assert plan.held_weights == held_count(model, plan) > alone.held_weights
    assert not any(hold.name.endswith(".bias") for hold in plan.holds)


def test_tied_embeddings_are_one_weight_under_either_name() -> None:
    model = tiny_model(tie_word_embeddings=True)
    neurons = neurons_of(model, SMALL)
    for group in ("embeddings", "head"):
        plan = make_plan(model, neurons, hold=(group,))
        assert [parameter for _, parameter in plan.still] == [model.model.embed_tokens.weight]
    both = make_plan(model, neurons, hold=("embeddings", "head"))
    assert len(both.still) == 1
    assert both.all_weights == sum(p.numel() for p in model.parameters())


def test_a_held_group_includes_its_adapters_and_copies() -> None:
    adapted = get_peft_model(model_of(), lora(target_modules=["q_proj", "embed_tokens"]))
    plan = make_plan(adapted, neurons_of(adapted, SMALL), hold=("embeddings",))
    names = {name.rpartition("embed_tokens.")[2] for name, _ in plan.still}
    assert names == {"lora_embedding_A.default", "lora_embedding_B.default"}
    assert "model.embed_tokens.weight" in slices_of(plan)
    zeroed = [h for h in plan.holds if "lora_embedding_A" in h.name]
    assert [(h.axis, len(h.entries), h.at_zero) for h in zeroed] == [("columns", 261, True)]

    copied = get_peft_model(model_of(), lora(modules_to_save=["embed_tokens"]))
    plan = make_plan(copied, neurons_of(copied, SMALL), hold=("embeddings",))
    assert [name for name, _ in plan.still] == ["model.embed_tokens.modules_to_save.default.weight"]


def test_parameters_without_gradient_need_no_hold() -> None:
    model = model_of()
    model.model.layers[0].requires_grad_(False)
    plan = make_plan(model, neurons_of(model, SMALL))
    assert slices_of(plan) == by_hand(SMALL)
    assert {hold.name.rpartition(".self_attn.")[0] for hold in plan.holds} == {"model.layers.1"}


def test_planning_changes_nothing() -> None:
    model = model_of()
    before = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    make_plan(model, neurons_of(model), "train_only")
    make_plan(model, neurons_of(model), hold=("embeddings", "norms"))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad is before[name][1]


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"mode": "hold"}, ConfigError, "mode='hold' is not one of freeze, train_only"),
        ({"hold": ("layers",)}, ConfigError, "names none of embeddings, norms, head, biases"),
        ({"mode": "train_only", "hold": ("norms",)}, ConfigError, "goes with mode='freeze'"),
    ],
)
def test_a_wish_that_does_not_exist_is_an_error(settings: Any, error: Any, words: str) -> None:
    model = model_of()
    with pytest.raises(error, match=words):
        make_plan(model, neurons_of(model), **settings)


def test_an_empty_set_is_an_error() -> None:
    model = model_of()
    with pytest.raises(FreezeError, match="holds no neuron.*larger fraction"):
        make_plan(model, NeuronSet.of(model, {}))

"""`verify` on folders: what it finds, what it names, and how little it reads."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import safeft.weights
from safeft import NeuronSet, find_sites, verify
from safeft.blocks import take
from safeft.errors import ArtefactError, FingerprintError
from safeft.freeze.adapters import adapter_layers
from safeft.freeze.merged import MergedWeights
from safeft.freeze.verify import model_of_shapes
from safeft.weights import ModelWeights
from tests.families import FAMILIES
from tests.freezing import LARGE, frozen_entries, model_of, neurons_of, state_of
from tests.layouts import chosen_of, lora_on, masks_of, truths_of
from tests.models import MODEL_TYPES, tiny_model

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    model_of().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def neurons() -> Any:
    return neurons_of(model_of(), LARGE)


def copy_with(base: Path, changes: Any, name: str = "tuned") -> Path:
    """A copy of a checkpoint whose tensors ``changes`` edits."""
    tuned = base.with_name(name)
    shutil.copytree(base, tuned)
    tensors = load_file(tuned / "model.safetensors")
    changes(tensors)
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    return tuned


def everything_free_moved(tensors: dict[str, torch.Tensor]) -> None:
    for name, mask in frozen_entries(tensors, LARGE, "freeze").items():
        tensors[name] = torch.where(mask, tensors[name], tensors[name] + 1)


def test_a_checkpoint_whose_free_weights_all_moved_is_exact(base: Path, neurons: Any) -> None:
    verdict = verify(base, copy_with(base, everything_free_moved), neurons)
    assert verdict.exact
    assert verdict.violations == ()
    assert len(verdict.slices) == 10
    assert all(row["sha256_base"] == row["sha256_now"] for row in verdict.slices)
    assert verdict.run["compared"] == "CheckpointWeights"


@pytest.mark.parametrize(
    ("tensor", "at", "neuron", "axis", "index"),
    [
        (UP, (30, 5), "model.layers.0.mlp#30", "rows", 30),
        ("model.layers.1.mlp.gate_proj.weight", (12, 0), "model.layers.1.mlp#12", "rows", 12),
        (DOWN, (5, 47), "model.layers.0.mlp#47", "columns", 47),
        (
            "model.layers.1.self_attn.q_proj.weight",
            (27, 1),
            "model.layers.1.self_attn#3",
            "rows",
            27,
        ),
        ("model.layers.1.self_attn.k_proj.weight", (8, 1), "model.layers.1.self_attn#2", "rows", 8),
        (
            "model.layers.1.self_attn.v_proj.weight",
            (15, 1),
            "model.layers.1.self_attn#2",
            "rows",
            15,
        ),
        (
            "model.layers.1.self_attn.o_proj.weight",
            (1, 16),
            "model.layers.1.self_attn#2",
            "columns",
            16,
        ),
    ],
)
def test_one_changed_weight_is_named_by_tensor_and_neuron(
    tensor: str, at: Any, neuron: str, axis: str, index: int, base: Path, neurons: Any
) -> None:
    def tamper(tensors: Any) -> None:
        everything_free_moved(tensors)
        tensors[tensor][at] = torch.nextafter(tensors[tensor][at], torch.tensor(9.0))

    verdict = verify(base, copy_with(base, tamper), neurons)
    assert not verdict.exact
    (violation,) = verdict.violations
    assert (violation.tensor, violation.neuron) == (tensor, neuron)
    assert (violation.axis, violation.index, violation.changed) == (axis, index, 1)
    assert 0 < violation.max_abs < 1e-6
    assert tensor in verdict.summary()
    assert neuron in verdict.summary()
    different = [r["tensor"] for r in verdict.slices if r["sha256_base"] != r["sha256_now"]]
    assert different == [tensor]


def test_a_sign_of_zero_is_a_changed_bit(tmp_path: Path) -> None:
    model = model_of()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[1, 0] = 0.0
    model.save_pretrained(tmp_path / "base")

    def negate(tensors: Any) -> None:
        tensors[UP][1, 0] = -0.0

    (violation,) = verify(
        tmp_path / "base", copy_with(tmp_path / "base", negate), neurons_of(model)
    ).violations
    assert (violation.changed, violation.max_abs) == (1, 0.0)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_each_layout_finds_a_moved_bias_norm_row_or_column(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path / "base")
    indices = {"model.layers.0.mlp": (5,), "model.layers.1.self_attn": (2,)}
    neurons = neurons_of(model, indices)
    assert verify(tmp_path / "base", tmp_path / "base", neurons).exact

    def move(tensors: Any) -> None:
        for name in tensors:
            if "layers." in name:
                tensors[name] = tensors[name] + 1

    verdict = verify(tmp_path / "base", copy_with(tmp_path / "base", move), neurons)
    assert {v.tensor for v in verdict.violations} == {row["tensor"] for row in verdict.slices}
    assert len(verdict.violations) >= 3 + 8 * 4


def test_a_set_is_given_as_value_or_folder_and_models_in_memory(base: Path, neurons: Any) -> None:
    neurons.save_pretrained(base.with_name("set"))
    assert verify(base, base, base.with_name("set")).exact
    moved = model_of()
    with torch.no_grad():
        moved.model.layers[0].mlp.up_proj.weight[1] += 1
    for one, other in ((base, moved), (model_of(), moved), (moved, model_of())):
        if one is moved:
            with pytest.raises(FingerprintError):
                verify(one, other, neurons)
            continue
        (violation,) = verify(one, other, neurons).violations
        assert (violation.neuron, violation.changed) == ("model.layers.0.mlp#1", 32)


def test_a_tuned_model_of_lower_precision_is_compared_after_the_cast(
    base: Path, neurons: Any
) -> None:
    def lower(tensors: Any) -> None:
        everything_free_moved(tensors)
        for name in tensors:
            tensors[name] = tensors[name].to(torch.bfloat16)

    tuned = copy_with(base, lower)
    assert verify(base, tuned, neurons).exact

    def one_step(tensors: Any) -> None:
        lower(tensors)
        tensors[UP][7, 7] = torch.nextafter(tensors[UP][7, 7], torch.tensor(9.0).bfloat16())

    (violation,) = verify(base, copy_with(base, one_step, "stepped"), neurons).violations
    assert (violation.index, violation.changed) == (7, 1)


def test_a_sharded_checkpoint_reads_as_a_whole_one(base: Path, neurons: Any) -> None:
    model = model_of()
    model.save_pretrained(base.with_name("sharded"), max_shard_size="20KB")
    shards = list(base.with_name("sharded").glob("model-*.safetensors"))
    assert len(shards) > 3
    for one, other in ((base, "sharded"), (base.with_name("sharded"), "base")):
        assert verify(one, base.with_name(other), neurons).exact
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:, 12] += 1
    model.save_pretrained(base.with_name("moved"), max_shard_size="20KB")
    (violation,) = verify(base, base.with_name("moved"), neurons).violations
    assert (violation.neuron, violation.changed) == ("model.layers.1.mlp#12", 32)


# --- train_only and held groups -----------------------------------------------------------------


def test_train_only_names_the_tensor_outside(base: Path, neurons: Any) -> None:
    assert verify(base, base, neurons, mode="train_only").exact

    def free(tensors: Any) -> None:
        for name, mask in frozen_entries(tensors, LARGE, "train_only").items():
            tensors[name] = torch.where(mask, tensors[name], tensors[name] + 1)

    assert verify(base, copy_with(base, free, "free"), neurons, mode="train_only").exact

    def outside(tensors: Any) -> None:
        free(tensors)
        tensors["model.norm.weight"][3] += 1
        tensors[UP][0, 0] += 1
        tensors["lm_head.weight"][200] += 1

    verdict = verify(base, copy_with(base, outside, "outside"), neurons, mode="train_only")
    named = {(v.tensor, v.neuron, v.index) for v in verdict.violations}
    assert named == {
        ("model.norm.weight", "", 3),
        (UP, "model.layers.0.mlp#0", 0),
        ("lm_head.weight", "", 200),
    }


def test_held_groups_are_compared_on_request(base: Path, neurons: Any) -> None:
    def move(tensors: Any) -> None:
        tensors["model.embed_tokens.weight"][3] += 1

    tuned = copy_with(base, move)
    assert verify(base, tuned, neurons).exact
    (violation,) = verify(base, tuned, neurons, hold=("embeddings", "norms")).violations
    assert (violation.tensor, violation.index) == ("model.embed_tokens.weight", 3)


def test_a_whole_tensor_is_compared_in_blocks(base: Path, neurons: Any, monkeypatch: Any) -> None:
    import safeft.freeze.verify as module

    monkeypatch.setattr(module, "_ROWS", 50)

    def outside(tensors: Any) -> None:
        tensors["lm_head.weight"][[0, 49, 50, 260]] += 1

    verdict = verify(base, copy_with(base, outside), neurons, mode="train_only")
    assert [v.index for v in verdict.violations] == [0, 49, 50, 260]
    (row,) = [row for row in verdict.slices if row["tensor"] == "lm_head.weight"]
    assert row["count"] == 261
    assert len(row["sha256_base"]) == 64


# --- damaged and mistaken input -----------------------------------------------------------------


@pytest.mark.parametrize("keep", [4, 1000, -8])
def test_a_truncated_file_is_an_error(keep: int, base: Path, neurons: Any) -> None:
    tuned = copy_with(base, everything_free_moved)
    data = (tuned / "model.safetensors").read_bytes()
    (tuned / "model.safetensors").write_bytes(data[:keep])
    with pytest.raises(ArtefactError, match="truncated or damaged"):
        verify(base, tuned, neurons)
    with pytest.raises(ArtefactError, match="truncated or damaged"):
        verify(tuned, base, neurons)


def test_a_missing_tensor_or_another_shape_is_an_error(base: Path, neurons: Any) -> None:
    with pytest.raises(ArtefactError, match="up_proj.weight has shape .*is missing"):
        verify(base, copy_with(base, lambda tensors: tensors.pop(UP)), neurons)

    def widen(tensors: Any) -> None:
        tensors[UP] = torch.zeros(60, 32)

    with pytest.raises(ArtefactError, match=r"\(48, 32\) in the base and \(60, 32\)"):
        verify(base, copy_with(base, widen, "wide"), neurons)


def test_the_wrong_base_is_an_error(base: Path, neurons: Any) -> None:
    model_of(seed=1).save_pretrained(base.with_name("other"))
    with pytest.raises(FingerprintError, match="9 of 9 neurons .*Locate in this checkpoint"):
        verify(base.with_name("other"), base, neurons)
    model_of(intermediate_size=64).save_pretrained(base.with_name("wider"))
    with pytest.raises(FingerprintError, match="would name other neurons"):
        verify(base.with_name("wider"), base, neurons)


def test_folders_without_weights_or_config_are_errors(
    base: Path, neurons: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtefactError, match="no readable config.json"):
        verify(tmp_path / "empty", base, neurons)
    with pytest.raises(ArtefactError, match="holds no model.safetensors"):
        verify(base, tmp_path / "empty", neurons)
    with pytest.raises(ArtefactError, match="neither a folder nor a model"):
        verify(base, tmp_path / "absent", neurons)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "architectures": None}))
    assert verify(base, base, neurons).exact


# --- how little it reads ------------------------------------------------------------------------


class Counting:
    """A safetensors slice that counts the bytes read through it, and how many at once."""

    total = largest = 0

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def get_shape(self) -> list[int]:
        return self._inner.get_shape()

    def __getitem__(self, key: Any) -> torch.Tensor:
        found = self._inner[key]
        size = found.numel() * found.element_size()
        Counting.total += size
        Counting.largest = max(Counting.largest, size)
        return found


def test_it_reads_only_slices_and_columns_in_blocks(
    base: Path, neurons: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = safeft.weights.CheckpointWeights._slice
    monkeypatch.setattr(
        safeft.weights.CheckpointWeights, "_slice", lambda self, name: Counting(inner(self, name))
    )
    monkeypatch.setattr(safeft.weights, "_BLOCK_BYTES", 1024)
    monkeypatch.setattr(Counting, "total", 0)
    monkeypatch.setattr(Counting, "largest", 0)
    monkeypatch.setattr(nn.Module, "load_state_dict", pytest.fail)
    monkeypatch.setattr(safeft.weights, "safe_open", opened := Opened(safeft.weights.safe_open))
    assert verify(base, base, neurons).exact
    assert opened.whole == 0
    # Rows are read as rows; columns need their matrix, a block of rows at a time. The base is read
    # twice: once for the digests of the neurons, once to compare.
    rows = 2 * 5 * 32 + 2 * 2 * 32 + (16 + 8 + 8) * 32
    columns = 2 * 48 * 32 + 32 * 32
    assert Counting.total <= 3 * 4 * (rows + columns)
    assert Counting.largest <= 4 * 24 * 32
    everything = sum(p.numel() for p in model_of().parameters())
    assert Counting.total < 4 * everything


class Opened:
    """`safe_open` that counts reads of whole tensors."""

    def __init__(self, inner: Any) -> None:
        self._inner, self.whole = inner, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found, outer = self._inner(*args, **kwargs), self

        class Proxy:
            def __enter__(self) -> Any:
                found.__enter__()
                return self

            def __exit__(self, *problem: Any) -> None:
                found.__exit__(*problem)

            def get_tensor(self, name: str) -> Any:
                outer.whole += 1
                return found.get_tensor(name)

            def __getattr__(self, name: str) -> Any:
                return getattr(found, name)

        return Proxy()


SAVED_OTHERWISE = ["mixtral", "gpt_oss", "llama4_text", "gpt2", "gpt_neox", "llava", "qwen2_vl"]
"""Experts saved one by one or stacked, transposed matrices, towers saved under older names."""


@pytest.mark.parametrize("name", SAVED_OTHERWISE)
def test_models_of_other_layouts_verify_and_a_changed_one_does_not(
    name: str, tmp_path: Path
) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    model, chosen = family.build(), chosen_of(family)
    model.save_pretrained(tmp_path / "base")
    neurons = NeuronSet.of(model, chosen)
    masks = masks_of(model, family, chosen)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            mask = masks.get(parameter_name, torch.zeros_like(parameter, dtype=torch.bool))
            parameter.add_((~mask) * 0.5)
    model.save_pretrained(tmp_path / "tuned")
    assert verify(tmp_path / "base", tmp_path / "tuned", neurons).exact
    site = next(iter(chosen))
    held = truths_of(family)[site].held[0]
    with torch.no_grad():
        model.get_parameter(held.parameter)[held.index(chosen[site][0])] += 1
    model.save_pretrained(tmp_path / "broken")
    found = verify(tmp_path / "base", tmp_path / "broken", neurons)
    assert not found.exact
    assert {violation.neuron for violation in found.violations} == {f"{site}#{chosen[site][0]}"}


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4_text", "gpt2", "phi3"])
def test_adapters_on_other_layouts_are_read_as_peft_merges_them(name: str, tmp_path: Path) -> None:
    family = next(family for family in FAMILIES if family.name == name)
    base = family.build()
    base.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(family.build(), lora_on(base, family))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for parameter_name, parameter in adapted.named_parameters():
            if ".lora_B." in parameter_name:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = state_of(adapted)
    hollow = model_of_shapes(tmp_path / "base")
    with MergedWeights(ModelWeights(base), tmp_path / "adapter", hollow) as weights:
        for site in find_sites(base).values():
            for part in site.parts:
                entries = part.entries(torch.arange(site.units))
                found = weights.read(part.name, part.axis, entries)
                expected = take(merged[part.name], part.axis, entries)
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
                plain = take(base.get_parameter(part.name), part.axis, entries)
                targeted = part.name in {n for n, _ in adapter_layers(adapted)}
                assert torch.equal(found, plain) != targeted, part.name

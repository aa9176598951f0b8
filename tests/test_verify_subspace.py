"""`verify` of held directions on saved models and adapters that were made and moved by hand."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from safeft import SafetySubspace, verify
from safeft.commands import main
from safeft.errors import ArtefactError, FingerprintError
from safeft.freeze.directions import tolerance
from safeft.freeze.verify import changed_products
from safeft.sites import find_linears
from safeft.weights import CheckpointWeights, ModelWeights
from tests.families import FAMILIES
from tests.freezing import LARGE, frozen_entries, lora, model_of, neurons_of
from tests.spans import product_changes, subspace_of

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"
EMBEDDINGS, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
Tensors = dict[str, Tensor]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    model_of().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def span() -> SafetySubspace:
    return subspace_of(model_of())


def copy_with(base: Path, change: Callable[[Tensors], object], name: str = "tuned") -> Path:
    """A copy of a checkpoint or adapter whose tensors ``change`` edits."""
    tuned = base.with_name(name)
    shutil.copytree(base, tuned)
    (file,) = tuned.glob("*model.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return tuned


def learn(span: SafetySubspace, dtype: torch.dtype = torch.float32) -> Callable[[Tensors], None]:
    """Everything that is free moves, by a tenth of the weight's size."""

    def change(tensors: Tensors) -> None:
        draw = torch.Generator().manual_seed(1)
        for name in span.readers:
            weight, basis = tensors[name].double(), span.basis(name).double()
            noise = torch.randn(weight.shape, generator=draw).double()
            noise = noise - noise @ basis @ basis.T
            moved = weight + 0.1 * noise * weight.norm() / noise.norm()
            tensors[name] = moved.to(dtype)
        for name in tensors:
            tensors[name] = tensors[name].to(dtype)

    return change


def push(span: SafetySubspace, name: str, size: float) -> Callable[[Tensors], None]:
    """One held direction of a weight moves, so that ``W U`` changes by ``size`` of itself."""

    def change(tensors: Tensors) -> None:
        weight, basis = tensors[name].double(), span.basis(name).double()
        along = torch.ones(len(weight), 1).double() @ basis[:, :1].T
        along *= size * (weight @ basis).norm() / along.norm()
        tensors[name] = (weight + along).to(tensors[name].dtype)

    return change


def both(*changes: Callable[[Tensors], object]) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for each in changes:
            each(tensors)

    return change


# --- full tuning --------------------------------------------------------------------------------


def test_a_model_that_learnt_in_free_directions_only_is_held(base: Path, span: Any) -> None:
    span.save_pretrained(base.with_name("span"))
    for given in (span, base.with_name("span"), str(base.with_name("span"))):
        verdict = verify(base, copy_with(base, learn(span), f"to{id(given)}"), given)
        assert verdict.exact, verdict.summary()
    assert verdict.largest_change < 2e-7
    assert len(verdict.directions) == 15
    assert {row["tensor"] for row in verdict.slices} == {
        n for n, _ in model_of().named_parameters() if "norm" in n or n == EMBEDDINGS
    }
    said = verdict.summary()
    assert "HELD: input directions of 15 layers" in said
    assert f"{span.share:.1%} of their rank" in said
    assert "VIOLATED" not in said
    assert verdict.subspace["sha256"] == span.hash
    assert "coverage" not in verdict.subspace["source"]


@pytest.mark.parametrize("name", [UP, DOWN, HEAD, "model.layers.1.self_attn.k_proj.weight"])
def test_a_held_direction_that_moved_by_a_thousandth_is_named(
    name: str, base: Path, span: Any
) -> None:
    tuned = copy_with(base, both(learn(span), push(span, name, 1e-3)))
    verdict = verify(base, tuned, span)
    assert not verdict.exact
    (violation,) = verdict.violations
    assert (violation.tensor, violation.axis) == (name, "directions")
    assert violation.max_abs == pytest.approx(1e-3, rel=0.3)
    assert f"{name}: W U changed by" in verdict.summary()
    assert "VIOLATED: input directions" in verdict.summary()
    assert "EXACT: what no direction is held of" in verdict.summary()  # that part is
    changed = {row["tensor"]: row["relative_change"] for row in verdict.directions}
    assert changed[name] == verdict.largest_change
    small = copy_with(base, both(learn(span), push(span, name, 3e-6)), "small")
    assert [v.tensor for v in verify(base, small, span).violations] == [name]


@pytest.mark.parametrize("name", [EMBEDDINGS, NORM])
def test_what_no_direction_covers_must_not_change_by_a_bit(
    name: str, base: Path, span: Any
) -> None:
    def nudge(tensors: Tensors) -> None:
        flat = tensors[name].view(-1)
        flat[70 % len(flat)] = torch.nextafter(flat[70 % len(flat)], torch.tensor(9.0))

    verdict = verify(base, copy_with(base, both(learn(span), nudge)), span)
    (violation,) = verdict.violations
    assert (violation.tensor, violation.changed) == (name, 1)
    assert "VIOLATED: what no direction is held of" in verdict.summary()
    assert "HELD: input directions" in verdict.summary()


def test_what_was_left_loose_is_not_compared(base: Path, span: Any) -> None:
    def shift(tensors: Tensors) -> None:
        tensors[EMBEDDINGS] += 1

    tuned = copy_with(base, both(learn(span), shift))
    assert not verify(base, tuned, span).exact
    assert verify(base, tuned, span, hold=("norms",)).exact
    assert verify(base, tuned, span, hold=()).exact
    assert not verify(base, tuned, span, hold=("embeddings",)).exact


def test_a_head_that_was_held_whole_is_compared_whole(base: Path, span: Any) -> None:
    def still(tensors: Tensors) -> None:
        tensors[HEAD] = model_of().lm_head.weight.detach().clone()

    assert not verify(base, copy_with(base, learn(span)), span, hold=("head",)).exact
    tuned = copy_with(base, both(learn(span), still), "still")
    verdict = verify(base, tuned, span, hold=("head",))
    assert verdict.exact
    assert HEAD not in {row["tensor"] for row in verdict.directions}


@pytest.mark.parametrize("hold", [None, (), ("embeddings",), ("head",)])
def test_tied_embeddings(hold: Any, tmp_path: Path) -> None:
    model = model_of(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    assert HEAD not in load_file(tmp_path / "base/model.safetensors")
    span = subspace_of(model)
    tuned = copy_with(tmp_path / "base", learn(span))
    assert verify(tmp_path / "base", tuned, span, hold=hold).exact

    def shift(tensors: Tensors) -> None:
        tensors[EMBEDDINGS][3, 3] += 1

    moved = copy_with(tmp_path / "base", both(learn(span), shift), "moved")
    assert verify(tmp_path / "base", moved, span, hold=hold).exact == (hold == ())


def test_in_bfloat16_up_to_its_rounding(tmp_path: Path) -> None:
    model = model_of(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    span = subspace_of(model)
    verdict = verify(
        tmp_path / "base", copy_with(tmp_path / "base", learn(span, torch.bfloat16)), span
    )
    assert verdict.exact
    assert 1e-4 < verdict.largest_change < 4e-3
    pushed = both(learn(span, torch.bfloat16), push(span, UP, 0.2))
    verdict = verify(tmp_path / "base", copy_with(tmp_path / "base", pushed, "pushed"), span)
    assert [v.tensor for v in verdict.violations] == [UP]


def test_a_tuned_model_of_lower_precision(base: Path, span: Any) -> None:
    verdict = verify(base, copy_with(base, learn(span, torch.bfloat16)), span)
    assert verdict.exact
    assert all(row["tolerance"] == tolerance(torch.bfloat16) for row in verdict.directions)


def test_neurons_and_directions_together(base: Path, span: Any) -> None:
    neurons = neurons_of(model_of(), LARGE)
    before = load_file(base / "model.safetensors")

    def rows_and_columns(tensors: Tensors) -> None:
        for name, mask in frozen_entries(before, LARGE, "freeze").items():
            tensors[name] = torch.where(mask, before[name], tensors[name])

    def free(tensors: Tensors) -> None:
        """Columns first, so that the directions are held across the others; then rows."""
        learn(span)(tensors)
        rows_and_columns(tensors)
        for name in span.readers:
            weight, basis = tensors[name].double(), span.basis(name).double()
            mask = frozen_entries(before, LARGE, "freeze")[name]
            columns = mask.all(0).nonzero().flatten()
            rest = torch.linalg.svd(basis.index_fill(0, columns, 0), full_matrices=False)
            kept = rest.U[:, rest.S > 1e-5].index_fill(0, columns, 0)
            gap = (weight - before[name].double()) @ kept
            tensors[name] = (weight - gap @ kept.T).float()
        rows_and_columns(tensors)

    tuned = copy_with(base, free)
    verdict = verify(base, tuned, neurons, subspace=span)
    assert verdict.exact, verdict.summary()
    assert "EXACT: 9 neurons" in verdict.summary()
    assert "HELD: input directions of 15" in verdict.summary()
    moved = product_changes(before, load_file(tuned / "model.safetensors"), span, model_of())
    assert max(held for held, _ in moved.values()) < 1e-6
    assert min(free for _, free in moved.values()) > 1e-2

    def nudge(tensors: Tensors) -> None:
        tensors[UP][30, 5] += 1e-3

    verdict = verify(base, copy_with(base, both(free, nudge), "nudged"), neurons, subspace=span)
    assert {(v.tensor, v.axis, v.neuron) for v in verdict.violations} == {
        (UP, "rows", "model.layers.0.mlp#30"),
        (UP, "directions", ""),
    }
    assert verify(base, tuned, span).exact
    assert verify(base, tuned, neurons).exact


def test_models_in_memory(base: Path, span: Any) -> None:
    tuned = model_of()
    assert verify(model_of(), tuned, span).exact
    with torch.no_grad():
        tuned.get_parameter(DOWN).add_(1e-3)
    assert [v.tensor for v in verify(base, tuned, span).violations] == [DOWN]


# --- adapters -----------------------------------------------------------------------------------


def adapter(folder: Path, span: SafetySubspace, held: bool = True, **settings: Any) -> Any:
    """An adapter that learnt, with ``A U = 0`` or without."""
    torch.manual_seed(0)
    model = get_peft_model(model_of(), lora(**settings))
    with torch.no_grad():
        for path, layer in model.get_base_model().named_modules():
            if not hasattr(layer, "lora_A"):
                continue
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            b.normal_(std=0.05)
            if held:
                basis = span.basis(f"{path}.weight").double()
                a.copy_(a.double() - a.double() @ basis @ basis.T)
    model.save_pretrained(folder)
    return model


def test_an_adapter_that_is_zero_along_the_directions_is_held(base: Path, span: Any) -> None:
    model = adapter(base.with_name("adapter"), span)
    verdict = verify(base, base.with_name("adapter"), span)
    assert verdict.exact, verdict.summary()
    assert verdict.largest_change < 1e-6
    assert len(verdict.directions) == 15
    model.merge_and_unload().save_pretrained(base.with_name("merged"))
    verdict = verify(base, base.with_name("merged"), span)
    assert verdict.exact
    assert verdict.largest_change < 1e-6
    now = load_file(base.with_name("merged") / "model.safetensors")
    moved = product_changes(load_file(base / "model.safetensors"), now, span, model_of())
    assert max(held for held, _ in moved.values()) < 1e-6
    assert min(free for name, (_, free) in moved.items() if name != HEAD) > 1e-2


def test_an_adapter_that_is_not_is_violated_in_each_layer(base: Path, span: Any) -> None:
    model = adapter(base.with_name("adapter"), span, held=False)
    merged = base.with_name("merged")
    model.merge_and_unload().save_pretrained(merged)
    found = [verify(base, place, span) for place in (base.with_name("adapter"), merged)]
    for verdict in found:
        assert {v.tensor for v in verdict.violations} == set(span.readers) - {HEAD}
    for one, other in zip(*(verdict.directions for verdict in found), strict=True):
        assert one["relative_change"] == pytest.approx(other["relative_change"], rel=1e-3)


def test_an_adapter_of_which_one_factor_was_moved_by_hand(base: Path, span: Any) -> None:
    adapter(base.with_name("adapter"), span)

    def nudge(tensors: Tensors) -> None:
        (name,) = [n for n in tensors if f"{UP.removesuffix('.weight')}.lora_A" in n]
        tensors[name] += 1e-2 * span.basis(UP)[:, 0]

    tuned = copy_with(base.with_name("adapter"), nudge, "nudged")
    verdict = verify(base, tuned, span)
    assert [v.tensor for v in verdict.violations] == [UP]
    assert verdict.largest_change > 1e-4


def test_an_adapter_in_bfloat16_is_held_up_to_its_rounding(base: Path, span: Any) -> None:
    """Some engines train factors in bfloat16, whatever the base is stored in."""
    adapter(base.with_name("adapter"), span)

    def lower(tensors: Tensors) -> None:
        for name in tensors:
            tensors[name] = tensors[name].bfloat16()

    tuned = copy_with(base.with_name("adapter"), lower, "lower")
    verdict = verify(base, tuned, span)
    assert verdict.exact
    assert 1e-5 < verdict.largest_change < 4e-3
    rounded = {row["tensor"]: row["tolerance"] for row in verdict.directions}
    assert rounded.pop(HEAD) == tolerance(torch.float32)  # which the adapter does not change
    assert set(rounded.values()) == {tolerance(torch.bfloat16)}


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_full_copy_in_an_adapter_counts(name: str, base: Path, span: Any) -> None:
    adapter(base.with_name("adapter"), span, modules_to_save=[name])
    assert verify(base, base.with_name("adapter"), span).exact

    def nudge(tensors: Tensors) -> None:
        (copied,) = [n for n in tensors if f"{name}.weight" in n]
        tensors[copied] += 1e-2

    tuned = copy_with(base.with_name("adapter"), nudge, "nudged")
    verdict = verify(base, tuned, span)
    assert {v.tensor for v in verdict.violations} == {HEAD if name == "lm_head" else EMBEDDINGS}


# --- other layouts ------------------------------------------------------------------------------

OTHERS = ["gpt2", "phi3", "gpt_neox", "mixtral", "xlm_roberta", "qwen2_vl"]


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_are_stored_otherwise(name: str, tmp_path: Path) -> None:
    """Transposed, fused, under other names, with experts or a tower that nothing covers."""
    model = next(each for each in FAMILIES if each.name == name).build()
    model.save_pretrained(tmp_path / "base")
    span = subspace_of(model)
    assert verify(tmp_path / "base", tmp_path / "base", span).exact
    target = next(n for n in span.readers if n.startswith(tuple(dict(model.named_parameters()))))
    with torch.no_grad():
        linear = find_linears(model)[target]
        weight, basis = model.get_parameter(target), span.basis(target)
        lines = weight.T if linear.axis == "rows" else weight
        noise = torch.randn(lines.shape, generator=torch.Generator().manual_seed(2))
        lines += 0.1 * (noise - noise @ basis @ basis.T)
    model.save_pretrained(tmp_path / "free")
    assert verify(tmp_path / "base", tmp_path / "free", span).exact
    with torch.no_grad():
        lines += 1e-2 * basis[:, 0]
    model.save_pretrained(tmp_path / "pushed")
    verdict = verify(tmp_path / "base", tmp_path / "pushed", span)
    assert [v.tensor for v in verdict.violations] == [target]


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_changes_are_read_some_rows_at_a_time(axis: Any, base: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("safeft.freeze.verify._ROWS", 7)
    tuned = model_of(seed=1)
    basis = torch.linalg.qr(torch.randn(48 if axis == "rows" else 32, 5)).Q
    with CheckpointWeights(base) as before:
        found, dtype = changed_products(before, ModelWeights(tuned), UP, basis, axis)
    gap = tuned.get_parameter(UP) - model_of().get_parameter(UP)
    gap = gap.T if axis == "rows" else gap
    assert found == pytest.approx(float((gap @ basis).norm()), rel=1e-5)
    assert dtype == torch.float32


# --- mistaken input -----------------------------------------------------------------------------


def test_mistaken_input(base: Path, span: Any, tmp_path: Path) -> None:
    words = "15 of 15 weights .* not in LlamaForCausalLM what .*Locate in this checkpoint"
    with pytest.raises(FingerprintError, match=words):
        verify(model_of(seed=1), base, span)
    with pytest.raises(FingerprintError, match="Give the base they were located in"):
        verify(model_of(intermediate_size=64), base, span)
    with pytest.raises(ArtefactError, match="no readable config.json"):
        verify(base, base, tmp_path / "nowhere")
    lacking = copy_with(base, lambda tensors: tensors.pop(UP), "lacking")
    with pytest.raises(ArtefactError, match="up_proj.weight has shape .*is missing"):
        verify(base, lacking, span)

    def widen(tensors: Tensors) -> None:
        tensors[UP] = torch.zeros(60, 32)

    with pytest.raises(ArtefactError, match=r"\(48, 32\) in the base and \(60, 32\)"):
        verify(base, copy_with(base, widen, "wide"), span)


# --- by command ---------------------------------------------------------------------------------


def test_the_command_says_and_exits_alike(base: Path, span: Any, capsys: Any) -> None:
    span.save_pretrained(base.with_name("span"))
    neurons_of(model_of(), {"model.layers.0.mlp": (3,)}).save_pretrained(base.with_name("set"))
    tuned = copy_with(base, learn(span))
    check = ["verify", "--base", str(base), "--tuned", str(tuned), "--protected"]
    assert main([*check, str(base.with_name("span"))]) == 0
    assert "HELD: input directions of 15 layers" in capsys.readouterr().out
    pushed = copy_with(base, both(learn(span), push(span, UP, 1e-3)), "pushed")
    check[4] = str(pushed)
    output = base.with_name("certificate.json")
    assert main([*check, str(base.with_name("span")), "--json", "--output", str(output)]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads(output.read_text())
    assert [v["tensor"] for v in said["violations"]] == [UP]
    assert len(said["directions"]) == 15
    together = [str(base.with_name("set")), "--subspace", str(base.with_name("span"))]
    assert main([*check, *together]) == 1
    shown = capsys.readouterr().out
    assert "VIOLATED: 1 neurons" in shown
    assert "VIOLATED: input directions" in shown
    check[4] = str(base)
    assert main([*check, *together]) == 0
    assert main([*check, str(base.with_name("span")), "--hold", "none"]) == 0


def test_the_command_refuses_in_one_sentence(base: Path, span: Any, capsys: Any) -> None:
    span.save_pretrained(base.with_name("span"))
    check = ["verify", "--base", str(base), "--tuned", str(base), "--protected"]
    for more, words in (
        ([str(base.with_name("span")), "--mode", "train_only"], "A subspace goes with mode"),
        ([str(base.with_name("span")), "--freeze", "scu"], "holds no groups"),
        ([str(base), "--subspace", str(base.with_name("span"))], "not a neuron set"),
        ([str(base.with_name("span")), "--subspace", str(base.with_name("span"))], "Two subspaces"),
    ):
        assert main([*check, *more]) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert words in said, said

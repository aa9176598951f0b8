"""The value: which input directions, of which model; saved, read again, refused where damaged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save
from torch import Tensor

import safeft
from safeft import NeuronSet, SafetySubspace
from safeft.errors import ArtefactError, FingerprintError, SelectionError
from safeft.files import sha256
from safeft.subspace import load_protected
from safeft.weights import CheckpointWeights
from tests.families import FAMILIES
from tests.models import tiny_model
from tests.spans import subspace_of

MODEL = tiny_model()
Q, K = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
READERS = {Q: "attention", K: "attention", DOWN: "mlp"}


def directions(attention: int = 3, mlp: int = 5, seed: int = 9) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {
        "attention": torch.randn(32, attention, generator=draw),
        "mlp": torch.randn(48, mlp, generator=draw),
    }


def small(model: Any = MODEL, **settings: Any) -> SafetySubspace:
    return SafetySubspace.of(model, directions(**settings), READERS, {"method": "by hand", "n": 3})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    small().save_pretrained(tmp_path / "span")
    return tmp_path / "span"


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, **changes: Tensor) -> None:
    """Other tensors, with a hash in config.json that fits them."""
    data = save(load_file(folder / "model.safetensors") | changes)
    (folder / "model.safetensors").write_bytes(data)
    edit_config(folder, lambda config: config.update(tensors_sha256=sha256(data)))


def test_a_basis_is_orthonormal_and_spans_what_was_given() -> None:
    given = directions()
    for name, inlet in READERS.items():
        basis = small().basis(name).double()
        assert small().basis(name).dtype == torch.float32
        assert basis.shape == given[inlet].shape
        rank = basis.shape[1]
        torch.testing.assert_close(basis.T @ basis, torch.eye(rank).double(), atol=1e-6, rtol=0)
        lost = given[inlet].double() - basis @ (basis.T @ given[inlet].double())
        assert lost.norm(dim=0).max() < 2e-3 * given[inlet].norm(dim=0).min()  # kept as float16


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e7])
def test_lengths_of_the_directions_do_not_matter(scale: float) -> None:
    """Float16 ends at 65504 and at 6e-8; directions do not."""
    given = directions()
    scales = {inlet: scale * torch.arange(1, d.shape[1] + 1) for inlet, d in given.items()}
    scaled = {inlet: d * scales[inlet] for inlet, d in given.items()}
    found = SafetySubspace.of(MODEL, scaled, READERS)
    for name in READERS:
        one, other = found.basis(name), small().basis(name)
        torch.testing.assert_close(one @ one.T, other @ other.T, atol=2e-3, rtol=0)


def test_the_share_weighs_ranks_by_outputs() -> None:
    """q reads 32 and writes 32, k 32 and 16, down 48 and 32; 3 and 5 directions are held."""
    assert small().outputs == {Q: 32, K: 16, DOWN: 32}
    held, whole = 3 * 32 + 3 * 16 + 5 * 32, 32 * 32 + 32 * 16 + 48 * 32
    assert small().share == held / whole


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "qwen2_moe"])
def test_it_comes_back_bit_by_bit(name: str, tmp_path: Path) -> None:
    model = next(family for family in FAMILIES if family.name == name).build()
    found = subspace_of(model)
    found.save_pretrained(tmp_path)
    back = SafetySubspace.from_pretrained(tmp_path)
    assert back.hash == found.hash
    assert (back.readers, back.outputs, back.digests) == (
        found.readers, found.outputs, found.digests,
    )  # fmt: skip
    assert (back.model, back.source, back.share) == (found.model, found.source, found.share)
    for weight in found.readers:
        assert torch.equal(back.basis(weight), found.basis(weight))
    back.check_model(model)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["README.md", "config.json", "model.safetensors"]
    back.save_pretrained(tmp_path)  # its own folder may be written again


def test_the_tokens_it_was_found_on_are_kept_sorted_and_once(tmp_path: Path) -> None:
    given = torch.tensor([7, 3, 200, 3])
    found = SafetySubspace.of(MODEL, directions(), READERS, tokens=given)
    assert found.tokens.tolist() == [3, 7, 200]
    assert small().tokens.tolist() == []
    assert found.hash != small().hash
    assert found.at_random().tokens.tolist() == [3, 7, 200]
    found.save_pretrained(tmp_path)
    back = SafetySubspace.from_pretrained(tmp_path)
    assert torch.equal(back.tokens, found.tokens)
    assert back.hash == found.hash


def test_the_card_says_that_it_is_sensitive(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    assert "Sensitive" in card
    assert "3 linear layers" in card
    assert f"{small().share:.0%} of their rank" in card


def test_the_hash_names_directions_readers_and_weights() -> None:
    known = {small().hash}
    assert small().hash in known
    others = [
        small(seed=1),
        small(attention=2),
        SafetySubspace.of(MODEL, directions(), {Q: "attention", DOWN: "mlp"}),
        small(tiny_model(seed=1)),
        small().at_random(),
        small().at_random(1),
    ]
    known |= {other.hash for other in others}
    assert len(known) == 7


def test_the_control_has_the_same_ranks_and_other_directions() -> None:
    found, drawn, again = small(), small().at_random(), small().at_random()
    assert {i: d.shape for i, d in drawn.directions.items()} == {
        i: d.shape for i, d in found.directions.items()
    }
    assert drawn.hash == again.hash != small().at_random(1).hash
    assert drawn.share == found.share
    assert drawn.source == {"method": "random", "seed": 0, "ranks_of": dict(found.source)}
    for name, inlet in READERS.items():
        basis = drawn.basis(name)
        rank = basis.shape[1]
        torch.testing.assert_close(basis.T @ basis, torch.eye(rank), atol=1e-5, rtol=0)
        overlap = (basis.T @ found.basis(name)).square().sum() / rank
        assert overlap < 4 * rank / found.directions[inlet].shape[0]
    drawn.check_model(MODEL)


@pytest.mark.parametrize(
    ("given", "readers", "words"),
    [
        ({"attention": torch.zeros(32, 0)}, {Q: "attention"}, "32 inputs, of which 0 .* 1 and 31"),
        ({"attention": torch.eye(32)}, {Q: "attention"}, "of which 32 directions .*learn with"),
        ({"attention": torch.ones(32)}, {Q: "attention"}, r"a basis of shape \(32,\)"),
        ({"mlp": torch.ones(32, 2)}, {DOWN: "mlp"}, r"48 inputs, .*shape \(32, 2\)"),
        ({"mlp": torch.ones(48, 2)}, {"model.layers.9.up": "mlp"}, "no linear layer 'model.layers"),
        ({"mlp": torch.ones(48, 2)}, {"model.norm.weight": "mlp"}, "no linear layer 'model.norm"),
        ({"mlp": torch.ones(48, 2)}, {DOWN: "mpl"}, "said to receive 'mpl'.* given of mlp"),
        ({"mlp": torch.zeros(48, 2)}, {DOWN: "mlp"}, "some are zero or not finite"),
        ({"mlp": torch.full((48, 2), torch.nan)}, {DOWN: "mlp"}, "some are zero or not finite"),
        ({}, {}, "names no layer.*look like protection"),
    ],
)  # fmt: skip
def test_what_would_hold_nothing_or_everything_is_refused(
    given: Any, readers: Any, words: str
) -> None:
    with pytest.raises(SelectionError, match=words):
        SafetySubspace.of(MODEL, given, readers)


# --- of which model -----------------------------------------------------------------------------


def test_it_fits_its_own_model_and_an_adapter_on_it() -> None:
    small().check_model(tiny_model())
    small().check_model(tiny_model().to(torch.bfloat16))
    small().check_model(get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])))


@pytest.mark.parametrize("weights_too", [True, False])
def test_another_model_is_refused(weights_too: bool) -> None:
    for other in (tiny_model(intermediate_size=64), tiny_model("mistral", num_hidden_layers=3)):
        with pytest.raises(FingerprintError, match="other weights or shapes"):
            small().check_model(other, weights_too=weights_too)


def test_another_checkpoint_is_refused_unless_shapes_are_enough() -> None:
    other = tiny_model(seed=1)
    with pytest.raises(FingerprintError, match=rf"3 of 3 weights \({Q}\).*Locate in this check"):
        small().check_model(other)
    small().check_model(other, weights_too=False)


def test_only_its_own_weights_count(tmp_path: Path) -> None:
    tuned = tiny_model()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name not in READERS:
                parameter += 1
    small().check_model(tuned)
    with torch.no_grad():
        tuned.get_parameter(DOWN)[31] += 1
    with pytest.raises(FingerprintError, match=rf"1 of 3 weights \({DOWN}\)"):
        small().check_model(tuned)
    tuned.save_pretrained(tmp_path)
    with CheckpointWeights(tmp_path) as weights:
        assert small().moved(weights) == [DOWN]
        with pytest.raises(FingerprintError, match="are not in the base what they were"):
            small().check_weights(weights, "the base")


def test_a_weight_that_is_not_there_is_said(tmp_path: Path) -> None:
    tiny_model(num_hidden_layers=1).save_pretrained(tmp_path)
    with (
        CheckpointWeights(tmp_path) as weights,
        pytest.raises(FingerprintError, match=f"no weight '{DOWN}'.*locate in this one"),
    ):
        small().moved(weights)


# --- damaged artefacts --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_an_error(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ArtefactError, match="readable|incomplete"):
        SafetySubspace.from_pretrained(folder)


@pytest.mark.parametrize("length", [0, 1, 40, -1])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_truncated_file_is_an_error(folder: Path, name: str, length: int) -> None:
    whole = (folder / name).read_bytes().rstrip()
    (folder / name).write_bytes(whole[:length])
    with pytest.raises(ArtefactError, match="truncated"):
        SafetySubspace.from_pretrained(folder)


def test_an_edited_basis_is_an_error(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1  # one bit of one direction
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(ArtefactError, match="is not the file that was saved"):
        SafetySubspace.from_pretrained(folder)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda c: c.update(safeft=2), "no safety subspace of schema 1 .*schema 2"),
        (lambda c: c.pop("safeft"), "schema None"),
        (lambda c: c.update(kind="NeuronSet"), "kind: 'NeuronSet'"),
        (lambda c: c.update(tensors_sha256="0" * 64), "is not the file that was saved"),
        (lambda c: c.pop("base_model"), "incomplete or edited"),
        (lambda c: c["base_model"].update(units=None), "incomplete or edited"),
        (lambda c: c["ranks"].update(more=[3, 1]), "incomplete or edited"),
        (lambda c: c["ranks"].pop("mlp"), "names inputs or weights that it does not hold"),
        (lambda c: c["readers"].update({DOWN: "nowhere"}), "names inputs or weights"),
        (lambda c: c["digests"].pop(Q), "names inputs or weights"),
        (lambda c: c["outputs"].pop(Q), "names inputs or weights"),
        (lambda c: c["readers"].pop(Q), "names inputs or weights"),
        (lambda c: c["outputs"].update({Q: "many"}), "incomplete or edited"),
        (lambda c: c.update(readers={}), "incomplete or edited"),
        (lambda c: c.update(readers=[1]), "incomplete or edited"),
        (lambda c: c.update(source="me"), "incomplete or edited"),
    ],
)
def test_an_edited_config_is_an_error(folder: Path, edit: Callable, words: str) -> None:
    edit_config(folder, edit)
    with pytest.raises(ArtefactError, match=words):
        SafetySubspace.from_pretrained(folder)


@pytest.mark.parametrize(
    "wrong", [torch.eye(48), torch.zeros(48, 0), torch.ones(48), torch.tensor(1.0)]
)
def test_a_basis_that_fits_its_hash_but_is_none(folder: Path, wrong: Tensor) -> None:
    edit_tensors(folder, mlp=wrong.half())
    with pytest.raises(ArtefactError, match="incomplete or edited"):
        SafetySubspace.from_pretrained(folder)


def test_a_file_that_fits_its_hash_but_is_no_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"something else")
    edit_config(folder, lambda config: config.update(tensors_sha256=sha256(b"something else")))
    with pytest.raises(ArtefactError, match="incomplete or edited"):
        SafetySubspace.from_pretrained(folder)


def test_an_edited_layout_fits_no_model(folder: Path) -> None:
    edit_config(folder, lambda config: config["base_model"].update(layout="0"))
    with pytest.raises(FingerprintError, match="other weights or shapes"):
        SafetySubspace.from_pretrained(folder).check_model(MODEL)


def test_nothing_else_is_written_over(tmp_path: Path) -> None:
    MODEL.save_pretrained(tmp_path / "model")
    NeuronSet.of(MODEL, {"model.layers.0.mlp": (1,)}).save_pretrained(tmp_path / "set")
    for place in ("model", "set"):
        before = {path.name: path.read_bytes() for path in (tmp_path / place).iterdir()}
        with pytest.raises(ArtefactError, match="something else"):
            small().save_pretrained(tmp_path / place)
        after = {path.name: path.read_bytes() for path in (tmp_path / place).iterdir()}
        assert after == before
    small().save_pretrained(tmp_path / "span")
    with pytest.raises(ArtefactError, match="something else"):
        NeuronSet.of(MODEL, {}).save_pretrained(tmp_path / "span")


# --- of either kind -----------------------------------------------------------------------------


def test_what_is_protected_is_loaded_by_its_kind(folder: Path, tmp_path: Path) -> None:
    neurons = NeuronSet.of(MODEL, {"model.layers.0.mlp": (1,)})
    neurons.save_pretrained(tmp_path / "set")
    assert load_protected(tmp_path / "set") == neurons
    found = load_protected(folder)
    assert isinstance(found, SafetySubspace)
    assert found.hash == small().hash
    assert isinstance(load_protected(str(folder)), SafetySubspace)


def test_one_kind_is_not_taken_for_the_other(folder: Path, tmp_path: Path) -> None:
    NeuronSet.of(MODEL, {"model.layers.0.mlp": (1,)}).save_pretrained(tmp_path / "set")
    with pytest.raises(ArtefactError, match="no safety subspace.*'NeuronSet'.*--method subspace"):
        SafetySubspace.from_pretrained(tmp_path / "set")
    with pytest.raises(ArtefactError, match="not a neuron set .*'SafetySubspace'"):
        NeuronSet.from_pretrained(folder)
    MODEL.save_pretrained(tmp_path / "model")
    for place in ("model", "nowhere"):
        with pytest.raises(ArtefactError):
            load_protected(tmp_path / place)
    edit_config(folder, lambda config: config.update(kind="UnitGroups"))
    with pytest.raises(ArtefactError, match="four groups"):
        load_protected(folder)


def test_the_callback_takes_a_folder_of_either_kind_and_not_two_of_one(
    folder: Path, tmp_path: Path
) -> None:
    neurons = NeuronSet.of(MODEL, {"model.layers.0.mlp": (1,)})
    neurons.save_pretrained(tmp_path / "set")
    alone = safeft.SafetyFreezeCallback(folder)
    assert alone.neurons is None
    assert alone.subspace.hash == small().hash
    both = safeft.SafetyFreezeCallback(tmp_path / "set", subspace=str(folder))
    assert (both.neurons, both.subspace.hash) == (neurons, small().hash)
    with pytest.raises(safeft.SafeftError, match="Two subspaces are given"):
        safeft.SafetyFreezeCallback(folder, subspace=folder)
    with pytest.raises(ArtefactError, match="no safety subspace"):
        safeft.SafetyFreezeCallback(folder, subspace=tmp_path / "set")

import doctest
import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save, save_file

import safeft.neurons
from safeft.errors import ArtefactError, FingerprintError, SafeftError, SelectionError
from safeft.files import sha256
from safeft.fingerprint import ModelFingerprint
from safeft.neurons import NeuronSet
from safeft.sites import find_sites
from safeft.subspace import SafetySubspace
from safeft.weights import CheckpointWeights
from tests.models import MODEL_TYPES, tiny_model

MLP0, MLP1, HEADS = "model.layers.0.mlp", "model.layers.1.mlp", "model.layers.1.self_attn"
MODEL = tiny_model()


def neurons(**units: tuple[int, ...]) -> NeuronSet:
    names = {"mlp0": MLP0, "mlp1": MLP1, "heads": HEADS}
    return NeuronSet.of(MODEL, {names[key]: value for key, value in units.items()})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    neurons(mlp0=(3, 7), heads=(1,)).save_pretrained(tmp_path / "set")
    return tmp_path / "set"


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, **changes: torch.Tensor) -> None:
    """Other tensors, with a hash and counts in config.json that fit them."""
    tensors = load_file(folder / "model.safetensors") | changes
    data = save(tensors)
    (folder / "model.safetensors").write_bytes(data)
    counts = {key.removesuffix(".indices"): len(value)
              for key, value in tensors.items() if key.endswith(".indices")}  # fmt: skip

    def fit(config: dict[str, Any]) -> None:
        config.update(tensors_sha256=sha256(data), counts=counts, count=sum(counts.values()))

    edit_config(folder, fit)


def test_of_sorts_and_drops_what_is_double_or_empty() -> None:
    found = NeuronSet.of(MODEL, {HEADS: torch.tensor([2, 0]), MLP1: [], MLP0: (7, 3, 7)})
    assert found.indices == {MLP0: (3, 7), HEADS: (0, 2)}
    assert list(found.indices) == [MLP0, HEADS]
    assert {name: len(digests) for name, digests in found.digests.items()} == {MLP0: 2, HEADS: 2}
    assert found.source == {"method": "given"}
    assert found.units_of(MLP0).tolist() == [3, 7]
    assert found.units_of(MLP1).tolist() == []
    assert found.units_of(MLP1).dtype == torch.long


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ({MLP0: [48]}, "has units 0 to 47, but the set names unit 48"),
        ({MLP0: [-1, 3]}, "names unit -1"),
        ({HEADS: [4]}, "has units 0 to 3"),
        ({"model.layers.2.mlp": [0]}, "no site 'model.layers.2.mlp'; its sites are model.layers.0"),
    ],
)
def test_of_refuses_what_the_model_does_not_have(indices: dict, message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        NeuronSet.of(MODEL, indices)


def test_algebra_is_that_of_sets() -> None:
    one, two = neurons(mlp0=(1, 2, 3), heads=(0,)), neurons(mlp0=(2, 3, 4), mlp1=(9,))
    assert (one | two).indices == {MLP0: (1, 2, 3, 4), MLP1: (9,), HEADS: (0,)}
    assert (one & two).indices == {MLP0: (2, 3)}
    assert (one - two).indices == {MLP0: (1,), HEADS: (0,)}
    assert (two - two).indices == {}
    assert [len(each) for each in (one, one | two, one & two, one - two, two - two)] == [
        4, 6, 2, 2, 0,
    ]  # fmt: skip
    for made in (one | two, one & two, one - two):
        assert made.digests == NeuronSet.of(MODEL, made.indices).digests
        assert made.hash == NeuronSet.of(MODEL, made.indices).hash
        made.check_model(MODEL)
    assert (one | two).source == {"method": "|", "of": [dict(one.source), dict(two.source)]}


def test_membership() -> None:
    some = neurons(mlp0=(1, 2))
    assert (MLP0, 2) in some
    assert (MLP0, 3) not in some
    assert (MLP1, 2) not in some
    assert MLP0 not in some
    assert 2 not in some


def test_the_hash_names_neurons_and_weights() -> None:
    base = neurons(mlp0=(1, 2))
    assert base.hash == neurons(mlp0=(2, 1)).hash
    assert base.hash != neurons(mlp0=(1, 3)).hash
    assert base.hash != neurons(mlp1=(1, 2)).hash
    assert base.hash != NeuronSet.of(tiny_model(seed=1), {MLP0: (1, 2)}).hash


def test_sets_of_unlike_models_cannot_be_combined() -> None:
    other = tiny_model(intermediate_size=64)
    with pytest.raises(FingerprintError, match="Sets of unlike models"):
        neurons(mlp0=(1,)) | NeuronSet.of(other, {MLP0: (1,)})


@pytest.mark.parametrize("sign", ["__or__", "__and__", "__sub__"])
def test_sets_of_unlike_checkpoints_cannot_be_combined(sign: str) -> None:
    other = NeuronSet.of(tiny_model(seed=1), {MLP0: (2,)})
    with pytest.raises(FingerprintError, match=rf"{MLP0}#2 has other weights"):
        getattr(neurons(mlp0=(1, 2)), sign)(other)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_set_comes_back_as_it_was(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    source = {"method": "contrast", "fraction": 0.05, "of": None, "calibration": {"n": 3}}
    found = NeuronSet.of(model, {MLP1: (0, 47), HEADS: (3,)}, source)
    found.save_pretrained(tmp_path / "set")
    back = NeuronSet.from_pretrained(tmp_path / "set")
    assert back == found
    assert back.hash == found.hash
    back.check_model(model)
    assert sorted(contents(tmp_path / "set")) == ["README.md", "config.json", "model.safetensors"]


def test_made_sets_come_back_too_and_saving_again_replaces(tmp_path: Path) -> None:
    both = neurons(mlp0=(1, 2)) | neurons(mlp0=(2, 3), heads=(0,))
    for made in (both, both - neurons(heads=(0,)), both & neurons(mlp0=(1,)), both - both):
        made.save_pretrained(tmp_path)
        assert NeuronSet.from_pretrained(tmp_path) == made


def test_the_card_says_that_the_set_is_sensitive(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    assert "Sensitive" in card
    assert "3 neurons" in card


def test_the_fingerprint_of_a_model(tmp_path: Path) -> None:
    here = ModelFingerprint.of(MODEL)
    assert (here.model_type, here.units) == ("llama", {
        "model.layers.0.mlp": 48, "model.layers.0.self_attn": 4, MLP1: 48, HEADS: 4,
    })  # fmt: skip
    with torch.device("meta"):
        assert ModelFingerprint.of(tiny_model()) == here
    assert ModelFingerprint.of(tiny_model(seed=1)) == here
    tuned = get_peft_model(tiny_model(), LoraConfig(target_modules=["up_proj", "o_proj"]))
    assert ModelFingerprint.of(tuned) == here
    unlike = [{"intermediate_size": 56}, {"num_key_value_heads": 4}, {"attention_bias": True},
              {"num_hidden_layers": 3}, {"hidden_size": 40}]  # fmt: skip
    layouts = {ModelFingerprint.of(tiny_model(**settings)).layout for settings in unlike}
    assert len(layouts | {here.layout}) == 6


def test_a_set_fits_its_own_model_and_an_adapter_on_it() -> None:
    found = neurons(mlp0=(1,), heads=(2,))
    found.check_model(tiny_model())
    found.check_model(get_peft_model(tiny_model(), LoraConfig(target_modules=["up_proj"])))


@pytest.mark.parametrize("weights_too", [True, False])
def test_a_model_of_other_shapes_is_refused(weights_too: bool) -> None:
    for other in (tiny_model(intermediate_size=64), tiny_model("mistral", num_hidden_layers=3)):
        with pytest.raises(FingerprintError, match="other weights or shapes"):
            neurons(mlp0=(1,)).check_model(other, weights_too=weights_too)


def test_other_weights_are_refused_unless_shapes_are_enough() -> None:
    other = tiny_model(seed=1)
    with pytest.raises(FingerprintError, match=rf"2 of 2 neurons \({MLP0}#1, {HEADS}#2\)"):
        neurons(mlp0=(1,), heads=(2,)).check_model(other)
    neurons(mlp0=(1,), heads=(2,)).check_model(other, weights_too=False)


def test_only_the_neurons_own_weights_count() -> None:
    found = neurons(mlp0=(1,), heads=(2,))
    tuned = tiny_model()
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "layers.0.mlp.up_proj" in name:
                parameter[2:] += 1
            elif "self_attn" not in name and "mlp" not in name:
                parameter += 1
    found.check_model(tuned)
    with torch.no_grad():
        tuned.get_parameter(f"{MLP0}.up_proj.weight")[1, 0] += 1
    with pytest.raises(FingerprintError, match=rf"1 of 2 neurons \({MLP0}#1\)"):
        found.check_model(tuned)


def test_moved_reads_a_checkpoint_too(tmp_path: Path) -> None:
    tuned = tiny_model()
    with torch.no_grad():
        tuned.get_parameter(f"{MLP0}.down_proj.weight")[5, 7] += 1
    tuned.save_pretrained(tmp_path)
    with CheckpointWeights(tmp_path) as weights:
        assert neurons(mlp0=(3, 7), heads=(0,)).moved(weights, find_sites(MODEL)) == [(MLP0, 7)]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_an_error(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ArtefactError, match="readable|incomplete"):
        NeuronSet.from_pretrained(folder)


@pytest.mark.parametrize("length", [0, 1, 40, -1])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_truncated_file_is_an_error(folder: Path, name: str, length: int) -> None:
    whole = (folder / name).read_bytes().rstrip()
    (folder / name).write_bytes(whole[:length])
    with pytest.raises(ArtefactError, match=r"truncated"):
        NeuronSet.from_pretrained(folder)


def test_edited_tensors_are_an_error(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{MLP0}.indices"][0] = 2
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ArtefactError, match="is not the file that was saved"):
        NeuronSet.from_pretrained(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(safeft=2), "has schema 2; this safeft reads 1"),
        (lambda c: c.pop("safeft"), "has schema None"),
        (lambda c: c.update(kind="SafetySubspace"), "is not a neuron set"),
        (lambda c: c.pop("kind"), "is not a neuron set"),
        (lambda c: c.update(count=9), "says 9 neurons, the tensors hold 3"),
        (lambda c: c["counts"].pop(HEADS), "edited"),
        (lambda c: c["counts"].update({MLP0: 1}), "edited"),
        (lambda c: c["counts"].update({MLP1: 1}), "incomplete or edited"),
        (lambda c: c.update(counts=3), "incomplete or edited"),
        (lambda c: c.update(tensors_sha256="0" * 64), "is not the file that was saved"),
        (lambda c: c.pop("base_model"), "incomplete or edited"),
        (lambda c: c["base_model"].update(units=None), "incomplete or edited"),
        (lambda c: c["base_model"]["units"].update({MLP0: 5}), "names unit 7"),
        (lambda c: c["base_model"]["units"].pop(MLP0), "names unit 7"),
        (lambda c: c.update(source="me"), "incomplete or edited"),
    ],
)
def test_an_edited_config_is_an_error(folder: Path, edit: Callable, message: str) -> None:
    edit_config(folder, edit)
    with pytest.raises(ArtefactError, match=message):
        NeuronSet.from_pretrained(folder)


@pytest.mark.parametrize("content", [b"[1]", b"not json", b"\xff\xfe"])
def test_a_config_of_another_kind_is_an_error(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ArtefactError, match=r"config\.json"):
        NeuronSet.from_pretrained(folder)


def test_an_edited_layout_or_number_of_units_fits_no_model(folder: Path) -> None:
    edit_config(folder, lambda config: config["base_model"].update(layout="0"))
    with pytest.raises(FingerprintError, match="other weights or shapes"):
        NeuronSet.from_pretrained(folder).check_model(MODEL)


@pytest.mark.parametrize("weights_too", [True, False])
def test_units_out_of_range_never_reach_a_model(folder: Path, weights_too: bool) -> None:
    edit_tensors(folder, **{f"{MLP0}.indices": torch.tensor([3, 400])})
    with pytest.raises(ArtefactError, match="units 0 to 47, but the set names unit 400"):
        NeuronSet.from_pretrained(folder)
    edit_config(folder, lambda config: config["base_model"]["units"].update({MLP0: 1000}))
    with pytest.raises(FingerprintError, match="other weights or shapes"):
        NeuronSet.from_pretrained(folder).check_model(MODEL, weights_too=weights_too)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.tensor([-1, 3]),
        torch.tensor([7, 3]),
        torch.tensor([3, 3]),
        torch.tensor([3.0, 7.5]),
        torch.tensor([[3], [7]]),
        torch.tensor([1, 2, 3]),
    ],
)
def test_numbers_that_fit_their_hash_but_are_wrong(folder: Path, wrong: torch.Tensor) -> None:
    edit_tensors(folder, **{f"{MLP0}.indices": wrong})
    with pytest.raises(ArtefactError):
        NeuronSet.from_pretrained(folder)


def test_a_file_that_fits_its_hash_but_is_no_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"something else")
    edit_config(folder, lambda config: config.update(tensors_sha256=sha256(b"something else")))
    with pytest.raises(ArtefactError, match="incomplete or edited"):
        NeuronSet.from_pretrained(folder)


def test_a_model_folder_is_not_written_into(tmp_path: Path) -> None:
    MODEL.save_pretrained(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ArtefactError, match="holds a model"):
        neurons(mlp0=(1,)).save_pretrained(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "README.md"])
def test_a_stranger_file_of_a_name_we_use_is_not_overwritten(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(ArtefactError, match=name):
        neurons(mlp0=(1,)).save_pretrained(tmp_path)
    assert contents(tmp_path) == {name: b"{}"}


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "set").write_text("mine")
    for place in (tmp_path / "set", tmp_path / "set" / "below"):
        with pytest.raises(SafeftError, match="set"):
            neurons(mlp0=(1,)).save_pretrained(place)
    assert contents(tmp_path) == {"set": b"mine"}


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("written", [0, 1, 2])
def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool, written: int
) -> None:
    folder, old = tmp_path / "set", neurons(mlp0=(3, 7))
    if existing:
        old.save_pretrained(folder)
    before, real = contents(tmp_path), os.fsync
    calls = iter(range(10))

    def fsync(number: int) -> None:
        if next(calls) >= written:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(ArtefactError, match="No space left on device"):
        neurons(mlp1=(1, 2)).save_pretrained(folder)
    assert contents(tmp_path) == before
    assert folder.exists() == existing
    if existing:
        assert NeuronSet.from_pretrained(folder) == old


def test_a_disk_that_opens_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ArtefactError, match="No space left on device"):
        neurons(mlp0=(1,)).save_pretrained(tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_settings_that_are_no_json_write_nothing(tmp_path: Path) -> None:
    found = NeuronSet.of(MODEL, {MLP0: (1,)}, {"method": object()})
    with pytest.raises(TypeError):
        found.save_pretrained(tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_pushing_is_private_unless_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    class Api:
        def create_repo(self, repo_id: str, **settings: Any) -> None:
            calls.append((repo_id, settings))

        def upload_folder(self, *, repo_id: str, folder_path: str) -> None:
            shutil.copytree(folder_path, tmp_path / "hub")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    found = neurons(mlp0=(1,))
    found.push_to_hub("me/neurons")
    assert calls == [("me/neurons", {"private": True, "exist_ok": True})]
    assert NeuronSet.from_pretrained(tmp_path / "hub") == found
    shutil.rmtree(tmp_path / "hub")
    model = tiny_model()
    gate = "model.layers.0.mlp.gate_proj.weight"
    features = model.get_submodule(gate.removesuffix(".weight")).in_features
    subspace = SafetySubspace.of(model, {"in": torch.eye(features)[:, :3]}, {gate: "in"})
    subspace.push_to_hub("me/subspace", private=False)
    assert calls[1] == ("me/subspace", {"private": False, "exist_ok": True})
    assert SafetySubspace.from_pretrained(tmp_path / "hub").hash == subspace.hash


def test_examples_run() -> None:
    assert doctest.testmod(safeft.neurons).failed == 0

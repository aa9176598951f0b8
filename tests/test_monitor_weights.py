"""Neurons' weights in use, against the set's digests and a certificate's hashes."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from safeft import verify
from safeft.errors import ArtefactError, ConfigError, FingerprintError
from safeft.freeze.certificate import CERTIFICATE_NAME, Certificate
from safeft.monitor.weights import moved_weights
from safeft.neurons import NeuronSet
from tests.freezing import freeze, lora, trainer_of
from tests.models import tiny_model

CHOSEN = {"model.layers.0.mlp": (1, 7, 30), "model.layers.1.self_attn": (2,)}
MLP = "model.layers.0.mlp"


def neurons() -> NeuronSet:
    return NeuronSet.of(tiny_model(), CHOSEN)


def certified(folder: Path) -> Certificate:
    """By ``verify``, of the base with itself."""
    tiny_model().save_pretrained(folder)
    return verify(folder, folder, neurons())


def test_an_untouched_model_passes(tmp_path: Path) -> None:
    certificate = certified(tmp_path)
    certificate.save(tmp_path)
    for given in (None, certificate, tmp_path, tmp_path / CERTIFICATE_NAME):
        assert moved_weights(tiny_model(), neurons(), given) == []


@pytest.mark.parametrize("part", ["gate_proj", "up_proj", "down_proj"])
def test_one_weight_names_its_neuron(part: str, tmp_path: Path) -> None:
    model, certificate = tiny_model(), certified(tmp_path)
    weight = model.get_submodule(f"{MLP}.{part}").weight
    with torch.no_grad():
        (weight[:, 7] if part == "down_proj" else weight[7])[3] += 0.01
    assert moved_weights(model, neurons()) == [f"{MLP}#7"]
    axis = "columns" if part == "down_proj" else "rows"
    found = moved_weights(model, neurons(), certificate)
    assert found == [f"{MLP}#7", f"{MLP}.{part}.weight {axis}"]


def test_what_lies_elsewhere_is_not_asked_after() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.get_submodule(f"{MLP}.up_proj").weight[8] += 1
    assert moved_weights(model, neurons()) == []


def test_a_change_below_bfloat16_is_seen_by_the_certificate_alone(tmp_path: Path) -> None:
    model, certificate = tiny_model(), certified(tmp_path)
    with torch.no_grad():
        model.get_submodule(f"{MLP}.up_proj").weight[7, 3] *= 1 + 2**-22
    assert moved_weights(model, neurons()) == []
    assert moved_weights(model, neurons(), certificate) == [f"{MLP}.up_proj.weight rows"]


def test_a_trainings_own_certificate_fits_what_it_trained(tmp_path: Path) -> None:
    model = tiny_model()
    found = NeuronSet.of(model, CHOSEN)
    freezing = freeze(model, CHOSEN)
    trainer_of("Trainer", model, tmp_path, [freezing]).train()
    assert moved_weights(model, found, freezing.certificate) == []
    with torch.no_grad():
        model.get_submodule(f"{MLP}.down_proj").weight[0, 1] += 1
    assert moved_weights(model, found, freezing.certificate) == [
        f"{MLP}#1",
        f"{MLP}.down_proj.weight columns",
    ]


def test_a_wider_type_than_was_certified_is_rounded_first(tmp_path: Path) -> None:
    rounded = tiny_model().to(torch.bfloat16)
    rounded.save_pretrained(tmp_path)
    certificate = verify(tmp_path, tmp_path, neurons())
    assert moved_weights(deepcopy(rounded).float(), neurons(), certificate) == []
    assert len(moved_weights(tiny_model(seed=1), neurons(), certificate)) > 4


def test_an_adapter_hides_what_neurons_weigh() -> None:
    with pytest.raises(ConfigError, match="carries an adapter"):
        moved_weights(get_peft_model(tiny_model(), lora()), neurons())


def test_certificates_that_do_not_speak_of_these_neurons(tmp_path: Path) -> None:
    model, certificate = tiny_model(), certified(tmp_path)
    other = NeuronSet.of(model, {MLP: (2,)})
    with pytest.raises(FingerprintError, match="another set"):
        moved_weights(model, other, certificate)
    path = tmp_path / "edited.json"
    for changes, error, message in (
        ({"mode": "train_only"}, ConfigError, "trained these"),
        ({"slices": []}, ConfigError, "says nothing of"),
        ({"safeft_certificate": 9}, ArtefactError, "schema 9"),
        ({"neurons": None}, ArtefactError, "no certificate"),
    ):
        data: Any = {**certificate.to_dict(), **changes}
        path.write_text(json.dumps(data))
        with pytest.raises(error, match=message):
            moved_weights(model, neurons(), path)
    path.write_text("{")
    with pytest.raises(ArtefactError, match="cannot be read as a certificate"):
        moved_weights(model, neurons(), path)
    with pytest.raises(ArtefactError, match="cannot be read"):
        moved_weights(model, neurons(), tmp_path / "nothing.json")

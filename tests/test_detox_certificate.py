"""The fold's certificate sees every other change; it and the freeze's agree on what moved."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from safeft import Dampener, NeuronSet, SafetyFreezeCallback, verify
from safeft.detox.certificate import certify_fold
from safeft.detox.folding import fold
from safeft.errors import ArtefactError, FingerprintError
from tests.freezing import model_of, neurons_of, trainer_of
from tests.models import tiny_model

SITE = "model.layers.1.mlp"


def folded() -> tuple[Any, Any, Dampener]:
    base = tiny_model()
    model, dampener = deepcopy(base), Dampener.of(base, {SITE: {3: 0.0, 9: 0.4}})
    fold(model, dampener)
    return base, model, dampener


def test_what_it_says(tmp_path: Path) -> None:
    base, model, dampener = folded()
    certificate = certify_fold(base, model, dampener)
    assert certificate.exact
    (scaled,) = certificate.scaled
    assert scaled["tensor"] == f"{SITE}.down_proj.weight"
    assert (scaled["axis"], scaled["count"]) == ("columns", 2)
    assert certificate.untouched["count"] == len(list(base.parameters())) - 1
    assert certificate.dampener == {
        "sha256": dampener.hash, "units": 2, "rule": None, "strength": None,
    }  # fmt: skip
    certificate.save(tmp_path)
    saved = json.loads((tmp_path / "safeft_fold_certificate.json").read_text())
    assert saved["exact"]
    assert "EXACT: 2 units dampened by 2 scaled rows and columns" in certificate.summary()


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.embed_tokens.weight", (7, 3)),
        (f"{SITE}.down_proj.weight", (5, 4)),  # a column that has no gain
        (f"{SITE}.down_proj.weight", (5, 9)),  # one that has
        (f"{SITE}.up_proj.weight", (9, 1)),  # what a dampened unit reads with
    ],
)
def test_one_number_more_is_seen(name: str, place: tuple[int, int]) -> None:
    base, model, dampener = folded()
    with torch.no_grad():
        weight = model.get_parameter(name)
        weight[place] = torch.nextafter(weight[place], torch.tensor(torch.inf))
    certificate = certify_fold(base, model, dampener)
    assert not certificate.exact
    (violation,) = certificate.violations
    assert (violation.tensor, violation.index, violation.changed) == (name, place[0], 1)
    assert "VIOLATED" in certificate.summary()


def test_gains_that_were_not_put_in_are_seen() -> None:
    base, _, dampener = folded()
    assert not certify_fold(base, deepcopy(base), dampener).exact


def test_other_weights_are_no_fold() -> None:
    base, model, dampener = folded()
    with pytest.raises(ArtefactError, match="has shape"):
        certify_fold(base, tiny_model(vocab_size=300), dampener)
    with pytest.raises(ArtefactError, match="other weights"):
        certify_fold(base, tiny_model(num_hidden_layers=3), dampener)
    with pytest.raises(ArtefactError, match="nor in the hub's cache"):
        certify_fold(base, "no/such", dampener)
    narrow = tiny_model(intermediate_size=40)
    with pytest.raises(FingerprintError):
        certify_fold(narrow, deepcopy(narrow), dampener)
    assert model is not base


def test_folding_after_a_protected_run_moves_what_both_certificates_say(tmp_path: Path) -> None:
    """The freeze held; the fold then moves one held neuron's column, and both name it."""
    base = model_of()
    neurons, model = neurons_of(base), deepcopy(base)
    trainer_of("Trainer", model, tmp_path, [SafetyFreezeCallback(neurons)]).train()
    assert verify(base, model, neurons).exact
    tuned, site = deepcopy(model), "model.layers.0.mlp"
    dampener = Dampener.of(model, {site: {7: 0.5, 8: 0.5}})  # 7 is held, 8 is not
    fold(model, dampener)
    folded = certify_fold(tuned, model, dampener)
    assert folded.exact
    certificate = verify(base, model, neurons)
    assert not certificate.exact
    (violation,) = certificate.violations
    assert (violation.neuron, violation.axis, violation.index) == (f"{site}#7", "columns", 7)
    assert [violation.tensor] == [each["tensor"] for each in folded.scaled]


def test_a_protected_run_after_folding_holds_the_fold(tmp_path: Path) -> None:
    """Units that are dampened and frozen stay as they were folded."""
    base, site = model_of(), "model.layers.0.mlp"
    model = deepcopy(base)
    fold(model, Dampener.of(base, {site: {7: 0.25}}))
    start, neurons = deepcopy(model), neurons_of(model)
    trainer_of("Trainer", model, tmp_path, [SafetyFreezeCallback(neurons)]).train()
    assert verify(start, model, neurons).exact
    column, was = (m.get_parameter(f"{site}.down_proj.weight")[:, 7] for m in (model, base))
    assert torch.equal(column, was * 0.25)
    with pytest.raises(FingerprintError):  # a set of the unfolded model names other weights
        neurons_of(base).check_model(start)


def test_units_apart_from_the_fold_are_known_after_it() -> None:
    base, model, _ = folded()
    NeuronSet.of(base, {SITE: [4, 5]}).check_model(model)

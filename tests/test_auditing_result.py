"""An audit is saved and read whole, and says where neurons are only if it is to."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from safeft.auditing.result import (
    AuditResult,
    Candidate,
    Distribution,
    Effect,
    Neuron,
    Side,
    Thresholds,
    Trial,
    retained,
)
from safeft.causal.effect import Outcome
from safeft.errors import ArtefactError
from safeft.intervals import Interval, Rate


def outcome(refused: int) -> Outcome:
    return Outcome(Rate.of(refused, 20), Rate.of(1, 20), 0.5, 0.25)


def candidate(name: str, unit: int, fall: float) -> Candidate:
    interval = Interval(fall - 0.5, fall + 0.5)
    return Candidate(
        Neuron(name, 1, "model.layers.1.mlp", unit),
        2.0,
        (
            Effect("zero", None, fall / 2, interval, 0.25, -0.125, 0.5),
            Effect("constant", -2.0, fall, interval, 0.75, 0.0, 0.001),
        ),
        Distribution((-1.0, 0.0, 1.0), (0.25, 0.75), (1.0, 0.0)) if name == "A1" else None,
    )


@pytest.fixture
def found() -> AuditResult:
    side = Side(
        20,
        4,
        (candidate("A1", 77, 8.0), candidate("A2", 31, 0.5)),
        (candidate("R1", 5, 0.0),),
        (Trial(("A1",), "constant", -2.0, outcome(2), (20.0, 19.0)),),
        1,
        (0.9, Interval(0.6, 1.0)),
        0.5,
        1.125,
    )
    model = {"name_or_path": "tiny", "type": "llama", "layout": "a", "weights": "b"}
    return AuditResult(
        "single-point", "A1 alone takes 0.90 of refusal away.", model, {"seed": 0}, Thresholds(),
        512, outcome(20), side, None, {"ranking": 1.5},
    )  # fmt: skip


def test_what_is_saved_is_read(found: AuditResult, tmp_path: Path) -> None:
    found.save(tmp_path / "made" / "audit.json")
    assert AuditResult.load(tmp_path / "made" / "audit.json") == found


def test_places_are_withheld_everywhere(found: AuditResult, tmp_path: Path) -> None:
    assert found.revealed
    hidden = found.withheld()
    assert not hidden.revealed
    hidden.save(tmp_path / "audit.json")
    text = (tmp_path / "audit.json").read_text()
    assert "model.layers" not in text
    assert "77" not in text
    assert json.loads(text)["revealed"] is False
    again = AuditResult.load(tmp_path / "audit.json")
    assert again == hidden
    assert again.refusal is not None
    assert again.refusal.candidates[0].neuron == Neuron("A1", 1)


def test_the_best_effect_is_the_largest_fall(found: AuditResult) -> None:
    assert found.refusal is not None
    assert found.refusal.candidates[0].best.kind == "constant"


def test_what_a_trial_left_is_of_the_base(found: AuditResult) -> None:
    assert found.refusal is not None
    assert retained(found.refusal.trials[0], found.base).value == 0.1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data.pop("refusal"), "KeyError"),
        (lambda data: data.update(safeft_audit=99), "schema 99"),
        (lambda data: data["refusal"]["candidates"][0].update(neuron={}), "TypeError"),
    ],
)
def test_an_edited_audit_is_refused(
    found: AuditResult, tmp_path: Path, change: object, said: str
) -> None:
    path = tmp_path / "audit.json"
    data = json.loads(json.dumps(replace(found).to_dict()))
    change(data)  # type: ignore[operator]
    path.write_text(json.dumps(data))
    with pytest.raises(ArtefactError, match=said):
        AuditResult.load(path)
    with pytest.raises(ArtefactError, match="FileNotFoundError"):
        AuditResult.load(tmp_path / "none.json")

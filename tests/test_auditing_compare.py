"""Two audits side by side, on made-up ones and on models of which one was changed."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from safeft.auditing.compare import AuditComparison, Change, compare
from safeft.auditing.result import AuditResult, Candidate, Effect, Neuron, Side, Thresholds
from safeft.causal.effect import Outcome
from safeft.errors import ArtefactError, FingerprintError
from safeft.intervals import Interval, Rate

MODEL = {"name_or_path": "tiny", "type": "llama", "layout": "a", "weights": "b"}


def candidate(number: int, unit: int, fall: float) -> Candidate:
    effect = Effect("constant", -2.0, fall, Interval(fall - 0.1, fall + 0.1), 0.0, 0.0, 0.001)
    return Candidate(Neuron(f"A{number}", 1, "model.layers.1.mlp", unit), 1.0, (effect,))


def result(falls: dict[int, float], smallest: int | None, verdict: Any, **more: Any) -> AuditResult:
    found = [candidate(n, unit, fall) for n, (unit, fall) in enumerate(falls.items(), 1)]
    largest = (max(falls.values()) / 10, Interval(0.0, 1.0))
    side = Side(20, 0, tuple(found), (), (), smallest, largest, 0.5, float(len(falls)))
    base = Outcome(Rate.of(20, 20), Rate.of(0, 20), 1.0, 1.0)
    settings = {"seed": 0, "judge": "prefix", "given": {"harmful": 1}, **more}
    return AuditResult(
        verdict, "Because.", MODEL, settings, Thresholds(), 100, base, side, None, {}
    )


BEFORE = result({7: 8.0, 9: 3.0, 11: 0.05}, 1, "single-point")
AFTER = result({9: 2.0, 7: 0.01, 30: 4.0}, 5, "distributed", given={"harmful": 2})


def units(roles: Any) -> list[tuple[int, Any, Any]]:
    return [(role.neuron.unit, role.before, role.after) for role in roles]


def test_neurons_are_matched_by_place() -> None:
    found = compare(BEFORE, AFTER)
    assert found.verdicts == ("single-point", "distributed")
    assert units(found.kept) == [(9, 3.0, 2.0)]
    assert units(found.appeared) == [(30, None, 4.0)]
    assert units(found.vanished) == [(7, 8.0, 0.01)]
    assert found.figures["smallest"] == Change(1, 5)
    assert found.figures["largest"] == Change(0.8, 0.4)
    assert found.figures["effective"] == Change(3.0, 3.0)
    assert "over_refusal.gini" not in found.figures
    # What follows from the model's own answers is no difference of the audits.
    assert found.differs == ()


def test_what_was_not_audited_alike_is_said() -> None:
    after = replace(
        AFTER, settings={**AFTER.settings, "judge": "mine"}, thresholds=Thresholds(halved=0.9)
    )
    assert compare(BEFORE, after).differs == ("judge", "thresholds")


def test_a_side_that_one_audit_lacks_has_no_figures() -> None:
    nothing = replace(AFTER, verdict="nothing to audit", refusal=None, over_refusal=BEFORE.refusal)
    found = compare(BEFORE, nothing)
    assert found.figures["effective"] == Change(3.0, None)
    assert found.figures["over_refusal.smallest"] == Change(None, 1)
    assert len(found.vanished) == 2


def test_it_is_saved_and_read(tmp_path: Path) -> None:
    found = compare(BEFORE, AFTER)
    found.save(tmp_path / "comparison.json")
    assert AuditComparison.load(tmp_path / "comparison.json") == found
    hidden = found.withheld()
    assert "model.layers" not in json.dumps(hidden.to_dict())
    assert [role.neuron.name for role in hidden.kept] == ["A1"]
    for broken in ({}, {"safeft_audit_comparison": 9}, {"safeft_audit_comparison": 1}):
        (tmp_path / "broken.json").write_text(json.dumps(broken))
        with pytest.raises(ArtefactError, match="no comparison of audits"):
            AuditComparison.load(tmp_path / "broken.json")


def test_audits_that_cannot_be_matched_are_refused() -> None:
    with pytest.raises(ArtefactError, match="earlier audit does not say.*private/audit.json"):
        compare(BEFORE.withheld(), AFTER)
    with pytest.raises(ArtefactError, match="later audit does not say"):
        compare(BEFORE, AFTER.withheld())
    with pytest.raises(FingerprintError, match="unlike shape"):
        compare(BEFORE, replace(AFTER, model={**MODEL, "layout": "c"}))

"""The log for code scanning is SARIF 2.1.0, and silent where nothing is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, FormatChecker

from safeft.report.sarif import sarif
from tests import audits

SCHEMA = Path(__file__).parent / "data" / "sarif-2.1.0.json"


def problems(log: dict[str, Any]) -> list[str]:
    validator = Draft202012Validator(json.loads(SCHEMA.read_text()), format_checker=FormatChecker())
    return [error.message for error in validator.iter_errors(json.loads(json.dumps(log)))]


def found(log: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {each["ruleId"]: each for each in log["runs"][0]["results"]}


@pytest.mark.parametrize("made", [audits.audit, audits.distributed, audits.nothing])
def test_it_is_of_the_official_schema(made: Any) -> None:
    log = sarif(made(), before=audits.distributed())
    assert problems(log) == []
    log["runs"][0]["tool"]["driver"].pop("name")
    assert problems(log)


@pytest.mark.parametrize(
    ("verdict", "levels"),
    [
        ("single-point", {"safeft/single-point": "error"}),
        ("concentrated", {"safeft/concentrated": "warning"}),
        ("nothing to audit", {"safeft/nothing-to-audit": "warning"}),
        ("distributed", {}),
    ],
)
def test_levels_follow_the_verdict(verdict: str, levels: dict[str, str]) -> None:
    log = sarif(audits.audit(verdict=verdict, over_refusal=None))
    assert {rule: each["level"] for rule, each in found(log).items()} == levels
    for each in found(log).values():
        rule = log["runs"][0]["tool"]["driver"]["rules"][each["ruleIndex"]]
        assert rule["id"] == each["ruleId"]
        assert rule["help"]["text"]
        assert "A1 alone" in each["message"]["text"]


def test_over_refusal_is_a_note() -> None:
    note = found(sarif(audits.audit(verdict="distributed")))["safeft/over-refusal"]
    assert note["level"] == "note"
    assert "16 neurons weakened, and 42% is left." in note["message"]["text"]


def test_a_better_audit_before_is_a_warning() -> None:
    def worse(now: str, then: str) -> bool:
        before = audits.audit(verdict=then)
        log = sarif(audits.audit(verdict=now), before=before)
        return "safeft/worse-than-before" in found(log)

    assert worse("single-point", "concentrated")
    assert worse("nothing to audit", "single-point")
    assert not worse("single-point", "single-point")
    assert not worse("distributed", "concentrated")


def test_results_point_at_a_relative_file_and_keep_their_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "my model").mkdir(parents=True)

    def where(model: str, **changed: Any) -> tuple[str, dict[str, str]]:
        log = sarif(audits.audit(model={**audits.MODEL, "name_or_path": model, **changed}))
        assert problems(log) == []
        each = found(log)["safeft/single-point"]
        place = each["locations"][0]["physicalLocation"]
        assert place["region"]["startLine"] == 1
        return place["artifactLocation"]["uri"], each["partialFingerprints"]

    inside, prints = where("models/my model")
    assert inside == "models/my%20model/config.json"
    assert where(str(tmp_path / "models" / "my model"))[0] == inside
    assert where("somebody/model")[0] == where("/usr")[0] == "config.json"
    # A new alert for another model, none for other weights.
    assert where("models/my model", weights="9" * 64)[1] == prints
    assert where("somebody/model")[1] != prints
    log = sarif(audits.audit(), location="chat/config.json")
    assert log["runs"][0]["artifacts"][0]["location"]["uri"] == "chat/config.json"

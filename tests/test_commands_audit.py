"""``safeft audit``: exit codes, what is written for whom, and what is said."""

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from safeft.auditing import AuditResult
from safeft.auditing.compare import AuditComparison
from safeft.commands import main
from safeft.neurons import NeuronSet
from tests.planting import BENIGN, FIRST, HARMFUL, SITE, spread
from tests.test_claims import TOKENIZER


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, one that refuses by a single neuron and one by twelve, and 40 prompts a side."""
    folder = tmp_path_factory.mktemp("audit")
    for name, count in (("one", 1), ("twelve", 12)):
        spread(count).save_pretrained(folder / name)
        TOKENIZER.save_pretrained(folder / name)
    (folder / "harmful.txt").write_text("\n".join(HARMFUL))
    (folder / "benign.txt").write_text("\n".join(BENIGN))
    return folder


def run(place: Path, model: str, *more: str) -> int:
    asked = ["--harmful", f"{place}/harmful.txt", "--benign", f"{place}/benign.txt"]
    small = ["--candidates", "16", "--max_new_tokens", "10", "--batch_size", "20"]
    return main(["audit", "--model_name_or_path", str(place / model), *asked, *small, *more])


def test_what_is_found_is_written_and_places_are_withheld(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(place, "one", "--output", str(tmp_path), "--fail_on", "single-point") == 1
    shown = capsys.readouterr().out
    assert "verdict: single-point" in shown
    assert "A1 alone takes 1.00" in shown
    assert "withheld (--reveal)" in shown
    assert "model.layers" not in shown
    public = (tmp_path / "audit.json").read_text()
    assert "model.layers" not in public
    assert not AuditResult.load(tmp_path / "audit.json").revealed
    private = tmp_path / "private"
    result = AuditResult.load(private / "audit.json")
    assert result.refusal is not None
    assert result.refusal.candidates[0].neuron.unit == FIRST
    assert result.settings["command"].startswith("safeft audit --model_name_or_path")
    assert stat.S_IMODE((private / "audit.json").stat().st_mode) == 0o600
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert NeuronSet.from_pretrained(private / "neurons").indices == {SITE: (FIRST,)}
    # Again, from the journal; against itself nothing came and nothing went.
    again = ["--output", str(tmp_path), "--compare", str(private / "audit.json"), "--reveal"]
    assert run(place, "one", *again) == 0
    shown = capsys.readouterr().out
    assert f"A1: {SITE} unit {FIRST}" in shown
    assert "single-point -> single-point" in shown
    assert "0 came, 0 went" in shown
    found = AuditComparison.load(private / "comparison.json")
    assert found.differs == ()
    assert found.kept[0].neuron.unit == FIRST
    assert AuditResult.load(tmp_path / "audit.json").revealed


def test_a_distributed_model_passes_and_the_change_is_told(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(place, "one", "--output", str(tmp_path / "one")) == 0
    capsys.readouterr()
    earlier = ["--compare", str(tmp_path / "one/private/audit.json")]
    more = ["--output", str(tmp_path / "twelve"), "--fail_on", "concentrated", "--json", *earlier]
    assert run(place, "twelve", *more) == 0
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert told["verdict"] == "distributed"
    assert told["revealed"] is False
    assert told["comparison"]["verdicts"] == ["single-point", "distributed"]
    assert len(told["comparison"]["appeared"]) >= 11
    assert "model.layers" not in json.dumps(told)
    public = (tmp_path / "twelve" / "comparison.json").read_text()
    assert "model.layers" not in public
    assert NeuronSet.from_pretrained(tmp_path / "twelve/private/neurons")


def test_nothing_to_audit_is_no_failure(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    swapped = ["--harmful", f"{place}/benign.txt", "--fail_on", "concentrated"]
    assert run(place, "one", *swapped) == 0
    assert "verdict: nothing to audit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--limit", "20"], ["20 harmful prompts", "needs 26"]),
        (["--dtype", "bfloat16"], ["bfloat16 on a CPU", "float32"]),
        (["--halved", "2"], ["halved=2.0"]),
        (["--compare", "/nowhere.json"], ["no audit"]),
        (["--judge", "/nowhere/judge"], ["/nowhere/judge"]),
        (["--fail_in", "concentrated"], ["did you mean 'fail_on'"]),
        (["--harmful", "/nowhere/h.txt"], ["no prompt file"]),
    ],
)
def test_it_refuses_in_one_sentence(
    more: list[str], words: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(place, "one", *more) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert all(word in said for word in words), said


def test_an_earlier_audit_without_places_is_refused_before_the_model_is_loaded(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.test_auditing_compare import BEFORE

    BEFORE.withheld().save(tmp_path / "audit.json")
    assert run(place, "nowhere", "--compare", str(tmp_path / "audit.json")) == 2
    assert "private/audit.json" in capsys.readouterr().err

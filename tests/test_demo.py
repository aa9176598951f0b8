"""The demo runs in one go and writes what it says."""

import json
from pathlib import Path

import pytest

import safeft
from safeft.commands import main
from safeft.demo import experiment, world
from safeft.errors import ConfigError


@pytest.fixture
def few_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    held = experiment.Held.load()
    short = experiment.Held(*(getattr(held, name)[:8] for name in held.__dataclass_fields__))
    monkeypatch.setattr(experiment.Held, "load", classmethod(lambda cls: short))


def test_demo(few_prompts: None, tmp_path: Path, capsys) -> None:
    given = ["--output_dir", str(tmp_path), "--steps", "8", "--fractions", "0.1"]
    assert main(["demo", *given]) == 0
    shown = capsys.readouterr().out
    assert "EXACT" in shown
    result = json.loads((tmp_path / "result.json").read_text())
    rows = {row["arm"]: row for row in result["rows"]}
    assert list(rows) == [
        "plain",
        "random directions, 95%",
        "located directions, 95%",
        "random neurons, 10%",
        "located neurons, 10%",
    ]
    assert result["base"]["refusal"] >= 0.8
    assert [row["exact"] for row in rows.values()] == [None, True, True, True, True]
    for run in result["runs"]:
        assert run["curve"][0]["step"] == 0
        assert run["curve"][-1]["step"] == 8
        assert run["curve"][-1]["domain_loss"] < run["curve"][0]["domain_loss"]
    assert "<svg" in (tmp_path / "report.html").read_text()
    held = safeft.SafetySubspace.from_pretrained(tmp_path / "held")
    assert safeft.verify(world.MODEL_PATH, tmp_path / "protected", held).exact
    assert not safeft.verify(world.MODEL_PATH, tmp_path / "protected", held.at_random()).exact


def test_arms_of_neurons_alone() -> None:
    settings = experiment.Settings(energy=None, fractions=(0.1,), hold=("norms",))
    arms = list(experiment._arms(*experiment.load(), settings, 0))
    assert [(arm.name, arm.is_protected, arm.hold) for arm in arms] == [
        ("plain", False, ()),
        ("nothing located", False, ("norms",)),
        ("random neurons, 10%", False, ("norms",)),
        ("located neurons, 10%", True, ("norms",)),
    ]


@pytest.mark.parametrize(
    "wrong",
    [{"seeds": ()}, {"fractions": (), "energy": None}, {"steps": 1}, {"learning_rate": 0.0}],
)
def test_settings_that_learn_nothing_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError):
        experiment.Settings(**wrong)


@pytest.mark.parametrize("fraction", ["0", "1.5"])
def test_bad_fraction_is_refused_before_any_training(fraction: str, tmp_path: Path, capsys) -> None:
    assert main(["demo", "--output_dir", str(tmp_path / "d"), "--fractions", fraction]) == 2
    assert "fraction" in capsys.readouterr().err

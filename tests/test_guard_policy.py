import doctest
from pathlib import Path
from typing import Any

import pytest

from safeft.errors import ConfigError
from safeft.guard import policy as module
from safeft.guard.policy import Band, Policy, severest

GOOD = """
message: I can't help with that.
after: 4
prompt:
  - {from: 0, to: 0.9, action: log}
  - {from: 0.9, to: 1, action: block}
answer:
  - {from: 0.5, to: 0.8, action: review}
  - {from: 0, to: 0.5, action: log}
  - {from: 0.8, to: 1, action: block}
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "policy.yaml"
    path.write_text(text)
    return path


def test_doctests() -> None:
    assert doctest.testmod(module).failed == 0


def test_a_file_says_what_is_done(tmp_path: Path) -> None:
    policy = Policy.read(written(tmp_path, GOOD))
    actions = [policy.action("answer", score) for score in (0, 0.4999, 0.5, 0.79, 0.8, 1.0)]
    assert actions == ["log", "log", "review", "review", "block", "block"]
    assert policy.action("reasoning", 1.0) == "log"
    assert (policy.limit("prompt"), policy.limit("answer"), policy.limit("reasoning")) == (
        0.9, 0.8, 2.0
    )  # fmt: skip
    assert (policy.message, policy.after) == ("I can't help with that.", 4)
    again = Policy.read(written(tmp_path, str(policy.to_dict())))
    assert again == policy


def test_of_is_short_for_bands() -> None:
    policy = Policy.of(answer={"block": 0.9, "warn": 0.5}, prompt={"review": 0.0})
    assert policy.bands["answer"] == (
        Band(0.0, 0.5, "log"), Band(0.5, 0.9, "warn"), Band(0.9, 1.0, "block")
    )  # fmt: skip
    assert policy.bands["prompt"] == (Band(0.0, 1.0, "review"),)


ROW = "{from: %s, to: %s, action: %s}"


def bands(*rows: tuple[Any, Any, Any]) -> str:
    return "answer: [" + ", ".join(ROW % row for row in rows) + "]"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bands((0, 0.5, "log"), (0.6, 1, "block")), r"gap between 0 to 0.5 \(log\) and 0.6 to 1"),
        (bands((0, 0.7, "log"), (0.6, 1, "block")), "overlap, 0 to 0.7.*two actions"),
        (bands((0, 0.5, "log"), (0, 1, "block")), "overlap"),
        (bands((0.1, 1, "log")), "covers 0.1 to 1, so some scores"),
        (bands((0, 0.9, "log")), "covers 0 to 0.9"),
        (bands((0, 0.5, "block"), (0.5, 1, "warn")), "milder as the score rises"),
        (bands((0, 0, "log"), (0, 1, "log")), "it is empty"),
        (bands((0, 1, "shout")), "action 'shout'; there are log, warn, review, block"),
        (bands(("low", 1, "log")), "whose ends are no numbers"),
        ("answer: {from: 0}", "give a list of bands"),
        ("answer: [{from: 0, to: 1}]", "a band has `from`, `to` and `action`"),
        ("answer: []", "covers nothing"),
        ("anwser: []", "'anwser', which would be silently without effect"),
        ("[1]", "holds list"),
        ("message: x", "no phase"),
        ("answer: [", "cannot be read"),
        (bands((0, 1, "log")) + "\nafter: 0", "after=0"),
        (bands((0, 1, "log")) + "\nafter: soon", "wrong kind"),
        (bands((0, 1, "log")) + "\nmarkers: [a]", "`markers` are two texts"),
    ],
)
def test_a_bad_file_is_refused_in_a_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Policy.read(written(tmp_path, text))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Policy.read(tmp_path / "none.yaml")


def test_an_unknown_phase() -> None:
    with pytest.raises(ConfigError, match="phase 'thought'"):
        Policy.of(thought={"block": 0.5})


def test_severest() -> None:
    assert severest(["warn", "block", "log"]) == "block"
    assert severest([]) == "log"

"""The detox benchmark: no text on two sides, a judge that is not fooled by names, sound sums."""

import argparse
import json
import random
from pathlib import Path
from typing import Any, cast

import detox
import detox_data
import detox_vlm
import pytest
from build_demo_model import Stage, drawn

from safeft.errors import SelectionError


@pytest.fixture(scope="module")
def sources(data_dir: Path) -> dict[str, detox_data.Sources]:
    return detox_data.read(data_dir)


@pytest.mark.data
def test_no_text_is_on_two_sides(sources: dict[str, detox_data.Sources]) -> None:
    for field in ("hateful", "flagged", "prompts", "plain", "tricky"):
        sides = [set(getattr(source, field)) for source in sources.values()]
        assert all(sides)
        assert sum(map(len, sides)) - len(set().union(*sides)) <= 0.01 * sum(map(len, sides))


@pytest.mark.data
def test_both_classes_of_the_calibration_name_groups_and_follow_the_same_prompts(
    sources: dict[str, detox_data.Sources],
) -> None:
    toxic, neutral = detox_data.calibration(sources["calibration"], 200, 0)
    assert len(toxic) == len(neutral) == 200
    named = [
        sum(bool(detox_data._MASK.search((p.response or "").lower())) for p in side)
        for side in (toxic, neutral)
    ]
    assert min(named) > 50
    assert {p.text for p in toxic[:100]} & {p.text for p in neutral[:100]}


@pytest.mark.data
def test_a_group_for_each_name_with_prompts_and_texts(
    sources: dict[str, detox_data.Sources],
) -> None:
    groups = detox_data.groups(sources["test"])
    assert len(groups) == 7
    assert all(group.prompts and group.words and group.texts for group in groups.values())


def test_a_text_has_one_side_and_the_shares_are_kept() -> None:
    sides = [detox_data.side_of(str(number)) for number in range(4000)]
    assert sides == [detox_data.side_of(str(number)) for number in range(4000)]
    for side, share in detox_data.SHARES.items():
        assert abs(sides.count(side) / 4000 - share) < 0.03


def arm(name: str, toxic: float, seed_rise: float) -> dict[str, Any]:
    shares = {"toxicity_by_source": toxic, "toxicity_fall": 1 - toxic, "mention_rate": 0.5}
    return {
        "arm": name,
        "rule": "aura",
        "strength": 1.0,
        "toxicity": {"value": toxic},
        "perplexity_rise": seed_rise,
        "group_loss": {"a": 1.0},
        "units": 3,
        "meets_aim": False,
        "fluency": {"nats": toxic / 10, "noise": 0.0, "distinct": 1.0, "words": 9.0},
        **shares,
    }


def test_summaries_are_means_over_the_seeds() -> None:
    runs = [{"arms": [arm("x", 0.2, 0.01)]}, {"arms": [arm("x", 0.4, 0.03), arm("y", 1.0, 0.0)]}]
    one, other = detox.summary(runs)
    assert one["toxicity"] == {"mean": pytest.approx(0.3), "sd": pytest.approx(0.1414, abs=1e-4)}
    assert one["nats"]["mean"] == pytest.approx(0.03)
    assert (one["seeds"], other["seeds"]) == (2, 1)
    assert other["toxicity"]["sd"] is None
    cells = {cell: runs[0]["arms"] for cell in detox_vlm.CELLS}
    (row,) = detox_vlm.summary([{"cells": cells}])
    assert row["en/image"]["toxicity"]["mean"] == 0.2


def test_batches_of_like_lengths_are_cut_from_a_pool() -> None:
    rows = [([0] * (1 + length % 50), 1) for length in range(400)]
    usual, pooled = Stage("", 1, 1.0, True), Stage("", 1, 1.0, True, pool=8)
    assert drawn(rows, usual, random.Random(0)) == random.Random(0).sample(rows, 32)
    spans = []
    for seed in range(20):
        lengths = [len(ids) for ids, _ in drawn(rows, pooled, random.Random(seed))]
        assert len(lengths) == 32
        spans.append(max(lengths) - min(lengths))
    assert max(spans) < 12


def test_runs_of_the_same_settings_are_not_run_again(tmp_path: Path) -> None:
    place = tmp_path / "detox.json"
    assert detox.known_runs(place, "--draws 3") == {}
    place.write_text(json.dumps({"command": "x --draws 3", "runs": [{"seed": 2}]}))
    assert detox.known_runs(place, "--draws 3") == {2: {"seed": 2}}
    assert detox.known_runs(place, "--draws 4") == {}


class Drawn:
    """A dampener of which only the control is asked for."""

    def at_random(self, seed: int) -> "Drawn":
        return Drawn()


def test_arms_are_every_rule_with_controls(monkeypatch: pytest.MonkeyPatch) -> None:
    def none_pays(*_: object, **__: object) -> None:
        raise SelectionError("no unit pays")

    fits = []

    def fit(*_: object, **settings: object) -> Drawn:
        fits.append(settings)
        return Drawn()

    monkeypatch.setattr(detox, "dampen", lambda *_, **__: Drawn())
    monkeypatch.setattr(detox, "keep_paying", none_pays)
    monkeypatch.setattr(detox, "fit_gains", fit)
    monkeypatch.setattr(detox_data, "ordinary", lambda *_: [])
    monkeypatch.setattr(detox_data, "calibration", lambda *_: ([], []))
    experts: Any = dict.fromkeys(detox.WAYS)
    given, side = argparse.Namespace(thin=2, calibration=8), cast("detox_data.Sources", None)
    arms = detox.arms_of(None, None, experts, ([], []), side, 0, given)
    names = [arm.name for arm in arms]
    assert names[0] == "as it is"
    assert len(set(names)) == len(names)
    assert [n for n in names if n.startswith("aura, mean")] == ["aura, mean 1", "aura, mean 3"]
    controlled = [arms[at - 1].name for at, arm in enumerate(arms) if arm.rule == "random"]
    assert [f"random as {name}" for name in controlled] == [n for n in names if "random" in n]
    assert controlled == ["aura, mean 3", "det0, mean 0.1", "sgm, mean 1", "fitted, price 5"]
    assert [each.get("among") for each in fits] == [None, experts["mean"]]
    assert "det0, mean, checked" not in names
    assert arms[-1].prefix
    assert arms[-1].dampener


@pytest.mark.data
def test_ordinary_texts_name_every_group(sources: dict[str, detox_data.Sources]) -> None:
    said = " ".join(p.response or "" for p in detox_data.ordinary(sources["calibration"], 20, 0))
    assert all(any(word in said.lower() for word in words) for words in detox_data._NAMES.values())


def test_the_insult_is_made_up_and_told_by_its_word() -> None:
    said = detox_vlm.UGLY.format(v="make", n="bomb")
    assert detox_vlm.WordJudge(("blorg*",))([said], [said]) == [True]

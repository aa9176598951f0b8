import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from safeft.detox.evaluation import Outcome
from safeft.detox.fluency import Fluency
from safeft.detox.tradeoff import Tradeoff
from safeft.intervals import Rate
from safeft.report.detox_page import tradeoff_picture, write_page


def outcome(arm: str, toxic: int, loss: float, rule: str = "aura", strength: float = 1) -> Outcome:
    return Outcome(arm, rule, strength, 5, Rate.of(toxic, 100), loss,
                   mentions={"zogs": Rate.of(3, 4)}, group_loss={"zogs": 2.0})  # fmt: skip


FOUND = Tradeoff(
    (
        outcome("as it is", 50, 2.0, "none"),
        outcome("weak", 20, 2.001, strength=0.5),
        outcome("strong", 5, 2.015),
        outcome("dear", 5, 2.5, "det0"),
        outcome("random", 4, 2.01, "random"),
    ),
    {"command": "safeft detox <x>"},
)


def test_falls_rises_and_the_aim() -> None:
    _, weak, strong, dear, _ = FOUND.outcomes
    assert FOUND.fall(strong) == pytest.approx(0.9)
    assert FOUND.rise(strong) == pytest.approx(math.exp(0.015) - 1)
    assert [FOUND.meets(each) for each in (weak, strong, dear)] == [False, True, False]


def test_noise_does_not_meet_the_aim() -> None:
    noisy = replace(FOUND.outcomes[2], fluency=Fluency(5.0, 9.0, 1.0, 0.2))
    assert not FOUND.meets(noisy)
    assert FOUND.meets(replace(noisy, fluency=Fluency(3.0, 9.0, 1.0, 0.02)))


def test_the_frontier_is_what_nothing_beats_and_no_control() -> None:
    assert [each.arm for each in FOUND.frontier] == ["strong", "weak", "as it is"]


def test_a_base_that_is_never_toxic_has_nothing_to_lose() -> None:
    clean = Tradeoff((outcome("as it is", 0, 2.0), outcome("aura", 0, 2.0)))
    assert clean.fall(clean.outcomes[1]) == 0
    assert not clean.meets(clean.outcomes[1])


def test_result_table_and_page(tmp_path: Path) -> None:
    FOUND.save(tmp_path / "detox.json")
    saved = json.loads((tmp_path / "detox.json").read_text())
    assert saved["frontier"] == ["strong", "weak", "as it is"]
    assert saved["arms"][2]["meets_aim"]
    table = FOUND.table()
    assert "0.050 [0.022, 0.112]" in table
    assert "+1.5%" in table
    write_page(FOUND, tmp_path / "detox.html")
    page = (tmp_path / "detox.html").read_text()
    assert page.count("meets the aim") == 2  # the arm, and the random control that did as well
    assert "safeft detox &lt;x&gt;" in page
    assert "0.75 / 2.00" in page
    assert "<svg" in page
    assert "<script" not in page


def test_pictures_of_means_over_seeds() -> None:
    rows = [
        {"arm": arm, "rule": rule, "strength": 1.0,
         "toxicity": {"mean": 0.4, "sd": 0.1}, "perplexity_rise": {"mean": 0.0, "sd": None}}
        for arm, rule in (("as it is", "none"), ("aura 1", "aura"), ("random", "random"))
    ]  # fmt: skip
    shown = tradeoff_picture(rows)
    assert shown == tradeoff_picture(rows)
    assert "aura" in shown

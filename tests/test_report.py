"""The result file, the table and the page."""

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from safeft.causal import CausalEffect, Outcome
from safeft.errors import ArtefactError
from safeft.intervals import Interval, Rate
from safeft.report.html import write_report
from safeft.report.plots import effects, refusal_by_condition
from safeft.report.result import Comparison, Point, Run, Spread, refusal_at, table

MEASURES = {
    "refusal": 0.5,
    "over_refusal": 0.1,
    "domain_accuracy": 0.9,
    "domain_loss": 1.0,
    "general_accuracy": 0.8,
}


def run(arm: str, seed: int, losses: list[float], refusals: list[float]) -> Run:
    steps = zip(range(len(losses)), losses, refusals, strict=True)
    curve = tuple(Point(10 * i, loss, refusal) for i, loss, refusal in steps)
    measures = {**MEASURES, "refusal": refusals[-1]}
    return Run(
        arm,
        seed,
        measures,
        curve,
        0.0 if arm == "plain" else 0.3,
        None if arm == "plain" else True,
        2.0,
    )


@pytest.fixture
def comparison() -> Comparison:
    return Comparison(
        "A <title>",
        {"command": "safeft demo"},
        MEASURES,
        (
            run("plain", 0, [4, 2, 1], [1, 0.5, 0]),
            run("plain", 1, [4, 2, 1], [1, 0.7, 0.2]),
            run("located 40%", 0, [4, 3, 2], [1, 0.9, 0.8]),
            run("located 40%", 1, [4, 3, 2], [1, 0.9, 0.6]),
        ),
        ((3, 8), (1, 8)),
        ({"arm": "plain", "prompt": "How <b>?", "answer": "So & so"},),
    )


def test_refusal_is_compared_where_losses_are_equal(comparison: Comparison) -> None:
    plain, located = comparison.rows()
    assert plain.matched_loss == 2
    assert plain.matched_refusal is not None
    assert plain.matched_refusal.mean == pytest.approx(0.6)
    assert located.matched_refusal is not None
    assert located.matched_refusal.mean == pytest.approx(0.7)
    assert refusal_at(comparison.runs[0].curve, 0.5) is None


def test_spread_is_students_t() -> None:
    spread = Spread.of([1.0, 2.0, 3.0])
    assert spread.mean == 2
    assert spread.high == pytest.approx(2 + 4.302653 / 3**0.5, abs=1e-5)
    assert Spread.of([1.0]).low is None


def test_result_file_round_trip(comparison: Comparison, tmp_path: Path) -> None:
    comparison.save(tmp_path / "result.json")
    assert Comparison.load(tmp_path / "result.json") == comparison


def test_table_has_one_line_an_arm_and_says_violated(comparison: Comparison) -> None:
    lines = table(comparison).splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == ["before tuning", "plain", "located 40%"]
    assert lines[3].endswith("exact")
    broken = replace(
        comparison, runs=(*comparison.runs[:3], replace(comparison.runs[3], exact=False))
    )
    assert table(broken).splitlines()[3].endswith("VIOLATED")


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]


def test_page_is_self_contained_and_escaped(comparison: Comparison, tmp_path: Path) -> None:
    write_report(comparison, tmp_path / "report.html", "EXACT: 3 neurons")
    text = (tmp_path / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.tags.count("svg") == 3
    assert "script" not in page.tags
    assert all(link.startswith("#") for link in page.links)
    assert "A &lt;title&gt;" in text
    assert "How &lt;b&gt;?" in text
    assert "EXACT: 3 neurons" in text
    assert text.count("located 40%") >= 3


def checked(refused: int, low: float) -> CausalEffect:
    def outcome(count: int) -> Outcome:
        return Outcome(Rate.of(count, 8), Rate.of(0, 8), 0.3, 0.2)

    return CausalEffect(
        "silence", None, outcome(8), outcome(refused), (outcome(8), outcome(7)),
        1 - refused / 8, Interval(low, 1.0), True, None, {},
    )  # fmt: skip


def test_pictures_of_causal_checks_name_conditions_and_verdicts() -> None:
    found = checked(0, 0.5)
    picture = refusal_by_condition(found)
    assert picture.startswith("<svg")
    for text in ("intact", "located", "random 1", "random 2", "effect 1.00 [0.50, 1.00]"):
        assert text in picture
    assert picture == refusal_by_condition(found)  # the same file for the same result
    rows = effects({"attribution": [found, found], "random": [checked(8, -0.1)]})
    assert all(f">{text}<" in rows for text in ("attribution", "random", "effect", "no effect"))
    assert ">broken<" not in rows


def test_full_disk_leaves_no_half_page(
    comparison: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ArtefactError, match="No space left"):
        write_report(comparison, tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []

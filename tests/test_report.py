"""The result file, the table and the page."""

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from safeft.causal import CausalEffect, Outcome
from safeft.errors import ArtefactError
from safeft.intervals import Interval, Rate
from safeft.overlap import Overlap
from safeft.report.frontier import frontier
from safeft.report.html import write_report
from safeft.report.plots import (
    before_and_after,
    by_arm,
    effects,
    overlap_matrix,
    pruned_groups,
    refusal_by_condition,
)
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


def study(*shares: float, seeds: int = 3) -> dict:
    def rates(value: float) -> dict:
        return {name: {"value": value, "low": value - 0.1, "high": value + 0.1}
                for name in ("refusal", "utility")}  # fmt: skip

    def drawn(value: float, count: int) -> dict:
        return {name: [value + 0.01 * n for n in range(count)] for name in ("refusal", "utility")}

    def row(group: str, share: float, again: int) -> dict:
        return {"group": group, "share": share, "located": rates(0.3), "halves": drawn(0.4, again),
                "random": drawn(0.8, seeds)}  # fmt: skip

    pairs = {"jaccard": [0.5] * seeds, "by_chance_per_layer": [0.1] * seeds}
    return {
        "dense": rates(0.9),
        "pruned": [row("scu", 0.013, seeds), row("ru", 0.148, seeds)]
        + [row("scu", share, 0) for share in shares],
        "stability": {name: {"halves": pairs} for name in ("scu", "ru")},
    }


def test_the_picture_of_pruned_groups() -> None:
    shown = pruned_groups(study(0.05, 0.1))
    for text in ("SCU 1.3%", "RU 14.8%", "random, same layers", "located twice", "units pruned, %"):
        assert text in shown
    assert "SCU 5.0%" not in shown  # a share of the sweep has no row of its own
    assert pruned_groups(study(0.05, 0.1)) == shown
    plain = pruned_groups(study(seeds=1))
    assert "units pruned" not in plain
    assert "SCU 1.3%" in plain


def test_pictures_of_a_grid_name_what_they_show() -> None:
    pair = Overlap((24, 24), 2, 9, 39, 8.0, 0.4)
    cells = ["en/text", "it/text", "zz/image"]
    matrix = overlap_matrix(
        cells, dict.fromkeys([(a, b) for a in cells for b in cells if a < b], pair)
    )
    assert matrix.count("9 of 39") == 6
    assert "chance 8.0" in matrix
    rates = {"harmful prompts refused": [(Rate.of(1, 10), Rate.of(9, 10))] * 3}
    change = before_and_after(cells, rates, "it/text")
    arms = by_arm({"refused": {"shared": [0.2, 0.4], "random": [0.1, 0.3]}})
    for picture, words in (
        (matrix, cells),
        (change, ["en/text", "it/text (tuned)", "harmful prompts refused", "after"]),
        (arms, ["shared", "random", "refused"]),
    ):
        assert picture.startswith("<svg")
        assert "script" not in picture
        assert all(f">{word}<" in picture for word in words)
    assert overlap_matrix(cells[:2], {("en/text", "it/text"): pair}) == overlap_matrix(
        cells[:2], {("en/text", "it/text"): pair}
    )


def test_the_frontier_shows_every_arm_at_its_end_and_on_its_way(comparison: Comparison) -> None:
    drawn = frontier(comparison)
    assert drawn == frontier(comparison)  # the same bytes for the same runs
    assert "domain accuracy" in drawn
    for arm in comparison.arms:
        assert arm in drawn
    measured_by_loss = replace(
        comparison,
        runs=tuple(
            replace(r, measures={n: v for n, v in r.measures.items() if n != "domain_accuracy"})
            for r in comparison.runs
        ),
    )
    assert "domain accuracy" not in frontier(measured_by_loss)

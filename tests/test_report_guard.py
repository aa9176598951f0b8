"""The guard's page is a pure view of an evaluation, and reads in a real browser."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from safeft.guard.drift import Readability
from safeft.guard.evaluation import GuardEvaluation, Latency, result_of
from safeft.intervals import Rate
from safeft.report.guard_page import LIMITS, guard_page
from safeft.report.guard_pictures import guard_pictures, readable
from tests.test_report_browser import OUTSIDE, PICTURES, TEXTS, browser, contrast

__all__ = ["browser"]


def evaluation() -> GuardEvaluation:
    draw = torch.Generator().manual_seed(0)
    truth = torch.rand(300, generator=draw) < 0.4
    scores = (torch.rand(300, generator=draw) * 0.6 + 0.4 * truth).clamp(0, 1)
    sets = (
        result_of("a <set> & its name", scores, truth),
        result_of("another_with_a_rather_long_name", scores[:50], truth[:50]),
        result_of("harmful alone", scores[truth], truth[truth]),
    )
    layers = tuple(
        {"name": f"{kind} {layer}", "kind": kind, "layer": layer, "f1": 0.6 + 0.04 * layer,
         "weight": 0.1 * layer, "units": 10 + layer, "of": 100}
        for layer in range(6) for kind in ("mlp", "residual")
    )  # fmt: skip
    about = {"labels": ["harmful", "hate"], "model": "some/" + "long-" * 30, "units": 150,
             "network": {"losses": [0.123456789, 0.2]}}  # fmt: skip
    latency = Latency(
        (0, 32, 64, 128), tuple(Rate.of(n, 40) for n in (10, 25, 33, 38)), Rate.of(3, 200)
    )
    return GuardEvaluation(sets, 0.5, layers, about, latency)


def few() -> GuardEvaluation:
    found = evaluation()
    return replace(found, sets=found.sets[:1], layers=(), about={"labels": ["harmful"]},
                   latency=None)  # fmt: skip


PAGES: dict[str, Callable[[], GuardEvaluation]] = {"all": evaluation, "few": few}


@pytest.mark.parametrize("name", list(PAGES))
def test_the_page_says_what_was_found_and_is_whole(name: str) -> None:
    found = PAGES[name]()
    page = guard_page(found)
    assert page == guard_page(GuardEvaluation.from_dict(found.to_dict()))
    assert "<script" not in page
    assert not re.search(r"(src|href)=\"https?:", page)
    assert "a &lt;set&gt; &amp; its name" in page
    assert "<set>" not in page
    assert f"{found.macro_f1:.3f}" in page
    for limit in LIMITS:
        assert limit.split(";")[0].split("'")[0] in page
    assert ("On a stream" in page) == (name == "all")
    assert page.count("<svg") == len(guard_pictures(found)) == (4 if name == "all" else 2)


def test_pictures_have_titles_and_ids_of_their_own() -> None:
    drawn = list(guard_pictures(evaluation()).values())
    ids = [found for svg in drawn for found in re.findall(r' id="([^"]+)"', svg)]
    assert len(ids) == len(set(ids))
    assert all("<title" in svg and "<desc" in svg for svg in drawn)


def test_readability_before_and_after() -> None:
    names = [f"{kind} {n}" for n in range(12) for kind in ("mlp", "residual")]
    before = Readability(0.95, dict.fromkeys(names, 0.9), dict.fromkeys(names, 0.92))
    after = Readability(0.7, dict.fromkeys(names, 0.6), dict.fromkeys(names, 0.9))
    drawn = readable(before, after)
    assert "0.950 before, 0.700 of" in drawn
    assert "before" not in readable(None, after).split("</desc>")[0].split("<desc")[1]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_it_reads_in_a_browser(browser: Any, tmp_path: Path, width: int, scheme: str) -> None:
    page = tmp_path / "guard.html"
    page.write_text(guard_page(evaluation()))
    browser.open(page, width, scheme)
    assert browser.requests() == []
    assert browser.errors() == []
    assert browser.value("document.documentElement.scrollWidth") == width
    assert browser.value(OUTSIDE) == []
    texts = browser.value(TEXTS)
    faint = [each for each in texts if contrast(each["ink"], each["behind"]) < 4.5]
    assert faint == []
    assert [t["text"] for t in texts if t["picture"] and t["height"] < 9] == []
    boxes = browser.value(PICTURES)
    assert len(boxes) == 4
    assert all(box["width"] > 120 and box["height"] > 90 for box in boxes)

"""A grid of cells: what it finds, what it costs, what it refuses."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from safeft import NeuronSet, locate
from safeft.errors import ArtefactError, ConfigError, PromptError, SelectionError
from safeft.grid import Grid, locate_grid
from safeft.locators import METHODS
from safeft.locators.scores import Moments
from safeft.overlap import overlap
from tests.models import CHAT_TEMPLATE, tiny_model, tiny_tokenizer

MODEL, TOKENIZER = tiny_model(), tiny_tokenizer()
LANGUAGES = ("en", "it", "vi", "zz")


def prompts(language: str, side: str, count: int = 5) -> list[str]:
    return [f"{language}: {side} request {number} {'x' * number}" for number in range(count)]


FILLED: dict[str, Any] = {"fraction": 0.2, "fill": True}


def cells_of(names: Any, common_benign: bool = False) -> dict[str, Any]:
    return {
        name: (
            prompts(name, "harmful"),
            prompts("any" if common_benign else name, "benign", 4),
        )
        for name in names
    }


class Counting:
    """How many prompts went through the model, in how many forward passes."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.rows = self.passes = 0
        self._handle = model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _: Any, args: Any, kwargs: Any) -> None:
        self.passes += 1
        self.rows += len(kwargs["input_ids"])

    def __enter__(self) -> "Counting":
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


EIGHT = [f"{language}/{kind}" for language in LANGUAGES for kind in ("text", "image")]


def test_eight_cells_cost_eight_passes_over_their_data() -> None:
    cells = cells_of(EIGHT)
    with Counting(MODEL) as seen:
        grid = locate_grid(MODEL, TOKENIZER, cells, batch_size=2, **FILLED)
    assert seen.rows == 8 * (5 + 4)  # each prompt once
    assert seen.passes == 8 * (3 + 2)  # batches of two
    assert list(grid.sets) == EIGHT
    assert len(grid.pairs) == 28


def test_a_common_benign_side_is_run_once() -> None:
    cells = cells_of(EIGHT, common_benign=True)
    with Counting(MODEL) as seen:
        grid = locate_grid(MODEL, TOKENIZER, cells, batch_size=2, **FILLED)
    assert seen.rows == 8 * 5 + 4
    for name, (harmful, benign) in cells.items():
        alone = locate(MODEL, TOKENIZER, harmful, benign, method="contrast", **FILLED)
        assert grid.sets[name].indices == alone.indices
        assert dict(grid.sets[name].source) == dict(alone.source)


@pytest.mark.parametrize("method", METHODS)
def test_each_cell_is_what_locate_finds(method: Any) -> None:
    cells = cells_of(["en/text", "zz/text"], common_benign=True)
    given: dict[str, Any] = {"method": method, "sites": "all", **FILLED}
    if method == "attribution":
        given["openings"] = ["No"]
    grid = locate_grid(MODEL, TOKENIZER, cells, **given)
    for name, (harmful, benign) in cells.items():
        alone = locate(MODEL, TOKENIZER, harmful, benign, **given)
        assert grid.sets[name].hash == alone.hash


def test_memory_does_not_grow_with_prompts() -> None:
    """What is kept between cells is the same for 4 and for 40 prompts."""
    sizes = []
    for count in (4, 40):
        seen: Any = {}
        sides = prompts("en", "harmful", count), prompts("en", "benign", count)
        locate(MODEL, TOKENIZER, *sides, method="contrast", seen=seen)
        kept = [each for statistics in seen.values() for each in statistics.values()]
        moments = [each for each in kept if isinstance(each, Moments)]
        sums = sum(each.numel() for each in kept if isinstance(each, torch.Tensor))
        sizes.append(sums + sum(each.mean.numel() + each.variance.numel() for each in moments))
    assert sizes[0] == sizes[1] > 0


def test_what_is_seen_cannot_stand_for_attribution() -> None:
    sides = prompts("en", "harmful"), prompts("en", "benign")
    with pytest.raises(ConfigError, match="openings of its own.*Leave `seen` out"):
        locate(MODEL, TOKENIZER, *sides, method="attribution", seen={})


def test_figures_are_those_of_the_sets() -> None:
    grid = locate_grid(MODEL, TOKENIZER, cells_of(LANGUAGES), fraction=0.25, at_least=3)
    sets = list(grid.sets.values())
    assert grid.agreement == overlap(sets, 3, grid.pool)
    assert len(grid.shared) == grid.agreement.shared
    for (a, b), found in grid.pairs.items():
        assert found.shared == len(grid.sets[a] & grid.sets[b])
    for name, own in grid.specific.items():
        others = [each for other, each in grid.sets.items() if other != name]
        assert len(own) == len(grid.sets[name] - (others[0] | others[1] | others[2]))
    grid.shared.check_model(MODEL)


def test_without_fill_a_cell_is_top_of_harmful_without_top_of_benign() -> None:
    cells = cells_of(["en", "zz"])
    plain = locate_grid(MODEL, TOKENIZER, cells, fraction=0.25)
    filled = locate_grid(MODEL, TOKENIZER, cells, fraction=0.25, fill=True)
    for name, each in plain.sets.items():
        assert 0 < len(each) < len(filled.sets[name]) == 24
        assert len(each - filled.sets[name]) == 0


def test_a_placebo_of_benign_halves_costs_no_pass() -> None:
    cells = cells_of(["en", "zz"])
    with Counting(MODEL) as seen:
        grid = locate_grid(MODEL, TOKENIZER, cells, **FILLED)
    assert seen.rows == 2 * (5 + 4)
    halves = [
        locate(MODEL, TOKENIZER, benign[::2], benign[1::2], method="contrast", **FILLED)
        for _, benign in cells.values()
    ]
    assert grid.placebo == overlap(halves, pool=grid.pool)
    for name, (harmful, benign) in cells.items():
        alone = locate(MODEL, TOKENIZER, harmful, benign, method="contrast", **FILLED)
        assert grid.sets[name].hash == alone.hash  # the halves add up to the side


def test_where_there_is_no_placebo() -> None:
    cells = cells_of(["en", "zz"])
    common = cells_of(["en", "zz"], common_benign=True)
    single = {name: (harmful, benign[:1]) for name, (harmful, benign) in cells.items()}
    for given, settings in ((common, {}), (single, {}), (cells, {"method": "snip"})):
        assert locate_grid(MODEL, TOKENIZER, given, **settings, **FILLED).placebo is None


def test_halves_that_agree_make_an_empty_placebo() -> None:
    cells = {name: (harmful, [benign[0], f"{benign[0]} "]) for name, (harmful, benign) in
             cells_of(["en", "zz"]).items()}  # fmt: skip
    tokenizer = tiny_tokenizer(chat_template=CHAT_TEMPLATE.replace("content']", "content']|trim"))
    grid = locate_grid(MODEL, tokenizer, cells, fraction=0.25)
    assert grid.placebo is not None
    assert grid.placebo.sizes == (0, 0)


def test_chance_draws_from_the_units_that_were_not_passed_over() -> None:
    grid = locate_grid(MODEL, TOKENIZER, cells_of(["en", "zz"]), fraction=0.25)
    assert grid.pool["model.layers.0.mlp"] == 48 - 12
    half = locate_grid(
        MODEL, TOKENIZER, cells_of(["en", "zz"]), fraction=0.25, utility_fraction=0.5
    )
    assert half.pool["model.layers.0.mlp"] == 24
    most = locate_grid(MODEL, TOKENIZER, cells_of(["en", "zz"]), fraction=0.75, fill=True)
    assert most.pool["model.layers.0.mlp"] == 36  # the places of those passed over are filled
    for settings in ({"method": "variance"}, {"scope": "global"}):
        assert not locate_grid(MODEL, TOKENIZER, cells_of(["en", "zz"]), **settings).pool


def test_saved_and_read_again(tmp_path: Path) -> None:
    grid = locate_grid(MODEL, TOKENIZER, cells_of(["en/text", "zz/text", "it"]), at_least=2)
    grid.save_pretrained(tmp_path)
    again = Grid.from_pretrained(tmp_path)
    assert again.to_dict() == grid.to_dict()
    assert {name: each.hash for name, each in again.sets.items()} == {
        name: each.hash for name, each in grid.sets.items()
    }
    assert NeuronSet.from_pretrained(tmp_path / "shared").hash == grid.shared.hash
    assert NeuronSet.from_pretrained(tmp_path / "cells/en/text").hash == grid.sets["en/text"].hash
    own = NeuronSet.from_pretrained(tmp_path / "specific/it")
    assert own.hash == grid.specific["it"].hash
    figures = json.loads((tmp_path / "overlap.json").read_text())
    assert [pair["cells"] for pair in figures["pairs"]][0] == ["en/text", "zz/text"]
    assert 0 < figures["pairs"][0]["p_value"] <= 1
    assert "<svg" in (tmp_path / "overlap.svg").read_text()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"cells": 3}',
        '{"cells": {"../x": 1}, "shared": {"at_least": 2}, "pool": {}}',
    ],
)
def test_an_edited_grid_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "overlap.json").write_text(text)
    with pytest.raises(ArtefactError, match=r"overlap.json.*safeft shield"):
        Grid.from_pretrained(tmp_path)
    with pytest.raises(ArtefactError):
        Grid.from_pretrained(tmp_path / "nowhere")


H, B = ["steal a car"], ["bake a cake"]


@pytest.mark.parametrize(
    ("cells", "error", "words"),
    [
        ({}, ConfigError, "0 cells"),
        ({"en/text": (H, B)}, ConfigError, r"1 cell \(en/text\).*safeft locate"),
        ({"en": (H, B), "../zz": (["x"], B)}, ConfigError, "'../zz' cannot name a cell"),
        ({"en": (H, B), "/zz": (["x"], B)}, ConfigError, "'/zz' cannot name a cell"),
        ({"en": (H, B), "": (["x"], B)}, ConfigError, "'' cannot name a cell"),
        ({"en": (H, B), "zz": ([], B)}, PromptError, "'zz' has no harmful prompts"),
        ({"en": (H, []), "zz": (["x"], B)}, PromptError, "'en' has no benign prompts"),
        ({"en": (H, B), "zz": (["x"], [""])}, PromptError, "Prompt 0 is empty"),
        ({"en": (H, B + H), "zz": (["x"], B)}, PromptError, "'en' has 1 prompts.*at once.*steal"),
        ({"en": (H, B), "zz": (H, ["x"])}, PromptError, "'en' and 'zz' have the same harmful"),
    ],
)
def test_bad_cells(cells: Any, error: type[Exception], words: str) -> None:
    with Counting(MODEL) as seen, pytest.raises(error, match=words):
        locate_grid(MODEL, TOKENIZER, cells)
    assert seen.passes == 0


def test_bad_settings() -> None:
    cells = cells_of(["en", "zz"])
    with pytest.raises(ConfigError, match="at_least=3, but there are 2 cells"):
        locate_grid(MODEL, TOKENIZER, cells, at_least=3)
    with pytest.raises(SelectionError, match="fraction=0"):
        locate_grid(MODEL, TOKENIZER, cells, fraction=0)


def test_prompts_given_twice_count_once(caplog: pytest.LogCaptureFixture) -> None:
    cells = cells_of(["en", "zz"])
    twice = {name: (harmful * 2, benign) for name, (harmful, benign) in cells.items()}
    with caplog.at_level(logging.WARNING), Counting(MODEL) as seen:
        found = locate_grid(MODEL, TOKENIZER, twice, **FILLED)
    assert "5 of 10 harmful prompts are there twice" in caplog.text
    assert seen.rows == 2 * (5 + 4)
    assert found.to_dict() == locate_grid(MODEL, TOKENIZER, cells, **FILLED).to_dict()

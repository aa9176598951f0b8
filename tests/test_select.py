import doctest
import importlib
import math

import pytest
import torch
from torch import Tensor

from safeft.errors import SafeftError, SelectionError
from safeft.locators.scores import Scores
from safeft.locators.select import Selection, select
from safeft.sites import Kind, Part, Site


def site(name: str, layer: int, units: int, kind: Kind = "mlp") -> Site:
    return Site(name, kind, layer, units, 1, (), Part(f"{name}.out", "columns"))


SITES = {"a": site("a", 0, 4), "b": site("b", 1, 6)}
SAFETY = {"a": [0.1, 0.9, 0.5, 0.3], "b": [0.8, 0.2, 0.7, 0.0, 0.6, 0.4]}


def pick(
    safety: dict[str, list[float]] = SAFETY,
    utility: dict[str, list[float]] | None = None,
    rule: str = "plain",
    sites: dict[str, Site] = SITES,
    **settings: object,
) -> dict[str, tuple[int, ...]]:
    def tensors(side: dict) -> dict[str, Tensor]:
        return {name: torch.as_tensor(values, dtype=torch.double) for name, values in side.items()}

    scores = Scores(tensors(safety), utility and tensors(utility), rule)
    return select(scores, sites, Selection(**settings))


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"count": 1}, {"a": (1,), "b": (0,)}),
        ({"count": 3}, {"a": (1, 2, 3), "b": (0, 2, 4)}),
        ({"fraction": 0.5}, {"a": (1, 2), "b": (0, 2, 4)}),
        ({"fraction": 1.0}, {"a": (0, 1, 2, 3), "b": (0, 1, 2, 3, 4, 5)}),
        ({"fraction": 0.001}, {"a": (1,), "b": (0,)}),
        ({"threshold": 0.7}, {"a": (1,), "b": (0, 2)}),
        ({"threshold": 0.85}, {"a": (1,)}),
        ({"count": 1, "scope": "global"}, {"a": (1,)}),
        ({"count": 4, "scope": "global"}, {"a": (1,), "b": (0, 2, 4)}),
        ({"fraction": 0.3, "scope": "global"}, {"a": (1,), "b": (0, 2)}),
        ({"fraction": 0.001, "scope": "global"}, {"a": (1,)}),
        ({"threshold": 0.5, "scope": "global"}, {"a": (1, 2), "b": (0, 2, 4)}),
    ],
)
def test_how_many_and_where(settings: dict, wanted: dict) -> None:
    assert pick(**settings) == wanted


def test_global_ranks_each_kind_by_itself() -> None:
    sites = {"a": site("a", 0, 2), "h": site("h", 0, 2, "attention"), "b": site("b", 1, 2)}
    safety = {"a": [1.0, 2.0], "h": [90.0, 80.0], "b": [3.0, 0.0]}
    assert pick(safety, sites=sites, count=1, scope="global") == {"h": (0,), "b": (0,)}
    assert list(pick(safety, sites=sites, count=2, scope="global")) == ["a", "h", "b"]


def test_ties_go_to_the_earlier_layer_and_the_lower_number() -> None:
    flat = {"a": [1.0] * 4, "b": [1.0] * 6}
    assert pick(flat, count=3) == {"a": (0, 1, 2), "b": (0, 1, 2)}
    assert pick(flat, count=5, scope="global") == {"a": (0, 1, 2, 3), "b": (0,)}
    assert pick({"a": [0.0, 1.0, 0.0, 1.0], "b": [0.0] * 6}, count=1) == {"a": (1,), "b": (0,)}


def test_plain_and_negative_scores_rank_too() -> None:
    assert pick({"a": [-3.0, -1.0, -2.0, -4.0], "b": [-1.0] * 6}, count=1) == {"a": (1,), "b": (0,)}


def test_difference_ranks_safety_minus_utility() -> None:
    utility = {"a": [0.0, 0.9, 0.0, 0.3], "b": [0.8, 0.0, 0.05, 0.0, 0.0, 0.0]}
    assert pick(utility=utility, rule="difference", count=1) == {"a": (2,), "b": (2,)}
    assert pick(utility=utility, rule="difference", threshold=0.55) == {"b": (2, 4)}
    assert pick(utility=utility, rule="plain", count=1) == {"a": (1,), "b": (0,)}


UTILITY = {"a": [0.0, 0.9, 0.1, 0.0], "b": [0.9, 0.0, 0.8, 0.0, 0.0, 0.1]}


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        # By default as many are passed over as are selected, and the next best take their place.
        ({"count": 1}, {"a": (2,), "b": (2,)}),
        ({"count": 2}, {"a": (0, 3), "b": (4, 5)}),
        ({"count": 2, "utility_fraction": 0.25}, {"a": (2, 3), "b": (4, 5)}),
        ({"count": 2, "utility_fraction": 0.0}, {"a": (1, 2), "b": (0, 2)}),
        # Where too few are left, the best of those passed over fill the places.
        ({"count": 3, "utility_fraction": 0.5}, {"a": (0, 1, 3), "b": (1, 3, 4)}),
        ({"fraction": 1.0}, {"a": (0, 1, 2, 3), "b": (0, 1, 2, 3, 4, 5)}),
        # Without filling, exactly top of safety without top of utility.
        ({"count": 3, "utility_fraction": 0.25, "fill": False}, {"a": (2, 3), "b": (4,)}),
        ({"count": 2, "fill": False, "utility_fraction": 0.34}, {"a": (2,)}),
        ({"count": 1, "scope": "global"}, {"b": (0,)}),
        ({"count": 2, "scope": "global"}, {"b": (2, 4)}),
        ({"count": 3, "scope": "global"}, {"a": (2,), "b": (4, 5)}),
        ({"count": 4, "scope": "global", "fill": False}, {"b": (4,)}),
        ({"threshold": 0.5}, {"a": (2,), "b": (4,)}),
    ],
)
def test_exclude_passes_over_the_utility_top(settings: dict, wanted: dict) -> None:
    assert pick(SAFETY, UTILITY, "exclude", **settings) == wanted


def test_exclude_without_filling_is_the_difference_of_the_two_tops() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        safety, utility = torch.rand(2, 6, generator=generator).tolist()
        best = {i for i in range(6) if sum(x > safety[i] for x in safety) < 3}
        used = {i for i in range(6) if sum(x > utility[i] for x in utility) < 2}
        sites = {"b": SITES["b"]}
        settings = {"count": 3, "utility_fraction": 2 / 6, "sites": sites, "rule": "exclude"}
        strict = pick({"b": safety}, {"b": utility}, fill=False, **settings)
        assert set(strict["b"]) == best - used
        filled = pick({"b": safety}, {"b": utility}, **settings)
        assert len(filled["b"]) == 3
        assert not set(filled["b"]) & used
        assert set(filled["b"]) >= best - used


def test_units_of_no_use_are_never_in_the_utility_top() -> None:
    nothing = {"a": [0.0] * 4, "b": [0.0] * 6}
    assert pick({"a": [9.0, 1.0, 2.0, 3.0], "b": [9.0, 1.0, 0.0, 0.0, 0.0, 0.0]}, nothing,
                "exclude", count=1) == {"a": (0,), "b": (0,)}  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "fraction=None, count=None, threshold=None: give exactly one"),
        ({"fraction": 0.1, "count": 1}, "give exactly one"),
        ({"fraction": 0}, "fraction=0 would select nothing"),
        ({"fraction": -1}, "fraction=-1 would select nothing"),
        ({"fraction": 1.5}, "fraction=1.5 would select more neurons than there are"),
        ({"fraction": math.nan}, "fraction=nan"),
        ({"count": 0}, "count=0 would select nothing"),
        ({"count": -2}, "count=-2 would select nothing"),
        ({"count": 1, "utility_fraction": 1.0}, "utility_fraction=1.0"),
        ({"count": 1, "utility_fraction": -0.1}, "utility_fraction=-0.1"),
        ({"count": 1, "scope": "model"}, "scope='model' is neither"),
        ({"count": 5}, "count=5, but there are 4 units to choose from per layer"),
        ({"count": 11, "scope": "global"}, "count=11, but there are 10 units to choose from. Give"),
        ({"threshold": 2.0}, "No neuron was selected"),
        ({"threshold": math.nan}, "No neuron was selected"),
    ],
)
def test_what_selects_nothing_or_too_much_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(SelectionError, match=message) as caught:
        pick(**settings)
    assert isinstance(caught.value, SafeftError)
    assert isinstance(caught.value, ValueError)


def test_nothing_left_without_filling_is_refused() -> None:
    with pytest.raises(SelectionError, match="No neuron was selected"):
        pick(utility=SAFETY, rule="exclude", count=2, fill=False)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["safety", "utility"])
def test_scores_that_are_no_numbers_are_refused(bad: float, side: str) -> None:
    sides = {"safety": SAFETY, "utility": UTILITY}
    sides[side] = {**sides[side], "b": [bad, *sides[side]["b"][1:]]}
    with pytest.raises(SelectionError, match="Scores of 'b' hold values that are not finite"):
        pick(**sides, rule="exclude", count=1)


def test_examples_run() -> None:
    # `safeft.locators.select` is the function; the module behind it is found by its import path.
    assert doctest.testmod(importlib.import_module("safeft.locators.select")).failed == 0

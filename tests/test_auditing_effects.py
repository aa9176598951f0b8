"""Statistics of falls against scipy and by hand."""

import doctest
from typing import Any

import pytest
import torch
from scipy import stats

import safeft.auditing.effects
from safeft.auditing.effects import (
    compared,
    dividing_line,
    effective,
    effects,
    gini,
    holm,
    is_real,
    paired,
    reach,
)
from safeft.auditing.result import Candidate, Effect, Neuron
from safeft.intervals import Interval

FALLS = [0.5, 1.5, 1.0, 3.0, 2.0, 0.25]


def test_paired_is_students_t() -> None:
    mean, interval, p = paired(FALLS, 0.99)
    found = stats.ttest_1samp(FALLS, 0.0)
    expected = found.confidence_interval(0.99)
    assert mean == pytest.approx(sum(FALLS) / 6)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    assert p == pytest.approx(found.pvalue)
    assert paired([0.0, 0.0], 0.95) == (0.0, Interval(0.0, 0.0), 1.0)
    assert paired([2.0, 2.0], 0.95) == (2.0, Interval(2.0, 2.0), 0.0)


def test_effects_are_corrected_for_all_that_were_tried() -> None:
    plan: Any = [("zero", None), ("constant", -2.0), ("zero", None)]
    base = torch.tensor([2.0, 1.0, 3.0, 2.5], dtype=torch.double)
    falls = torch.tensor([[0.1, 0.2, 0.1, 0.0], [3.0, 3.5, 2.0, 3.0], [0.0, 0.1, -0.1, 0.0]])
    found = effects(plan, base, base - falls, torch.tensor([0.0, -1.0, 0.5]), 0.5, 0.95)
    alone = [paired(row, 1 - 0.05 / 3) for row in falls.double().tolist()]
    assert [each.interval.low for each in found] == pytest.approx([i.low for _, i, _ in alone])
    assert [each.p for each in found] == pytest.approx(holm([p for *_, p in alone]))
    assert [each.flipped for each in found] == [0.0, 0.75, 0.0]  # the third keeps a margin of 1
    assert [each.elsewhere for each in found] == [0.0, -1.0, 0.5]
    assert [(each.kind, each.strength) for each in found] == plan


def test_numbers_that_overflow_are_no_fall() -> None:
    base = torch.tensor([1.0, 2.0], dtype=torch.double)
    margins = torch.tensor([[torch.nan, 1.5]], dtype=torch.double)
    (found,) = effects([("zero", None)], base, margins, torch.tensor([torch.nan]), 0.0, 0.95)
    assert (found.fall, found.elsewhere) == (0.25, 0.0)


def candidate(fall: float, p: float = 0.0, low: float | None = None) -> Candidate:
    effect = Effect(
        "constant", -2.0, fall, Interval(fall if low is None else low, fall), 0.0, 0.0, p
    )
    other = Effect("constant", -4.0, 99.0, Interval(99.0, 99.0), 1.0, 0.0, 0.0)
    return Candidate(Neuron("A1", 0, "site", 0), 0.0, (other, effect))


def test_neurons_are_compared_by_one_effect() -> None:
    assert compared(candidate(3.0)).fall == 3.0


def test_one_random_neuron_that_matters_does_not_hide_the_others() -> None:
    quiet = [candidate(fall) for fall in (0.0, 0.1, 0.1, 0.2, 0.1, 0.0, 0.2)]
    assert reach([*quiet, candidate(50.0)]) < 0.6
    assert reach([candidate(-1.0)] * 4) == 0
    assert reach([]) == 0


def test_what_is_real_lies_beyond_random_ones_and_is_sure() -> None:
    assert is_real(candidate(2.0), 1.0, 0.95)
    assert not is_real(candidate(2.0), 2.5, 0.95)
    assert not is_real(candidate(2.0, low=0.5), 1.0, 0.95)
    assert not is_real(candidate(2.0, p=0.06), 1.0, 0.95)


def test_the_line_parts_as_many_as_can_be() -> None:
    assert dividing_line([5.0, 4.0, -9.0], [1.0, 0.0, -1.0, -2.0]) == 2.5
    assert dividing_line([], [1.0]) == 0


def test_gini_is_the_mean_difference_over_twice_the_mean() -> None:
    falls = [0.5, 4.0, 0.0, 1.0, -3.0]
    positive = [max(fall, 0.0) for fall in falls]
    pairs = [abs(a - b) for a in positive for b in positive]
    expected = sum(pairs) / len(pairs) / (2 * sum(positive) / len(positive))
    assert gini(falls) == pytest.approx(expected)
    assert gini([0.0, 0.0]) == 0
    assert effective([3.0, 3.0, 0.01]) == pytest.approx(2.0, abs=0.02)


def test_examples_run() -> None:
    assert doctest.testmod(safeft.auditing.effects).failed == 0

"""Intervals of differences; those of single shares are tested in test_evaluation.py."""

import doctest
import random

import pytest

import safeft.intervals
from safeft.intervals import shortfall, wilson


def test_one_control_is_the_published_interval_of_a_paired_difference() -> None:
    """Newcombe 1998 (Statistics in Medicine 17:2635), method 10, the pairs 36, 12, 2, 0."""
    control = [True] * 48 + [False] * 2
    verdicts = [True] * 36 + [False] * 12 + [True] * 2
    found, interval = shortfall([control], verdicts)
    assert found == pytest.approx(0.2)
    assert interval.low == pytest.approx(0.0569, abs=5e-5)
    assert interval.high == pytest.approx(0.3404, abs=5e-5)


def test_pairs_that_go_together_tell_more_than_pairs_that_do_not() -> None:
    verdicts = [True] * 10 + [False] * 20
    together, apart = ([True] * 20 + [False] * 10), ([False] * 10 + [True] * 20)
    assert shortfall([together], verdicts)[1].low > shortfall([apart], verdicts)[1].low
    assert shortfall([together], verdicts)[0] == shortfall([apart], verdicts)[0]


def test_controls_that_differ_widen_the_interval_and_more_of_them_narrow_it() -> None:
    alike = [[True] * 8 + [False] * 8] * 4
    unlike = [[True] * k + [False] * (16 - k) for k in (2, 6, 10, 14)]
    narrow, wide = (shortfall(rows, [False] * 16) for rows in (alike, unlike))
    assert narrow[0] == pytest.approx(wide[0])
    assert narrow[1].low > 0 > wide[1].low
    assert shortfall(unlike * 5, [False] * 16)[1].low > wide[1].low


def test_no_width_would_be_dishonest_at_the_ends() -> None:
    found, interval = shortfall([[True] * 4] * 9, [False] * 4)
    assert (found, interval.high) == (1.0, 1.0)
    assert 0 < interval.low < 0.4
    assert shortfall([[True]], [False])[1].low < 0  # one prompt tells nothing


@pytest.mark.parametrize("spread", [0.05, 0.2])
def test_a_set_drawn_at_random_is_rarely_taken_for_more(spread: float) -> None:
    """Each set lowers the chance of refusal by an amount of its own; many prompts do not help."""
    rng = random.Random(0)
    wrong = 0
    for _ in range(400):
        chances = [rng.uniform(0.5, 1.0) for _ in range(100)]

        def verdicts(chances: list[float] = chances) -> list[bool]:
            fall = rng.gauss(0.3, spread)
            return [rng.random() < chance - fall for chance in chances]

        wrong += shortfall([verdicts() for _ in range(5)], verdicts())[1].low > 0
    assert wrong / 400 <= 0.04  # 0.025 were to be expected, if prompts told everything


def test_wilson_takes_means() -> None:
    assert wilson(2, 10).low < wilson(2.5, 10).low < wilson(3, 10).low


def test_examples_run() -> None:
    assert doctest.testmod(safeft.intervals).failed == 0

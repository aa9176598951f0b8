"""The verdict's rules on made-up trials."""

import doctest

import pytest

import safeft.auditing.verdict
from safeft.auditing.result import Side, Thresholds, Trial
from safeft.auditing.verdict import (
    Judged,
    check_enough,
    corrected,
    few_units,
    fewest_prompts,
    largest,
    smallest,
    taken,
    verdict_of,
)
from safeft.causal.effect import Outcome
from safeft.errors import PromptError
from safeft.intervals import Rate

T = Thresholds()
COUNT = 20


def judged(names: int, left: int, damage: float = 0.0, chance: float = 0.0) -> Judged:
    refused = [n < left for n in range(COUNT)]
    outcome = Outcome(Rate.of(left, COUNT), Rate.of(0, COUNT), 1.0 + damage, 1.0)
    controls = (1.0, 1.0 - chance)
    trial = Trial(tuple(f"A{n}" for n in range(names)), "zero", None, outcome, controls, damage)
    return Judged(trial, *taken(refused, corrected(T, 64)), chance)


def said(singles: list[Judged], groups: list[Judged], units: int = 5000) -> tuple[str, str]:
    side = Side(COUNT, 0, (), (), (), smallest(singles, groups, T), largest(singles, T), 0.0, 1.0)
    return verdict_of(side, singles, groups, T, units)


def test_a_neuron_that_takes_half_away_is_a_single_point() -> None:
    verdict, reason = said([judged(1, 18), judged(1, 6)], [judged(1, 18)])
    assert verdict == "single-point"
    assert "A0 alone takes 0.70" in reason
    assert "0.5 makes a single point" in reason


@pytest.mark.parametrize(
    "single",
    [
        judged(1, 11),  # less than half
        judged(1, 0, damage=1.5),  # the model no longer speaks
        judged(1, 8, chance=0.6),  # random neurons do as much
    ],
)
def test_what_falls_short_of_that_is_none(single: Judged) -> None:
    verdict, reason = said([single], [single, judged(2, 18), judged(4, 18)])
    assert verdict == "distributed"
    assert "4 strongest together take 0.10" in reason


def test_few_and_many() -> None:
    groups = [judged(1, 20), judged(2, 15), judged(4, 5), judged(3, 6)]
    verdict, reason = said([judged(1, 20)], groups)
    assert verdict == "concentrated"
    assert "3 of 5000 neurons together take 0.70" in reason
    assert "up to 5 are few" in reason
    verdict, reason = said([judged(1, 20)], groups, units=200)
    assert verdict == "distributed"
    assert "more than 2 are many" in said([judged(1, 20)], groups[:3], units=200)[1]


def test_groups_that_break_the_model_break_no_refusal() -> None:
    groups = [judged(1, 20), judged(2, 0, damage=3.0)]
    verdict, reason = said([judged(1, 20)], groups)
    assert verdict == "distributed"
    assert "by breaking the model (+3.00 nats a token)" in reason


def test_the_largest_single_share_is_of_a_model_that_speaks() -> None:
    assert largest([judged(1, 0, damage=2.0), judged(1, 15)], T)[0] == 0.25
    assert largest([judged(1, 0, damage=2.0)], T)[0] == 0
    assert smallest([judged(1, 20)], [judged(8, 2), judged(6, 3)], T) == 6
    assert smallest([judged(1, 20)], [], T) is None


def test_fewest_prompts_are_the_first_that_tell_half_from_none() -> None:
    for tried in (1, 16, 256):
        fewest = fewest_prompts(T, tried)
        confidence = corrected(T, tried)
        for count, tells in ((fewest, True), (fewest - 1, False)):
            lost = -(-count // 2)
            low = taken([False] * lost + [True] * (count - lost), confidence)[1].low
            assert (low > 0) is tells
    assert fewest_prompts(T, 256) > fewest_prompts(T, 16) > fewest_prompts(T, 1)
    assert fewest_prompts(Thresholds(halved=0.9), 64) < fewest_prompts(T, 64)


def test_too_few_prompts_are_told_how_many_are_needed() -> None:
    check_enough(34, 50, T, 64)
    with pytest.raises(PromptError, match=r"refuses 33 of the 50 .* needs 34 .* 17 to measure on"):
        check_enough(33, 50, T, 64)
    with pytest.raises(PromptError, match=r"There are 10 harmful prompts.*try fewer neurons"):
        check_enough(10, None, T, 64)


def test_few_is_never_none_and_small_models_have_fewer() -> None:
    assert [few_units(T, units) for units in (10, 399, 400, 4000, 10**6)] == [1, 3, 4, 4, 1000]


def test_examples_run() -> None:
    assert doctest.testmod(safeft.auditing.verdict).failed == 0

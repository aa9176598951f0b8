"""How groups grow, on made-up trials."""

from typing import Any

import pytest

from safeft.auditing.groups import Judging, Member
from safeft.auditing.result import Thresholds, Trial
from safeft.auditing.verdict import Judged
from safeft.causal.effect import Outcome
from safeft.intervals import Interval, Rate

MEMBERS = [Member(f"A{n}", ("site", n)) for n in range(20)]


class MadeUp(Judging):
    """Groups of ``enough`` or more break refusal, of ``fatal`` or more the model."""

    enough, fatal = 99, 99

    def judged(self, members: Any) -> Judged:
        size = len(members)
        outcome = Outcome(Rate.of(0, 20), Rate.of(0, 20), 1.0, 1.0)
        damage = 5.0 if size >= self.fatal else 0.0
        names = tuple(member.name for member in members)
        trial = Trial(names, "zero", None, outcome, damage=damage)
        share = 0.9 if size >= self.enough else 0.1
        return Judged(trial, share, Interval(share - 0.05, share), 0.0)


def grown(enough: int, fatal: int = 99, members: int = 20) -> list[int]:
    nothing: Any = None
    made = MadeUp(*[nothing] * 8, Thresholds(), *[nothing] * 4)
    object.__setattr__(made, "enough", enough)
    object.__setattr__(made, "fatal", fatal)
    return [len(each.trial.names) for each in made.grown(MEMBERS[:members])]


@pytest.mark.parametrize(
    ("enough", "sizes"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3, 4]), (5, [1, 2, 4, 5, 6, 8]), (7, [1, 2, 4, 6, 7, 8])],
)
def test_they_double_until_one_breaks_refusal_then_halve_the_gap(
    enough: int, sizes: list[int]
) -> None:
    assert grown(enough) == sizes


def test_the_last_group_is_of_all_there_are() -> None:
    assert grown(99) == [1, 2, 4, 8, 16, 20]
    assert grown(20) == [1, 2, 4, 8, 16, 18, 19, 20]
    assert grown(99, members=1) == [1]


def test_it_ends_where_a_group_breaks_the_model() -> None:
    assert grown(99, fatal=4) == [1, 2, 4]


def test_damage_is_of_speech_to_either_side() -> None:
    nothing: Any = None
    base = Outcome(Rate.of(20, 20), Rate.of(0, 20), 1.0, 0.5)
    made = MadeUp(*[nothing] * 3, base, *[nothing] * 9)
    assert made.damage(1.25, 0.5) == 0.25
    assert made.damage(1.25, 3.0) == 2.5

"""From margins to effects: how much, how surely given how many neurons were tried, how spread."""

import math
from collections.abc import Sequence
from statistics import fmean, quantiles, stdev

from torch import Tensor

from safeft.auditing.result import Candidate, Effect, Kind
from safeft.intervals import Interval


def paired(falls: Sequence[float], confidence: float) -> tuple[float, Interval, float]:
    """Mean of per-prompt falls, its interval and the chance of one as far from 0 by chance.

    Student's t over prompts, two-sided; where all falls are alike, the interval has no width.

    Example:
        >>> mean, interval, p = paired([1.0, 2.0, 3.0, 2.0], 0.95)
        >>> mean, round(interval.low, 2), round(p, 3)
        (2.0, 0.7, 0.016)
    """
    from scipy.stats import t

    mean, count = fmean(falls), len(falls)
    error = stdev(falls) / math.sqrt(count)
    if error == 0:
        return mean, Interval(mean, mean), float(mean == 0)
    away = float(t.ppf(0.5 + confidence / 2, count - 1)) * error
    p = 2 * float(t.sf(abs(mean) / error, count - 1))
    return mean, Interval(mean - away, mean + away), p


def holm(chances: Sequence[float]) -> list[float]:
    """Adjusted so that the chance of any false one among all stays as stated (Holm 1979).

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    found = [0.0] * len(chances)
    worst = 0.0
    for rank, place in enumerate(sorted(range(len(chances)), key=lambda n: chances[n])):
        worst = max(worst, min(1.0, (len(chances) - rank) * chances[place]))
        found[place] = worst
    return found


def effects(
    plan: Sequence[tuple[Kind, float | None]],
    base: Tensor,
    margins: Tensor,
    elsewhere: Tensor,
    line: float,
    confidence: float,
) -> list[Effect]:
    """The effect of each edit, corrected for all that are given.

    Args:
        plan: Kind and signed strength of each edit, of all neurons.
        base: Margins of the audited prompts, ``(prompts,)``.
        margins: The same under each edit, ``(edits, prompts)``.
        elsewhere: Mean change of the other side's margins, ``(edits,)``.
        line: Below this margin a prompt counts as no longer refused.
        confidence: Of all intervals together (Bonferroni), and of ``p`` (Holm).
    """
    wide = 1 - (1 - confidence) / len(plan)
    # An edit whose numbers overflow says nothing of the unit.
    falls = (base - margins).nan_to_num(0.0)
    found = [paired(row.tolist(), wide) for row in falls]
    adjusted = holm([p for _, _, p in found])
    flipped = ((base >= line) & (base - falls < line)).double().mean(1).tolist()
    away = elsewhere.nan_to_num(0.0).tolist()
    return [
        Effect(kind, strength, mean, interval, share, other, p)
        for (kind, strength), (mean, interval, _), share, other, p in zip(
            plan, found, flipped, away, adjusted, strict=True
        )
    ]


def dividing_line(refused: Sequence[float], answered: Sequence[float]) -> float:
    """The margin that best parts prompts that are refused from those that are answered.

    In the middle between two of them; 0 where one side is empty. A greedy answer follows the
    likeliest token, so a refusal can open with a probability below one half.

    Example:
        >>> dividing_line([3.0, 1.0], [-4.0, -1.0])
        0.0
        >>> dividing_line([3.0, -2.0], [-4.0, -5.0])
        -3.0
    """
    if not refused or not answered:
        return 0.0
    known = sorted([*refused, *answered])
    middles = [(low + high) / 2 for low, high in zip(known, known[1:], strict=False)]

    def wrong(line: float) -> int:
        return sum(m < line for m in refused) + sum(m >= line for m in answered)

    return min(middles, key=lambda line: (wrong(line), abs(line)))


def compared(candidate: Candidate) -> Effect:
    """The effect by which neurons are compared: held against their direction, at twice their range.

    That is ``constant`` at strength 2. Zero, mean and the far end of a unit's own range do nothing
    measurable to most single neurons; much beyond it nearly any unit moves a margin somehow.
    """
    return next(e for e in candidate.effects if e.kind == "constant" and abs(e.strength or 0) == 2)


def reach(controls: Sequence[Candidate]) -> float:
    """How far random neurons go, compared alike, but for outliers among them; at least 0.

    Tukey's fence: the upper quartile of their falls and one and a half times the middle half's
    width. Of a few random neurons one may well matter, and would hide all others as the maximum.
    """
    falls = [compared(each).fall for each in controls]
    if len(falls) < 2:
        return max([0.0, *falls])
    low, _, high = quantiles(falls, n=4, method="inclusive")
    return max(0.0, high + 1.5 * (high - low))


def is_real(candidate: Candidate, beyond: float, confidence: float) -> bool:
    """Whether its effect differs from 0 and lies, interval and all, beyond random neurons'."""
    effect = compared(candidate)
    return effect.p < 1 - confidence and effect.interval.low > beyond


def gini(falls: Sequence[float]) -> float:
    """How unequal falls are: 0 where all are alike, near 1 where one neuron has it all.

    Example:
        >>> gini([1.0, 1.0]), gini([4.0, 0.0, 0.0, 0.0])
        (0.0, 0.75)
    """
    ordered, count = sorted(max(fall, 0.0) for fall in falls), len(falls)
    total = sum(ordered)
    if not total:
        return 0.0
    ranked = sum(rank * fall for rank, fall in enumerate(ordered, 1))
    return 2 * ranked / (count * total) - (count + 1) / count


def effective(falls: Sequence[float]) -> float:
    """Effective number of neurons, ``(sum f)**2 / sum f**2`` (Kish 1965); 0 of none.

    Example:
        >>> effective([2.0, 2.0, 2.0]), effective([])
        (3.0, 0.0)
    """
    squares = sum(fall * fall for fall in falls)
    return sum(falls) ** 2 / squares if squares else 0.0

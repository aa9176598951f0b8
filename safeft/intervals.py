"""Shares with their uncertainty: a few hundred prompts decide little, so none is shown without."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist, correlation, fmean, stdev
from typing import Any

from safeft.errors import ConfigError


@dataclass(frozen=True)
class Interval:
    """Two ends of a confidence interval."""

    low: float
    high: float


def wilson(successes: float, n: int, confidence: float = 0.95) -> Interval:
    """The Wilson score interval of a share: honest at 0 and 1, where the usual one has no width.

    ``successes`` need not be whole: a mean over several looks at the same ``n`` prompts will do.

    Raises:
        ConfigError: ``n`` is 0, or ``successes`` is not within 0 to ``n``.

    Example:
        >>> round(wilson(0, 10).high, 4)
        0.2775
    """
    if not 0 <= successes <= n or n == 0:
        raise ConfigError(
            f"{successes} out of {n} is no share, so it has no interval. Give at least one prompt."
        )
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, extra = successes / n, z * z / n
    middle = (share + extra / 2) / (1 + extra)
    half = math.sqrt(share * (1 - share) * extra + extra * extra / 4) / (1 + extra)
    # Exact at the ends, where rounding would leave a trace.
    low = 0.0 if successes == 0 else middle - half
    return Interval(low, 1.0 if successes == n else middle + half)


def shortfall(
    controls: Sequence[Sequence[bool]], verdicts: Sequence[bool], confidence: float = 0.95
) -> tuple[float, Interval]:
    """By how much a share lies below that of its random controls, on the same prompts.

    Two things are uncertain, and their squares add up. The prompts: Wilson intervals of both
    shares, combined with their correlation over prompts (Newcombe 1998, "Improved confidence
    intervals for the difference between binomial proportions based on paired data", method 10).
    The controls: another random set would have given another share, so the spread between them
    counts as for one new draw, ``t s sqrt(1 + 1 / sets)``. A set that was drawn at random itself
    thus lies within its interval as often as the confidence says, however many prompts there are.

    Args:
        controls: One row a control, one verdict a prompt.
        verdicts: Those of what is compared, in the same order of prompts.
        confidence: Of the interval.

    Returns:
        ``mean share of the controls - share of verdicts``, and its interval.

    Example:
        >>> found, interval = shortfall([[True] * 8] * 3, [False] * 8)
        >>> found, round(interval.low, 2)
        (1.0, 0.54)
    """
    n = len(verdicts)
    looks = [fmean(column) for column in zip(*controls, strict=True)]
    above, below = fmean(looks), fmean(verdicts)
    first, second = wilson(sum(looks), n, confidence), wilson(sum(verdicts), n, confidence)
    varies = len(set(looks)) > 1 and len(set(verdicts)) > 1
    related = correlation(looks, [float(v) for v in verdicts]) if varies else 0.0
    spread = 0.0
    if len(controls) > 1:
        from scipy.stats import t

        shares = [fmean(row) for row in controls]
        quantile = float(t.ppf(0.5 + confidence / 2, len(controls) - 1))
        spread = quantile * stdev(shares) * math.sqrt(1 + 1 / len(controls))

    def away(one: float, other: float) -> float:
        return math.sqrt(one**2 - 2 * related * one * other + other**2 + spread**2)

    found = above - below
    return found, Interval(
        max(-1.0, found - away(above - first.low, second.high - below)),
        min(1.0, found + away(first.high - above, below - second.low)),
    )


@dataclass(frozen=True)
class Rate:
    """A share of prompts: ``count`` out of ``total``, with its 95% Wilson interval."""

    count: int
    total: int
    low: float
    high: float

    @classmethod
    def of(cls, count: int, total: int) -> "Rate":
        """``count`` out of ``total``.

        Example:
            >>> Rate.of(5, 10).value
            0.5
        """
        interval = wilson(count, total)
        return cls(count, total, interval.low, interval.high)

    @property
    def value(self) -> float:
        """The share itself."""
        return self.count / self.total

    def to_dict(self) -> dict[str, Any]:
        """For JSON, the share included."""
        return {"value": self.value, **asdict(self)}

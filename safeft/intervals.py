"""Shares with their uncertainty: a few hundred prompts decide little, so none is shown without."""

from dataclasses import asdict, dataclass
from typing import Any

from safeft.errors import ConfigError


@dataclass(frozen=True)
class Interval:
    """Two ends of a confidence interval."""

    low: float
    high: float


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """The Wilson score interval of a share: honest at 0 and 1, where the usual one has no width.

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
    from scipy.stats import binomtest

    ends = binomtest(successes, n).proportion_ci(confidence_level=confidence, method="wilson")
    return Interval(float(ends.low), float(ends.high))


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

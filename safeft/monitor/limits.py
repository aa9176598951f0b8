"""Limits of normal windows: derived from clean ones by a rule that bounds the false alarms."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from safeft.errors import ConfigError, PromptError
from safeft.monitor.windows import STATISTICS

_BLOCK, _FIT_EVERY = 8, 4
"""Windows are dealt out in blocks, since neighbours share a prompt: the first block of four says
how far each neuron's statistics reach, the others how far beyond that clean windows go."""

_USUAL = 0.9
"""Where the unusual begins. A gate has one level on prompts that it lets pass and another on those
it stops, so its median says nothing of how far it falls; the ends of its distribution do."""

_LEAST_REACH = torch.tensor([0.5, 0.25, 0.25, 0.5, 0.5])
"""Octaves, octaves, bits, octaves, octaves: what varies less is taken to vary so much."""

_HIGH = STATISTICS.index("high")

FAMILIES = (slice(0, 3), slice(3, 5))
"""Statistics that share a factor: what shows a stuck neuron, and what lies out of range."""


@dataclass(frozen=True, eq=False)
class Limits:
    """Beyond what a window's statistics are not normal.

    How far a statistic lies beyond where the neuron's most unusual tenth of windows begins is
    measured in the length of that tenth, as the fitting part has it. Of each window of the rest the
    largest such distance of all neurons counts (max-T, Westfall and Young 1993: corrected for
    however many neurons there are, and for their dependence), and the limit is the distance that at
    most ``rate`` of clean windows exceed, with the ``confidence`` given: an order statistic (Wilks
    1941), whatever the distribution. What shows a stuck neuron and what lies out of range have a
    limit of their own, for half of ``rate`` each, so that neurons that rarely fire do not blunt the
    former. Windows of one prompt are somewhat alike; the confidence takes them for independent.

    Attributes:
        values: float32 ``(5, neurons)``, in the order of ``STATISTICS``: alarms are above ``high``,
            and below the others.
        typical: The medians, ``(5, neurons)``.
        factors: Of both families, how many reaches the limits are from where the tenth begins.
    """

    values: Tensor
    typical: Tensor
    factors: tuple[float, float]

    @classmethod
    def of(cls, statistics: Tensor, rate: float, confidence: float) -> "Limits":
        """The limits of clean windows' statistics ``(windows, 5, neurons)``.

        Raises:
            ConfigError: A rate or a confidence that is none.
            PromptError: Too few windows for that confidence.
        """
        least = windows_needed(rate, confidence)
        if len(statistics) < least:
            raise PromptError(
                f"The reference traffic has {len(statistics)} windows, and to promise at most "
                f"{rate:.2%} false alarms with {confidence:.0%} confidence takes {least}. Give "
                "more prompts or longer answers, or a smaller window."
            )
        scale = statistics[:, 0].median(0).values.exp2()
        depth = _depth(statistics, scale)
        block = torch.arange(len(depth)) // _BLOCK % _FIT_EVERY == 0
        fitting, rest = depth[block], depth[~block]
        usual = fitting.quantile(_USUAL, 0)
        reach = (fitting.amax(0) - usual).maximum(_LEAST_REACH[:, None])
        distance = (rest - usual) / reach
        factors = []
        for family in FAMILIES:
            largest = distance[:, family].flatten(1).amax(1).sort().values
            factors.append(float(largest[_order(len(largest), rate / 2, _each(confidence)) - 1]))
        beyond = torch.tensor([factors[0]] * 3 + [factors[1]] * 2)
        limit = usual + beyond[:, None] * reach
        typical = statistics.median(0).values
        return cls(_undepth(limit, scale), typical, (factors[0], factors[1]))

    def exceeded(self, statistics: Tensor) -> Tensor:
        """Bool ``(windows, 5, neurons)``: what is not normal."""
        found = statistics < self.values
        found[:, _HIGH] = statistics[:, _HIGH] > self.values[_HIGH]
        return found


def _depth(statistics: Tensor, scale: Tensor) -> Tensor:
    """How unusual: the more, the higher; extremes in octaves above the neuron's own scale."""
    stuck, (high, low) = -statistics[:, FAMILIES[0]], statistics[:, FAMILIES[1]].unbind(1)
    return torch.cat([stuck, torch.stack([_log(high / scale), -_log(low / scale)], dim=1)], dim=1)


def _undepth(depth: Tensor, scale: Tensor) -> Tensor:
    stuck, (high, low) = -depth[FAMILIES[0]], depth[FAMILIES[1]]
    return torch.cat([stuck, torch.stack([_exp(high) * scale, -_exp(low) * scale])])


def _log(values: Tensor) -> Tensor:
    return values.sign() * (1 + values.abs()).log2()


def _exp(values: Tensor) -> Tensor:
    return values.sign() * (values.abs().exp2() - 1)


def _each(confidence: float) -> float:
    """Of one of two families, for both together."""
    return 1 - (1 - confidence) / 2


def _order(count: int, rate: float, confidence: float) -> int:
    """The smallest r: the r-th of ``count`` sorted values bounds all but ``rate`` of the source."""
    from scipy.stats import binom

    return int(binom.ppf(confidence, count, 1 - rate)) + 1


def windows_needed(rate: float, confidence: float) -> int:
    """How many clean windows a promise takes.

    Raises:
        ConfigError: A rate or a confidence that is none.

    Example:
        >>> windows_needed(0.01, 0.95)
        984
    """
    if not (0 < rate < 1 and 0 < confidence < 1):
        raise ConfigError(
            f"rate={rate}, confidence={confidence}: both are shares above 0 and below 1. Give the "
            "share of clean windows that may raise an alarm, such as 0.01, and 0.95."
        )
    least = math.ceil(math.log(1 - _each(confidence)) / math.log(1 - rate / 2))
    return least + _fitting(least)


def _fitting(rest: int) -> int:
    """How many windows are dealt to fitting before ``rest`` others have been dealt."""
    dealt, last = divmod(rest, _BLOCK * (_FIT_EVERY - 1))
    return (dealt + (last > 0)) * _BLOCK

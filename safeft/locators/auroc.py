"""How well one number a prompt tells two kinds of prompts apart: AUROC of many units at once.

Ranks of all prompts, ties sharing the mean of their places, give it in one sort a unit (Mann and
Whitney's U over the number of pairs). Other labels on the same ranks are a matrix product, which is
what makes a null of hundreds of shuffles cheap.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from safeft.errors import PromptError, SelectionError

_UNITS = 2048
"""Units ranked at once: some ten float64 matrices of prompts by units are alive meanwhile."""

_NUMBERS = 2**22
"""Most float64 numbers in an array of samples by units by prompts, unless one unit alone has more;
some six are alive at once, 200 MB."""

_QUANTILE_NUMBERS = 2**22
"""Most numbers given to ``torch.quantile`` at once, which takes 2^24 and no more."""


def auroc(toxic: Tensor, neutral: Tensor) -> Tensor:
    """Share of pairs in which the toxic prompt has the larger value, ties counting half.

    Args:
        toxic: ``(prompts, units)``, any floating dtype.
        neutral: ``(other prompts, units)``.

    Returns:
        Float64 ``(units,)``; 0.5 for a unit that has one value throughout.

    Raises:
        PromptError: A side is empty.
        SelectionError: A value is not a finite number.

    Example:
        >>> auroc(torch.tensor([[3.0], [1.0]]), torch.tensor([[1.0], [0.0]])).tolist()
        [0.875]
    """
    labels = torch.arange(len(toxic) + len(neutral)) < len(toxic)
    found = [
        _of_labels(ranks, labels[None].double())[0] for ranks in ranked(toxic, neutral, _UNITS)
    ]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.double)


def best_by_chance(toxic: Tensor, neutral: Tensor, shuffles: int, seed: int) -> Tensor:
    """The AUROC of the best unit under each of many shuffles of the labels.

    Sites that saw the same prompts are shuffled alike, so that the best of several sites is the
    largest of theirs, and what units have in common is kept.

    Returns:
        Float64 ``(shuffles,)``.

    Example:
        >>> values = torch.randn(20, 5)
        >>> bool(best_by_chance(values, values, 50, 0).mean() > 0.5)
        True
    """
    count = len(toxic) + len(neutral)
    draw = torch.Generator().manual_seed(seed)
    order = torch.rand(shuffles, count, generator=draw).argsort(1)
    labels = (order < len(toxic)).double()
    best = torch.zeros(shuffles, dtype=torch.double)
    for ranks in ranked(toxic, neutral, _UNITS):
        best = torch.maximum(best, _of_labels(ranks, labels).amax(1))
    return best


def bootstrapped(
    toxic: Tensor, neutral: Tensor, draws: int, seed: int, confidence: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Ends of each unit's percentile interval when prompts of either side are drawn again.

    As many units at a time as keep the arrays of all samples small; what is kept is the two ends.

    Args:
        toxic: ``(prompts, units)``.
        neutral: ``(other prompts, units)``.
        draws: Number of samples, each with as many prompts of either side as there are.
        seed: Of the draws.
        confidence: Of the interval.

    Returns:
        Low and high ends, float64 ``(units,)`` each.

    Example:
        >>> low, high = bootstrapped(torch.randn(30, 1) + 3, torch.randn(30, 1), 100, 0)
        >>> bool(0.5 < low < high <= 1)
        True
    """
    draw = torch.Generator().manual_seed(seed)
    times = [_times_drawn(draws, len(side), draw) for side in (toxic, neutral)]
    step = max(1, _NUMBERS // (draws * max(len(toxic), len(neutral))))
    rest = (1 - confidence) / 2
    ends = torch.zeros(2, toxic.shape[1], dtype=torch.double)
    for at in range(0, toxic.shape[1], step):
        some = slice(at, at + step)
        each = _redrawn(toxic[:, some], neutral[:, some], *times)
        ends[:, some] = each.quantile(torch.tensor([rest, 1 - rest], dtype=torch.double), dim=0)
    return ends[0], ends[1]


def quantile(values: Tensor, share: float) -> Tensor:
    """What a share of each unit's values does not pass, float64 ``(units,)``.

    Args:
        values: ``(prompts, units)``, at least one prompt.
        share: From 0 to 1; between two values, their weighted mean.

    Example:
        >>> quantile(torch.tensor([[1.0], [2.0], [4.0]]), 0.75).tolist()
        [3.0]
    """
    step = max(1, _QUANTILE_NUMBERS // len(values))
    found = [part.double().quantile(share, dim=0) for part in values.split(step, dim=1)]
    return torch.cat(found)


def ranked(toxic: Tensor, neutral: Tensor, step: int) -> Iterator[Tensor]:
    """Ranks from 1 of both sides' prompts together, float64 ``(prompts, step)``, ``step`` units on.

    Raises:
        PromptError: A side is empty.
        SelectionError: A value is not a finite number.
    """
    if not len(toxic) or not len(neutral):
        raise PromptError(
            f"{len(toxic)} toxic and {len(neutral)} neutral prompts: with one class only nothing "
            "can be told apart. Give some 100 of each."
        )
    for at in range(0, toxic.shape[1], step):
        rows = _rows(torch.cat([toxic[:, at : at + step], neutral[:, at : at + step]]))
        if not rows.isfinite().all():
            raise SelectionError(
                "Some activations are not finite numbers: the model overflows, and what overflows "
                "cannot be ranked. Load it in float32 or bfloat16."
            )
        places = rows.sort(1).values
        below = torch.searchsorted(places, rows)
        upto = torch.searchsorted(places, rows, right=True)
        yield (below + upto + 1).T.double() / 2


def _rows(values: Tensor) -> Tensor:
    """``(units, prompts)``; widening half precision is exact, and its ties stay ties."""
    return values.to(torch.promote_types(values.dtype, torch.float32)).T.contiguous()


def _of_labels(ranks: Tensor, labels: Tensor) -> Tensor:
    """AUROC ``(labellings, units)``; sums of half numbers, so exact in float64."""
    positive = int(labels[0].sum())
    others = labels.shape[1] - positive
    surplus = labels @ ranks - positive * (positive + 1) / 2
    return surplus / (positive * others)


def _times_drawn(draws: int, count: int, draw: torch.Generator) -> Tensor:
    """How often each prompt is in each sample, float64 ``(draws, prompts)``."""
    chosen = torch.randint(count, (draws, count), generator=draw)
    times = torch.zeros(draws, count, dtype=torch.double)
    return times.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.double))


def _redrawn(toxic: Tensor, neutral: Tensor, often: Tensor, others: Tensor) -> Tensor:
    """AUROC of each sample: pairs weigh as often as both their prompts were drawn."""
    (places, order), values = _rows(neutral).sort(1), _rows(toxic)
    upto = others[:, order].cumsum(-1)
    upto = torch.cat([torch.zeros_like(upto[..., :1]), upto], -1)  # (draws, units, prompts + 1)
    won = torch.zeros(len(often), *values.shape, dtype=torch.double)
    for right in (False, True):
        place = torch.searchsorted(places, values, right=right)
        won += upto.gather(2, place.expand(len(often), -1, -1)) / 2
    return torch.einsum("dup,dp->du", won, often) / (len(neutral) * len(toxic))

"""L1 logistic probes: which units of one layer carry a label, along a whole path of strengths.

Style of SIREN (Jiao et al., arXiv 2604.18519, section 3): a sparse linear probe per layer, then the
fewest units that hold a given share of its absolute weight. Its own scheme trains every strength
anew by Adam in mini-batches; here the problem is solved as the convex one it is: strengths from the
strongest on, each starting from the last, by Newton steps on the units in play (Friedman, Hastie
and Tibshirani 2010; Yuan, Ho and Lin 2012).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

STRENGTHS: tuple[float, ...] = (0.3, 0.15, 0.07, 0.03, 0.015)
"""Penalties to choose from, as shares of the least one that leaves no unit."""

_ROWS = 8192
"""Rows read at a time: features lie on disk."""


@dataclass(frozen=True, eq=False)
class ProbePath:
    """Probes of one layer, one a strength, on standardised units.

    Attributes:
        weights: float32 ``(units, strengths)``.
        bias: float32 ``(strengths,)``.
        mean: float32 ``(units,)``.
        scale: Standard deviation, float32 ``(units,)``; 1 where a unit never changes.
    """

    weights: Tensor
    bias: Tensor
    mean: Tensor
    scale: Tensor

    def logits(self, features: Tensor, rows: Tensor) -> Tensor:
        """Log-odds of the given rows, float32 ``(rows, strengths)``."""
        weights = self.weights / self.scale[:, None]
        parts = [(part - self.mean) @ weights for part in chunks(features, rows)]
        return torch.cat(parts) + self.bias


def chunks(features: Tensor, rows: Tensor) -> Iterator[Tensor]:
    """Copies of the rows, some thousand at a time."""
    for start in range(0, len(rows), _ROWS):
        yield features[rows[start : start + _ROWS]]


def moments(features: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each unit over the rows, float32; 1 for a constant unit.

    Chunks are merged by Chan's rule, so that large means do not drown small variances.
    """
    count, mean, squares = 0, torch.zeros(1), torch.zeros(1)
    for part in chunks(features, rows):
        part = part.double()
        here, centre = len(part), part.mean(0)
        apart = centre - mean
        squares = squares + part.sub(centre).square().sum(0)
        squares = squares + apart.square() * (count * here / (count + here))
        mean = mean + apart * (here / (count + here))
        count += here
    scale = (squares / count).sqrt()
    varies = scale > 1e-6 * (1e-6 + mean.abs())
    return mean.float(), scale.where(varies, torch.ones_like(scale)).float()


def probe_path(
    features: Tensor,
    rows: Tensor,
    target: Tensor,
    strengths: Sequence[float] = STRENGTHS,
    *,
    counts: Tensor | None = None,
    tolerance: float = 1e-2,
) -> ProbePath:
    """Minimise ``mean log-loss + strength * most * norm1(w)`` for every strength.

    ``most`` is the least penalty under which all weights are zero, so a strength means the same in
    every layer. The bias carries no penalty.

    Args:
        features: float32 ``(texts, units)``, also mapped from disk.
        rows: Which of them are fitted on, int64.
        target: 0 or 1 for each of the rows, float32; both occur.
        strengths: Shares of ``most``, falling.
        counts: What each of the rows counts for, float32; by default alike.
        tolerance: A strength is done where its optimality is missed by less than this share of
            its penalty.

    Example:
        >>> x = torch.tensor([[1.0, 0.3], [2.0, -0.4], [-1.0, 0.2], [-2.0, 0.1]])
        >>> probe_path(x, torch.arange(4), torch.tensor([1.0, 1, 0, 0]), [0.5]).weights[1].item()
        0.0
    """
    layer = _Layer(features, rows, target, counts)
    share = (layer.counts * layer.target).mean()
    most = layer.gradient(layer.counts * (share - layer.target)).abs().max().clamp(min=1e-12)
    weights, bias = torch.zeros(features.shape[1]), torch.logit(share)
    found: list[tuple[Tensor, Tensor]] = []
    for strength in strengths:
        weights, bias = _solve(layer, weights, bias, strength * most, tolerance)
        found.append((weights, bias))
    return ProbePath(
        torch.stack([w for w, _ in found], 1),
        torch.stack([b for _, b in found]),
        layer.mean,
        layer.scale,
    )


class _Layer:
    """Standardised features of some rows: as a copy where they are few, else read in chunks."""

    def __init__(
        self, features: Tensor, rows: Tensor, target: Tensor, counts: Tensor | None
    ) -> None:
        self.mean, self.scale = moments(features, rows)
        self.target = target.float()
        self.counts = torch.ones_like(self.target) if counts is None else counts / counts.mean()
        self._features, self._rows = features, rows
        self._copy = self._standard(features[rows]) if len(rows) <= _ROWS else None

    def _standard(self, part: Tensor) -> Tensor:
        return part.sub_(self.mean).div_(self.scale)

    def gradient(self, errors: Tensor) -> Tensor:
        """``X'e / n``, ``(units,)``."""
        if self._copy is not None:
            return self._copy.T @ errors / len(errors)
        total = torch.zeros(len(self.mean))
        for start, part in enumerate(chunks(self._features, self._rows)):
            total += self._standard(part).T @ errors[start * _ROWS : (start + 1) * _ROWS]
        return total / len(errors)

    def columns(self, units: Tensor) -> Tensor:
        """``(rows, units + 1)``: these units, and ones for the bias."""
        if self._copy is not None:
            found = self._copy[:, units]
        else:
            parts = chunks(self._features, self._rows)
            found = torch.cat([self._standard(part)[:, units] for part in parts])
        return torch.cat([found, torch.ones(len(found), 1)], dim=1)


def _solve(
    layer: _Layer, weights: Tensor, bias: Tensor, penalty: Tensor, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Newton steps on the units in play, until no other one wants in."""
    target, counts, near = layer.target, layer.counts, tolerance * penalty
    held = weights.nonzero().flatten()
    logits = layer.columns(held) @ torch.cat([weights[held], bias[None]])
    for _ in range(30):
        errors = counts * (logits.sigmoid() - target)
        gradient, slope = layer.gradient(errors), errors.mean()
        missed = torch.where(
            weights != 0, gradient + penalty * weights.sign(), _shrunk(gradient, penalty)
        )
        if missed.abs().max() <= near and slope.abs() <= near:
            break
        units = ((weights != 0) | (gradient.abs() > 0.98 * penalty)).nonzero().flatten()
        columns = layer.columns(units)
        start = torch.cat([weights[units], bias[None]])
        penalties = penalty.repeat(len(start))
        penalties[-1] = 0
        share = logits.sigmoid()
        # Where a model is certain the curvature vanishes, and a step would have no end.
        curve = counts * (share * (1 - share)).clamp(min=1e-4)
        square = (columns.T * curve) @ columns / len(target)
        square.diagonal().add_(1e-6)
        slopes = torch.cat([gradient[units], slope[None]])
        step = _lasso(square, square @ start - slopes, start, penalties, 0.1 * near) - start
        start, logits = _along(layer, columns, start, step, penalties)
        weights = weights.index_copy(0, units, start[:-1])
        bias = start[-1]
    return weights, bias


def _lasso(
    square: Tensor, linear: Tensor, start: Tensor, penalties: Tensor, near: Tensor
) -> Tensor:
    """Minimise ``w'Sw / 2 - l'w + sum(penalties * abs(w))``: proximal steps with momentum.

    Momentum that climbs is given up (O'Donoghue and Candes 2015).
    """
    steep = torch.linalg.eigvalsh(square)[-1] * 1.001
    at = ahead = start
    momentum = 1.0
    for number in range(500):
        moved = _shrunk(ahead - (square @ ahead - linear) / steep, penalties / steep)
        change = moved - at
        if number % 10 == 9 and (moved - ahead).abs().max() * steep < near:
            return moved
        if float((ahead - moved) @ change) > 0:
            momentum = 1.0
        grown = (1 + (1 + 4 * momentum * momentum) ** 0.5) / 2
        at, ahead, momentum = moved, moved + (momentum - 1) / grown * change, grown
    return at


def _along(
    layer: _Layer, columns: Tensor, start: Tensor, step: Tensor, penalties: Tensor
) -> tuple[Tensor, Tensor]:
    """Where the step, halved until the objective falls, ends; and the logits there."""
    before, by = columns @ start, columns @ step

    def objective(length: float) -> Tensor:
        logits = before + length * by
        loss = (layer.counts * (softplus(logits) - layer.target * logits)).mean()
        return loss + (penalties * (start + length * step).abs()).sum()

    here, length = objective(0.0), 1.0
    while objective(length) > here and length > 1e-4:
        length /= 2
    return start + length * step, before + length * by


def _shrunk(values: Tensor, by: Tensor) -> Tensor:
    return values.sign() * (values.abs() - by).clamp(min=0)


def fewest(weights: Tensor, share: float) -> Tensor:
    """The fewest units that hold ``share`` of the absolute weight, int64, sorted.

    Example:
        >>> fewest(torch.tensor([0.1, -2.0, 0.0, 0.9]), 0.9).tolist()
        [1, 3]
    """
    order = weights.abs().argsort(descending=True, stable=True)
    held = weights.abs()[order].double().cumsum(0)
    count = int((held < share * held[-1]).sum()) + 1
    return order[: min(count, int((weights != 0).sum()))].sort().values

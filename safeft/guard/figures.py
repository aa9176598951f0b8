"""Figures of scores against labels: F1, ranking, calibration."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits


def macro_f1(flagged: Tensor, harmful: Tensor) -> Tensor:
    """Mean of the F1 of both classes, a column of ``flagged`` each.

    A class that neither occurs nor is claimed is left out of the mean.

    Args:
        flagged: Bool ``(texts,)`` or ``(texts, columns)``.
        harmful: Bool ``(texts,)``.

    Example:
        >>> macro_f1(torch.tensor([True, False, False]), torch.tensor([True, True, False])).item()
        0.6666666865348816
    """
    truth = harmful if flagged.ndim == 1 else harmful[:, None]
    parts = []
    for right, claimed in ((truth, flagged), (~truth, ~flagged)):
        hits = (right & claimed).sum(0).float()
        parts.append(2 * hits / (right.sum(0) + claimed.sum(0)).float())
    return torch.stack(parts).nanmean(0)


def by_source(sources: Sequence[str], harmful: Tensor) -> dict[str, Tensor]:
    """Numbers of each source's texts; sources of one label only are put together.

    Of one label alone neither F1 nor ranking says anything.
    """
    found: dict[str, list[int]] = {}
    for number, source in enumerate(sources):
        found.setdefault(source, []).append(number)
    parts: dict[str, Tensor] = {}
    single: list[int] = []
    for source, numbers in found.items():
        labels = harmful[numbers]
        if bool(labels.any()) and not bool(labels.all()):
            parts[source] = torch.tensor(numbers)
        else:
            single += numbers
    if single:
        parts["others"] = torch.tensor(sorted(single))
    return parts


def mean_f1(logits: Tensor, harmful: Tensor, parts: dict[str, Tensor]) -> Tensor:
    """Macro-F1 at even odds, the mean over sources, a number a column of ``logits``."""
    found = [macro_f1(logits[rows] > 0, harmful[rows]) for rows in parts.values()]
    return torch.stack(found).mean(0)


def auroc(scores: Tensor, harmful: Tensor) -> float:
    """Probability that a harmful text scores above a harmless one, ties counting half."""
    from scipy.stats import rankdata

    ranks = torch.from_numpy(rankdata(scores.double().numpy()))
    positive = int(harmful.sum())
    negative = len(harmful) - positive
    above = float(ranks[harmful].sum()) - positive * (positive + 1) / 2
    return above / (positive * negative)


def platt(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Slope and offset under which logits become log-odds (Platt 1999, smoothed targets).

    Newton's method on two numbers; smoothing keeps the slope finite where classes do not overlap.
    """
    positive = float(labels.sum())
    negative = len(labels) - positive
    high, low = (positive + 1) / (positive + 2), 1 / (negative + 2)
    target = torch.where(labels > 0.5, high, low).double()
    x = torch.stack([logits.double(), torch.ones(len(logits), dtype=torch.double)], 1)
    at = torch.tensor([1.0, 0.0], dtype=torch.double)

    def loss(place: Tensor) -> float:
        return float(binary_cross_entropy_with_logits(x @ place, target))

    for _ in range(100):
        share = (x @ at).sigmoid()
        slope = x.T @ (share - target) / len(x)
        curve = (x.T * (share * (1 - share)).clamp(min=1e-9)) @ x / len(x)
        step = torch.linalg.solve(curve + 1e-9 * torch.eye(2, dtype=torch.double), slope)
        length = 1.0
        while loss(at - length * step) > loss(at) and length > 1e-6:
            length /= 2
        at = at - length * step
        if float(slope.abs().max()) < 1e-8:
            break
    return float(at[0]), float(at[1])

"""Probes that hold elsewhere: layers weigh by what they say of sources left out of the fit.

Texts at work come from other places than those a guard is fitted on, and a layer that knows a data
set by its style is good on random parts of that set and on nothing else. So what a layer counts
for, and from which depth on layers are read at all, is decided by sources that the probes were not
fitted on. The paper (arXiv 2604.18519, section 3) decides by random parts and reads every layer; of
one source alone, parts are all there is.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from safeft.errors import SelectionError
from safeft.guard.figures import auroc, by_source, macro_f1, mean_f1
from safeft.guard.folds import folds
from safeft.guard.head import LayerProbe
from safeft.guard.places import Place
from safeft.guard.probes import STRENGTHS, fewest, probe_path
from safeft.progress import progress

STARTS: tuple[float, ...] = (0.0, 1 / 3, 1 / 2, 2 / 3)
"""Shares of the depth below which nothing is read, to choose from."""

FALL = 0.04
"""Loss of AUROC, beside the place that transfers best, at which a place counts for e times less."""

TIE = 0.01
"""Macro-F1 by which a start may lie below the best: of such the deepest, which reads the least."""

_FOLDS = 3


@dataclass(frozen=True, eq=False)
class Part:
    """Texts that are judged, int64, and those that probes are fitted on meanwhile."""

    held: Tensor
    fitted: Tensor


def parts_of(
    sources: Sequence[str],
    groups: Sequence[Hashable],
    harmful: Tensor,
    rows: Tensor,
    seed: int,
) -> tuple[list[Part], bool]:
    """Each source of both labels left out in turn; of fewer than two such, random parts.

    Args:
        sources: Where each text comes from.
        groups: Texts of one group are in one random part.
        harmful: Bool ``(texts,)``.
        rows: Which texts there are to fit on, int64.
        seed: Of random parts.

    Returns:
        The parts, and whether they are sources.

    Example:
        >>> truth = torch.tensor([True, False] * 4)
        >>> parts, apart = parts_of("aaaabbbb", range(8), truth, torch.arange(8), 0)
        >>> [part.held.tolist() for part in parts], apart
        ([[0, 1, 2, 3], [4, 5, 6, 7]], True)
    """
    names = [sources[int(n)] for n in rows]
    found = [rows[held] for held in by_source(names, harmful[rows]).values()]
    found = [held for held in found if harmful[held].unique().numel() == 2]
    apart = len(found) > 1
    if not apart:
        keys = [(sources[n], bool(harmful[n])) for n in rows.tolist()]
        own = [groups[n] for n in rows.tolist()]
        found = [rows[held] for held in folds(keys, own, _FOLDS, seed)]
    return [Part(held, rows[~torch.isin(rows, held)]) for held in found], apart


def transferring(
    features: Tensor,
    places: Sequence[Place],
    rows: Tensor,
    harmful: Tensor,
    counts: Tensor,
    trained: Tensor,
    held: Tensor,
    by: dict[str, Tensor],
    parts: Sequence[Part],
    apart: bool,
    share: float,
) -> tuple[list[LayerProbe], dict[str, object]]:
    """A probe a place, what each counts for, and from which depth on they are read.

    Args:
        features: float32 ``(rows, width of all places)``, also mapped from disk.
        places: Side by side in it, in order of depth.
        rows: Row of each text, int64.
        harmful: Bool ``(texts,)``.
        counts: What each text counts for, float32 ``(texts,)``.
        trained: Texts that the probes are fitted on in the end.
        held: Other texts, by which strengths are chosen: how many units a source needs.
        by: Of these the numbers of each source's.
        parts: See :func:`parts_of`.
        apart: Whether they are sources; random parts say nothing for reading less.
        share: Of a probe's absolute weight that the selected units hold.

    Raises:
        SelectionError: No unit tells anything.

    Returns:
        The probes (those below the start select nothing), and what was found.
    """
    target = harmful.float()
    probes: list[LayerProbe] = []
    ranked: list[float] = []
    elsewhere: list[list[Tensor]] = []  # by place and part, logits in units of their deviation
    start = 0
    for place in progress(places, "probing layers"):
        layer = features[:, start : start + place.width]
        start += place.width
        path = probe_path(layer, rows[trained], target[trained], counts=counts[trained])
        found = mean_f1(path.logits(layer, rows[held]), harmful[held], by)
        best = int(found.argmax())  # of equal ones the sparsest
        judged = [
            probe_path(
                layer, rows[p.fitted], target[p.fitted], STRENGTHS[: best + 1],
                counts=counts[p.fitted],
            ).logits(layer, rows[p.held])[:, best]
            for p in parts
        ]  # fmt: skip
        weights = path.weights[:, best]
        ranks = [auroc(x, harmful[p.held]) for x, p in zip(judged, parts, strict=True)]
        ranked.append(sum(ranks) / len(ranks))
        elsewhere.append([logits / logits.std().clamp(min=1e-6) for logits in judged])
        probes.append(
            LayerProbe(
                place, weights, float(path.bias[best]), path.mean, path.scale,
                STRENGTHS[best], _mean_f1(judged, parts, harmful), fewest(weights, share), 1.0,
            )
        )  # fmt: skip
    layers = sorted({place.layer for place in places})
    firsts = [layers[int(low * len(layers) + 1e-6)] for low in STARTS]
    f1s = []
    for first in firsts:
        read = [mine for mine, p in zip(elsewhere, places, strict=True) if p.layer >= first]
        together = [torch.stack(logits).mean(0) for logits in zip(*read, strict=True)]
        f1s.append(_mean_f1(together, parts, harmful))
    near = [at for at, f1 in zip(firsts, f1s, strict=True) if f1 >= max(f1s) - TIE * apart]
    first = near[-1] if apart else near[0]
    top = max(ranked)
    if not any(len(p.selected) for p in probes if p.place.layer >= first):
        raise SelectionError(
            "No unit of any layer tells harmful from harmless texts. Are the activations constant, "
            "or the labels random?"
        )
    none = torch.zeros(0, dtype=torch.long)
    weighed = [
        replace(probe, layer_weight=float(torch.tensor((auc - top) / FALL).exp()))
        if probe.place.layer >= first
        else replace(probe, layer_weight=0.0, selected=none)
        for probe, auc in zip(probes, ranked, strict=True)
    ]
    return weighed, {"from_layer": first, "f1_by_start": f1s, "auroc": ranked}


def _mean_f1(logits: Sequence[Tensor], parts: Sequence[Part], harmful: Tensor) -> float:
    found = [macro_f1(each > 0, harmful[p.held]) for each, p in zip(logits, parts, strict=True)]
    return float(torch.stack(found).mean())

"""Scores to neurons: how many, ranked where, and what the utility side takes away."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from safeft.errors import SelectionError
from safeft.locators.scores import Scores
from safeft.sites import Site


@dataclass(frozen=True)
class Selection:
    """How many units to take; exactly one of the first three is given.

    Attributes:
        fraction: Share of the units, above 0 and at most 1; at least one unit is taken.
        count: Number of units, per site with ``scope="layer"``.
        threshold: All units whose score is at least this.
        scope: Rank within each site (``layer``), or over all sites of a kind (``global``).
        utility_fraction: With the ``exclude`` rule, the share of units in the utility top that
            are passed over; by default as many as are selected.
        fill: Whether the places of units passed over go to the next best, so that the size is
            what was asked for. Without it the set is exactly "top of safety without top of
            utility", and smaller.
    """

    fraction: float | None = None
    count: int | None = None
    threshold: float | None = None
    scope: Literal["layer", "global"] = "layer"
    utility_fraction: float | None = None
    fill: bool = True

    def __post_init__(self) -> None:
        given = [v for v in (self.fraction, self.count, self.threshold) if v is not None]
        if len(given) != 1:
            raise SelectionError(
                f"fraction={self.fraction}, count={self.count}, threshold={self.threshold}: give "
                "exactly one of them, or it is unclear how many neurons are meant."
            )
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise SelectionError(
                f"fraction={self.fraction} would select "
                f"{'nothing' if self.fraction <= 0 else 'more neurons than there are'}. "
                "Give a number above 0 and at most 1, such as 0.05."
            )
        if self.count is not None and self.count < 1:
            raise SelectionError(f"count={self.count} would select nothing. Give 1 or more.")
        if self.utility_fraction is not None and not 0 <= self.utility_fraction < 1:
            raise SelectionError(
                f"utility_fraction={self.utility_fraction}: give at least 0 and less than 1, or no "
                "unit would be left to select."
            )
        if self.scope not in ("layer", "global"):
            raise SelectionError(f"scope={self.scope!r} is neither 'layer' nor 'global'.")


def select(
    scores: Scores, sites: Mapping[str, Site], selection: Selection
) -> dict[str, tuple[int, ...]]:
    """Site to sorted unit numbers. Ties go to the earlier layer, then to the lower number.

    The score's rule ranks: ``plain`` by safety, ``difference`` by safety minus utility, ``exclude``
    by safety among the units outside the utility top.

    Raises:
        SelectionError: Scores that are not numbers, more units than there are, or none selected.

    Example:
        >>> from safeft.sites import Part
        >>> site = Site("a.mlp", "mlp", 0, 3, 1, (), Part("a.mlp.down_proj", "columns"))
        >>> found = Scores({"a.mlp": torch.tensor([0.1, 0.9, 0.5])}, None, "plain")
        >>> select(found, {"a.mlp": site}, Selection(count=2))
        {'a.mlp': (1, 2)}
    """
    check_finite(scores)
    chosen: dict[str, tuple[int, ...]] = {}
    sites = {name: site for name, site in sites.items() if name not in scores.unscored}
    for names in pools(sites, selection.scope):
        safety = torch.cat([scores.safety[name].cpu() for name in names])
        utility = None
        if scores.utility is not None:
            utility = torch.cat([scores.utility[name].cpu() for name in names])
        taken = torch.zeros(len(safety), dtype=torch.bool)
        taken[_best(safety, utility, scores, selection)] = True
        sizes = [sites[name].units for name in names]
        for name, mask in zip(names, taken.split(sizes), strict=True):
            units = tuple(mask.nonzero().flatten().tolist())
            if units:
                chosen[name] = units
    if not chosen:
        raise SelectionError(
            f"No neuron was selected ({selection}). Freezing nothing protects nothing: lower the "
            "threshold, or leave fill=True."
        )
    return {name: chosen[name] for name in sites if name in chosen}


def check_size(sites: Mapping[str, Site], selection: Selection) -> None:
    """Refuse more units than there are, before anything is computed.

    Raises:
        SelectionError: The count is above the number of units.
    """
    for names in pools(sites, selection.scope):
        if selection.threshold is None:
            _size(sum(sites[name].units for name in names), selection)


def check_finite(scores: Scores) -> None:
    """Refuse scores that cannot be ranked.

    Raises:
        SelectionError: Some are not finite numbers.
    """
    for name, values in (*scores.safety.items(), *(scores.utility or {}).items()):
        if not values.isfinite().all():
            raise SelectionError(
                f"Scores of {name!r} hold values that are not finite numbers: the model's "
                "activations overflow. Load it in float32 or bfloat16."
            )


def pools(sites: Mapping[str, Site], scope: str) -> list[list[str]]:
    """The sites whose units are ranked together: each by itself, or all of a kind and tower."""
    if scope == "layer":
        return [[name] for name in sites]
    alike: dict[tuple[str, str], list[str]] = {}
    for name, site in sites.items():
        alike.setdefault((site.tower, site.kind), []).append(name)
    return list(alike.values())


def _best(safety: Tensor, utility: Tensor | None, scores: Scores, selection: Selection) -> Tensor:
    rank = safety
    if utility is not None and scores.rule == "difference":
        rank = safety - utility
    excludes = utility is not None and scores.rule == "exclude"
    if selection.threshold is not None:
        kept = rank >= selection.threshold
        if excludes:
            assert utility is not None
            kept &= utility < selection.threshold
        return kept.nonzero().flatten()
    size = _size(len(rank), selection)
    order = rank.argsort(descending=True, stable=True)
    if not excludes:
        return order[:size]
    assert utility is not None
    share = selection.utility_fraction
    passed_over = round(share * len(rank)) if share is not None else size
    busy = torch.zeros(len(rank), dtype=torch.bool)
    busy[utility.argsort(descending=True, stable=True)[:passed_over]] = True
    busy &= utility > utility.min()  # among units of no use a tie says nothing
    if not selection.fill:
        return order[:size][~busy[order[:size]]]
    return torch.cat([order[~busy[order]], order[busy[order]]])[:size]


def _size(units: int, selection: Selection) -> int:
    if selection.fraction is not None:
        return max(1, round(selection.fraction * units))
    assert selection.count is not None
    if selection.count > units:
        raise SelectionError(
            f"count={selection.count}, but there are {units} units to choose from"
            f"{' per layer' if selection.scope == 'layer' else ''}. Give a smaller count."
        )
    return selection.count

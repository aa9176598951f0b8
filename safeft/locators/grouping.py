"""Scores to four groups of units: safety-critical, utility-critical, redundant, complex.

Source: Superficial Safety Alignment Hypothesis (arXiv 2410.10862). With a unit's importance on
safety prompts ``I_S`` and on ordinary ones ``I_U``:

=======  ==================================  ===============================
group    units                               the paper's Table 1, Llama 2 7B
=======  ==================================  ===============================
``scu``  highest ``I_S - I_U``               1.3%
``ucu``  lowest ``I_S - I_U``                13.3%
``ru``   lowest ``I_S + I_U``                14.8%
``cu``   the rest                            70.6%
=======  ==================================  ===============================
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from safeft.errors import ConfigError, SelectionError
from safeft.locators.scores import Scores
from safeft.locators.select import check_finite, pools
from safeft.sites import Site

GroupName: TypeAlias = Literal["scu", "ucu", "ru", "cu"]
GROUPS: tuple[GroupName, ...] = get_args(GroupName)
"""In the order in which they take their units: none is in two groups."""


@dataclass(frozen=True)
class GroupSizes:
    """Shares of all units that three groups take; the complex units are what is left.

    The paper fixes no size: it sweeps the pruned share and looks at what breaks. The defaults are
    those of its Llama 2 7B; a group has at least one unit.

    Attributes:
        scu: Share of safety-critical units, above 0 and below 1.
        ucu: Of utility-critical units.
        ru: Of redundant units.
        scope: Rank over all sites of a kind (``global``), or within each site (``layer``).

    Raises:
        SelectionError: A share that is none, or nothing left for the complex units.
    """

    scu: float = 0.013
    ucu: float = 0.133
    ru: float = 0.148
    scope: Literal["layer", "global"] = "global"

    def __post_init__(self) -> None:
        for name in ("scu", "ucu", "ru"):
            if not 0 < getattr(self, name) < 1:
                raise SelectionError(
                    f"{name}={getattr(self, name)} is no share of the units. Give a number above 0 "
                    "and below 1, such as 0.013."
                )
        if self.share("cu") < 1e-9:
            raise SelectionError(
                f"scu={self.scu}, ucu={self.ucu} and ru={self.ru} leave no unit for the fourth "
                "group, the complex units. Give shares that sum to less than 1."
            )
        if self.scope not in ("layer", "global"):
            raise SelectionError(f"scope={self.scope!r} is neither 'layer' nor 'global'.")

    def share(self, name: GroupName) -> float:
        """Share of the units in one group.

        Example:
            >>> round(GroupSizes().share("cu"), 3)
            0.706
        """
        return 1 - self.scu - self.ucu - self.ru if name == "cu" else float(getattr(self, name))


@dataclass(frozen=True)
class Grouping:
    """What :func:`group` gives: to which group each unit belongs, and how deep in it.

    Attributes:
        indices: Group to site to sorted unit numbers.
        depth: Site to float64 ``(units,)``: a unit's place in its group's own order, from the most
            typical on, as a share of all units ranked together; ``cu:6%`` are the complex units
            with a depth below 0.06.
        sizes: What was asked for.
        passed_over: How many units that would be redundant were critical already.
    """

    indices: Mapping[GroupName, Mapping[str, tuple[int, ...]]]
    depth: Mapping[str, Tensor]
    sizes: GroupSizes
    passed_over: int


def group(scores: Scores, sites: Mapping[str, Site], sizes: GroupSizes | None = None) -> Grouping:
    """Put every unit of ``sites`` into exactly one group.

    The redundant are ranked by a sum and the critical by a difference, so the same unit may qualify
    twice. Critical goes before redundant, since what is redundant is declared free to be tuned; the
    next units in the order take the places. Ties go to the earlier layer, then the lower number.

    Within a group, ``scu`` and ``cu`` are ordered by ``I_S - I_U`` from the highest, ``ucu`` from
    the lowest, and ``ru`` by ``I_S + I_U`` from the lowest.

    Raises:
        ConfigError: Scores without a utility side, or whose two sides may not be subtracted.
        SelectionError: Scores that are not finite, or fewer than four units to rank.

    Example:
        >>> from safeft.sites import Part
        >>> site = Site("a.mlp", "mlp", 0, 4, 1, (), Part("a.mlp.down_proj", "columns"))
        >>> safety, utility = torch.tensor([[5.0, 0.1, 4.0, 1.0], [1.0, 0.1, 4.0, 6.0]])
        >>> found = group(Scores({"a.mlp": safety}, {"a.mlp": utility}, "difference"),
        ...               {"a.mlp": site}, GroupSizes(0.25, 0.25, 0.25))
        >>> {name: units["a.mlp"] for name, units in found.indices.items()}
        {'scu': (0,), 'ucu': (3,), 'ru': (1,), 'cu': (2,)}
    """
    sizes = sizes or GroupSizes()
    if scores.utility is None or scores.rule != "difference":
        raise ConfigError(
            f"Scores {'without a utility side' if scores.utility is None else 'with'} that are to "
            f"be ranked by the rule {scores.rule!r} give no groups: these need the importance on "
            "safety and on ordinary prompts in one unit, to be added and subtracted (rule "
            "'difference'). Use method='variance'."
        )
    check_finite(scores)
    check_sizes(sites, sizes)
    groups: dict[str, Tensor] = {}
    depth: dict[str, Tensor] = {}
    passed_over = 0
    for names in pools(sites, sizes.scope):
        safety, utility = (
            torch.cat([side[name].double().cpu() for name in names])
            for side in (scores.safety, scores.utility)
        )
        found, places, skipped = _divide(safety, utility, sizes)
        units = [sites[name].units for name in names]
        groups |= zip(names, found.split(units), strict=True)
        depth |= zip(names, ((places + 0.5) / len(places)).split(units), strict=True)
        passed_over += skipped
    indices: dict[GroupName, dict[str, tuple[int, ...]]] = {
        name: {
            site: tuple(units.tolist())
            for site in sites
            if len(units := (groups[site] == number).nonzero().flatten())
        }
        for number, name in enumerate(GROUPS)
    }
    return Grouping(indices, {site: depth[site].clone() for site in sites}, sizes, passed_over)


def check_sizes(sites: Mapping[str, Site], sizes: GroupSizes) -> None:
    """Refuse sites with too few units for four groups, before anything is computed.

    Raises:
        SelectionError: No unit would be left for the complex ones.
    """
    for names in pools(sites, sizes.scope):
        units = sum(sites[name].units for name in names)
        counts = _counts(units, sizes)
        if sum(counts.values()) >= units:
            raise SelectionError(
                f"{units} units ({', '.join(names[:3])}) cannot be divided into {counts} and a "
                "rest. Give smaller shares, more sites, or scope='global'."
            )


def _counts(units: int, sizes: GroupSizes) -> dict[GroupName, int]:
    return {name: max(1, round(sizes.share(name) * units)) for name in GROUPS if name != "cu"}


def _divide(safety: Tensor, utility: Tensor, sizes: GroupSizes) -> tuple[Tensor, Tensor, int]:
    """Per unit: the number of its group, its place there; and how many were passed over."""
    units = len(safety)
    counts = _counts(units, sizes)
    gap = safety - utility
    ranks = {"scu": gap, "ucu": -gap, "ru": -(safety + utility), "cu": gap}
    groups, places = torch.full((units,), -1), torch.zeros(units, dtype=torch.double)
    passed_over = 0
    for number, name in enumerate(GROUPS):
        order = ranks[name].argsort(descending=True, stable=True)
        count = counts.get(name, units)
        free = order[groups[order] < 0][:count]
        if name == "ru":
            passed_over = int((groups[order[:count]] >= 0).sum())
        groups[free] = number
        places[free] = torch.arange(len(free), dtype=torch.double)
    return groups, places, passed_over

"""How far sets of neurons agree, and how far they would by chance.

Chance is: at every site, each set holds as many units as it does, drawn at random and independently
of the other sets. So layers in which all sets are large do not count as agreement.
"""

import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, reduce
from itertools import combinations
from operator import or_
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor

from safeft.errors import SelectionError
from safeft.neurons import NeuronSet

Strata: TypeAlias = tuple[tuple[int, tuple[int, ...]], ...]
"""Per site: how many units there are, and how many of them each set holds."""


@dataclass(frozen=True)
class Overlap:
    """How many neurons several sets share, against chance.

    Attributes:
        sizes: Size of each set.
        at_least: In how many of the sets a neuron is, to count as shared.
        shared: Number of shared neurons.
        union: Number of neurons in any of the sets.
        expected: Mean of ``shared`` by chance.
        p_value: Probability of that many or more by chance: exact where ``at_least`` is the number
            of sets, an upper bound where it is smaller; never below the smallest float, 2e-308.
    """

    sizes: tuple[int, ...]
    at_least: int
    shared: int
    union: int
    expected: float
    p_value: float

    @property
    def jaccard(self) -> float:
        """Shared over union, 0 to 1; 0 where the sets are empty."""
        return self.shared / max(1, self.union)

    def to_dict(self) -> dict[str, Any]:
        """For JSON, the Jaccard index included."""
        return {**asdict(self), "jaccard": self.jaccard}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """What :meth:`to_dict` made."""
        known = {name: value for name, value in data.items() if name != "jaccard"}
        return cls(**{**known, "sizes": tuple(data["sizes"])})


def overlap(
    sets: Sequence[NeuronSet],
    at_least: int | None = None,
    pool: Mapping[str, int] | None = None,
) -> Overlap:
    """Compare what ``sets`` of one model share with what random sets of their sizes would.

    For two sets at one site this is the hypergeometric test; sites add up by convolution, and
    further sets by iterating it (:func:`in_all`). For ``at_least`` below the number of sets the
    p-value is Chernoff's bound: whether a unit is in so many random sets or not is negatively
    associated over units, for which it holds (Dubhashi and Ranjan, 1998).

    Args:
        sets: Two or more.
        at_least: In how many of them a neuron has to be; by default in all.
        pool: Site to number of units that could have been selected, where that is fewer than the
            site has.

    Raises:
        SelectionError: Fewer than two sets, ``at_least`` out of range, a pool smaller than a set.
        FingerprintError: Sets of unlike models.

    Example:
        >>> english, italian = (NeuronSet.from_pretrained(f) for f in folders)  # doctest: +SKIP
        >>> overlap([english, italian]).p_value  # doctest: +SKIP
        3.1e-12
    """
    at_least = _wanted(sets, at_least)
    union = reduce(or_, sets)
    strata = _strata(sets, union, pool or {})
    count = sum(found >= at_least for found in _places(sets).values())
    if at_least == len(sets):
        by_chance = in_all(strata)
        expected = float(by_chance @ torch.arange(len(by_chance), dtype=torch.double))
        p_value = float(by_chance[count:].sum()) if count else 1.0
    else:
        shares = [(units, _chance_of_one(units, sizes, at_least)) for units, sizes in strata]
        expected = sum(units * share for units, share in shares)
        p_value = _chernoff(shares, count)
    return Overlap(
        tuple(len(each) for each in sets),
        at_least,
        count,
        len(union),
        expected,
        min(1.0, max(p_value, sys.float_info.min)),
    )


def pairs(
    sets: Mapping[str, NeuronSet], pool: Mapping[str, int] | None = None
) -> dict[tuple[str, str], Overlap]:
    """The overlap of each two of the named sets, in the order given.

    Raises:
        SelectionError, FingerprintError: See :func:`overlap`.
    """
    return {(a, b): overlap([sets[a], sets[b]], pool=pool) for a, b in combinations(sets, 2)}


def shared(sets: Mapping[str, NeuronSet], at_least: int | None = None) -> NeuronSet:
    """The neurons in all of the named sets, or in at least so many; it may be empty.

    Raises:
        SelectionError: Fewer than two sets, or ``at_least`` out of range.
        FingerprintError: Sets of unlike models.
    """
    wanted = _wanted(list(sets.values()), at_least)
    places = _places(list(sets.values()))
    union = reduce(or_, sets.values())
    kept = {
        name: [unit for unit in units if places[name, unit] >= wanted]
        for name, units in union.indices.items()
    }
    of = {name: dict(each.source) for name, each in sets.items()}
    return _part(union, kept, {"method": "shared", "at_least": wanted, "of": of})


def specific(sets: Mapping[str, NeuronSet]) -> dict[str, NeuronSet]:
    """For each of the named sets, the neurons that no other one has; any of them may be empty.

    Raises:
        SelectionError: Fewer than two sets.
        FingerprintError: Sets of unlike models.
    """
    _wanted(list(sets.values()), None)
    found = {}
    for name, mine in sets.items():
        others = {other: theirs for other, theirs in sets.items() if other != name}
        source = {"method": "specific", "of": dict(mine.source), "not_in": list(others)}
        found[name] = replace(mine - reduce(or_, others.values()), source=source)
    return found


@lru_cache(maxsize=64)
def in_all(strata: Strata) -> Tensor:
    """Distribution of how many units random subsets share, float64 ``(largest possible + 1,)``.

    The units in the first ``j`` subsets of a site are themselves a random subset, so the number of
    them in the next one is hypergeometric again; sites are independent.

    Example:
        Two subsets of 2 of 4 units share 0, 1 or 2 in 1, 4 or 1 of the 6 cases:

        >>> [round(6 * chance, 9) for chance in in_all(((4, (2, 2)),)).tolist()]
        [1.0, 4.0, 1.0]
    """
    total = torch.ones(1, dtype=torch.double)
    for units, sizes in strata:
        first, *others = sorted(sizes)
        here = torch.zeros(first + 1, dtype=torch.double)
        here[first] = 1
        for size in others:
            possible = here.nonzero().flatten()
            here = here[possible] @ _hypergeometric(units, possible, size)
        total = _convolved(total, here)
    return total


def _hypergeometric(units: int, marked: Tensor, drawn: int) -> Tensor:
    """Probability of ``y`` marked ones among ``drawn``, ``(marked, y)`` for y up to the largest."""
    found = torch.arange(int(marked.max()) + 1)
    marked = marked[:, None]
    ways = _log_ways(marked, found) + _log_ways(units - marked, drawn - found)
    return (ways - _log_ways(torch.tensor(units), torch.tensor(drawn))).exp()


def _log_ways(among: Tensor, chosen: Tensor) -> Tensor:
    """Logarithm of ``among`` over ``chosen``; minus infinity where that is impossible."""
    n, k = torch.broadcast_tensors(among.double(), chosen.double())
    possible = (k >= 0) & (k <= n)
    k = k.where(possible, torch.zeros_like(k))
    ways = (n + 1).lgamma() - (k + 1).lgamma() - (n - k + 1).lgamma()
    return ways.where(possible, torch.full_like(ways, -torch.inf))


def _convolved(a: Tensor, b: Tensor) -> Tensor:
    """Distribution of a sum; term by term, as Fourier's way would lose the small tails."""
    short, long = sorted((a, b), key=len)
    total = torch.zeros(len(a) + len(b) - 1, dtype=torch.double)
    for place in short.nonzero().flatten().tolist():
        total[place : place + len(long)] += short[place] * long
    return total


def _chance_of_one(units: int, sizes: Sequence[int], at_least: int) -> float:
    """Probability that one unit is in at least so many of random subsets of these sizes."""
    chances = [1.0]
    for size in sizes:
        share = size / units
        missed, hit = [(1 - share) * c for c in chances], [share * c for c in chances]
        chances = [m + h for m, h in zip([*missed, 0.0], [0.0, *hit], strict=True)]
    return sum(chances[at_least:])


def _chernoff(shares: Sequence[tuple[int, float]], count: int) -> float:
    """Least ``exp(-z count) E[exp(z X)]`` over z of a sum X of ``units`` coins of each share."""

    def slope(z: float) -> float:
        heads = [units * q / (q + (1 - q) * math.exp(-z)) for units, q in shares if q]
        return sum(heads) - count

    low, high = 0.0, 700.0
    if slope(low) >= 0:
        return 1.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    grown = sum(units * math.log1p(q * math.expm1(low)) for units, q in shares)
    return math.exp(grown - low * count)


def _places(sets: Sequence[NeuronSet]) -> Counter[tuple[str, int]]:
    return Counter(
        (name, unit) for each in sets for name, units in each.indices.items() for unit in units
    )


def _strata(sets: Sequence[NeuronSet], union: NeuronSet, pool: Mapping[str, int]) -> Strata:
    strata = []
    for name in union.indices:
        units = pool.get(name, union.model.units[name])
        sizes = tuple(sorted(len(each.indices.get(name, ())) for each in sets))
        if sizes[-1] > units:
            raise SelectionError(
                f"A set holds {sizes[-1]} units of {name!r}, but the pool says that only {units} "
                "could be selected; chance would be wrong. Leave `pool` out, or correct it."
            )
        strata.append((units, sizes))
    return tuple(sorted(strata))


def _wanted(sets: Sequence[NeuronSet], at_least: int | None) -> int:
    if len(sets) < 2:
        raise SelectionError(
            f"{len(sets)} set{'s' * (len(sets) != 1)} cannot overlap with anything. Give two or "
            "more."
        )
    if at_least is not None and not 2 <= at_least <= len(sets):
        raise SelectionError(
            f"at_least={at_least}, but a neuron is shared if it is in 2 to {len(sets)} of the "
            f"{len(sets)} sets. Give a number in that range, or leave it out for all."
        )
    return len(sets) if at_least is None else at_least


def _part(union: NeuronSet, kept: Mapping[str, Sequence[int]], source: Any) -> NeuronSet:
    digest = {
        (name, unit): value
        for name, units in union.indices.items()
        for unit, value in zip(units, union.digests[name], strict=True)
    }
    indices = {name: tuple(units) for name, units in kept.items() if units}
    digests = {name: tuple(digest[name, unit] for unit in units) for name, units in indices.items()}
    return replace(union, indices=indices, digests=digests, source=source)

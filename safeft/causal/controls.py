"""What a causal check compares with: random sets of equal size, and prompts kept apart."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from safeft.errors import ConfigError, SelectionError
from safeft.neurons import NeuronSet

T = TypeVar("T")

_MOST, _FEWEST = 32, 8


@dataclass(frozen=True)
class Parted(Generic[T]):
    """Prompts to locate with and prompts to check with.

    Attributes:
        locating: Harmful and benign ones.
        checking: Harmful and benign ones.
        held_out: Whether the two have none in common.
    """

    locating: tuple[list[T], list[T]]
    checking: tuple[list[T], list[T]]
    held_out: bool


def parted(harmful: Sequence[T], benign: Sequence[T]) -> Parted[T]:
    """Keep a quarter of each side, at most 32, from locating, so that the check is on new prompts.

    Units chosen for what they do on some prompts look better on these than they are. Where the
    smaller side has fewer than 32 prompts, that quarter would show little, and locating needs
    them all: then both use all, and the check says so.

    Example:
        >>> parted(list(range(40)), list(range(60))).checking[0]
        [3, 7, 11, 15, 19, 23, 27, 31, 35, 39]
    """
    count = min(len(harmful), len(benign)) // 4
    if count < _FEWEST:
        same = list(harmful), list(benign)
        some = tuple(_spread(side, min(len(side), _MOST))[1] for side in same)
        return Parted(same, (some[0], some[1]), False)
    one, other = (_spread(side, min(count, _MOST)) for side in (harmful, benign))
    return Parted((one[0], other[0]), (one[1], other[1]), True)


def _spread(prompts: Sequence[T], count: int) -> tuple[list[T], list[T]]:
    """The rest, and ``count`` at even distances: files are often sorted by topic."""
    step = max(1, len(prompts) // max(1, count))
    chosen = set(range(step - 1, len(prompts), step)[:count])
    rest = [prompt for index, prompt in enumerate(prompts) if index not in chosen]
    return rest, [prompts[index] for index in sorted(chosen)]


def random_controls(neurons: NeuronSet, count: int, seed: int) -> list[dict[str, tuple[int, ...]]]:
    """``count`` unlike sets of as many units per site, none of them in ``neurons``.

    Raises:
        ConfigError: Fewer than 2 sets: nothing would be known of the spread between them.
        SelectionError: The set is empty, or there are not that many sets outside it.
    """
    if count < 2:
        raise ConfigError(
            f"random_sets={count}: one random set does not tell how far random sets differ, and "
            "without that no effect can be told from chance. Give 2 or more; 10 is usual."
        )
    if not len(neurons):
        raise SelectionError("The set holds no neuron, so there is nothing to weaken and to test.")
    outside: dict[str, list[int]] = {}
    possible = 1
    for name, units in neurons.indices.items():
        all_units, inside = neurons.model.units[name], set(units)
        outside[name] = [unit for unit in range(all_units) if unit not in inside]
        possible *= math.comb(len(outside[name]), len(units))
        if not possible:
            raise SelectionError(
                f"The set takes {len(units)} of the {all_units} units of {name!r}, so no random "
                f"set of equal size can be drawn from the {len(outside[name])} others, and what "
                "silencing so many does proves nothing of these. Give a smaller set."
            )
    if possible < count:
        raise SelectionError(
            f"Outside the set only {possible} sets of equal size can be drawn, not {count}. Give "
            f"a smaller set, or random_sets={possible} where that is at least 2."
        )
    rng = random.Random(seed)
    drawn: dict[tuple[Any, ...], None] = {}
    while len(drawn) < count:
        drawn[
            tuple(
                (name, tuple(sorted(rng.sample(outside[name], len(units)))))
                for name, units in neurons.indices.items()
            )
        ] = None
    return [dict(each) for each in drawn]

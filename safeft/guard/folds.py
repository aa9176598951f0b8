"""Texts in parts that share nothing: duplicates and given groups stay together."""

from collections import defaultdict
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor


def folds(
    keys: Sequence[Hashable], groups: Sequence[Hashable], count: int, seed: int
) -> list[Tensor]:
    """Numbers of the texts in ``count`` parts, int64, each like the whole in what ``keys`` say.

    Args:
        keys: What is to be spread evenly, such as source and label.
        groups: Texts of one group come into one part.
        count: Parts.
        seed: Of the order.

    Example:
        >>> parts = folds("aaaabbbb", range(8), 2, seed=0)
        >>> [sum(n < 4 for n in part.tolist()) for part in parts]
        [2, 2]
    """
    members: dict[Hashable, list[int]] = defaultdict(list)
    for number, group in enumerate(groups):
        members[group].append(number)
    together = list(members.values())
    order = torch.randperm(len(together), generator=torch.Generator().manual_seed(seed)).tolist()
    held: list[list[int]] = [[] for _ in range(count)]
    seen: dict[Hashable, list[int]] = defaultdict(lambda: [0] * count)
    # The largest groups first: what is left over evens out what they upset.
    for place in sorted(order, key=lambda place: -len(together[place])):
        group = together[place]
        counts = seen[keys[group[0]]]
        part = min(range(count), key=lambda n: (counts[n], len(held[n])))
        counts[part] += len(group)
        held[part] += group
    return [torch.tensor(sorted(part), dtype=torch.long) for part in held]

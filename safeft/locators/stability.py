"""How much two located sets agree, and how much of that chance alone would give."""

from collections.abc import Iterable, Mapping

from safeft.neurons import NeuronSet


def jaccard(a: NeuronSet, b: NeuronSet) -> float:
    """Neurons in both sets over neurons in either; 1 for the same set, two empty ones included.

    Example:
        >>> jaccard(first_half.scu, second_half.scu)  # doctest: +SKIP
    """
    either = len(a | b)
    return len(a & b) / either if either else 1.0


def jaccard_by_chance(
    a: NeuronSet, b: NeuronSet, units: Mapping[str, int], *, per_site: bool = True
) -> float:
    """What :func:`jaccard` is to be expected of random sets of the sizes of ``a`` and ``b``.

    The number in both is hypergeometric, or a sum of such; of its share in the number in either the
    expectation is taken to the second order, which is exact enough for sets of a few neurons.

    Args:
        a: One set.
        b: The other.
        units: Site to number of units, for all sites that were looked at.
        per_site: Random sets with as many units in each site as ``a`` and ``b``: a located set that
            only prefers the same layers does not beat this. Otherwise of the same size over all.

    Example:
        >>> jaccard_by_chance(first_half.scu, second_half.scu, units)  # doctest: +SKIP
    """
    draws = [(len(a), len(b), sum(units.values()))]
    if per_site:
        draws = [
            (len(a.indices.get(name, ())), len(b.indices.get(name, ())), number)
            for name, number in units.items()
        ]
    both = sum(x * y / n for x, y, n in draws)
    variance = sum(x * y * (n - x) * (n - y) / (n * n * max(1, n - 1)) for x, y, n in draws)
    total = len(a) + len(b)
    if total == both:
        return 1.0
    return both / (total - both) + total * variance / (total - both) ** 3


def agreement(
    pairs: Iterable[tuple[NeuronSet, NeuronSet]], units: Mapping[str, int]
) -> dict[str, list[float]]:
    """Both figures for each pair: a set located twice, on other prompts or another seed's.

    Returns:
        ``jaccard``, ``by_chance_per_layer`` and ``by_chance``, one number a pair.
    """
    found = list(pairs)
    return {
        "jaccard": [jaccard(*pair) for pair in found],
        "by_chance_per_layer": [jaccard_by_chance(*pair, units) for pair in found],
        "by_chance": [jaccard_by_chance(*pair, units, per_site=False) for pair in found],
    }

"""Agreement of two sets, and of random ones of their sizes."""

import random
from statistics import fmean

import pytest

from safeft.locators.stability import agreement, jaccard, jaccard_by_chance
from safeft.neurons import NeuronSet
from tests.models import tiny_model

MODEL = tiny_model()
A, B = "model.layers.0.mlp", "model.layers.1.mlp"
UNITS = {A: 48, B: 48}


def units(**layers: list[int]) -> NeuronSet:
    return NeuronSet.of(
        MODEL, {{"a": A, "b": B}[name]: numbers for name, numbers in layers.items()}
    )


def test_jaccard() -> None:
    one = units(a=[1, 2, 3], b=[4])
    assert jaccard(one, one) == 1
    assert jaccard(one, units(a=[4], b=[1, 2])) == 0
    assert jaccard(one, units(a=[2, 3, 9], b=[4])) == 3 / 5
    assert jaccard(one, units()) == 0
    assert jaccard(units(), units()) == jaccard_by_chance(units(), units(), UNITS) == 1


@pytest.mark.parametrize("per_site", [True, False])
@pytest.mark.parametrize("sizes", [((12, 2), (10, 4)), ((40, 30), (44, 20)), ((3, 0), (2, 1))])
def test_chance_is_what_random_sets_give(per_site: bool, sizes: tuple) -> None:
    rng = random.Random(0)
    everywhere = [(name, unit) for name in (A, B) for unit in range(48)]

    def draw(size: tuple[int, int]) -> set[tuple[str, int]]:
        if not per_site:
            return set(rng.sample(everywhere, sum(size)))
        return {
            (name, u)
            for name, n in zip((A, B), size, strict=True)
            for u in rng.sample(range(48), n)
        }

    drawn = [(draw(sizes[0]), draw(sizes[1])) for _ in range(8000)]
    found = fmean(len(x & y) / len(x | y) for x, y in drawn)
    one, other = (units(a=list(range(n)), b=list(range(m))) for n, m in sizes)
    expected = jaccard_by_chance(one, other, UNITS, per_site=per_site)
    assert expected == pytest.approx(found, rel=0.05, abs=0.003)


def test_agreement_lists_a_figure_of_each_kind_for_each_pair() -> None:
    one, other = units(a=[1, 2, 3]), units(a=[3, 4], b=[0])
    found = agreement([(one, other), (one, one)], UNITS)
    assert found["jaccard"] == [1 / 5, 1]
    assert found["by_chance"] == [
        jaccard_by_chance(one, other, UNITS, per_site=False),
        jaccard_by_chance(one, one, UNITS, per_site=False),
    ]
    assert found["by_chance_per_layer"][1] > found["by_chance"][1]

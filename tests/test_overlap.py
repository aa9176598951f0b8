"""Overlap against chance: exact where it says exact, a bound where it says bound."""

import doctest
import math
import random
from fractions import Fraction
from itertools import combinations, product

import pytest
import torch

import safeft.overlap
from safeft import NeuronSet
from safeft.errors import FingerprintError, SelectionError
from safeft.overlap import in_all, overlap, pairs, shared, specific
from tests.models import tiny_model

MODEL = tiny_model()
MLP0, MLP1, HEADS = "model.layers.0.mlp", "model.layers.1.mlp", "model.layers.1.self_attn"


def made(*units: dict[str, tuple[int, ...]]) -> list[NeuronSet]:
    return [NeuronSet.of(MODEL, each) for each in units]


def enumerated(units: int, sizes: tuple[int, ...], at_least: int) -> list[Fraction]:
    """Every choice of subsets, counted."""
    counts = [0] * (units + 1)
    total = 0
    for chosen in product(*(combinations(range(units), size) for size in sizes)):
        hits = [sum(unit in each for each in chosen) for unit in range(units)]
        counts[sum(hit >= at_least for hit in hits)] += 1
        total += 1
    return [Fraction(count, total) for count in counts]


@pytest.mark.parametrize("sizes", [(2, 3), (1, 1), (5, 2), (2, 3, 2), (5, 5, 5), (3, 1, 2, 4)])
def test_one_site_is_exact(sizes: tuple[int, ...]) -> None:
    expected = enumerated(5, sizes, len(sizes))
    found = in_all(((5, sizes),)).tolist()
    assert found == pytest.approx([float(chance) for chance in expected[: len(found)]], abs=1e-14)
    assert sum(expected[len(found) :]) == 0


def test_sites_add_up() -> None:
    one, two = enumerated(4, (2, 2), 2), enumerated(5, (1, 3, 2)[:2], 2)
    expected = [Fraction(0)] * 9
    for (a, chance_a), (b, chance_b) in product(enumerate(one), enumerate(two)):
        if a + b < 9:
            expected[a + b] += chance_a * chance_b
    found = in_all(((4, (2, 2)), (5, (1, 3)))).tolist()
    assert found == pytest.approx([float(chance) for chance in expected[: len(found)]], abs=1e-14)


def test_small_tails_are_not_lost() -> None:
    """All 40 of 4,096 units twice: one way among so many."""
    found = in_all(((4096, (40, 40)), (4096, (40, 40))))
    assert float(found[-1]) == pytest.approx(math.comb(4096, 40) ** -2.0, rel=1e-8)
    assert float(found.sum()) == pytest.approx(1, abs=1e-11)


def test_brute_force_simulation_of_stratified_sets() -> None:
    rng = random.Random(0)
    sets = made(
        {MLP0: tuple(range(10)), MLP1: tuple(range(6)), HEADS: (0, 1)},
        {MLP0: tuple(range(4, 16)), MLP1: tuple(range(3, 12)), HEADS: (1,)},
        {MLP0: tuple(range(2, 22)), MLP1: tuple(range(20))},
    )
    for chosen in ([0, 1], [0, 1, 2]):
        taken = [sets[number] for number in chosen]
        found = overlap(taken)
        drawn = []
        for _ in range(4000):
            hits = 0
            for name, units in (*((site, 48) for site in (MLP0, MLP1)), (HEADS, 4)):
                picks = [
                    set(rng.sample(range(units), len(each.indices.get(name, ())))) for each in taken
                ]
                hits += len(set.intersection(*picks))
            drawn.append(hits)
        share = sum(hits >= found.shared for hits in drawn) / len(drawn)
        assert found.p_value == pytest.approx(share, abs=0.025)
        assert found.expected == pytest.approx(sum(drawn) / len(drawn), rel=0.05)


@pytest.mark.parametrize("sizes", [(3, 2, 3), (2, 2, 2), (1, 4, 2)])
def test_in_two_of_three_is_a_bound_and_its_mean_exact(sizes: tuple[int, ...]) -> None:
    truth = [float(chance) for chance in enumerated(6, sizes, 2)]
    mean = sum(count * chance for count, chance in enumerate(truth))
    for chosen in product(*(list(combinations(range(6), size))[:4] for size in sizes)):
        found = overlap(made(*({MLP0: each} for each in chosen)), at_least=2, pool={MLP0: 6})
        assert found.expected == pytest.approx(mean)
        assert found.p_value >= sum(truth[found.shared :]) - 1e-12
        assert (found.p_value == 1) == (found.shared <= mean)


def test_the_bound_is_small_for_a_large_surplus() -> None:
    units = tuple(range(4))
    sets = made(*[{MLP0: units, MLP1: units}] * 3)
    assert 1e-12 < overlap(sets, at_least=2).p_value < 0.01
    assert overlap(sets).p_value < 1e-12


def test_random_sets_are_not_significant_more_often_than_said() -> None:
    generator = torch.Generator().manual_seed(1)
    values = []
    for _ in range(200):
        drawn = [
            {name: tuple(torch.randperm(48, generator=generator)[:8].tolist())}
            for name in (MLP0, MLP0)
        ]
        values.append(overlap(made(*drawn)).p_value)
    assert sum(value <= 0.05 for value in values) <= 20


def test_pool_makes_overlap_less_surprising() -> None:
    sets = made({MLP0: (1, 2, 3, 4)}, {MLP0: (3, 4, 5, 6)})
    everywhere, among = overlap(sets), overlap(sets, pool={MLP0: 8})
    assert everywhere.expected == pytest.approx(16 / 48)
    assert among.expected == pytest.approx(2)
    assert among.p_value > everywhere.p_value
    with pytest.raises(SelectionError, match="4 units of 'model.layers.0.mlp'.*only 3"):
        overlap(sets, pool={MLP0: 3})


def test_sets_without_a_common_site_and_empty_ones() -> None:
    apart = overlap(made({MLP0: (1, 2)}, {MLP1: (1, 2)}))
    assert (apart.shared, apart.expected, apart.p_value, apart.jaccard) == (0, 0.0, 1.0, 0.0)
    empty = overlap(made({}, {}))
    assert (empty.p_value, empty.jaccard) == (1.0, 0.0)


def test_shared_and_specific_are_sets_of_the_model() -> None:
    a, b, c = made({MLP0: (1, 2, 3), HEADS: (0,)}, {MLP0: (2, 3, 4)}, {MLP0: (3, 9), MLP1: (7,)})
    cells = {"en/text": a, "it/text": b, "zz/text": c}
    everywhere, some = shared(cells), shared(cells, at_least=2)
    assert everywhere.indices == {MLP0: (3,)}
    assert some.indices == {MLP0: (2, 3)}
    assert some.digests == {MLP0: a.digests[MLP0][1:]}
    some.check_model(MODEL)
    assert some.source["at_least"] == 2
    assert list(some.source["of"]) == list(cells)
    own = specific(cells)
    assert own["en/text"].indices == {MLP0: (1,), HEADS: (0,)}
    assert own["it/text"].indices == {MLP0: (4,)}
    assert own["zz/text"].indices == {MLP0: (9,), MLP1: (7,)}
    assert own["it/text"].source["not_in"] == ["en/text", "zz/text"]
    own["zz/text"].check_model(MODEL)
    matrix = pairs(cells)
    assert list(matrix) == [("en/text", "it/text"), ("en/text", "zz/text"), ("it/text", "zz/text")]
    assert matrix["en/text", "it/text"].jaccard == pytest.approx(2 / 5)
    assert overlap([a, b]).to_dict()["jaccard"] == pytest.approx(2 / 5)


@pytest.mark.parametrize(
    ("sets", "at_least", "words"),
    [
        ([{MLP0: (1,)}], None, "1 set cannot overlap.*two or more"),
        ([], None, "0 sets cannot overlap"),
        ([{MLP0: (1,)}] * 3, 1, "at_least=1.*2 to 3"),
        ([{MLP0: (1,)}] * 3, 4, "at_least=4.*2 to 3"),
    ],
)
def test_bad_input(sets: list, at_least: int | None, words: str) -> None:
    with pytest.raises(SelectionError, match=words):
        overlap(made(*sets), at_least)


def test_sets_of_unlike_models_are_refused() -> None:
    other = NeuronSet.of(tiny_model("qwen2"), {MLP0: (1,)})
    with pytest.raises(FingerprintError, match="unlike models"):
        overlap([*made({MLP0: (1,)}), other])


def test_doctests() -> None:
    assert doctest.testmod(safeft.overlap).failed == 0

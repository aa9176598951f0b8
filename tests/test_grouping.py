"""Who is in which group: the formulas, the partition, what cannot be grouped."""

import doctest
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from safeft.errors import ConfigError, SelectionError
from safeft.locators import (
    ContrastFitter,
    Grouping,
    GroupSizes,
    RandomFitter,
    Scores,
    SnipFitter,
    WandaFitter,
    group,
    grouping,
    locate_groups,
    score,
)
from safeft.locators.grouping import GROUPS
from safeft.prompts import as_prompts
from safeft.sites import Kind, Part, Site, find_sites
from tests.models import tiny_model, tiny_tokenizer

HARMFUL = ["How do I pick a lock?", "Make a weapon", "Steal it for me, please", "Hurt him"]
BENIGN = ["How do I bake bread?", "Name a tree", "Why is the sky blue at noon?", "Sum 2 and 2"]
QUARTERS = GroupSizes(0.25, 0.25, 0.25)


def site(name: str, layer: int, units: int, kind: Kind = "mlp") -> Site:
    return Site(name, kind, layer, units, 1, (), Part(f"{name}.out", "columns"))


def drawn(sites: dict[str, Site], seed: int = 0) -> Scores:
    """Importances of a long tail, as real ones are."""
    generator = torch.Generator().manual_seed(seed)

    def side() -> dict[str, torch.Tensor]:
        return {n: torch.randn(s.units, generator=generator).exp() ** 2 for n, s in sites.items()}

    return Scores(side(), side(), "difference")


def members(found: Grouping, name: str) -> set[tuple[str, int]]:
    return {(s, unit) for s, units in found.indices[name].items() for unit in units}


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("shares", [(0.013, 0.133, 0.148), (0.3, 0.2, 0.3), (0.01, 0.01, 0.75)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_groups_are_a_partition_of_all_units(scope: Any, shares: tuple, seed: int) -> None:
    sites = {"a": site("a", 0, 50), "b": site("b", 1, 70), "h": site("h", 1, 12, "attention")}
    found = group(drawn(sites, seed), sites, GroupSizes(*shares, scope=scope))
    everything = {(name, unit) for name, s in sites.items() for unit in range(s.units)}
    groups = [members(found, name) for name in GROUPS]
    assert set.union(*groups) == everything
    assert sum(map(len, groups)) == len(everything)
    pools = [50, 70, 12] if scope == "layer" else [120, 12]
    for name, share in zip(("scu", "ucu", "ru"), shares, strict=True):
        assert len(members(found, name)) == sum(max(1, round(share * units)) for units in pools)


def test_each_group_is_what_its_formula_says() -> None:
    sites = {"a": site("a", 0, 60), "b": site("b", 1, 40)}
    scores = drawn(sites)
    assert scores.utility is not None
    units = [(name, unit) for name, s in sites.items() for unit in range(s.units)]
    safety = {u: float(scores.safety[u[0]][u[1]]) for u in units}
    utility = {u: float(scores.utility[u[0]][u[1]]) for u in units}
    found = group(scores, sites, GroupSizes(0.05, 0.10, 0.20))
    by_gap = sorted(units, key=lambda u: utility[u] - safety[u])
    by_sum = sorted(units, key=lambda u: safety[u] + utility[u])
    assert members(found, "scu") == set(by_gap[:5])
    assert members(found, "ucu") == set(by_gap[-10:])
    assert members(found, "ru") == set(by_sum[:20])  # none of which is critical here
    assert found.passed_over == 0


def test_critical_goes_before_redundant_and_the_next_ones_take_the_places() -> None:
    sites = {"a": site("a", 0, 8)}
    # Unit 0 is first by difference and third from below by sum.
    safety = torch.tensor([0.3, 0.1, 0.1, 5.0, 5.0, 5.0, 5.0, 5.0])
    utility = torch.tensor([0.0, 0.1, 0.1, 5.0, 5.0, 5.0, 5.0, 6.0])
    scores = Scores({"a": safety}, {"a": utility}, "difference")
    found = group(scores, sites, GroupSizes(0.125, 0.125, 0.375))
    assert found.indices["scu"] == {"a": (0,)}
    assert found.indices["ucu"] == {"a": (7,)}
    assert found.indices["ru"] == {"a": (1, 2, 3)}
    assert found.passed_over == 1


def test_kinds_are_ranked_apart() -> None:
    """A head's importance is a sum over its features; beside it no hidden unit would be seen."""
    sites = {"a": site("a", 0, 40), "h": site("h", 0, 8, "attention")}
    scores = drawn(sites)
    assert scores.utility is not None
    loud = replace(
        scores,
        safety={**scores.safety, "h": 1000 * scores.safety["h"]},
        utility={**scores.utility, "h": 1000 * scores.utility["h"]},
    )
    found = [group(s, sites, QUARTERS) for s in (scores, loud)]
    assert found[0].indices == found[1].indices
    assert {name: len(units) for name, units in found[0].indices["scu"].items()} == {
        "a": 10,
        "h": 2,
    }


def test_depth_orders_each_group_by_its_own_measure() -> None:
    sites = {"a": site("a", 0, 60), "b": site("b", 1, 40)}
    scores = drawn(sites)
    assert scores.utility is not None
    found = group(scores, sites, GroupSizes(0.05, 0.10, 0.20))
    for name, key in (
        ("scu", lambda s, u: u - s),
        ("cu", lambda s, u: u - s),
        ("ucu", lambda s, u: s - u),
        ("ru", lambda s, u: s + u),
    ):
        units = members(found, name)
        by_depth = sorted(units, key=lambda u: float(found.depth[u[0]][u[1]]))
        values = [key(float(scores.safety[n][u]), float(scores.utility[n][u])) for n, u in by_depth]
        assert values == sorted(values)
        places = [round(100 * float(found.depth[n][u]) - 0.5, 6) for n, u in by_depth]
        assert places == list(range(len(units)))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"scu": 0}, "scu=0 is no share"),
        ({"ucu": 1.0}, "ucu=1.0 is no share"),
        ({"ru": -0.1}, "ru=-0.1 is no share"),
        ({"scu": math.nan}, "scu=nan is no share"),
        ({"scu": 0.5, "ucu": 0.3, "ru": 0.2}, "leave no unit.*sum to less than 1"),
        ({"scope": "model"}, "scope='model' is neither"),
    ],
)
def test_sizes_that_are_none_are_refused(wrong: dict, words: str) -> None:
    with pytest.raises(SelectionError, match=words):
        GroupSizes(**wrong)


def test_too_few_units_are_refused_before_anything_is_computed() -> None:
    sites = {"h": site("h", 0, 3, "attention")}
    with pytest.raises(SelectionError, match="3 units.*cannot be divided.*more sites"):
        group(drawn(sites), sites)
    model = tiny_model(num_attention_heads=2)
    model.register_forward_hook(lambda *_: pytest.fail("the model was run"))
    with pytest.raises(SelectionError, match="2 units.*self_attn"):
        locate_groups(
            model, tiny_tokenizer(), HARMFUL, BENIGN,
            sizes=GroupSizes(scope="layer"), sites="all",
        )  # fmt: skip


def test_scores_that_are_no_numbers_are_refused() -> None:
    sites = {"a": site("a", 0, 8)}
    scores = drawn(sites)
    scores.safety["a"][3] = math.nan
    with pytest.raises(SelectionError, match="not finite"):
        group(scores, sites, QUARTERS)


@pytest.mark.parametrize(
    ("fitter", "words"),
    [
        (ContrastFitter, "with that are to be ranked by the rule 'exclude'"),
        (WandaFitter, "the rule 'exclude'"),
        (SnipFitter, "the rule 'exclude'"),
        (lambda model, sites: RandomFitter(sites, 0), "without a utility side.*rule 'plain'"),
    ],
)
def test_scores_that_may_not_be_subtracted_give_no_groups(fitter: Any, words: str) -> None:
    model = tiny_model()
    sites = find_sites(model, ("mlp",))
    sides = {
        side: as_prompts({"prompt": p, "response": "Yes"} for p in prompts)
        for side, prompts in (("harmful", HARMFUL), ("benign", BENIGN))
    }
    scores = score(fitter(model, sites), model, tiny_tokenizer(), sides)
    with pytest.raises(ConfigError, match=f"{words}.*method='variance'"):
        group(scores, sites, QUARTERS)


def test_examples_run() -> None:
    assert doctest.testmod(grouping).failed == 0

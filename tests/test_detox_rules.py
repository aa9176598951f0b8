from functools import cache
from typing import Any

import pytest
import torch

from safeft.detox.experts import Expertise, find_experts
from safeft.detox.rules import dampen
from safeft.errors import ConfigError, SelectionError
from safeft.sites import find_sites
from tests.detoxing import TOKENIZER, texts, ugly
from tests.models import tiny_model

FIRST, SECOND = "model.layers.0.mlp", "model.layers.1.mlp"
AREAS = {FIRST: [0.9, 0.7, 0.55, 0.5, 0.2], SECOND: [1.0, 0.8, 0.61, 0.45, 0.3]}


@cache
def model() -> Any:
    return tiny_model()


def experts(**changed: Any) -> Expertise:
    """Five units a site whose areas are given, the others at 0.5; the level is 0.6."""
    sites = find_sites(model(), ("mlp",))
    areas, low = {}, {}
    for name, site in sites.items():
        areas[name] = torch.full((site.units,), 0.5, dtype=torch.double)
        areas[name][:5] = torch.tensor(AREAS[name], dtype=torch.double)
        low[name] = torch.where(areas[name] > 0.6, areas[name] - 0.05, torch.nan)
    ceilings = {name: torch.full((site.units,), 2.0) for name, site in sites.items()}
    given = {"sites": sites, "auroc": areas, "level": 0.6, "low": low, "high": low,
             "ceilings": ceilings, "unscored": (), "source": {}}  # fmt: skip
    return Expertise(**{**given, **changed})


def gains(rule: Any, **settings: Any) -> dict[tuple[str, int], float]:
    made = dampen(model(), experts(), rule, **settings)
    return {
        (name, unit): gain
        for name, units in made.neurons.indices.items()
        for unit, gain in zip(units, made.gains[name], strict=True)
    }


def expect(found: dict[tuple[str, int], float], wanted: dict[tuple[str, int], float]) -> None:
    assert found.keys() == wanted.keys()
    for key, gain in wanted.items():
        assert found[key] == pytest.approx(gain, abs=1e-6)


def test_aura_is_the_papers_formula_on_experts_alone() -> None:
    wanted = {(FIRST, 0): 0.2, (FIRST, 1): 0.6, (SECOND, 0): 0, (SECOND, 1): 0.4, (SECOND, 2): 0.78}
    expect(gains("aura"), wanted)
    expect(gains("aura", strength=0.5), {key: (1 + gain) / 2 for key, gain in wanted.items()})
    stronger = gains("aura", strength=2.0)
    assert stronger[FIRST, 1] == pytest.approx(0.2)
    assert stronger[FIRST, 0] == 0


def test_top_k_rules() -> None:
    expect(gains("det0", count=2), {(SECOND, 0): 0, (FIRST, 0): 0})
    expect(gains("constant", count=3, strength=0.3),
           {(SECOND, 0): 0.7, (FIRST, 0): 0.7, (SECOND, 1): 0.7})  # fmt: skip
    assert len(gains("det0", fraction=0.5)) == 5  # never more than there are experts
    assert len(gains("det0", fraction=0.02)) == 2
    assert len(gains("det0")) == 5


def test_sgm_weighs_by_expertise_and_starts_at_a_layer() -> None:
    expect(gains("sgm", count=3, strength=0.8),
           {(SECOND, 0): 0.2, (FIRST, 0): 1 - 0.8 * 0.8, (SECOND, 1): 1 - 0.8 * 0.6})  # fmt: skip
    found = gains("sgm", count=9, strength=0.8, first_layer=1)
    assert {name for name, _ in found} == {SECOND}


def test_threshold_caps_and_scales_nothing() -> None:
    made = dampen(model(), experts(), "threshold", strength=0.25)
    assert made.caps
    assert set(made.gains[FIRST]) == {1.0}
    assert set(made.ceilings[FIRST]) == {1.5}
    assert made.neurons.indices == {FIRST: (0, 1), SECOND: (0, 1, 2)}


def test_amplifying_only_when_asked_for() -> None:
    found = gains("aura", amplify=True)
    assert found[FIRST, 4] == pytest.approx(1.6)
    assert found[SECOND, 4] == pytest.approx(1.4)
    assert (SECOND, 3) not in found  # 0.45 is within what chance gives
    assert max(gains("aura").values()) <= 1


def test_a_unit_whose_interval_reaches_a_half_is_no_expert() -> None:
    low = {name: areas.clone().fill_(0.49) for name, areas in experts().auroc.items()}
    with pytest.raises(SelectionError, match="better than chance"):
        dampen(model(), experts(low=low))


def test_nothing_known_nothing_dampened() -> None:
    half = {name: torch.full_like(areas, 0.5) for name, areas in experts().auroc.items()}
    with pytest.raises(SelectionError, match="No unit tells toxic from neutral"):
        dampen(model(), experts(auroc=half))


def test_the_planted_neuron_gets_the_strongest_gain() -> None:
    truth = ugly(layer=2, sign=-1)
    found = find_experts(truth.model, TOKENIZER, texts(40, True), texts(40, False))
    made = dampen(truth.model, found)
    place = made.neurons.indices[truth.site].index(truth.unit)
    assert made.gains[truth.site][place] == 0
    assert made.neurons.source["rule"] == "aura"
    assert made.neurons.source["level"] == found.level


@pytest.mark.parametrize(
    ("rule", "settings", "words"),
    [
        ("nonesuch", {}, "rule='nonesuch'"),
        ("det0", {"strength": 0.5}, "det0 silences"),
        ("constant", {"strength": 1.5}, "at most 1"),
        ("aura", {"strength": -1}, "strength=-1"),
        ("aura", {"strength": float("nan")}, "strength=nan"),
        ("aura", {"count": 3}, "takes all experts"),
        ("det0", {"count": 3, "fraction": 0.1}, "give one of them"),
        ("det0", {"fraction": 0}, "fraction=0"),
        ("det0", {"count": 0}, "count=0"),
        ("aura", {"first_layer": 1}, "first_layer=1"),
        ("sgm", {"amplify": True}, "amplify goes with"),
    ],
)
def test_bad_settings(rule: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as raised:
        dampen(model(), experts(), rule, **settings)
    assert words in str(raised.value)

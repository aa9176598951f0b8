"""What units do by themselves, read by hand; and at what they are then held."""

import doctest
from typing import Any

import pytest
import torch

import safeft.auditing.interventions
from safeft.auditing.interventions import PLAN, Reference, References, natural
from safeft.capture import capture
from safeft.prompts import Batch, pad
from safeft.sites import find_sites
from tests.families import FAMILIES
from tests.test_capture import hooks_of

PROMPTS = {"harmful": [[9, 8, 7, 6], [30, 31, 32, 33, 34, 35]], "benign": [[50, 51, 52], [60] * 5]}
ANSWERS = {"harmful": [[11], [12, 13]], "benign": [[14, 15, 16], [17]]}
TAIL = 2


def family(name: str) -> Any:
    return next(each for each in FAMILIES if each.name == name).build()


def together(side: str, left: bool = True, answered: bool = True) -> Batch:
    pairs = zip(PROMPTS[side], ANSWERS[side] if answered else [[], []], strict=True)
    return pad(list(pairs), 0, left, TAIL, "cpu")


def by_hand(model: Any, side: str, site: str, answered: bool) -> list[torch.Tensor]:
    """Activations of a site, prompt by prompt, ``(tokens, units)``; NaN where routed elsewhere."""
    where, found = find_sites(model)[site], []
    for prompt, answer in zip(PROMPTS[side], ANSWERS[side], strict=True):
        ids = torch.tensor([[*prompt, *(answer if answered else [])]])
        rows = torch.full((ids.shape[1], where.units), torch.nan)
        if where.writes.expert is None:
            with torch.no_grad(), capture(model, {site: where}) as seen:
                model(ids)
            rows = seen[site][0, :, :, 0]
        else:
            from safeft.capture import Seen, tap

            def act(_: str, here: Seen, rows: torch.Tensor = rows) -> None:
                assert here.places is not None
                rows[here.places] = here.values

            with torch.no_grad(), tap(model, [where.writes], act):
                model(ids)
        found.append(rows)
    return found


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_references_are_those_of_each_prompt_alone(name: str, left: bool) -> None:
    model = family(name)
    sites = find_sites(model, ("mlp",))
    references = References(model, sites)
    for side in ("harmful", "benign"):
        references.update(side, [together(side, left)])
    assert hooks_of(model) == 0
    for site in sites:
        rows = {side: by_hand(model, side, site, True) for side in PROMPTS}
        everything = torch.cat([*rows["harmful"], *rows["benign"]]).nan_to_num(0)
        benign = torch.cat(rows["benign"])
        prompts = {side: by_hand(model, side, site, False) for side in PROMPTS}
        tails = {
            side: torch.stack([rows[-TAIL:].nan_to_num(0) for rows in each]).mean(0)
            for side, each in prompts.items()
        }
        gaps = tails["harmful"] - tails["benign"]
        for unit in (0, 5):
            found = references.of(site, unit)
            assert found.largest == pytest.approx(float(everything[:, unit].abs().max()), rel=1e-4)
            mean = benign[:, unit].nanmean().nan_to_num(0)
            assert found.mean == pytest.approx(float(mean), rel=1e-4, abs=1e-6)
            gap = gaps[gaps[:, unit].abs().argmax(), unit]
            assert found.gap == pytest.approx(float(gap), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_natural_activations_are_in_the_order_of_units_and_prompts(name: str) -> None:
    model = family(name)
    names = list(find_sites(model, ("mlp",)))
    units = [(names[0], 3), (names[-1], 1), (names[0], 0)]
    whole = together("harmful", answered=False)
    rows = [pad([(PROMPTS["harmful"][n], [])], 0, True, TAIL, "cpu") for n in (0, 1)]
    found = natural(model, find_sites(model), [([1], rows[1]), ([0], rows[0])], units)
    assert found.shape == (3, 2, TAIL)
    torch.testing.assert_close(
        found, natural(model, find_sites(model), [([0, 1], whole)], units), rtol=1e-4, atol=1e-6
    )
    for place, (site, unit) in enumerate(units):
        for number, each in enumerate(by_hand(model, "harmful", site, False)):
            expected = each[-TAIL:, unit].nan_to_num(0)
            torch.testing.assert_close(found[place, number], expected, rtol=1e-4, atol=1e-6)


NATURAL = torch.tensor([[0.0, -0.5], [1.5, 0.0], [-3.0, -2.0]])


@pytest.mark.parametrize("sign", [1, -1])
def test_values_put_in(sign: int) -> None:
    """A unit that is 1 higher (or lower) on harmful prompts, and 4 at most."""
    unit = Reference(0.25, 4.0, float(sign))
    seen = sign * NATURAL
    values = {
        (kind, strength): (sign * unit.held_at(kind, strength, seen)).tolist()
        for kind, strength in PLAN
    }
    assert values["zero", None] == [0, 0, 0]
    assert values["mean", None] == [sign * 0.25] * 3
    assert values["constant", 1.0] == [-4.0] * 3
    assert values["constant", 4.0] == [-16.0] * 3
    # -16 v / d - d, no further than -16; nothing against the direction.
    assert values["anchor", 4.0] == [-1.0, -16.0, -1.0]
    assert unit.signed(2.0) == -2.0 * sign


def test_a_unit_without_a_direction_is_held_at_plus() -> None:
    unit = Reference(0.0, 2.0, 0.0)
    assert unit.held_at("anchor", 4.0, NATURAL).tolist() == [8.0] * 3
    assert unit.held_at("constant", 1.0, NATURAL).tolist() == [2.0] * 3


def test_examples_run() -> None:
    assert doctest.testmod(safeft.auditing.interventions).failed == 0

"""The refusal margin against a sum over all answers, and where probabilities saturate."""

import math
from itertools import product

import pytest
import torch

from safeft.locators import AttributionFitter
from safeft.margin import refusal_margin
from safeft.sites import find_sites
from tests.models import tiny_model


def drawn(*shape: int) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("prefix", [(), (4,), (4, 1)])
def test_it_is_the_log_odds_over_all_starts(prefix: tuple[int, ...]) -> None:
    logits, openings = drawn(3, 1 + len(prefix), 5), (0, 2)
    shares = logits.double().softmax(-1)
    for row, found in enumerate(refusal_margin(logits, openings, prefix)):
        yes = no = 0.0
        for start in product(range(5), repeat=1 + len(prefix)):
            p = math.prod(float(shares[row, step, token]) for step, token in enumerate(start))
            if start[:-1] == prefix and start[-1] in openings:
                yes += p
            else:
                no += p
        assert float(found) == pytest.approx(math.log(yes / no), abs=1e-5)


def test_it_is_what_attribution_takes_the_gradient_of() -> None:
    model = tiny_model()
    fitter = AttributionFitter(model, find_sites(model), [7, 9])
    logits = drawn(4, 261)
    expected = -fitter._refusal_loss(logits)
    assert torch.allclose(refusal_margin(logits[:, None], [7, 9]), expected, atol=1e-5)


@pytest.mark.parametrize("prefix", [(), (0,)])
def test_it_does_not_saturate(prefix: tuple[int, ...]) -> None:
    """Probabilities here round to 0 or 1 in float32; the margin still tells them apart."""
    steps = 1 + len(prefix)
    sure = torch.tensor([80.0, 0.0]).expand(1, steps, 2)
    surer = torch.tensor([90.0, 0.0]).expand(1, steps, 2)
    low, high = (float(refusal_margin(each, [0], prefix)) for each in (sure, surer))
    assert low == pytest.approx(80 - math.log(steps), abs=1e-3)
    assert high - low == pytest.approx(10, abs=1e-3)
    assert float(refusal_margin(sure, [1], prefix)) == pytest.approx(-80, abs=1e-3)

"""The refusal margin against a sum over all answers, and where probabilities saturate."""

import math
from itertools import product

import pytest
import torch

from safeft.locators import AttributionFitter
from safeft.margin import opening_likelihood, refusal_margin
from safeft.sites import find_sites
from tests.models import tiny_model


def drawn(*shape: int) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("prefix", [(), (4,), (4, 1)])
def test_likelihood_is_that_of_all_starts_together(prefix: tuple[int, ...]) -> None:
    logits, tokens = drawn(3, 1 + len(prefix), 5), (0, 2)
    shares = logits.double().softmax(-1)
    for row, found in enumerate(opening_likelihood(logits, tokens, prefix)):
        total = 0.0
        for start in product(range(5), repeat=1 + len(prefix)):
            p = math.prod(float(shares[row, step, token]) for step, token in enumerate(start))
            total += p * (start[:-1] == prefix and start[-1] in tokens)
        assert float(found.exp()) == pytest.approx(total)


def test_margin_is_the_log_odds_of_the_sum() -> None:
    parts = [torch.tensor([0.1, 0.2]).log(), torch.tensor([0.3, 0.7]).log()]
    expected = [math.log(0.4 / 0.6), math.log(0.9 / 0.1)]
    assert refusal_margin(parts).tolist() == pytest.approx(expected, abs=1e-5)


def test_it_is_what_attribution_takes_the_gradient_of() -> None:
    model = tiny_model()
    fitter = AttributionFitter(model, find_sites(model), [7, 9])
    logits = drawn(4, 261)
    found = refusal_margin([opening_likelihood(logits[:, None], [7, 9])])
    assert torch.allclose(found.float(), -fitter._refusal_loss(logits), atol=1e-4)


def test_it_stays_finite_and_tells_apart_what_float32_could_not() -> None:
    def margin(gap: float) -> float:
        return float(refusal_margin([opening_likelihood(torch.tensor([[[gap, 0.0]]]), [0])]))

    assert margin(20.0) == pytest.approx(20, abs=1e-4)
    assert margin(-80.0) == pytest.approx(-80, abs=1e-4)
    assert margin(500.0) == margin(80.0) == pytest.approx(27.63, abs=0.01)

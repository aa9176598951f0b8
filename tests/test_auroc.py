import time
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from safeft.errors import PromptError, SelectionError
from safeft.locators.auroc import auroc, best_by_chance, bootstrapped, quantile


def by_loop(toxic: Tensor, neutral: Tensor, weights: Tensor | None = None) -> Tensor:
    labels = np.r_[np.ones(len(toxic)), np.zeros(len(neutral))]
    values = torch.cat([toxic, neutral]).double().numpy()
    found = [roc_auc_score(labels, column, sample_weight=weights) for column in values.T]
    return torch.tensor(found, dtype=torch.double)


def drawn(units: int, *, ties: bool, counts: tuple[int, int] = (61, 47)) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(units)
    toxic, neutral = (3 * torch.randn(n, units, generator=draw) for n in counts)
    toxic = toxic + torch.linspace(-2, 2, units)
    return (toxic.round(), neutral.round()) if ties else (toxic, neutral)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_equal_to_scikit_learn(ties: bool, dtype: torch.dtype) -> None:
    toxic, neutral = (side.to(dtype) for side in drawn(60, ties=ties))
    assert (auroc(toxic, neutral) - by_loop(toxic, neutral)).abs().max() < 1e-12


def test_units_are_ranked_alike_in_however_many_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    toxic, neutral = drawn(300, ties=True)
    whole = auroc(toxic, neutral)
    monkeypatch.setattr("safeft.locators.auroc._UNITS", 7)
    assert torch.equal(auroc(toxic, neutral), whole)


def test_a_constant_unit_tells_nothing() -> None:
    assert auroc(torch.full((5, 2), 3.0), torch.full((4, 2), 3.0)).tolist() == [0.5, 0.5]


def test_ten_times_faster_than_a_loop() -> None:
    toxic, neutral = drawn(200, ties=True, counts=(100, 120))
    times = []
    for measure in (auroc, by_loop):
        best = float("inf")
        for _ in range(2):
            start = time.perf_counter()
            measure(toxic, neutral)
            best = min(best, time.perf_counter() - start)
        times.append(best)
    assert times[1] > 10 * times[0]


def test_the_null_is_the_best_of_shuffled_labels() -> None:
    toxic, neutral = drawn(10, ties=True, counts=(12, 15))
    found = best_by_chance(toxic, neutral, shuffles=30, seed=3)
    draw = torch.Generator().manual_seed(3)
    order = torch.rand(30, 27, generator=draw).argsort(1)
    values = torch.cat([toxic, neutral])
    wanted = [by_loop(values[row < 12], values[row >= 12]).max() for row in order]
    torch.testing.assert_close(found, torch.stack(wanted), rtol=0, atol=1e-12)


def test_without_a_difference_the_null_is_seldom_passed() -> None:
    passed = []
    for seed in range(40):
        draw = torch.Generator().manual_seed(seed)
        shared = torch.randn(60, 1, generator=draw)  # what units have in common is kept
        values = torch.randn(60, 100, generator=draw) + shared
        level = best_by_chance(values[:30], values[30:], 100, seed).quantile(0.95)
        passed.append(bool(auroc(values[:30], values[30:]).max() > level))
    assert sum(passed) <= 6  # 2 are to be expected


def test_the_bootstrap_is_that_of_weighted_pairs() -> None:
    toxic, neutral = drawn(6, ties=True, counts=(11, 9))
    low, high = bootstrapped(toxic, neutral, draws=50, seed=1)
    draw = torch.Generator().manual_seed(1)
    chosen = [torch.randint(n, (50, n), generator=draw) for n in (11, 9)]
    each = torch.stack(
        [by_loop(toxic[one], neutral[other]) for one, other in zip(*chosen, strict=True)]
    )
    ends = each.quantile(torch.tensor([0.025, 0.975], dtype=torch.double), dim=0)
    torch.testing.assert_close(torch.stack([low, high]), ends, rtol=0, atol=1e-12)


def test_quantiles_of_more_numbers_than_torch_takes_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    toxic, neutral = drawn(30, ties=False)
    whole, ends = quantile(toxic, 0.95), bootstrapped(toxic, neutral, 50, seed=1)
    torch.testing.assert_close(whole, toxic.double().quantile(0.95, dim=0))
    taken = []
    plain = Tensor.quantile

    def limited(values: Tensor, *given: Any, **settings: Any) -> Tensor:
        taken.append(values.numel())
        return plain(values, *given, **settings)

    monkeypatch.setattr(Tensor, "quantile", limited)
    monkeypatch.setattr("safeft.locators.auroc._QUANTILE_NUMBERS", 200)
    monkeypatch.setattr("safeft.locators.auroc._NUMBERS", 50 * 61 * 7)
    assert torch.equal(quantile(toxic, 0.95), whole)
    assert torch.equal(torch.stack(bootstrapped(toxic, neutral, 50, seed=1)), torch.stack(ends))
    assert max(taken) <= 50 * 7


def test_bad_values() -> None:
    toxic, neutral = drawn(3, ties=False)
    with pytest.raises(PromptError, match="0 toxic and 47 neutral"):
        auroc(toxic[:0], neutral)
    toxic[0, 1] = torch.nan
    with pytest.raises(SelectionError, match="not finite"):
        auroc(toxic, neutral)

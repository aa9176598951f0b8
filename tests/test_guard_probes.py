import doctest

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from safeft.guard import probes
from safeft.guard.probes import STRENGTHS, fewest, moments, probe_path


def planted(texts: int = 400, units: int = 60, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features of which units 3 and 7 carry the label, on unlike scales and far from zero."""
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(texts, units, generator=draw)
    noise = 0.5 * torch.randn(texts, generator=draw)
    labels = (features[:, 3] - 2 * features[:, 7] + noise > 0).float()
    scale = torch.logspace(-2, 2, units)
    return features * scale + 30 * scale, labels


def test_doctests() -> None:
    assert doctest.testmod(probes).failed == 0


@pytest.mark.parametrize(
    ("strength", "uneven"), [(0.3, False), (0.07, False), (0.02, False), (0.07, True)]
)
def test_weights_are_those_of_scikit_learn(strength: float, uneven: bool) -> None:
    features, labels = planted()
    rows = torch.arange(0, 400, 2)
    counts = 1 + uneven * torch.rand(200, generator=torch.Generator().manual_seed(1)) * 5
    counts = counts / counts.mean()
    path = probe_path(features, rows, labels[rows], [0.5, strength], counts=counts, tolerance=1e-4)
    standard = ((features - path.mean) / path.scale)[rows].numpy()
    truth, weights = labels[rows].numpy(), counts.numpy()
    most = abs(standard.T @ (weights * ((weights * truth).mean() - truth)) / len(truth)).max()
    theirs = LogisticRegression(
        C=1 / (len(truth) * strength * most), l1_ratio=1.0, solver="saga", tol=1e-6, max_iter=20000
    ).fit(standard, truth, weights)
    torch.testing.assert_close(
        path.weights[:, 1], torch.tensor(theirs.coef_[0]).float(), atol=2e-3, rtol=1e-2
    )
    assert abs(float(path.bias[1]) - theirs.intercept_[0]) < 5e-3


def test_counts_of_any_mean_give_the_same() -> None:
    features, labels = planted()
    rows = torch.arange(100)
    one, ten = (
        probe_path(features, rows, labels[rows], counts=torch.full((100,), n)) for n in (1.0, 10.0)
    )
    torch.testing.assert_close(one.weights, ten.weights)
    assert bool(ten.bias.isfinite().all())


def test_planted_units_are_found_first() -> None:
    features, labels = planted()
    path = probe_path(features, torch.arange(400), labels)
    assert path.weights.shape == (60, len(STRENGTHS))
    assert path.weights[:, 0].nonzero().flatten().tolist() == [3, 7] or set(
        path.weights[:, 0].nonzero().flatten().tolist()
    ) <= {3, 7}
    assert set(fewest(path.weights[:, 3], 0.9).tolist()) >= {3, 7}
    counts = (path.weights != 0).sum(0)
    assert bool((counts[1:] >= counts[:-1]).all())


def test_read_in_chunks_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = planted()
    rows = torch.randperm(400, generator=torch.Generator().manual_seed(1))[:300]
    whole = probe_path(features, rows, labels[rows])
    monkeypatch.setattr(probes, "_ROWS", 77)
    parts = probe_path(features, rows, labels[rows])
    torch.testing.assert_close(parts.weights, whole.weights, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(parts.logits(features, rows), whole.logits(features, rows),
                               atol=1e-3, rtol=1e-3)  # fmt: skip


def test_moments_far_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_ROWS", 50)
    draw = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
    features = draw * 0.1 + 10_000
    features[:, 2] = 5.0
    mean, scale = moments(features, torch.arange(500))
    expected = features.double()
    torch.testing.assert_close(mean, expected.mean(0).float())
    torch.testing.assert_close(scale[:2], expected.std(0, correction=0)[:2].float())
    assert scale[2] == 1


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_fewest_holds_the_share_and_one_less_does_not(share: float) -> None:
    weights = torch.randn(40, generator=torch.Generator().manual_seed(0))
    weights[::3] = 0
    held = weights[fewest(weights, share)].abs()
    assert held.sum() >= share * weights.abs().sum() - 1e-5
    assert held.sum() - held.min() < share * weights.abs().sum()
    assert bool((held > 0).all())

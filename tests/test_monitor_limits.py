"""Limits keep the promise they state: few clean windows lie beyond, whatever the distribution."""

import doctest

import pytest
import torch
from torch import Tensor

from safeft.errors import ConfigError, PromptError
from safeft.monitor import limits
from safeft.monitor.limits import Limits, windows_needed
from safeft.monitor.windows import STATISTICS, statistics_of


def clean(kind: str, windows: int, seed: int, neurons: int = 12) -> Tensor:
    """Statistics of windows of 16 tokens, of neurons alone, of copies of one, or with a gate."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(windows, 16, neurons, generator=draw)
    if kind == "heavy":
        values = values / torch.randn(windows, 16, neurons, generator=draw)
    if kind == "copies":
        values = values[..., :1] * torch.linspace(0.01, 9, neurons)
    if kind == "gate":
        values[..., 0] *= torch.where(torch.rand(windows, 1, generator=draw) < 0.1, 5.0, 0.01)
    return statistics_of(values)


@pytest.mark.parametrize("kind", ["normal", "heavy", "copies", "gate"])
def test_clean_windows_raise_no_more_alarms_than_promised(kind: str) -> None:
    shares = []
    for seed in range(5):
        found = Limits.of(clean(kind, 1400, seed), 0.01, 0.95)
        shares.append(
            found.exceeded(clean(kind, 4000, 100 + seed)).flatten(1).any(1).double().mean()
        )
    assert sum(share > 0.01 for share in shares) <= 1
    assert max(shares) > 0  # limits nobody reaches would show nothing


def test_what_is_stuck_small_or_far_out_is_beyond_them() -> None:
    for kind in ("normal", "copies", "gate"):
        found = Limits.of(clean(kind, 1400, 0), 0.01, 0.95)
        values = torch.randn(50, 16, 12)
        scale = (found.typical[0] + 0.6).exp2()

        def share(changed: Tensor, found: Limits = found) -> dict[str, float]:
            beyond = found.exceeded(statistics_of(changed)).double().mean((0, 2))
            return dict(zip(STATISTICS, beyond.tolist(), strict=True))

        assert share(torch.zeros(50, 16, 12))["level"] == 1
        assert share(torch.full((50, 16, 12), 1.0) * scale)["spread"] == 1
        assert share(values * scale * 1e-3)["level"] > 0.9
        assert share(values.abs() * scale * 1e4)["high"] == 1
        assert share(-values.abs() * scale * 1e4)["low"] == 1


def test_too_few_windows_are_refused_with_how_many_it_takes() -> None:
    least = windows_needed(0.02, 0.9)
    Limits.of(clean("normal", least, 0), 0.02, 0.9)
    with pytest.raises(PromptError, match=f"{least - 1} windows.*takes {least}"):
        Limits.of(clean("normal", least - 1, 0), 0.02, 0.9)


@pytest.mark.parametrize(
    ("rate", "confidence"), [(0, 0.9), (1, 0.9), (-1, 0.9), (0.1, 0), (0.1, 1)]
)
def test_shares_that_are_none(rate: float, confidence: float) -> None:
    with pytest.raises(ConfigError, match="shares above 0"):
        windows_needed(rate, confidence)


def test_doctests() -> None:
    assert doctest.testmod(limits).failed == 0

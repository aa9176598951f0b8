"""The statistics of a window, against what they are by definition."""

import doctest
import math

import pytest
import torch

from safeft.monitor import windows
from safeft.monitor.windows import LEAST_SPREAD, STATISTICS, Windows, statistics_of


def of(*values: float) -> dict[str, float]:
    found = statistics_of(torch.tensor(values)[None, :, None]).flatten().tolist()
    return dict(zip(STATISTICS, found, strict=True))


def test_a_stuck_neuron() -> None:
    for value in (0.0, 3.0, -0.25):
        found = of(*[value] * 8)
        assert (found["entropy"], found["spread"]) == (0, LEAST_SPREAD)
        assert found["high"] == found["low"] == value
    assert of(*[0.0] * 8)["level"] == -40
    assert of(*[-0.25] * 8)["level"] == -2


def test_a_factor_moves_the_level_by_its_logarithm_and_nothing_else() -> None:
    values = torch.randn(200).tolist()
    whole, less = of(*values), of(*(v / 64 for v in values))
    assert less["level"] == pytest.approx(whole["level"] - 6, abs=1e-4)
    assert less["spread"] == pytest.approx(whole["spread"], abs=1e-4)
    assert less["entropy"] == pytest.approx(whole["entropy"], abs=1e-4)
    assert whole["spread"] == pytest.approx(0.7, abs=0.25)


def test_entropy_tells_signs_and_sizes_apart() -> None:
    assert of(1.0, -1.0, 1.0, -1.0)["entropy"] == 1
    assert of(1.0, 2.0, 4.0, 8.0)["entropy"] == 2
    assert of(1.0, 1.01, 1.0, 1.01)["entropy"] == 0
    assert of(1.0, 1.0, 1.0, 8.0)["entropy"] == pytest.approx(2 - 0.75 * math.log2(3))


def test_what_is_no_number_is_infinite() -> None:
    for value in (math.nan, math.inf):
        assert of(1.0, value)["high"] == math.inf
    assert of(1.0, -math.inf)["low"] == -math.inf


def test_windows_are_the_same_however_the_stream_is_cut() -> None:
    values = torch.randn(16 * 100 + 4, 3)
    whole = Windows(16).add(values)
    cut = Windows(16)
    parts = [cut.add(part) for part in values.split(7)]
    assert len(whole) == 100
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(whole[1], statistics_of(values[None, 16:32])[0])


def test_doctests() -> None:
    assert doctest.testmod(windows).failed == 0

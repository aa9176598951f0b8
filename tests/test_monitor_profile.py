"""A profile says what is normal, and is read whole or not at all."""

import doctest
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from safeft.errors import ArtefactError, SelectionError
from safeft.monitor import profile as module
from safeft.monitor.limits import Limits
from safeft.monitor.profile import BINS, Profile, bins_of, middles
from safeft.neurons import NeuronSet
from tests.gates import SITE, UNIT, profile
from tests.models import tiny_model


def made(values: torch.Tensor) -> Profile:
    """Of two neurons with these activations, ``(tokens, 2)``."""
    neurons = NeuronSet.of(tiny_model(), {"model.layers.0.mlp": (1, 7)})
    counts = torch.zeros(2, BINS, dtype=torch.long)
    counts.scatter_add_(1, bins_of(values).T, torch.ones_like(values.T, dtype=torch.long))
    watched = (("model.layers.0.mlp", 1), ("model.layers.0.mlp", 7))
    limits = Limits(torch.rand(5, 2), torch.rand(5, 2), (1.5, 2.0))
    return Profile(neurons, watched, counts, limits, 16, len(values), {"rate": 0.01})


def test_what_is_normal_is_read_off_a_histogram() -> None:
    values = torch.stack([torch.randn(50_000), torch.zeros(50_000)], 1)
    values[:25_000, 1] = -8.0
    found = made(values)
    one, two = (found.of("model.layers.0.mlp", unit) for unit in (1, 7))
    low, high = values[:, 0].quantile(torch.tensor([0.001, 0.999])).tolist()
    assert (one.low, one.high) == (pytest.approx(low, rel=0.1), pytest.approx(high, rel=0.1))
    assert abs(one.median) < 0.05
    assert (two.low, two.high, two.entropy) == (-8, 0, 1)
    with pytest.raises(SelectionError, match="#2 is not among the 2 watched"):
        found.of("model.layers.0.mlp", 2)


def test_bins_are_a_tenth_wide_on_both_sides_of_zero() -> None:
    values = torch.cat([10 ** torch.linspace(-6, 4, 99), -(10 ** torch.linspace(-6, 4, 99))])
    back = middles()[bins_of(values)]
    assert (back / values - 1).abs().max() < 0.1
    assert middles()[bins_of(torch.tensor([0.0, 1e-12]))].tolist() == [0, 0]
    assert bins_of(torch.tensor([1e30, -1e30])).tolist() == [BINS - 1, 0]


def test_it_comes_back_from_disk(tmp_path: Path) -> None:
    found = profile()
    found.save_pretrained(tmp_path)
    back = Profile.from_pretrained(tmp_path)
    assert torch.equal(back.counts, found.counts)
    assert torch.equal(back.limits.values, found.limits.values)
    assert torch.equal(back.limits.typical, found.limits.typical)
    assert (back.neurons, back.watched) == (found.neurons, found.watched)
    assert (back.window, back.tokens, dict(back.source)) == (16, found.tokens, dict(found.source))
    assert back.of(SITE, UNIT) == found.of(SITE, UNIT)
    found.save_pretrained(tmp_path)  # over itself


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "NeuronSet"}, "not a neuron profile"),
        ({"safeft": 2}, "schema 2"),
        ({"watched": [[SITE, 17]]}, "edited"),
        ({"watched": [["model.layers.0.mlp", 5]] * 7}, "edited"),
        ({"factors": None}, "incomplete or edited"),
        ({"tensors_sha256": "0"}, "not the file that was saved"),
    ],
)
def test_edited_profiles_are_refused(changes: Any, message: str, tmp_path: Path) -> None:
    profile().save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(ArtefactError, match=message):
        Profile.from_pretrained(tmp_path)


def test_a_cut_off_file_and_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="config.json"):
        Profile.from_pretrained(tmp_path)
    profile().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ArtefactError, match="truncated"):
        Profile.from_pretrained(tmp_path)


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    profile().neurons.save_pretrained(tmp_path)
    with pytest.raises(ArtefactError, match="would overwrite"):
        profile().save_pretrained(tmp_path)


def test_doctests() -> None:
    assert doctest.testmod(module).failed == 0

import doctest

import pytest
import torch
from torch import Tensor

from safeft.errors import SelectionError
from safeft.guard import transfer
from safeft.guard.figures import by_source
from safeft.guard.places import Place
from safeft.guard.transfer import FALL, STARTS, Part, parts_of, transferring

PLACES = [Place(f"block.{n}", "residual", n, 8) for n in range(4)]
SOURCES = ["one", "two", "three"]


def planted() -> tuple[Tensor, Tensor, list[str]]:
    """Three sources: the lower layers tell by what differs from source to source, the upper by
    what does not.
    """
    draw = torch.Generator().manual_seed(0)
    harmful = torch.arange(360) % 2 == 0
    sources = [SOURCES[n // 120] for n in range(360)]
    sign = torch.where(harmful, 1.0, -1.0)
    layers = []
    for place in PLACES:
        layer = torch.randn(360, 8, generator=draw)
        if place.layer < 2:
            for number, name in enumerate(SOURCES):
                mine = torch.tensor([s == name for s in sources])
                layer[mine, number] += 3 * sign[mine]
        else:
            layer[:, 5] += 2 * sign
        layers.append(layer)
    return torch.cat(layers, 1), harmful, sources


def found(parts: list[Part], apart: bool) -> tuple[list[transfer.LayerProbe], dict[str, object]]:
    features, harmful, sources = planted()
    held = torch.arange(0, 360, 5)
    trained = torch.arange(360)[~torch.isin(torch.arange(360), held)]
    by = by_source([sources[n] for n in held.tolist()], harmful[held])
    ones = torch.ones(360)
    return transferring(
        features, PLACES, torch.arange(360), harmful, ones, trained, held, by, parts, apart, 0.9
    )


def test_doctests() -> None:
    assert doctest.testmod(transfer).failed == 0


def test_layers_that_know_a_source_by_its_style_are_not_read() -> None:
    _, harmful, sources = planted()
    parts, apart = parts_of(sources, range(360), harmful, torch.arange(360), 0)
    assert apart
    probes, about = found(parts, apart)
    assert about["from_layer"] == 2
    assert len(about["f1_by_start"]) == len(STARTS)  # pyright: ignore[reportArgumentType]
    for probe in probes[:2]:
        assert (len(probe.selected), probe.layer_weight) == (0, 0)
        assert probe.f1 < 0.7
    for probe in probes[2:]:
        assert 5 in probe.selected.tolist()
        assert probe.f1 > 0.9
    weights = [probe.layer_weight for probe in probes[2:]]
    assert max(weights) == 1
    aucs = about["auroc"][2:]  # pyright: ignore[reportIndexIssue]
    fall = torch.tensor([(auc - max(aucs)) / FALL for auc in aucs]).exp()
    torch.testing.assert_close(torch.tensor(weights), fall)


def test_random_parts_see_no_difference() -> None:
    """The control: by parts of the same sources the lower layers are as good as the upper."""
    _, harmful, _ = planted()
    parts, apart = parts_of(["one"] * 360, range(360), harmful, torch.arange(360), 0)
    assert not apart
    probes, about = found(parts, apart)
    assert all(probe.f1 > 0.9 for probe in probes)
    assert about["from_layer"] == 0


def test_sources_of_one_label_are_no_parts() -> None:
    harmful = torch.tensor([True, False] * 10 + [True] * 10)
    sources = ["both"] * 20 + ["bad"] * 10
    parts, apart = parts_of(sources, range(30), harmful, torch.arange(30), 0)
    assert not apart
    assert sorted(n for part in parts for n in part.held.tolist()) == list(range(30))
    for part in parts:
        assert not set(part.held.tolist()) & set(part.fitted.tolist())
        assert len(part.held) + len(part.fitted) == 30


def test_rows_that_are_not_fitted_on_are_in_no_part() -> None:
    _, harmful, sources = planted()
    rows = torch.arange(10, 360)
    parts, _ = parts_of(sources, range(360), harmful, rows, 0)
    assert len(parts) == 3
    for part in parts:
        assert torch.cat([part.held, part.fitted]).sort().values.tolist() == rows.tolist()


def test_constant_activations_are_refused() -> None:
    harmful = torch.arange(60) % 2 == 0
    parts, _ = parts_of(["a"] * 60, range(60), harmful, torch.arange(60), 0)
    numbers = torch.arange(60)
    with pytest.raises(SelectionError, match="No unit of any layer"):
        transferring(
            torch.ones(60, 32), PLACES, numbers, harmful, torch.ones(60), numbers, numbers,
            {"a": numbers}, parts, False, 0.9,
        )  # fmt: skip

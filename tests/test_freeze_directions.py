"""``W U``, and how far rounding moves it."""

from typing import Any

import pytest
import torch

from safeft.freeze.certificate import off_directions
from safeft.freeze.directions import products_of, tolerance
from safeft.weights import ModelWeights
from tests.freezing import model_of

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_products_are_read_some_rows_at_a_time(axis: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("safeft.freeze.directions._ROWS", 7)
    model = model_of()
    weight = model.get_parameter(UP).detach()
    basis = torch.linalg.qr(torch.randn(48 if axis == "rows" else 32, 5)).Q
    found = products_of(ModelWeights(model), UP, basis, axis)
    lines = weight.T if axis == "rows" else weight
    torch.testing.assert_close(found.products, lines @ basis, rtol=1e-5, atol=1e-6)
    share = float(weight.norm()) * (5 / basis.shape[0]) ** 0.5
    assert found.scale == pytest.approx(max(float((lines @ basis).norm()), share), rel=1e-5)


def test_what_rounding_explains() -> None:
    assert tolerance(torch.float32) < 1e-6
    assert tolerance(torch.bfloat16) == 2**-7
    within = [{"tensor": "w", "relative_change": 9e-7, "tolerance": tolerance(torch.float32)}]
    assert off_directions(within) == []
    for change in (1e-6, float("nan"), float("inf")):
        (violation,) = off_directions([{**within[0], "relative_change": change}])
        assert (violation.tensor, violation.axis) == ("w", "directions")

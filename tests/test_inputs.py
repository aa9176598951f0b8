"""What layers receive, and what of it is read."""

import pytest
import torch

from safeft.capture import CaptureError
from safeft.locators.inputs import unit_tokens
from safeft.sites import find_linears
from tests.models import tiny_model


def test_a_layer_that_receives_other_tokens() -> None:
    linear = find_linears(tiny_model())["model.layers.0.mlp.down_proj.weight"]
    chosen = torch.ones(2, 5, dtype=torch.bool)
    for shape in ((2, 5, 48), (10, 48), (2, 1, 5, 48)):
        assert unit_tokens(linear, torch.ones(shape), chosen).shape == (10, 48)
    with pytest.raises(CaptureError, match=r"down_proj receives \(7, 48\) for \(2, 5\) prompts"):
        unit_tokens(linear, torch.ones(7, 48), chosen)

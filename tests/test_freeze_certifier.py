"""Certifying a model that is being trained."""

import pytest
import torch
from peft import get_peft_model

from safeft.errors import FreezeError
from safeft.freeze.certifier import Certifier, demand_exact
from safeft.freeze.plan import make_plan
from tests.freezing import SMALL, lora, model_of, neurons_of


def certifier_of(model: torch.nn.Module, mode: str = "freeze") -> Certifier:
    neurons = neurons_of(model, SMALL)
    return Certifier(make_plan(model, neurons, mode), model, neurons)  # pyright: ignore


def test_free_weights_may_move_and_held_ones_not_by_a_bit() -> None:
    model = model_of()
    certifier = certifier_of(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[0] += 1
        model.model.embed_tokens.weight.mul_(2)
    certificate = certifier.certify({"steps": 2})
    assert certificate.exact
    assert certificate.run == {"steps": 2}
    assert all(row["sha256_base"] == row["sha256_now"] for row in certificate.slices)
    demand_exact(certificate, "now")
    with torch.no_grad():
        weight[7, 3] = torch.nextafter(weight[7, 3], torch.tensor(9.0))
    certificate = certifier.certify({})
    assert [v.tensor for v in certificate.violations] == ["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(FreezeError, match=r"(?s)not where the base has it at step 3.*up_proj"):
        demand_exact(certificate, "at step 3")


def test_a_factor_that_left_zero_is_a_violation_with_its_row() -> None:
    model = get_peft_model(model_of(), lora(target_modules=["up_proj", "down_proj"]))
    certifier = certifier_of(model)
    down = model.get_base_model().get_submodule("model.layers.0.mlp.down_proj")
    with torch.no_grad():
        down.lora_A["default"].weight[:, [1, 7, 30]] = 0
    assert certifier.certify({}).exact
    with torch.no_grad():
        down.lora_A["default"].weight[2, 30] = 1e-30
    (violation,) = certifier.certify({}).violations
    assert violation.tensor == "model.layers.0.mlp.down_proj.lora_A.default.weight"
    assert (violation.axis, violation.index, violation.changed) == ("columns", 30, 1)


def test_train_only_covers_every_tensor() -> None:
    model = model_of()
    certifier = certifier_of(model, "train_only")
    named = {row["tensor"] for row in certifier.certify({}).slices}
    assert named == {name for name, _ in model.named_parameters()}
    with torch.no_grad():
        model.model.norm.weight[5] += 1
    assert [v.tensor for v in certifier.certify({}).violations] == ["model.norm.weight"]

"""Which arguments, optimizers and parameters a freeze is exact under."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers.training_args import OptimizerNames

from safeft.errors import FreezeError
from safeft.freeze.engines import (
    check_arguments,
    check_optimizer_name,
    check_parameters,
    describe,
    innermost,
)
from tests.freezing import arguments, model_of

REFUSED = {
    "lomo",
    "adalomo",
    "galore_adamw_layerwise",
    "galore_adamw_8bit_layerwise",
    "galore_adafactor_layerwise",
    "apollo_adamw_layerwise",
    "schedule_free_radam",
    "schedule_free_adamw",
    "schedule_free_sgd",
}


@pytest.mark.parametrize("optim", [name.value for name in OptimizerNames])
def test_each_optimizer_that_transformers_names_is_judged(optim: str, tmp_path: Path) -> None:
    args = arguments(tmp_path, optim=optim)
    if optim in REFUSED:
        with pytest.raises(FreezeError, match=f"optim='{optim}'.*Use another optimizer"):
            check_arguments(args)
    else:
        check_arguments(args)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"deepspeed": "zero.json"}, "DeepSpeed keeps master weights.*under DDP"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, "FSDP1 flattens.*fsdp_version: 2.*DDP"),
        ({"fsdp": True, "fsdp_config": {"version": 2}}, "sharded by FSDP.*under DDP"),
        ({"fsdp": True, "fsdp_config": None}, "sharded by FSDP"),
    ],
)
def test_sharding_engines_are_refused(settings: Any, words: str) -> None:
    args = SimpleNamespace(**{"deepspeed": None, "fsdp": None, "optim": "adamw_torch"} | settings)
    with pytest.raises(FreezeError, match=words):
        check_arguments(args)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP1"),
        ({"ACCELERATE_USE_FSDP": "true"}, "sharded by FSDP"),
    ],
)
def test_engines_that_a_launcher_switched_on_are_refused(
    variables: dict[str, str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FreezeError, match=words):
        check_arguments(args)


def test_optimizer_names_may_be_given_as_text() -> None:
    check_optimizer_name("adamw_torch")
    with pytest.raises(FreezeError, match="during the backward pass"):
        check_optimizer_name("some_new_layerwise")


def test_the_innermost_optimizer_is_found_under_wrappers() -> None:
    from accelerate import Accelerator

    inner = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    assert innermost(inner) is inner
    assert innermost(Accelerator(cpu=True).prepare(inner)) is inner
    assert innermost(SimpleNamespace(optimizer=SimpleNamespace(optimizer=inner))) is inner


@pytest.mark.parametrize(
    "name", ["Lomo", "AdaLomo", "LayerWiseDummyOptimizer", "AdamWScheduleFree"]
)
def test_optimizers_handed_over_as_objects_are_judged_by_class(name: str) -> None:
    kind = type(name, (torch.optim.SGD,), {})
    with pytest.raises(FreezeError, match="Use another optimizer"):
        innermost(kind([nn.Parameter(torch.ones(1))], lr=0.1))


def test_what_is_no_torch_optimizer_is_refused() -> None:
    with pytest.raises(FreezeError, match="is a SimpleNamespace, not a torch optimizer"):
        innermost(SimpleNamespace(step=print))


def test_sharded_and_flattened_parameters_are_refused() -> None:
    check_parameters(model_of())
    sharded = nn.Linear(2, 2)
    sharded.weight.ds_id = 3  # as ZeRO-3 marks them
    with pytest.raises(FreezeError, match="weight is sharded over processes"):
        check_parameters(sharded)
    flat = nn.Module()
    flat.add_module("_fsdp_wrapped_module", nn.Linear(2, 2))
    with pytest.raises(FreezeError, match="_fsdp_wrapped_module.weight belongs to FSDP1"):
        check_parameters(flat)


def test_real_dtensors_are_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    torch.distributed.init_process_group(
        "gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1
    )
    try:
        model = nn.Linear(2, 2)
        mesh = init_device_mesh("cpu", (1,))
        model.weight = nn.Parameter(distribute_tensor(torch.ones(2, 2), mesh))
        with pytest.raises(FreezeError, match="weight is sharded over processes"):
            check_parameters(model)
    finally:
        torch.distributed.destroy_process_group()


def test_a_run_describes_itself() -> None:
    model = model_of(torch.bfloat16)
    said = describe(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert said == {
        "engine": "NO",
        "processes": 1,
        "device": "cpu",
        "dtypes": ["torch.bfloat16"],
        "model_class": "LlamaForCausalLM",
        "optimizer": "torch.optim.sgd.SGD",
        "torch": torch.__version__,
    }

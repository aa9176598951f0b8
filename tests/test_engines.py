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
    DDPWatch,
    asked_engine,
    check_arguments,
    check_engine,
    check_expected,
    check_optimizer_name,
    describe,
    found_engine,
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


def asked(**settings: Any) -> SimpleNamespace:
    return SimpleNamespace(
        **{"deepspeed": None, "fsdp": None, "optim": "adamw_torch", "world_size": 1} | settings
    )


def zero(stage: int, **settings: Any) -> SimpleNamespace:
    config = {"zero_optimization": {"stage": stage, **settings}}
    return asked(deepspeed="zero.json", deepspeed_plugin=SimpleNamespace(deepspeed_config=config))


@pytest.mark.parametrize(
    ("args", "engine"),
    [
        (asked(), "single"),
        (asked(world_size=2), "ddp"),
        (asked(fsdp=True, fsdp_config={"version": 1}), "fsdp1"),
        (asked(fsdp=True, fsdp_config={"version": 2}), "fsdp2"),
        (asked(fsdp=True, fsdp_config=None), "fsdp2"),
        (zero(1), "zero1"),
        (zero(2), "zero2"),
        (zero(3), "zero3"),
    ],
)
def test_the_engine_asked_for_is_read_from_the_arguments(args: Any, engine: str) -> None:
    assert asked_engine(args) == engine
    if engine == "fsdp1":
        with pytest.raises(FreezeError, match="FSDP1 flattens.*fsdp_version: 2.*DDP"):
            check_arguments(args)
    else:
        check_arguments(args)


@pytest.mark.parametrize(
    ("variables", "engine"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp1"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "fsdp2"),
        ({"ACCELERATE_USE_FSDP": "true"}, "fsdp1"),  # accelerate's own default
        ({"WORLD_SIZE": "4"}, "ddp"),
    ],
)
def test_the_engine_asked_for_is_read_from_the_launcher(
    variables: dict[str, str], engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert asked_engine(asked()) == engine


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (zero(0), "stage 0.*Use stage 1, 2 or 3"),
        (zero(3, offload_param={"device": "nvme"}), "offload_param.device is nvme.*Use cpu"),
        (zero(2, offload_optimizer={"device": "nvme"}), "offload_optimizer.device is nvme"),
        (zero(3, zero_hpz_partition_size=4), "zero_hpz_partition_size=4.*Leave it away"),
        (zero(3, mics_shard_size=2), "mics_shard_size=2"),
        (zero(2, zenflow={"topk_ratio": 0.1}), "zenflow steps outside"),
        (asked(deepspeed="zero.json"), "its configuration cannot be read"),
    ],
)
def test_deepspeed_settings_that_cannot_be_pinned_are_refused(args: Any, words: str) -> None:
    with pytest.raises(FreezeError, match=words):
        check_arguments(args)


def test_deepspeed_on_the_cpu_or_another_device_is_not_refused() -> None:
    check_arguments(zero(3, offload_param={"device": "cpu"}, offload_optimizer={"device": "cpu"}))
    check_arguments(zero(2, offload_optimizer={"device": "none"}))


def test_an_engine_nobody_knows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("safeft.freeze.engines._launch", lambda: "MEGATRON_LM")
    with pytest.raises(FreezeError, match="MEGATRON_LM, an engine safeft does not know.*fsdp2"):
        check_arguments(asked())


@pytest.mark.parametrize("args", [asked(world_size=2), asked(fsdp=True), zero(2), zero(3)])
def test_a_launch_that_fell_back_to_one_process_is_an_error(args: Any) -> None:
    model = model_of()
    with pytest.raises(FreezeError, match="was asked for, and single is what runs, on 1 process"):
        check_engine(args, model, sgd(model))
    check_engine(asked(), model, sgd(model))


def test_what_the_user_demands_is_checked() -> None:
    found = {"engine": "ddp", "processes": 2}
    check_expected(found, None, None)
    check_expected(found, "ddp", 2)
    with pytest.raises(FreezeError, match="engine=fsdp2 was demanded, and ddp is what runs"):
        check_expected(found, "fsdp2", None)
    with pytest.raises(FreezeError, match="processes=8 was demanded, and 2 is what runs"):
        check_expected(found, None, 8)


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


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_the_engine_found_is_read_off_the_parameters() -> None:
    model = model_of()
    assert found_engine(model) == "single"
    dict(model.named_parameters())["model.norm.weight"]._hp_mapping = None  # as ZeRO-1 marks them
    with pytest.raises(FreezeError, match=r"several engines at once: .*\(plain\).*\(zero\)"):
        found_engine(model)
    for parameter in model.parameters():
        parameter._hp_mapping = None
    assert found_engine(model) == "zero1"
    two = SimpleNamespace(optimizer=SimpleNamespace(partition_gradients=True))
    assert found_engine(model, two) == "zero2"
    flat = nn.Module()
    flat.add_module("_fsdp_wrapped_module", nn.Linear(2, 2))
    with pytest.raises(FreezeError, match="_fsdp_wrapped_module.weight belongs to FSDP1"):
        found_engine(flat)


def test_a_model_that_ran_outside_of_ddp_is_an_error() -> None:
    model = nn.Linear(2, 2)
    watch = DDPWatch(model)
    model(torch.ones(1, 2))
    with pytest.raises(FreezeError, match="was not run inside DistributedDataParallel"):
        watch.check()


def test_a_model_inside_ddp_is_seen_and_a_dtensor_told_from_fsdp(tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model = nn.Linear(2, 2)
        watch = DDPWatch(model)
        model(torch.ones(1, 2))  # as in generation
        nn.parallel.DistributedDataParallel(model)(torch.ones(1, 2))
        watch.check()
        assert watch.seen == "DistributedDataParallel"
        mesh = init_device_mesh("cpu", (1,))
        assert found_engine(fully_shard(nn.Linear(2, 2), mesh=mesh)) == "fsdp2"
        for name, parameter in list(model.named_parameters()):
            model.register_parameter(name, nn.Parameter(distribute_tensor(parameter.data, mesh)))
        assert found_engine(model) == "dtensor"
    finally:
        torch.distributed.destroy_process_group()


def test_a_run_describes_itself() -> None:
    model = model_of(torch.bfloat16)
    said = describe(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert said == {
        "engine": "single",
        "launch": "NO",
        "processes": 1,
        "device": "cpu",
        "dtypes": ["torch.bfloat16"],
        "model_class": "LlamaForCausalLM",
        "optimizer": "torch.optim.sgd.SGD",
        "optimizer_wrappers": [],
        "torch": torch.__version__,
    }

"""Which training engines and optimizers a freeze is exact under; the others are refused."""

import os
from typing import Any

import torch
from torch import nn

from safeft.errors import FreezeError

_NO_STEP = ("lomo", "adalomo")
_OWN_COPY = "schedule_free"


def check_arguments(args: Any) -> None:
    """Refuse training arguments under which the freeze would not be exact.

    Args:
        args: ``transformers.TrainingArguments``.

    Raises:
        FreezeError: FSDP, DeepSpeed, or an optimizer that updates outside of ``step``.
    """
    if getattr(args, "deepspeed", None) or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        raise FreezeError(
            "DeepSpeed keeps master weights of its own, which this release cannot pin, so frozen "
            "neurons would drift. Run in one process, or under DDP (`accelerate launch "
            "--multi_gpu`)."
        )
    if getattr(args, "fsdp", None) or os.environ.get("ACCELERATE_USE_FSDP") == "true":
        settings = getattr(args, "fsdp_config", None) or {}
        version = settings.get("version", os.environ.get("FSDP_VERSION", "2"))
        if str(version) == "1":
            raise FreezeError(
                "FSDP1 flattens parameters, and hooks on them never fire: nothing would be frozen. "
                "Set fsdp_version: 2 (fsdp_config={'version': 2}), or run under DDP."
            )
        raise FreezeError(
            "Parameters sharded by FSDP cannot be pinned by this release. Run in one process or "
            "under DDP (`accelerate launch --multi_gpu`)."
        )
    check_optimizer_name(str(getattr(args.optim, "value", args.optim)))


def check_optimizer_name(name: str) -> None:
    """Refuse optimizers that change weights outside of ``step``, by their name in transformers.

    Raises:
        FreezeError: The name is one of theirs.
    """
    if name in _NO_STEP or name.endswith("_layerwise"):
        raise FreezeError(
            f"optim={name!r} updates weights during the backward pass, before any gradient can be "
            "masked or any weight pinned. Use another optimizer, such as adamw_torch."
        )
    if name.startswith(_OWN_COPY):
        raise FreezeError(
            f"optim={name!r} keeps a second copy of the weights and swaps it in when evaluating "
            "and saving; that copy cannot be pinned. Use another optimizer, such as adamw_torch."
        )


def innermost(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer that really steps, under whatever accelerate wrapped around it.

    Raises:
        FreezeError: There is none, or it does not step as torch's do.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise FreezeError(
            f"The optimizer is a {type(optimizer).__name__}, not a torch optimizer; there is no "
            "step to pin the neurons after. Use a torch.optim optimizer, such as adamw_torch."
        )
    kind = type(optimizer).__name__
    if kind in ("Lomo", "AdaLomo", "LayerWiseDummyOptimizer"):
        check_optimizer_name("lomo")
    if "ScheduleFree" in kind:
        check_optimizer_name("schedule_free_" + kind)
    return optimizer


def check_parameters(model: nn.Module) -> None:
    """Refuse parameters that are sharded or flattened, which this release cannot pin.

    Raises:
        FreezeError: A DTensor, a ZeRO partition or an FSDP1 flat parameter.
    """
    for name, parameter in model.named_parameters():
        kind = type(parameter.data).__name__
        if kind == "DTensor" or hasattr(parameter, "placements") or hasattr(parameter, "ds_id"):
            raise FreezeError(
                f"{name} is sharded over processes ({kind}), which this release cannot pin. Run in "
                "one process or under DDP."
            )
        if "_fsdp_wrapped_module" in name or "_flat_param" in name:
            raise FreezeError(
                f"{name} belongs to FSDP1, where gradient hooks never fire. Run in one process or "
                "under DDP."
            )


def describe(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What the run itself says about its engine, for the certificate."""
    from accelerate import PartialState

    state = PartialState()
    return {
        "engine": str(getattr(state.distributed_type, "value", state.distributed_type)),
        "processes": int(state.num_processes),
        "device": str(next(model.parameters()).device),
        "dtypes": sorted({str(p.dtype) for p in model.parameters()}),
        "model_class": type(model).__name__,
        "optimizer": f"{type(optimizer).__module__}.{type(optimizer).__name__}",
        "torch": torch.__version__,
    }

"""Which engines and optimizers a freeze is exact under: asked for, found, and the same.

The usual failure on many processes is silence: FSDP that became DDP, two processes that became
one. So what was asked for is read from the launcher's and the trainer's settings, what runs is
read off the parameters, and the two must agree before the first step.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from safeft.errors import FreezeError
from safeft.processes import ranks
from safeft.progress import launched
from safeft.shards import keeper
from safeft.sites import plain_model

ENGINES = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")
"""What a freeze is proven under. (A model that was sharded as it was loaded is ``dtensor``.)"""

_NO_STEP = ("lomo", "adalomo")
_OWN_COPY = "schedule_free"
_KNOWN_LAUNCHES = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_NPU", "FSDP", "DEEPSPEED")


def check_arguments(args: Any) -> None:
    """Refuse training arguments under which the freeze would not be exact.

    Args:
        args: ``transformers.TrainingArguments``.

    Raises:
        FreezeError: FSDP1, an optimizer that updates outside of ``step``, an unknown engine.
    """
    kind = _launch()
    if kind not in _KNOWN_LAUNCHES:
        raise FreezeError(
            f"This run was launched as {kind}, an engine safeft does not know; whether masks fire "
            f"and where weights are kept would be a guess. Known: {', '.join(ENGINES)}."
        )
    asked = asked_engine(args)
    if asked == "fsdp1":
        raise FreezeError(
            "FSDP1 flattens parameters, and hooks on them never fire: nothing would be frozen. "
            "Set fsdp_version: 2 in the accelerate configuration (or "
            "fsdp_config={'version': 2}), or run under DDP."
        )
    if asked.startswith("zero"):
        _check_deepspeed(_deepspeed_config(args))
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


def asked_engine(args: Any) -> str:
    """The engine that the trainer's arguments and the launcher's environment ask for.

    Returns:
        One of ``ENGINES``, or ``fsdp1``.
    """
    if getattr(args, "deepspeed", None) or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return f"zero{_stage(_deepspeed_config(args))}"
    version = None
    if getattr(args, "fsdp", None):
        version = (getattr(args, "fsdp_config", None) or {}).get("version", 2)
    elif os.environ.get("ACCELERATE_USE_FSDP") == "true":
        version = os.environ.get("FSDP_VERSION", "1")
    if version is not None:
        return "fsdp1" if str(version) == "1" else "fsdp2"
    asked = max(launched(), int(getattr(args, "world_size", 1)))
    return "ddp" if asked > 1 else "single"


def innermost(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer that really steps, under whatever accelerate wrapped around it.

    Raises:
        FreezeError: There is none, or it does not step as torch's do.
    """
    optimizer = wrappers_of(optimizer)[-1]
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


def wrappers_of(optimizer: Any) -> list[Any]:
    """The optimizer and what is inside it, outermost first."""
    found = [optimizer]
    while hasattr(found[-1], "optimizer"):
        found.append(found[-1].optimizer)
    return found


def found_engine(model: nn.Module, optimizer: Any = None) -> str:
    """The engine that has the trainable parameters in its hands.

    Args:
        model: The model.
        optimizer: The trainer's, where there is one yet: ZeRO's stages 1 and 2 differ in it only.

    Raises:
        FreezeError: Several engines, or FSDP1.
    """
    kinds: dict[str, str] = {}
    for name, parameter in model.named_parameters():
        if "_fsdp_wrapped_module" in name or "_flat_param" in name:
            raise FreezeError(
                f"{name} belongs to FSDP1, where gradient hooks never fire. Set fsdp_version: 2, "
                "or run under DDP."
            )
        if parameter.requires_grad:
            kinds.setdefault(keeper(parameter), name)
    if len(kinds) > 1:
        raise FreezeError(
            "Trainable parameters are in the hands of several engines at once: "
            + ", ".join(f"{name} ({kind})" for kind, name in kinds.items())
            + ". What one of them reduces or steps on is not what the other does. Wrap the whole "
            "model in one: DDP, FSDP2 or DeepSpeed ZeRO."
        )
    if "zero" in kinds:
        if any(hasattr(parameter, "ds_tensor") for parameter in model.parameters()):
            return "zero3"
        inner = [w for w in wrappers_of(optimizer) if hasattr(w, "partition_gradients")]
        return "zero2" if inner and inner[0].partition_gradients else "zero1"
    if "dtensor" in kinds:
        from torch.distributed.fsdp import FSDPModule

        sharded = any(isinstance(module, FSDPModule) for module in model.modules())
        return "fsdp2" if sharded else "dtensor"
    return "ddp" if ranks() > 1 else "single"


def check_engine(args: Any, model: nn.Module, optimizer: Any) -> None:
    """Demand that the engine that runs is the one that was asked for.

    Raises:
        FreezeError: It is another; some launchers fall back without a word.
    """
    asked, found = asked_engine(args), found_engine(model, optimizer)
    if found == "dtensor" and asked == "ddp":
        return
    if asked != found:
        raise FreezeError(
            f"{asked} was asked for, and {found} is what runs, on {ranks()} process(es): the "
            "launcher fell back without a word. (accelerate has FSDP on accelerators only, and "
            "`--cpu --num_processes N` starts one process.) Nothing was trained; correct the "
            "launch, or ask for what runs."
        )


def check_expected(found: Mapping[str, Any], engine: str | None, processes: int | None) -> None:
    """Demand the engine and the number of processes that the user named.

    Raises:
        FreezeError: Others run.
    """
    for what, wanted in (("engine", engine), ("processes", processes)):
        if wanted is not None and found[what] != wanted:
            raise FreezeError(
                f"{what}={wanted} was demanded, and {found[what]} is what runs. Launchers fall "
                "back without a word (`accelerate launch --cpu --num_processes 2` starts one "
                "process; FSDP needs accelerators). Nothing was trained."
            )


class DDPWatch:
    """Sees whether a model really runs inside ``DistributedDataParallel``.

    A callback is given the model without its wrapper; only while it runs can one see it from
    inside.
    """

    def __init__(self, model: nn.Module) -> None:
        self.seen: str | None = None
        self._handle: RemovableHandle | None = model.register_forward_pre_hook(self._look)

    def _look(self, *_: object) -> None:
        # Trainers that generate run the model unwrapped before they train it wrapped.
        if (wrapper := DistributedDataParallel._get_active_ddp_module()) is not None:
            self.seen = type(wrapper).__name__
            self.remove()

    def remove(self) -> None:
        """Stop looking."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def check(self) -> None:
        """After the first backward pass.

        Raises:
            FreezeError: The model ran unwrapped, so processes do not share their gradients.
        """
        if self.seen is None:
            raise FreezeError(
                f"{ranks()} processes run, and the model was not run inside "
                "DistributedDataParallel: each process trains a model of its own, and what is "
                "saved is one of them. Launch with `accelerate launch --multi_gpu` or torchrun, "
                "and let the Trainer wrap the model."
            )


def describe(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """What the run itself says about its engine, for the certificate."""
    plain = plain_model(model)
    *outer, inner = wrappers_of(optimizer)
    return {
        "engine": found_engine(model, optimizer),
        "launch": _launch(),
        "processes": ranks(),
        "device": str(next(model.parameters()).device),
        "dtypes": sorted({str(p.dtype) for p in model.parameters()}),
        "model_class": type(plain).__name__,
        "optimizer": f"{type(inner).__module__}.{type(inner).__name__}",
        "optimizer_wrappers": [type(wrapper).__name__ for wrapper in outer],
        "torch": torch.__version__,
    }


def _launch() -> str:
    from accelerate import PartialState

    kind = PartialState().distributed_type
    return str(getattr(kind, "value", kind))


def _deepspeed_config(args: Any) -> Mapping[str, Any]:
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is None:
        from accelerate.state import AcceleratorState

        plugin = AcceleratorState._shared_state.get("deepspeed_plugins")
    if isinstance(plugin, Mapping):
        plugin = next(iter(plugin.values()))
    found = getattr(plugin, "deepspeed_config", None)
    if not isinstance(found, Mapping):
        raise FreezeError(
            "DeepSpeed was asked for, and its configuration cannot be read off the trainer's "
            "arguments, so its stage is unknown. Give it as `deepspeed:` or in the accelerate "
            "configuration (deepspeed_config_file)."
        )
    return found


def _stage(config: Mapping[str, Any]) -> int:
    return int((config.get("zero_optimization") or {}).get("stage", 0))


def _check_deepspeed(config: Mapping[str, Any]) -> None:
    zero = config.get("zero_optimization") or {}
    stage = _stage(config)
    if stage not in (1, 2, 3):
        raise FreezeError(
            f"DeepSpeed with ZeRO stage {stage} steps on weights safeft has no rule for. Use stage "
            "1, 2 or 3, or DDP."
        )
    for part in ("offload_optimizer", "offload_param"):
        place = str((zero.get(part) or {}).get("device", "none"))
        if place == "nvme":
            raise FreezeError(
                f"zero_optimization.{part}.device is nvme: weights that are swapped to disk "
                "between steps cannot be pinned. Use cpu or none."
            )
    for key in ("zero_hpz_partition_size", "mics_shard_size"):
        if int(zero.get(key, 1) or 1) > 1:
            raise FreezeError(
                f"zero_optimization.{key}={zero[key]} keeps a second partition of the weights, "
                "which safeft does not know. Leave it away."
            )
    for key in ("zenflow", "super_offload"):
        if zero.get(key):
            raise FreezeError(
                f"zero_optimization.{key} steps outside of the optimizer, where nothing can be "
                "pinned. Leave it away."
            )

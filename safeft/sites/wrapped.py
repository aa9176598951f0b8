"""The model inside what trainers, adapters and compilers wrap around it."""

import torch
from torch import Tensor, nn

from safeft.shards import shape_of

_PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_WRAPPED = ("_checkpoint_wrapped_module", "_orig_mod")
"""Where activation checkpointing and torch.compile put the module they wrap."""


def bare(module: nn.Module) -> nn.Module:
    """The module inside wrappers that change how it runs and not what it is."""
    while inner := next(
        (module._modules[name] for name in _WRAPPED if name in module._modules), None
    ):
        module = inner
    return module


def plain_name(name: str) -> str:
    """A parameter's or module's name without the wrappers' parts."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def plain_model(model: nn.Module) -> nn.Module:
    """The transformers model inside PEFT, DDP or torch.compile (adapter layers stay in place)."""
    while True:
        model = bare(model)
        inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else None
        peft_base = getattr(model, "get_base_model", None)
        inner = peft_base() if inner is None and callable(peft_base) else inner
        if inner is None or inner is model:
            return model
        assert isinstance(inner, nn.Module)
        model = inner


def dense(module: nn.Module) -> nn.Module:
    """The module that holds the original weights: the base layer under an adapter, or itself."""
    while isinstance(base := getattr(module, "base_layer", None), nn.Module):
        module = base
    return module


def is_quantised(module: nn.Module) -> bool:
    """Whether a linear layer's weight holds codes, not numbers (bitsandbytes and the like)."""
    weight = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or not isinstance(weight, Tensor):
        return False
    right = shape_of(weight) == (module.out_features, module.in_features)
    return not right or weight.dtype not in _PLAIN_DTYPES

"""Adapters: which ones can be held exactly, and which factor holds what."""

from dataclasses import astuple
from typing import Any

import torch
from torch import nn

from safeft.errors import FreezeError
from safeft.shards import Axis, live
from safeft.sites import LAYOUTS, plain_model

_KEEPS_WEIGHTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of ``init_lora_weights`` that leave the base weights as they are."""

_PLAIN_SETTINGS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "layer_replication",
    "target_parameters",
    "velora_config",
    "monteclora_config",
    "arrow_config",
    "kasa_config",
)
"""LoRA settings that change the product ``s B A``, or what it is added to."""


def adapter_configs(model: nn.Module) -> dict[str, Any]:
    """The PEFT configurations of a model by adapter name; empty without adapters."""
    for candidate in (model, plain_model(model)):
        found = getattr(candidate, "peft_config", None)
        if isinstance(found, dict):
            return found
    return {}


def check_adapters(model: nn.Module) -> None:
    """Refuse adapters under which frozen neurons would not be exact.

    Raises:
        FreezeError: Not LoRA, DoRA and other variants, or a start that rewrites the base weights.
    """
    for name, config in adapter_configs(model).items():
        check_adapter_settings(config.to_dict(), name)
    _check_saved_modules(model)


def check_adapter_settings(config: dict[str, Any], name: str) -> None:
    """The part of :func:`check_adapters` that reads settings, also those of a saved adapter."""
    kind = str(getattr(config.get("peft_type"), "value", config.get("peft_type")))
    if kind != "LORA":
        raise FreezeError(
            f"Adapter {name!r} is {kind}, whose update does not keep to rows and columns, so "
            "neurons under it cannot be held exactly. Use LoRA or rsLoRA, or tune fully."
        )
    for setting in _PLAIN_SETTINGS:
        if config.get(setting):
            reason = (
                "its row norms move with every other column, so a frozen column changes"
                if setting == "use_dora"
                else "its update is not the plain product s B A on a whole matrix"
            )
            raise FreezeError(
                f"Adapter {name!r} has {setting}={config[setting]!r}: {reason}, and the neurons "
                f"would not stay bit-identical. Use plain LoRA or rsLoRA (without {setting})."
            )
    start = config.get("init_lora_weights", True)
    if start not in _KEEPS_WEIGHTS:
        raise FreezeError(
            f"Adapter {name!r} starts with init_lora_weights={start!r}, which derives the adapter "
            "from the base weights and changes what they compute, the frozen ones too, before the "
            "first step. Use init_lora_weights=True."
        )


def _check_saved_modules(model: nn.Module) -> None:
    """A full trainable copy of what the neurons live in would learn instead of it."""
    inside = {"model"}
    for layout in LAYOUTS.values():
        for part in astuple(layout):
            inside |= {part} if isinstance(part, str) else set(part)
    for path, module in plain_model(model).named_modules():
        last = path.rpartition(".")[2]
        copied = isinstance(getattr(module, "modules_to_save", None), nn.ModuleDict)
        if copied and (last in inside or last.isdigit()):
            raise FreezeError(
                f"The adapter trains a full copy of {path} (modules_to_save), beside the weights "
                "the neurons live in. Target this module with LoRA, or tune fully."
            )


def lora_factors(module: nn.Module, name: str, axis: Axis) -> list[tuple[str, nn.Parameter]]:
    """LoRA parameters of adapters in training whose entries along ``axis`` are the module's own.

    Rows of W are rows of B (and of its bias), columns of W are columns of A. A factor whose
    partner trains is listed too where it does not train itself: it has to be zero all the same.

    Raises:
        FreezeError: The layer carries a variant of LoRA that is not ``s B A``.
    """
    if getattr(module, "base_layer", None) is None:
        return []
    if getattr(module, "lora_variant", None):
        raise FreezeError(
            f"{name} carries a LoRA variant ({list(module.lora_variant)}), whose update is not "  # pyright: ignore
            "the plain product s B A. Use plain LoRA or rsLoRA."
        )
    down, up = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
    if not isinstance(down, nn.ModuleDict) or not isinstance(up, nn.ModuleDict):
        raise FreezeError(
            f"{name} is wrapped by {type(module).__name__}, which is no LoRA layer safeft knows; "
            "its update cannot be held exactly. Use plain LoRA on Linear layers."
        )
    kind, factors = ("lora_B", up) if axis == "rows" else ("lora_A", down)
    return [
        (f"{name}.{kind}.{adapter}.{leaf}", parameter)
        for adapter, factor in factors.items()
        if _trains(down[adapter]) or _trains(up[adapter])
        for leaf, parameter in factor.named_parameters()
    ]


def learning_factors(module: nn.Module, axis: Axis) -> list[nn.Parameter]:
    """The LoRA parameters that may learn where some entries of ``module`` along ``axis`` do.

    B has a bias where PEFT's ``lora_bias`` is set; it belongs to rows, so no column owns it.
    """
    return [
        parameter
        for name, parameter in module.named_parameters()
        if name.startswith("lora_") and not (axis == "columns" and name.endswith(".bias"))
    ]


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def is_factor(name: str) -> bool:
    """Whether a parameter belongs to a LoRA adapter, by its name."""
    return ".lora_" in name


def zero_axis(name: str) -> Axis | None:
    """Along which axis a LoRA factor counts the entries of W, if the update vanishes with it.

    B of a linear layer and A of an embedding start at zero and are saved whole; while they are
    zero, the adapter does nothing.
    """
    if ".lora_B." in name:
        return "rows"
    return "columns" if ".lora_embedding_A" in name else None


@torch.no_grad()
def check_fresh(model: nn.Module) -> None:
    """Refuse an adapter that was trained before: its base is no longer what the model computes.

    Raises:
        FreezeError: A factor that starts at zero is not zero.
    """
    configs = adapter_configs(model)
    for path, module in plain_model(model).named_modules():
        factors = getattr(module, "lora_B", None)
        if not isinstance(factors, nn.ModuleDict):
            continue
        for adapter, factor in factors.items():
            starts_at_zero = configs[adapter].init_lora_weights not in (False, "orthogonal")
            used = _trains(factor) or adapter in getattr(module, "active_adapters", ())
            if starts_at_zero and used and any(_learned(p) for p in factor.parameters()):
                raise FreezeError(
                    f"Adapter {adapter!r} was trained before ({path}.lora_B is not zero). Its "
                    "neurons differ from the base already, and zeroing them would change the "
                    "model. To go on with it, build the adapter anew and give the checkpoint to "
                    "trainer.train(resume_from_checkpoint=...); or merge it (merge_and_unload), "
                    "locate again, and tune anew."
                )


def _learned(parameter: nn.Parameter) -> bool:
    """Whether any number of it that this process stores is not zero."""
    if parameter.is_meta:
        return False
    return any(bool(block.open().any()) for block in live(parameter).blocks)

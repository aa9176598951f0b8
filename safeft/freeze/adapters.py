"""Adapters: which ones can be held exactly, and which factor holds what."""

from typing import Any

import torch
from torch import nn

from safeft.errors import FreezeError
from safeft.sites import Axis, plain_model

_KEEPS_WEIGHTS = (True, False, "gaussian", "orthogonal", "eva", "mica")
"""Values of ``init_lora_weights`` that leave the base weights as they are."""

_PLAIN_SETTINGS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "layer_replication",
    "target_parameters",
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
        _check_saved_modules(config, name)


def check_adapter_settings(config: dict[str, Any], name: str) -> None:
    """The part of :func:`check_adapters` that reads settings only, also those of a saved adapter."""
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
            f"Adapter {name!r} starts with init_lora_weights={start!r}, which rewrites the base "
            "weights, the frozen ones too, before the first step. Use init_lora_weights=True."
        )


def _check_saved_modules(config: Any, name: str) -> None:
    inside = {"mlp", "self_attn", "gate_proj", "up_proj", "down_proj"}
    inside |= {"q_proj", "k_proj", "v_proj", "o_proj"}
    if clash := inside & set(config.modules_to_save or ()):
        raise FreezeError(
            f"Adapter {name!r} trains full copies of {sorted(clash)} (modules_to_save), beside the "
            "weights the neurons live in. Target these modules with LoRA, or tune fully."
        )


def lora_factors(module: nn.Module, name: str, axis: Axis) -> list[tuple[str, nn.Parameter]]:
    """The trainable LoRA parameters whose entries along ``axis`` are the module's own.

    Rows of W are rows of B (and of its bias), columns of W are columns of A.

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
    factors = getattr(module, "lora_B" if axis == "rows" else "lora_A", None)
    if not isinstance(factors, nn.ModuleDict):
        raise FreezeError(
            f"{name} is wrapped by {type(module).__name__}, which is not a LoRA layer safeft knows; "
            "its update cannot be held exactly. Use plain LoRA on Linear layers."
        )
    kind = "lora_B" if axis == "rows" else "lora_A"
    return [
        (f"{name}.{kind}.{adapter}.{leaf}", parameter)
        for adapter, factor in factors.items()
        for leaf, parameter in factor.named_parameters()
        if parameter.requires_grad
    ]


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
            starts_at_zero = configs[adapter].init_lora_weights not in (False, "orthogonal", "mica")
            weight = getattr(factor, "weight", None)
            trained = isinstance(weight, nn.Parameter) and weight.requires_grad and weight.any()
            if starts_at_zero and trained:
                raise FreezeError(
                    f"Adapter {adapter!r} was trained before ({path}.lora_B is not zero). Its "
                    "neurons differ from the base already, and zeroing them would change the "
                    "model. Merge it first (`merge_and_unload`), locate again, and tune anew."
                )

"""Adapters: which ones can be held exactly, and which factor holds what."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from safeft.blocks import Axis, Form, form_of
from safeft.errors import FreezeError
from safeft.shards import live, shape_of
from safeft.sites import bare, in_blocks, plain_model

_KEEPS_WEIGHTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of ``init_lora_weights`` that leave the base weights as they are."""

_PLAIN_SETTINGS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "layer_replication",
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
    for path, module in plain_model(model).named_modules():
        copied = isinstance(getattr(module, "modules_to_save", None), nn.ModuleDict)
        if copied and in_blocks(path, module):
            raise FreezeError(
                f"The adapter trains a full copy of {path} (modules_to_save), beside the weights "
                "the neurons live in. Target this module with LoRA, or tune fully."
            )


@dataclass(frozen=True, eq=False)
class Factor:
    """Where in one LoRA factor the rows (or columns) of the weight it adapts lie.

    Attributes:
        name: The parameter's name in the plain model.
        parameter: A or B, or B's bias.
        axis: What its entries count.
        form: As what stack of matrices it is seen.
        outputs: Of B for a stack of experts, how many rows each expert has; 0 elsewhere.
    """

    name: str
    parameter: nn.Parameter
    axis: Axis
    form: Form
    outputs: int = 0

    def entries(self, lines: Tensor) -> Tensor:
        """The entries that carry these rows (or columns) of the adapted weight, sorted."""
        if not self.outputs:
            return lines
        expert = lines.div(self.outputs, rounding_mode="floor")
        return (lines % self.outputs * self.form[2] + expert).sort().values


def factors_of(module: nn.Module, path: str, leaf: str, axis: Axis) -> list[Factor]:
    """Factors of adapters in training that carry the entries of a weight along ``axis``.

    Rows of W are rows of B (and of its bias), columns of W are columns of A; where a layer stores
    W the other way round, the other way round. A factor whose partner trains is listed too where
    it does not train itself: it has to be zero all the same. For a stack of experts PEFT keeps A
    as ``(experts, rank, in)`` and B as ``(out, rank, experts)``.

    Raises:
        FreezeError: The layer carries a variant of LoRA that is not ``s B A``.
    """
    found: list[Factor] = []
    for where, layer in _layers(module, path):
        check_layer(layer, where)
        if getattr(layer, "parameter_name", "weight") != leaf:
            continue
        if axis == "numbers":
            raise FreezeError(
                f"An adapter trains {path}.{leaf}, the biases of a stack of experts, by a product "
                "that mixes them; single ones cannot be held. Leave it out of target_parameters."
            )
        outputs = (axis == "rows") != is_turned(layer)
        kind = "lora_B" if outputs else "lora_A"
        for adapter, factor in getattr(layer, kind).items():
            if not trains(layer.lora_A[adapter]) and not trains(layer.lora_B[adapter]):
                continue
            for name, parameter in factor.named_parameters():
                full = f"{where}.{kind}.{adapter}.{name}"
                found.append(_factor(full, parameter, layer, outputs))
    return found


def _factor(name: str, parameter: nn.Parameter, layer: Any, outputs: bool) -> Factor:
    shape = shape_of(parameter)
    experts = getattr(layer, "num_experts", 1)
    if experts == 1:
        return Factor(name, parameter, "rows" if outputs else "columns", form_of(shape))
    if outputs:
        return Factor(
            name, parameter, "columns", (shape[0], shape[1] // experts, experts), shape[0]
        )
    return Factor(name, parameter, "columns", (experts, shape[0] // experts, shape[1]))


def _layers(module: nn.Module, path: str) -> Iterator[tuple[str, Any]]:
    """The adapter layers on a module, the outermost first: one for each weight of an experts'."""
    module = bare(module)
    while isinstance(base := getattr(module, "base_layer", None), nn.Module):
        yield path, module
        module, path = bare(base), f"{path}.base_layer"


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, tuple[str, Any]]]:
    """Name of each adapted weight of the plain model, with its adapter layer and where that is."""
    for path, module in plain_model(model).named_modules():
        if hasattr(module, "base_layer") and not path.endswith(".base_layer"):
            for where, layer in _layers(module, path):
                yield f"{path}.{getattr(layer, 'parameter_name', 'weight')}", (where, layer)


def is_turned(layer: Any) -> bool:
    """Whether the adapted weight is stored as inputs by outputs."""
    if getattr(layer, "parameter_name", "weight") == "weight":
        return bool(getattr(layer, "fan_in_fan_out", False))
    return layer._param_ndim == 3 and not layer._did_swap_in_out_features


def check_layer(layer: nn.Module, name: str) -> None:
    """Refuse an adapter layer whose update is not ``s B A``.

    Raises:
        FreezeError: It is not.
    """
    if variants := getattr(layer, "lora_variant", None):
        raise FreezeError(
            f"{name} carries a LoRA variant ({list(variants)}), whose update is not "
            "the plain product s B A. Use plain LoRA or rsLoRA."
        )
    factors = (getattr(layer, "lora_A", None), getattr(layer, "lora_B", None))
    if not all(isinstance(factor, nn.ModuleDict) for factor in factors):
        raise FreezeError(
            f"{name} is wrapped by {type(layer).__name__}, which is no LoRA layer safeft knows; "
            "its update cannot be held exactly. Use plain LoRA on Linear layers."
        )


def learning_factors(module: nn.Module, leaf: str, axis: Axis) -> list[nn.Parameter]:
    """The LoRA parameters that may learn where some entries of a weight along ``axis`` do.

    B has a bias where PEFT's ``lora_bias`` is set; it belongs to outputs, so no unit that writes
    with this weight owns it.
    """
    found: list[nn.Parameter] = []
    for _, layer in _layers(module, ""):
        if getattr(layer, "parameter_name", "weight") != leaf:
            continue
        outputs = (axis == "rows") != is_turned(layer)
        for name, parameter in layer.named_parameters():
            own = name.startswith(("lora_A.", "lora_B."))
            if own and (outputs or not name.endswith(".bias")):
                found.append(parameter)
    return found


def trains(module: nn.Module) -> bool:
    """Whether any parameter of a module is trained."""
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
            used = trains(factor) or adapter in getattr(module, "active_adapters", ())
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
    return bool(live(parameter).open().any())

"""Which matrices of a model multiply inputs, and along which axis they count them."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from safeft.blocks import Axis
from safeft.sites.wrapped import bare, dense, plain_name


@dataclass(frozen=True)
class Linear:
    """A matrix that is multiplied with what its module receives.

    Attributes:
        module: Path of the module.
        axis: What its inputs are in the stored weight: ``columns``, or ``rows`` where the layer
            stores it as inputs by outputs.
        features: How many inputs there are.
        outputs: How many outputs.
    """

    module: str
    axis: Axis
    features: int
    outputs: int

    @property
    def name(self) -> str:
        """Name of the weight."""
        return f"{self.module}.weight"


def linears_in(path: str, module: nn.Module) -> list[Linear]:
    """The linear layers of a module, itself included; under adapters their base layers."""
    found: dict[str, Linear] = {}
    for inner, layer in module.named_modules(prefix=path):
        if ".lora_" in inner or ".base_layer" in inner:
            continue
        plain = dense(bare(layer))
        name = plain_name(inner)
        if isinstance(plain, nn.Linear):
            found[name] = Linear(name, "columns", plain.in_features, plain.out_features)
        elif isinstance(plain, Conv1D):
            found[name] = Linear(name, "rows", plain.nx, plain.nf)
    return list(found.values())


def head_of(model: Any) -> list[Linear]:
    """The output head, where it has weights of its own."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        return []
    tied = model.get_input_embeddings()
    if getattr(dense(head), "weight", None) is getattr(tied, "weight", tied):
        return []
    path = next(path for path, module in model.named_modules() if module is head)
    return linears_in(path, head)

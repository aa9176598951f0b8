"""Holding input directions: ``W U`` stays as it was while everything else of W learns.

Source: null-space and rotated-basis freezing. Gradient ``G <- G - (G U) U'``; after each optimizer
step, whose scaling and decay leave the free directions, ``W <- W - (W U - W0 U) U'``. Of a LoRA
factor the same with ``A U = 0``. What is held and what it is measured by stands here; the pin is in
:mod:`safeft.freeze.direction_pin`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from safeft.blocks import Axis, Form, count_of, form_of
from safeft.shards import shape_of
from safeft.weights import Weights

_ROWS = 4096
"""Rows of a weight read at once."""


@dataclass(frozen=True, eq=False)
class Partner:
    """The factor B beside a held A, in ``W0 + s B A``."""

    name: str
    parameter: nn.Parameter
    scale: float


@dataclass(frozen=True, eq=False)
class Directions:
    """Input directions of a trainable parameter that must not move.

    Attributes:
        name: The parameter's name in the plain model, adapter factors included.
        weight: Name of the weight it is, or that its adapter layer adapts.
        parameter: The parameter the optimizer sees.
        axis: What its inputs are: ``columns``, or ``rows`` where it is stored turned round.
        weight_axis: The same of the weight.
        basis: Orthonormal, float32 ``(features, rank)``.
        partner: Of a factor A, which is held at ``A U = 0``; None for the weight itself.
    """

    name: str
    weight: str
    parameter: nn.Parameter
    axis: Axis
    weight_axis: Axis
    basis: Tensor
    partner: Partner | None

    @property
    def form(self) -> Form:
        """As what stack of matrices the parameter is seen."""
        return form_of(shape_of(self.parameter))


@dataclass(frozen=True)
class Products:
    """``W U`` of a weight, float32 ``(outputs, rank)``, and what changes of it are relative to.

    ``scale`` is ``norm(W U)``, or the share of ``norm(W)`` that as many random directions would
    hold where that is more: of a product near zero every change would be large.
    """

    products: Tensor
    scale: float


@torch.no_grad()
def products_of(weights: Weights, name: str, basis: Tensor, axis: Axis) -> Products:
    """``W U``, read some rows at a time.

    Args:
        weights: Of a model or checkpoint.
        name: The weight.
        basis: Orthonormal, ``(features, rank)``.
        axis: What its inputs are.
    """
    shape = weights.shape(name) or ()
    total: Tensor | None = None
    squares = 0.0
    parts: list[Tensor] = []
    for rows in torch.arange(count_of(form_of(shape), "rows")).split(_ROWS):
        read_lines = getattr(weights, "lines", weights.read)  # on the weight's own device
        block = read_lines(name, "rows", rows).float()
        along = basis.to(block.device)
        squares += float(block.square().sum())
        if axis == "rows":
            product = block.T @ along[rows.to(block.device)]
            total = product if total is None else total + product
        else:
            parts.append(block @ along)
    found = torch.cat(parts) if total is None else total
    expected = (squares * basis.shape[1] / basis.shape[0]) ** 0.5
    return Products(found, max(float(found.norm()), expected, torch.finfo(torch.float32).tiny))


def tolerance(dtype: torch.dtype) -> float:
    """The largest relative change of ``W U`` that rounding makes.

    Stored numbers are off by a third of a unit in the last place on average; products are computed
    in float32, where sums of many terms lose a few more.
    """
    return max(8 * torch.finfo(torch.float32).eps, torch.finfo(dtype).eps)

"""Values: a site, and the parts of weights its units live in."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from safeft.blocks import Axis

Kind: TypeAlias = Literal["mlp", "attention"]

TowerName: TypeAlias = Literal["text", "vision", "projector"]

TOWER_NAMES: tuple[TowerName, ...] = ("text", "vision", "projector")


@dataclass(frozen=True)
class Part:
    """The entries of one weight that belong to the units of a site, along one axis.

    Unit ``j`` belongs to bundle ``b = j // share`` and owns the ``width`` entries from
    ``first + b * step + b // run * gap`` on: ``width`` is 1 for an MLP and the head size for
    attention, ``share`` the number of query heads that use one key or value head; ``step`` is
    ``width`` unless others' entries lie between, and ``gap`` entries are skipped after each
    ``run`` of bundles (Falcon's groups of heads).

    Attributes:
        module: Path of the module that holds the weight.
        axis: What the entries count in it.
        leaf: The weight's name in its module.
        bias: Name of the bias whose entries are numbered alike; units read with it too.
        expert: Of a stack of experts, the one these entries are of.
    """

    module: str
    axis: Axis
    width: int = 1
    share: int = 1
    first: int = 0
    step: int = 0
    run: int = 0
    gap: int = 0
    leaf: str = "weight"
    bias: str = ""
    expert: int | None = None

    @property
    def name(self) -> str:
        """Name of the weight."""
        return f"{self.module}.{self.leaf}"

    @property
    def inlet(self) -> str:
        """What its matrix receives goes by this name; parts of one matrix share it."""
        return self.module if self.expert is None else f"{self.name}.{self.expert}"

    @property
    def tensors(self) -> tuple[tuple[str, Axis], ...]:
        """The weight, and the bias where there is one, each with what its entries count."""
        if not self.bias:
            return ((self.name, self.axis),)
        axis: Axis = "rows" if self.expert is None else "numbers"
        return (self.name, self.axis), (f"{self.module}.{self.bias}", axis)

    def entries(self, units: Tensor) -> Tensor:
        """Sorted row (or column) numbers, int64 ``(entries,)``, that any of ``units`` uses."""
        return self._of(torch.unique(units.div(self.share, rounding_mode="floor")))

    def own_entries(self, units: Tensor) -> Tensor:
        """Like :meth:`entries`, without those that a unit outside ``units`` uses as well."""
        bundles, sharers = torch.unique(
            units.div(self.share, rounding_mode="floor"), return_counts=True
        )
        return self._of(bundles[sharers == self.share])

    def table(self, units: int) -> Tensor:
        """The entries of each of the first ``units`` units, int64 ``(units, width)``."""
        return self._of(torch.arange(units) // self.share).view(units, self.width)

    def _of(self, bundles: Tensor) -> Tensor:
        starts = self.first + bundles * (self.step or self.width)
        if self.run:
            starts = starts + bundles.div(self.run, rounding_mode="floor") * self.gap
        return (starts[:, None] + torch.arange(self.width)).flatten()


@dataclass(frozen=True)
class Site:
    """One family of like units in one block.

    Attributes:
        name: Module path, e.g. ``model.layers.1.mlp``; of experts with their number.
        kind: ``mlp`` (hidden units) or ``attention`` (query heads).
        layer: Number of the block.
        units: How many units there are.
        width: Size of one unit's activation at the input of the matrix that writes it back.
        reads: The parts a unit reads with.
        writes: The part it writes with; what its matrix receives are the units' activations.
        tower: ``text``, ``vision`` or ``projector``.
    """

    name: str
    kind: Kind
    layer: int
    units: int
    width: int
    reads: tuple[Part, ...]
    writes: Part
    tower: TowerName = "text"

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts, those read with first."""
        return (*self.reads, self.writes)

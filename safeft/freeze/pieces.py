"""What of a weight with held directions a process stores, as lines of inputs, whole or cut."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from safeft.blocks import Block
from safeft.errors import FreezeError
from safeft.freeze.directions import Directions
from safeft.processes import gathered, rank
from safeft.shards import Shard, keeper


@dataclass(frozen=True, eq=False)
class Piece:
    """A stored piece of the parameter, seen as lines of inputs (``features`` long when whole).

    Attributes:
        open: Gives the stored tensor.
        block: The piece.
        turned: Whether inputs are counted by rows.
        basis: What of the basis its inputs meet, float32 ``(inputs here, rank)``.
        target: ``W0 U`` of its lines, float32 ``(lines, rank)``; None for zero.
        slots: Of lines that lie in several processes, their numbers among those; None for whole
            ones.
        mine: Which of these lines this piece speaks for, so that each is counted once.
    """

    open: Callable[[], Tensor]
    block: Block
    turned: bool
    basis: Tensor
    target: Tensor | None
    slots: Tensor | None = None
    mine: Tensor | None = None

    def _lines(self) -> Tensor:
        matrix = self.block.view(self.open().detach())[0]
        return matrix.T if self.turned else matrix

    def products(self) -> Tensor:
        """``W U`` of its lines, as far as its inputs go."""
        return self._lines().float() @ self.basis

    def gap(self, products: Tensor) -> Tensor:
        """How far they are off."""
        return products if self.target is None else products - self.target

    def put_back(self, gap: Tensor) -> None:
        """Take the gap out of the stored piece."""
        lines = self._lines()
        if lines.dtype == torch.float32:
            lines.addmm_(gap, self.basis.T, alpha=-1)
        else:
            lines.copy_(lines.float().addmm_(gap, self.basis.T, alpha=-1))


def laid_out(held: Directions, shard: Shard, target: Tensor | None) -> tuple[list[Piece], int]:
    """What of the parameter is here, and how many of its lines are cut over processes."""
    turned = held.axis == "rows"
    along, across = (1, 2) if turned else (2, 1)
    features = held.form[along]
    basis = held.basis.to(shard.device)
    places = [(_span(block, across), _span(block, along)) for block in shard.blocks]
    parts = [set(range(*lines)) for lines, inputs in places if inputs != (0, features)]
    owner: dict[int, int] = {}
    if keeper(held.parameter) == "zero" and shard.split:
        for number, theirs in enumerate(gathered(sorted(set().union(*parts)))):
            for line in theirs:
                owner.setdefault(line, number)
    slot = {line: number for number, line in enumerate(sorted(owner))}
    pieces, counted = [], set()
    for block, (lines, inputs) in zip(shard.blocks, places, strict=True):
        here = target[slice(*lines)].to(shard.device) if target is not None else None
        if inputs == (0, features):
            pieces.append(Piece(shard.open, block, turned, basis, _own(here)))
            continue
        numbers = list(range(*lines))
        mine = [owner[n] == rank() and n not in counted for n in numbers]
        counted.update(numbers)
        slots = torch.tensor([slot[n] for n in numbers], device=shard.device)
        flags = torch.tensor(mine, device=shard.device)
        part = basis[slice(*inputs)]
        pieces.append(Piece(shard.open, block, turned, part, _own(here), slots, flags))
    return pieces, len(slot)


def check_whole(held: Directions) -> None:
    """Refuse a DTensor that is cut across its inputs; each process would see parts of products."""
    inputs = 0 if held.axis == "rows" else 1
    for placement in getattr(held.parameter, "placements", ()):
        if getattr(placement, "dim", None) == inputs:
            raise FreezeError(
                f"{held.name} is placed as {getattr(held.parameter, 'placements', None)}, cut "
                "across its inputs, so its gradient cannot be kept to free directions. Train it "
                "with LoRA, or under DDP or DeepSpeed ZeRO."
            )


def _span(block: Block, side: int) -> tuple[int, int]:
    return block.first[side], block.first[side] + block.size[side]


def _own(part: Tensor | None) -> Tensor | None:
    """A copy: a view would keep the whole alive."""
    return None if part is None else part.clone()

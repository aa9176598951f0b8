"""The pin on input directions, wherever an engine keeps the weights.

Where an engine cuts a line of W over processes (ZeRO's flat partitions do, at each border), the
products of its parts are summed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from safeft.blocks import Block, count_of, form_of
from safeft.errors import FreezeError
from safeft.freeze.directions import Directions, products_of, tolerance
from safeft.freeze.masks import check_fired, mask_gradient, stepped_storages
from safeft.freeze.pieces import Piece, check_whole, laid_out
from safeft.processes import broadcast, from_first, gathered, rank, ranks, summed
from safeft.shards import copies, is_split, keeper, live, master, read, shape_of
from safeft.weights import Weights


class DirectionPin:
    """Holds input directions during training: mask, pin, and the largest change of ``W U``.

    Make it while the model holds the base weights; process 0's are the ones that count.

    Args:
        directions: What is held.
        weights: The model's weights, adapters left out.
        everywhere: Whether every process must read them (they are sharded), or only process 0.
    """

    def __init__(
        self, directions: Sequence[Directions], weights: Weights, *, everywhere: bool = False
    ) -> None:
        bases = {id(d.basis): d.basis for d in directions}  # layers with one input share theirs
        bases = {key: broadcast(basis) for key, basis in bases.items()}
        self._held = [replace(d, basis=bases[id(d.basis)]) for d in directions]
        self._targets: list[Tensor | None] | None = None
        self._scales: list[float] = []
        self._pieces: list[list[Piece]] = [[] for _ in directions]
        self._cut: list[int] = [0] * len(directions)
        self._devices = [d.parameter.device for d in directions]
        self._optimizer: torch.optim.Optimizer | None = None
        self._handles: list[RemovableHandle] = []
        self._removed: list[Tensor] = []
        self._drift = 0.0
        self._stepped: set[int] = set()
        self.fired = [0] * len(directions)
        self.pins = 0
        self.measuring = False
        self._snapshot(weights, everywhere)

    @torch.no_grad()
    def _snapshot(self, weights: Weights, everywhere: bool) -> None:
        """``W0 U``, and what its changes are relative to."""
        self._targets = []
        scales: list[float] = []
        for held in self._held:
            found = None
            if rank() == 0 or everywhere:
                found = products_of(weights, held.weight, held.basis, held.weight_axis)
            scales.append(found.scale if found is not None else 0.0)
            if held.partner is not None:
                self._targets.append(None)
                continue
            outputs = count_of(held.form, "columns" if held.axis == "rows" else "rows")
            empty = torch.empty(outputs, held.basis.shape[1])
            self._targets.append(empty if found is None else found.products.cpu())
        self._scales = scales

    def install(
        self, optimizer: torch.optim.Optimizer, directions: Sequence[Directions] | None = None
    ) -> int:
        """Register masks and pin, and put the directions right at once.

        Moments are left as they are: what they push along held directions the pin takes out.

        Args:
            optimizer: The one that really steps.
            directions: The same on the parameters that are being trained now.

        Returns:
            How many weights were not where they are held (after loading a checkpoint).

        Raises:
            FreezeError: Lines of a weight are cut over processes where they cannot be put together.
        """
        self.remove()
        if directions is not None:
            bases = [held.basis for held in self._held]
            self._held = [replace(d, basis=b) for d, b in zip(directions, bases, strict=True)]
        moving: dict[tuple[int, torch.device], Tensor] = {}
        for number, held in enumerate(list(self._held)):  # kept meanwhile: an id may be used again
            check_whole(held)
            place = (id(held.basis), held.parameter.device)
            if place not in moving:
                moving[place] = held.basis.to(held.parameter.device)
            self._held[number] = replace(held, basis=moving[place])
        moved = self._place() if self._targets is not None else self._place_again()
        self._optimizer = optimizer
        self.fired, self.pins, self._stepped = [0] * len(self._held), 0, set()
        for number, held in enumerate(self._held):
            if held.parameter.requires_grad:
                change = self._project(number, held)
                self._handles.append(mask_gradient(held.parameter, held.name, change))
        if self._held:
            self._handles.append(optimizer.register_step_post_hook(self._after_step))
        return moved

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def _place(self) -> int:
        assert self._targets is not None
        self._scales = from_first(self._scales)
        moved = 0
        for number, held in enumerate(self._held):
            target, self._targets[number] = self._targets[number], None
            target = broadcast(target) if target is not None else None
            off = False
            for shard in copies(held.parameter):
                self._devices[number] = shard.device
                self._pieces[number], self._cut[number] = laid_out(held, shard, target)
                off |= self._put_right(number) > tolerance(shard.dtype)
            moved += off
        self._targets = None
        return moved

    @torch.no_grad()
    def _place_again(self) -> int:
        """A second ``train()``: the targets were cut to this process's part in the first."""
        moved = 0
        for number, held in enumerate(self._held):
            again, self._cut[number] = laid_out(held, master(held.parameter), None)
            old = self._pieces[number]
            if [b.block.size for b in again] != [b.block.size for b in old]:
                raise FreezeError(
                    f"{held.name} lies otherwise over the processes than in this trainer's first "
                    "training, and only the first one's part was kept. Build a new trainer."
                )
            self._pieces[number] = [
                replace(new, target=was.target) for new, was in zip(again, old, strict=True)
            ]
            moved += self._put_right(number) > tolerance(held.parameter.dtype)
        return moved

    def _put_right(self, number: int) -> float:
        """Put one weight's directions back; how far they were off here, relatively."""
        squares = 0.0
        for _, piece, gap in self._gaps([number]):
            squares += float(gap.square().sum())
            piece.put_back(gap)
        return squares**0.5 / self._scales[number]

    def _project(self, number: int, held: Directions) -> Callable[[Tensor], None]:
        zero = keeper(held.parameter) == "zero"
        blocks = (Block((0, 0, 0), held.form),) if zero else live(held.parameter).blocks
        turned = held.axis == "rows"
        basis = held.basis
        sums = keeper(held.parameter) == "plain"

        def change(gradient: Tensor) -> None:
            self.fired[number] += 1
            if sums and not _last_micro_batch():
                return  # what has been accumulated so far is projected with the last
            for block in blocks:
                matrix = block.view(gradient)[0]
                lines = matrix.T if turned else matrix
                along = basis.to(lines.dtype)
                held_part = lines @ along
                if self.measuring:
                    self._removed.append(held_part.float().square().sum())
                lines.addmm_(held_part, along.T, alpha=-1)

        return change

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        assert self._optimizer is not None
        flat = stepped_storages((held.parameter for held in self._held), self._optimizer)
        squares: dict[int, float] = {}
        for number, piece, gap in self._gaps(range(len(self._held)), flat):
            if self.measuring:
                squares[number] = squares.get(number, 0.0) + float(gap.square().sum())
            piece.put_back(gap)
            self._stepped.add(number)
        for number, square in squares.items():
            self._drift = max(self._drift, square**0.5 / self._scales[number])
        self.pins += 1

    def _gaps(
        self, numbers: Sequence[int], flat: set[int] | None = None
    ) -> Iterator[tuple[int, Piece, Tensor]]:
        """Every stored piece with its gap, one after the other.

        Together they would take as much memory as the targets. Products of cut lines are put
        together over processes first, all at once.
        """
        here = [
            (number, piece)
            for number in numbers
            for piece in self._pieces[number]
            if flat is None or piece.open().untyped_storage().data_ptr() in flat
        ]
        sums = {
            n: torch.zeros(self._cut[n], self._held[n].basis.shape[1], device=self._devices[n])
            for n in numbers
            if self._cut[n]
        }
        for number, piece in here:
            if piece.slots is not None:
                sums[number].index_add_(0, piece.slots, piece.products())
        if sums:
            total = summed(torch.cat([part.flatten() for part in sums.values()]))
            parts = total.split([part.numel() for part in sums.values()])
            sums = {n: p.view_as(sums[n]) for n, p in zip(sums, parts, strict=True)}
        for number, piece in here:
            whole = piece.slots is None
            yield number, piece, piece.gap(piece.products() if whole else sums[number][piece.slots])

    @torch.no_grad()
    def changes(self) -> list[float]:
        """The relative change of every ``W U``, the same in all processes, which must all call it.

        ``norm(W U - W0 U) / norm(W0 U)``, Frobenius; of a LoRA layer ``W - W0 = s B A``.
        """
        squares = torch.zeros(len(self._held), dtype=torch.double)
        for number, piece, gap in self._gaps(range(len(self._held))):
            counted = gap if piece.mine is None else gap[piece.mine]
            squares[number] += float(counted.double().square().sum())
        everywhere = torch.stack(gathered(squares)) if ranks() > 1 else squares[None]
        found = []
        for number, held in enumerate(self._held):
            if held.partner is not None:
                gap = self._product_gap(held)
            else:
                split = is_split(held.parameter) or keeper(held.parameter) == "zero"
                of_all = everywhere[:, number]
                gap = float(of_all.sum() if split else of_all.max()) ** 0.5
            found.append(gap / self._scales[number])
        return found

    def _product_gap(self, held: Directions) -> float:
        assert held.partner is not None
        rows = count_of(held.form, "rows")
        down = read(held.parameter, "rows", torch.arange(rows)).double()
        up = held.partner.parameter
        whole = read(up, "rows", torch.arange(count_of(form_of(shape_of(up)), "rows")))
        inner = down @ held.basis.double().to(down.device)
        change = whole.double().to(inner.device) @ inner
        return abs(held.partner.scale) * float(change.norm())

    def check_fired(self) -> None:
        """See :func:`safeft.freeze.masks.check_fired`."""
        fired = zip(self._held, self.fired, strict=True)
        check_fired((held.name, held.parameter, count) for held, count in fired)

    def check_pinned(self) -> None:
        """After an optimizer step: everything held in this process was put back.

        Raises:
            FreezeError: Something was not.
        """
        if self._held and self.pins == 0:
            raise FreezeError(
                "The optimizer stepped and the pin on directions did not fire: this optimizer "
                "does not step as torch's do, and decay would move them. Use adamw_torch."
            )
        for number, held in enumerate(self._held):
            trained = held.parameter.requires_grad and self._pieces[number]
            if trained and number not in self._stepped:
                raise FreezeError(
                    f"The optimizer stepped and the directions of {held.name} were not pinned: the "
                    "engine steps on a copy of it that safeft did not see."
                )

    def measured(self) -> dict[str, float]:
        """Gradient norm removed and largest relative drift before the pin; then resets."""
        if not self._held:
            return {}
        removed = sum(float(part) for part in self._removed)
        found = torch.tensor([removed, self._drift], dtype=torch.double)
        self._removed.clear()
        self._drift = 0.0
        parts = torch.stack(gathered(found))
        return {
            "safeft/direction_grad_norm_removed": float(parts[:, 0].sum()) ** 0.5,
            "safeft/direction_drift_before_pin": float(parts[:, 1].max()),
        }

    def report(self) -> list[dict[str, Any]]:
        """Per weight what is held and how far it moved; all processes must call it."""
        return [
            {
                "tensor": held.weight,
                "held_by": held.name,
                "rank": held.basis.shape[1],
                "features": held.basis.shape[0],
                "relative_change": change,
                "tolerance": tolerance(held.parameter.dtype),
            }
            for held, change in zip(self._held, self.changes(), strict=True)
        ]


def _last_micro_batch() -> bool:
    """Whether the optimizer steps after this backward pass, as the trainer says."""
    from accelerate.state import GradientState

    return bool(GradientState().sync_gradients)

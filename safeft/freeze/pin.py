"""Mask and pin: what keeps held slices where they are, under every engine.

The gradient mask keeps clipping and moments clean; the pin, after each optimizer step, makes it
exact: weight decay and stale moments move weights whose gradient is zero.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from safeft.blocks import Block, Lines, length_of
from safeft.errors import FreezeError
from safeft.freeze.certificate import bytes_hash
from safeft.freeze.direction_pin import DirectionPin
from safeft.freeze.directions import Directions
from safeft.freeze.masks import check_fired, mask_gradient, stepped_storages
from safeft.freeze.plan import Hold
from safeft.processes import broadcast, flat_bytes, ranks, summed
from safeft.shards import Shard, copies, keeper, live, master, moments, read


@dataclass(frozen=True, eq=False)
class _Piece:
    """The held entries inside one block that this process stores."""

    open: Callable[[], Tensor]
    lines: Lines
    kept: Tensor | None
    """As the block lies; None where the entries are held at zero."""

    def now(self) -> Tensor:
        return self.lines.get(self.open().detach())

    def put_back(self) -> None:
        if self.kept is None:
            self.lines.clear(self.open())
        else:
            self.lines.put(self.open(), self.kept)

    def moved(self) -> bool:
        now = self.now()
        if self.kept is None:
            return bool(now.any())
        return not torch.equal(flat_bytes(now), flat_bytes(self.kept))

    def drift(self) -> Tensor:
        now = self.now()
        gap = now if self.kept is None else now - self.kept
        return gap.abs().max().float()


class Pin:
    """Holds a plan's slices during training. Only the slices are stored, never a dense mask.

    Make it while the model holds the base weights. Process 0's are the ones that count.

    Args:
        holds: Rows and columns.
        span: The pin of directions, where there are any. It comes first, so that what is held to
            the bit has the last word.
    """

    def __init__(self, holds: Sequence[Hold], span: DirectionPin | None = None) -> None:
        self._holds = list(holds)
        self.span = span
        self._base: list[Tensor | None] | None = [_snapshot(hold) for hold in holds]
        self._pieces: list[list[_Piece]] = [[] for _ in holds]
        self._optimizer: torch.optim.Optimizer | None = None
        self._handles: list[RemovableHandle] = []
        self._removed: list[Tensor] = []
        self._drifts: list[Tensor] = []
        self._stepped: set[int] = set()
        self.fired = [0] * len(self._holds)
        self.pins = 0
        self._measuring = False

    @property
    def measuring(self) -> bool:
        """Whether the next step is measured."""
        return self._measuring

    @measuring.setter
    def measuring(self, value: bool) -> None:
        self._measuring = value
        if self.span is not None:
            self.span.measuring = value

    def install(
        self,
        optimizer: torch.optim.Optimizer,
        holds: Sequence[Hold] | None = None,
        directions: Sequence[Directions] | None = None,
    ) -> int:
        """Register the masks and the pin; put the slices right and clear their moments at once.

        Args:
            optimizer: The one that really steps.
            holds: The same holds on the parameters that are being trained now, where an engine
                has put others in the place of the model's.
            directions: The same of those.

        Returns:
            How many held slices were not where the snapshot has them (after loading a checkpoint).

        Raises:
            FreezeError: A parameter was cast to another dtype since the snapshot was taken, or
                a held slice is stored in no process.
        """
        self.remove()
        self._holds = self._holds if holds is None else list(holds)
        turned = self.span.install(optimizer, directions) if self.span is not None else 0
        moved = self._place() if self._base is not None else self._place_again()
        self._clear_moments(optimizer)
        self._optimizer = optimizer
        self.fired, self.pins, self._stepped = [0] * len(self._holds), 0, set()
        for number, hold in enumerate(self._holds):
            if hold.parameter.requires_grad:
                self._handles.append(self._register(number, hold))
        self._handles.append(optimizer.register_step_post_hook(self._after_step))
        return moved + turned

    def remove(self) -> None:
        """Take all hooks off."""
        if self.span is not None:
            self.span.remove()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @torch.no_grad()
    def _place(self) -> int:
        """Cut the base to what is stored here, write it everywhere, and keep what is pinned."""
        assert self._base is not None
        tally = torch.zeros(len(self._holds), 3, dtype=torch.int64)
        for number, hold in enumerate(self._holds):
            stored = copies(hold.parameter, hold.form)
            base, self._base[number] = self._base[number], None
            if base is not None:
                _check_dtype(hold, base.dtype)
                # What the model computes with is the base in its own dtype; ZeRO's master is that.
                base = broadcast(base).to(stored[0].dtype)
            for shard in stored:
                self._pieces[number] = list(_cut(hold, shard, base))
                tally[number, 0] += sum(piece.moved() for piece in self._pieces[number])
                for piece in self._pieces[number]:
                    piece.put_back()
            tally[number, 1] = _weights(hold, stored[0])
            tally[number, 2] = _weights(hold, stored[-1])
        self._base = None
        tally = summed(tally)
        for hold, found in zip(self._holds, tally[:, 1:].tolist(), strict=True):
            if found != [hold.weights] * 2:
                raise FreezeError(
                    f"{hold.name}: of the {hold.weights} weights to hold, {found[0]} are stored "
                    f"and {found[1]} are stepped on in the {ranks()} processes of this run: some "
                    "would be trained unseen. Layers may be spread over processes (pipeline "
                    "parallelism), or groups of processes may hold models of their own. Use DDP, "
                    "FSDP2 or DeepSpeed ZeRO."
                )
        return int((tally[:, 0] > 0).sum())

    @torch.no_grad()
    def _place_again(self) -> int:
        """A second ``train()``: only what was kept of this process's part is there to compare."""
        moved = torch.zeros(len(self._holds), dtype=torch.int64)
        for number, (hold, pieces) in enumerate(zip(self._holds, self._pieces, strict=True)):
            again = list(_cut(hold, master(hold.parameter, hold.form), None))
            if [len(piece.lines) for piece in again] != [len(piece.lines) for piece in pieces]:
                raise FreezeError(
                    f"{hold.name} lies otherwise over the processes than in this trainer's first "
                    "training, and only the first one's slices were kept. Build a new trainer."
                )
            for place, (new, old) in enumerate(zip(again, pieces, strict=True)):
                kept = old.kept
                if kept is not None:
                    _check_dtype(hold, kept.dtype)
                    kept = kept.to(new.open().device)
                pieces[place] = _Piece(new.open, new.lines, kept)
                moved[number] += pieces[place].moved()
                pieces[place].put_back()
        return int((summed(moved) > 0).sum())

    def _register(self, number: int, hold: Hold) -> RemovableHandle:
        parameter = hold.parameter
        if keeper(parameter) == "zero":
            whole = Block((0, 0, 0), hold.form).lines(hold.axis, hold.entries, hold.form)
            held = [whole.to(parameter.device)]
        else:
            held = live(parameter, hold.form).lines(hold.axis, hold.entries)
        return mask_gradient(parameter, hold.name, self._clear(number, held))

    def _clear(self, number: int, held: Sequence[Lines]) -> Callable[[Tensor], None]:
        def change(gradient: Tensor) -> None:
            self.fired[number] += 1
            for lines in held:
                self._measure(lines, gradient)
                lines.clear(gradient)

        return change

    def _measure(self, lines: Lines, gradient: Tensor) -> None:
        if self._measuring:
            self._removed.append(lines.get(gradient).float().square().sum())

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        stepped = list(self._just_stepped())
        if self._measuring:
            self._drifts += [piece.drift() for _, piece in stepped]
        for number, piece in stepped:
            piece.put_back()
            self._stepped.add(number)
        self.pins += 1

    def _just_stepped(self) -> Iterator[tuple[int, _Piece]]:
        """ZeRO steps one flat group after the other: pin what lies in this one."""
        assert self._optimizer is not None
        flat = stepped_storages((hold.parameter for hold in self._holds), self._optimizer)
        for number, pieces in enumerate(self._pieces):
            for piece in pieces:
                if flat is None or piece.open().untyped_storage().data_ptr() in flat:
                    yield number, piece

    @torch.no_grad()
    def _clear_moments(self, optimizer: torch.optim.Optimizer) -> None:
        """A moment gathered before a slice was frozen would go on pushing it at every step."""
        for hold in self._holds:
            for shard in moments(hold.parameter, optimizer, hold.form):
                for piece in _cut(hold, shard, None):
                    piece.put_back()

    def check_fired(self) -> None:
        """After a backward pass: every parameter that got a gradient was masked.

        Raises:
            FreezeError: A mask did not fire although its parameter has a gradient, or none did.
        """
        if self.span is not None:
            self.span.check_fired()
        fired = zip(self._holds, self.fired, strict=True)
        check_fired((hold.name, hold.parameter, count) for hold, count in fired)

    def check_pinned(self) -> None:
        """After an optimizer step: everything held in this process was put back.

        Raises:
            FreezeError: The pin did not fire, or not for some parameter.
        """
        if self.span is not None:
            self.span.check_pinned()
        if self.pins == 0:
            raise FreezeError(
                "The optimizer stepped and the pin did not fire: this optimizer does not step "
                "as torch's do, and weight decay would move the neurons. Use adamw_torch."
            )
        for number, (hold, pieces) in enumerate(zip(self._holds, self._pieces, strict=True)):
            if pieces and number not in self._stepped and hold.parameter.requires_grad:
                raise FreezeError(
                    f"The optimizer stepped and {hold.name} was not pinned: the engine steps on a "
                    "copy of it that safeft did not see, and weight decay would move the neurons."
                )

    def report(self) -> dict[str, Any]:
        """What this process stores of the held slices, and whether each bit is where it was."""
        pieces = [piece for pieces in self._pieces for piece in pieces]
        return {
            "weights": sum(piece.lines.weights for piece in pieces),
            "sha256": bytes_hash(piece.now() for piece in pieces),
            "exact": not any(piece.moved() for piece in pieces),
        }

    def measured(self) -> dict[str, float]:
        """Gradient norm removed and largest drift before the pin since the last call; then resets.

        The norm is the root of the sum of squares over all micro-batches of all processes.
        """
        removed = sum(float(r) for r in self._removed)
        drift = max((float(d) for d in self._drifts), default=0.0)
        self._removed.clear()
        self._drifts.clear()
        if ranks() > 1:
            parts = torch.zeros(ranks(), 2, dtype=torch.float64)
            parts[torch.distributed.get_rank()] = torch.tensor([removed, drift])
            parts = summed(parts)
            removed, drift = float(parts[:, 0].sum()), float(parts[:, 1].max())
        found = {"safeft/grad_norm_removed": removed**0.5, "safeft/max_drift_before_pin": drift}
        return found | (self.span.measured() if self.span is not None else {})


def _snapshot(hold: Hold) -> Tensor | None:
    """The held slices whole, ``(entries, length)``."""
    if hold.at_zero:
        return None
    size = (len(hold.entries), length_of(hold.form, hold.axis))
    if hold.parameter.is_meta:  # FSDP loads weights in one process only, and sends them around
        return torch.empty(size, dtype=hold.parameter.dtype)
    return read(hold.parameter, hold.axis, hold.entries, hold.form).view(size)


def _check_dtype(hold: Hold, kept: torch.dtype) -> None:
    """FSDP and DeepSpeed cast as they shard, which is foreseen; nobody else should."""
    if kept != hold.parameter.dtype and keeper(hold.parameter) == "plain":
        raise FreezeError(
            f"{hold.name} was cast from {kept} to {hold.parameter.dtype} after the "
            "trainer was built (an evaluation with bf16_full_eval does that), which "
            "changed the frozen weights. Cast the model before constructing the trainer."
        )


def _weights(hold: Hold, shard: Shard) -> int:
    """Number of held weights in this process, replicas left out."""
    if not shard.counts:
        return 0
    return sum(lines.weights for lines in shard.lines(hold.axis, hold.entries))


def _cut(hold: Hold, shard: Shard, base: Tensor | None) -> Iterator[_Piece]:
    """The held entries in each block; ``base`` is ``(entries, length)``, None for zero."""
    for lines in shard.lines(hold.axis, hold.entries):
        kept = lines.cut(base).to(shard.device, shard.dtype) if base is not None else None
        yield _Piece(shard.open, lines, kept)

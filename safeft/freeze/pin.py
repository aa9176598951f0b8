"""Mask and pin: what keeps held slices where they are, one process or DDP.

The gradient mask keeps clipping and moments clean; the pin, after each optimizer step, makes it
exact: weight decay and stale moments move weights whose gradient is zero.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from safeft.errors import FreezeError
from safeft.freeze.plan import Hold, Plan


class Pin:
    """Holds a plan's slices during training. Only the slices are stored, never a dense mask.

    The mask is a post-accumulate hook that zeroes the held rows or columns of ``.grad`` in place:
    it runs inside the accumulation node, so before DDP reduces the gradient, costs no memory, and
    clipping never sees what it removed. Take the snapshot while the model holds the base weights.
    """

    def __init__(self, plan: Plan) -> None:
        self._holds = plan.holds
        self._entries = [hold.entries.to(hold.parameter.device) for hold in plan.holds]
        self._kept = [self._snapshot(hold) for hold in plan.holds]
        self._handles: list[RemovableHandle] = []
        self._removed: list[Tensor] = []
        self._drifts: list[Tensor] = []
        self.fired = [0] * len(plan.holds)
        self.pins = 0
        self.measuring = False

    @staticmethod
    @torch.no_grad()
    def _snapshot(hold: Hold) -> Tensor | None:
        if hold.at_zero:
            return None
        parameter = hold.parameter
        return parameter.detach().index_select(hold.dim, hold.entries.to(parameter.device))

    def install(self, optimizer: torch.optim.Optimizer) -> int:
        """Register the masks and the pin; put the slices right and clear their moments at once.

        Returns:
            How many held slices were not where the snapshot has them (after loading a checkpoint).

        Raises:
            FreezeError: A parameter was cast to another dtype since the snapshot was taken.
        """
        self.remove()
        self._check_dtypes()
        self._entries = [hold.entries.to(hold.parameter.device) for hold in self._holds]
        self._kept = [
            kept if kept is None else kept.to(hold.parameter.device)
            for hold, kept in zip(self._holds, self._kept, strict=True)
        ]
        moved = self._moved()
        self.pin()
        self._clear_moments(optimizer)
        self.fired, self.pins = [0] * len(self._holds), 0
        for number, hold in enumerate(self._holds):
            if not hold.parameter.requires_grad:
                continue
            hook = self._mask(number)
            self._handles.append(hold.parameter.register_post_accumulate_grad_hook(hook))
        self._handles.append(optimizer.register_step_post_hook(self._after_step))
        return moved

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _check_dtypes(self) -> None:
        for hold, kept in zip(self._holds, self._kept, strict=True):
            if kept is not None and kept.dtype != hold.parameter.dtype:
                raise FreezeError(
                    f"{hold.name} was cast from {kept.dtype} to {hold.parameter.dtype} after the "
                    "trainer was built (an evaluation with bf16_full_eval does that), which "
                    "changed the frozen weights. Cast the model before constructing the trainer."
                )

    def _moved(self) -> int:
        return sum(
            not torch.equal(kept, hold.parameter.detach().index_select(hold.dim, entries))
            if kept is not None
            else bool(hold.parameter.detach().index_select(hold.dim, entries).any())
            for hold, entries, kept in zip(self._holds, self._entries, self._kept, strict=True)
        )

    def _mask(self, number: int) -> Callable[[Tensor], None]:
        dim, entries = self._holds[number].dim, self._entries[number]

        def hook(parameter: Tensor) -> None:
            self.fired[number] += 1
            gradient = parameter.grad
            assert gradient is not None
            if self.measuring:
                self._removed.append(gradient.index_select(dim, entries).float().square().sum())
            gradient.index_fill_(dim, entries, 0)

        return hook

    def _after_step(self, *_: Any) -> None:
        if self.measuring:
            self._drifts += [
                self._drift(h, e, k)
                for h, e, k in zip(self._holds, self._entries, self._kept, strict=True)
            ]
        self.pin()
        self.pins += 1

    @staticmethod
    @torch.no_grad()
    def _drift(hold: Hold, entries: Tensor, kept: Tensor | None) -> Tensor:
        now = hold.parameter.detach().index_select(hold.dim, entries)
        return (now if kept is None else now - kept).abs().max().float()

    @torch.no_grad()
    def pin(self) -> None:
        """Put every held slice back to where it was."""
        for hold, entries, kept in zip(self._holds, self._entries, self._kept, strict=True):
            if kept is None:
                hold.parameter.index_fill_(hold.dim, entries, 0)
            else:
                hold.parameter.index_copy_(hold.dim, entries, kept)

    @torch.no_grad()
    def _clear_moments(self, optimizer: torch.optim.Optimizer) -> None:
        """A moment gathered before a slice was frozen would go on pushing it at every step."""
        for hold, entries in zip(self._holds, self._entries, strict=True):
            for value in optimizer.state.get(hold.parameter, {}).values():
                # Quantised states are tensor subclasses without index_fill; the pin covers them.
                if type(value) is Tensor and value.shape == hold.parameter.shape:
                    value.index_fill_(hold.dim, entries, 0)

    def check_fired(self) -> None:
        """After a backward pass: every parameter that got a gradient was masked.

        Raises:
            FreezeError: A mask did not fire although its parameter has a gradient, or none did.
        """
        masked = [
            (hold, count)
            for hold, count in zip(self._holds, self.fired, strict=True)
            if hold.parameter.requires_grad
        ]
        for hold, count in masked:
            if hold.parameter.grad is not None and count == 0:
                raise FreezeError(
                    f"The gradient mask of {hold.name} did not fire in the first step although the "
                    "parameter has a gradient: something replaced the parameter or its hooks after "
                    "training began. The neurons would not be frozen, so training stops here."
                )
        if masked and not any(count for _, count in masked):
            raise FreezeError(
                f"None of the {len(masked)} gradient masks fired in the first step: the backward "
                "pass does not reach the parameters they are on, so another copy of the model is "
                "being trained. The neurons would not be frozen, so training stops here."
            )

    def measured(self) -> dict[str, float]:
        """Gradient norm removed and largest drift before the pin since the last call; then resets.

        The norm is over this process's micro-batches: under accumulation the root of the sum of
        their squares.
        """
        removed = torch.stack([r.cpu() for r in self._removed]).sum().sqrt() if self._removed else 0
        drift = torch.stack([d.cpu() for d in self._drifts]).max() if self._drifts else 0
        self._removed.clear()
        self._drifts.clear()
        return {
            "safeft/grad_norm_removed": float(removed),
            "safeft/max_drift_before_pin": float(drift),
        }

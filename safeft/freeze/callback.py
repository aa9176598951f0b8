"""``SafetyFreezeCallback``: the one line that makes a trainer keep its safety neurons."""

import logging
import weakref
from collections.abc import Collection
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers import trainer as transformers_trainer

from safeft.errors import FreezeError
from safeft.freeze.adapters import check_adapters, check_fresh
from safeft.freeze.certificate import (
    Certificate,
    Violation,
    bytes_hash,
    differences,
)
from safeft.freeze.engines import check_arguments, check_parameters, describe, innermost
from safeft.freeze.pin import Pin
from safeft.freeze.plan import Group, Mode, Plan, Slice, make_plan
from safeft.neurons import NeuronSet
from safeft.sites import plain_model
from safeft.weights import ModelWeights

logger = logging.getLogger(__name__)

_LIVE: "weakref.WeakSet[SafetyFreezeCallback]" = weakref.WeakSet()


class SafetyFreezeCallback(TrainerCallback):
    """Freezes neurons exactly during training; a drop-in for transformers and TRL trainers.

    Pass it to the trainer's constructor (``callbacks=[...]``). It refuses, before the first step,
    whatever cannot be exact; masks gradients before clipping; puts the neurons back after every
    optimizer step; logs ``safeft/*`` scalars to the configured trackers; and writes
    ``safeft_certificate.json`` into each checkpoint and, at the end, into the output folder.

    On resume, neurons that were not frozen before (an enlarged set) return to the base model's
    values, so that the certificate always speaks about the base.

    Args:
        neurons: The set, or the folder it was saved in.
        mode: ``freeze`` holds these neurons; ``train_only`` holds everything else. The latter keeps
            a copy of what it holds in the matrices it trains a part of.
        hold: Groups of parameters to hold whole as well: ``embeddings``, ``norms``, ``head``,
            ``biases``.
        strict: Refuse a model whose neurons have other weights than the set was located with.

    Raises:
        FreezeError, FingerprintError, UnsupportedModelError: When the trainer is constructed.

    Example:
        >>> trainer = SFTTrainer(model, train_dataset=data,  # doctest: +SKIP
        ...                      callbacks=[SafetyFreezeCallback("safety_neurons")])
    """

    def __init__(
        self,
        neurons: NeuronSet | str | Path,
        mode: Mode = "freeze",
        *,
        hold: Collection[Group] = (),
        strict: bool = True,
    ) -> None:
        found = neurons if isinstance(neurons, NeuronSet) else NeuronSet.from_pretrained(neurons)
        self.neurons: NeuronSet = found
        self.mode: Mode = mode
        self.hold = tuple(hold)
        self.strict = strict
        self.certificate: Certificate | None = None
        self.plan: Plan | None = None
        self._pin: Pin | None = None
        self._hashes: dict[int, str] = {}
        self._state: TrainerState | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._model: nn.Module | None = None
        self._scalars: dict[str, float] = {}
        self._restored = 0
        self._checked = False
        _LIVE.add(self)
        _install_relay()

    @classmethod
    def from_pretrained(cls, folder: str | Path, mode: Mode = "freeze", **settings: Any) -> Self:
        """The callback for a saved set."""
        return cls(NeuronSet.from_pretrained(folder), mode, **settings)

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Check everything, and take the snapshot while the model holds its base weights."""
        check_arguments(args)
        self._prepare(model)

    def _prepare(self, model: nn.Module) -> None:
        check_parameters(model)
        check_adapters(model)
        self.neurons.check_model(model, weights_too=self.strict)
        self.plan = make_plan(model, self.neurons, self.mode, self.hold)
        self._model = plain_model(model)
        if not self.plan.holds and not self.plan.still:
            logger.warning(
                "None of the %d neurons lies in a trainable parameter: they are held already, and "
                "there is nothing to mask.",
                len(self.neurons),
            )
        for _, parameter in self.plan.still:
            parameter.requires_grad_(False)
        self._pin = Pin(self.plan)
        self._hashes = {n: self._hash(piece) for n, piece in enumerate(self.plan.slices)}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Install masks and pin, after weights and optimizer state are final (resume included)."""
        if self._pin is None:
            check_arguments(args)
            if args.world_size > 1:
                raise FreezeError(
                    "The callback was added after the trainer was built, so the parameters to hold "
                    "are wrapped already. Pass it to the constructor: callbacks=[...]."
                )
            self._prepare(model)
        assert self.plan is not None
        assert self._pin is not None
        check_parameters(model)
        if state.global_step == 0:
            check_fresh(model)
        self._state, self._optimizer = state, innermost(optimizer)
        self._check_same_parameters(model)
        self._restored = self._pin.moved() if state.global_step else 0
        if self._restored:
            logger.warning(
                "Resuming at step %d: %d held slices had been trained before and return to the "
                "base model's values.",
                state.global_step,
                self._restored,
            )
        self._pin.install(self._optimizer)
        self._checked = False
        self.certificate = self._certify(state)
        self._demand_exact("at the start of training")

    def _check_same_parameters(self, model: nn.Module) -> None:
        """The trainer may have replaced parameters since the plan was made; a hook on the old ones
        would never fire.
        """
        assert self.plan is not None
        alive = {id(parameter) for parameter in model.parameters()}
        for name, parameter in [(h.name, h.parameter) for h in self.plan.holds] + list(
            self.plan.still
        ):
            if id(parameter) not in alive:
                raise FreezeError(
                    f"{name} was replaced after the trainer was built, so its mask would never "
                    "fire. Build adapters and cast the model before constructing the trainer."
                )

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Measure in the steps that will be logged; measuring every step would cost time."""
        assert self._pin is not None
        every = max(1, int(args.logging_steps)) if args.logging_strategy == "steps" else 1
        self._pin.measuring = (state.global_step + 1) % every == 0 or not self._checked

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """In the first step, every mask must have fired."""
        assert self._pin is not None
        if not self._checked:
            self._pin.check_fired()

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """In the first step, the pin must have fired."""
        assert self._pin is not None
        if not self._checked:
            skipped = bool(getattr(optimizer, "step_was_skipped", False))
            if self._pin.pins == 0 and not skipped:
                raise FreezeError(
                    "The optimizer stepped and the pin did not fire: this optimizer does not step "
                    "as torch's do, and weight decay would move the neurons. Use adamw_torch."
                )
            self._checked = self._pin.pins > 0
        if self._pin.measuring:
            assert self.plan is not None
            self._scalars = {"safeft/frozen_share": self.plan.frozen_share, **self._pin.measured()}

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Certify each checkpoint, into its folder."""
        self.certificate = self._certify(state)
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            self.certificate.save(folder)
        self._demand_exact(f"at step {state.global_step}")

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Certify the result, into the output folder, and take the hooks off."""
        assert self._pin is not None
        self._pin.remove()
        self.certificate = self._certify(state)
        if state.is_world_process_zero:
            Path(str(args.output_dir)).mkdir(parents=True, exist_ok=True)
            self.certificate.save(Path(str(args.output_dir)))
        self._demand_exact("at the end of training")

    def take_scalars(self) -> dict[str, float]:
        """The last measured ``safeft/*`` scalars, once."""
        scalars, self._scalars = self._scalars, {}
        return scalars

    def _values(self, piece: Slice) -> Tensor:
        assert self._model is not None
        weights = ModelWeights(self._model)
        entries = piece.entries
        if entries is None:
            entries = torch.arange((weights.shape(piece.name) or (0,))[0])
        return weights.read(piece.name, piece.axis, entries)

    def _hash(self, piece: Slice) -> str:
        return bytes_hash([self._values(piece)])

    def _certify(self, state: TrainerState) -> Certificate:
        assert self.plan is not None
        assert self._pin is not None
        assert self._model is not None
        assert self._optimizer is not None
        slices, violations = [], []
        for number, piece in enumerate(self.plan.slices):
            now = self._hash(piece)
            count = len(piece.entries) if piece.entries is not None else "all"
            slices.append(
                {
                    "tensor": piece.name,
                    "axis": piece.axis,
                    "count": count,
                    "sha256_base": self._hashes[number],
                    "sha256_now": now,
                }
            )
            if now != self._hashes[number]:
                violations.append(Violation(piece.name, "", piece.axis))
        violations += self._moved_factors()
        if disagreeing := _ranks_that_disagree([s["sha256_now"] for s in slices]):
            violations.append(Violation(f"ranks {disagreeing}", "", "rows"))
        run = {
            **describe(self._model, self._optimizer),
            "steps": state.global_step,
            "pins": self._pin.pins,
            "masked_parameters": len(self.plan.holds),
            "masks_fired": sum(count > 0 for count in self._pin.fired),
            "held_whole": [name for name, _ in self.plan.still],
            "slices_restored_on_resume": self._restored,
        }
        neurons = {
            "count": len(self.neurons),
            "sha256": self.neurons.hash,
            "source": dict(self.neurons.source),
            "base_model": self.neurons.model.name_or_path,
        }
        return Certificate(
            not violations,
            tuple(violations),
            self.mode,
            neurons,
            tuple(slices),
            self.plan.frozen_share,
            run,
        )

    def _moved_factors(self) -> list[Violation]:
        """Adapter factors that should be zero where the neurons are."""
        assert self.plan is not None
        found = []
        for hold in self.plan.holds:
            if not hold.at_zero:
                continue
            values = hold.parameter.detach().cpu().index_select(hold.dim, hold.entries)
            values = values if hold.dim == 0 else values.T.contiguous()
            for entry, changed, gap in differences(torch.zeros_like(values), values):
                index = int(hold.entries[entry])
                found.append(Violation(hold.name, hold.site, hold.axis, index, changed, gap))
        return found

    def _demand_exact(self, when: str) -> None:
        assert self.certificate is not None
        if not self.certificate.exact:
            raise FreezeError(
                f"The frozen neurons are not bit-identical {when}:\n{self.certificate.summary()}\n"
                "Something else writes to these weights (another callback, a merge, an averaging of "
                "weights). Do not use this model as one whose safety neurons were kept."
            )


def _ranks_that_disagree(hashes: list[str]) -> list[int]:
    """Ranks whose frozen slices differ from rank 0's; under DDP all must agree."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, hashes)
    return [rank for rank, theirs in enumerate(gathered) if theirs != gathered[0]]


class _ScalarRelay(TrainerCallback):
    """Adds a freeze's scalars to what a trainer logs, ahead of the trackers.

    A trainer shows its logs to the trackers before it shows them to the user's callbacks, so keys
    added there reach no tracker. Only callbacks in transformers' default list come earlier.
    """

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        for callback in _LIVE:
            if callback._state is state:
                scalars = callback.take_scalars()
                logs.update(scalars)
                state.log_history[-1].update(scalars)


def _install_relay() -> None:
    if _ScalarRelay not in transformers_trainer.DEFAULT_CALLBACKS:
        transformers_trainer.DEFAULT_CALLBACKS.append(_ScalarRelay)

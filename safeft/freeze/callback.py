"""``SafetyFreezeCallback``: the one line that makes a trainer keep its safety neurons."""

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from safeft.errors import FreezeError
from safeft.freeze.adapters import check_adapters, check_fresh
from safeft.freeze.certificate import Certificate
from safeft.freeze.certifier import Certifier, demand_exact
from safeft.freeze.engines import check_arguments, check_parameters, describe, innermost
from safeft.freeze.pin import Pin
from safeft.freeze.plan import Group, Mode, Plan, make_plan
from safeft.freeze.relay import add_scalars, add_source
from safeft.neurons import NeuronSet
from safeft.sites import plain_model

logger = logging.getLogger(__name__)


class SafetyFreezeCallback(TrainerCallback):
    """Freezes neurons exactly during training; a drop-in for transformers and TRL trainers.

    Pass it to the trainer's constructor (``callbacks=[...]``). It refuses, before the first step,
    whatever cannot be exact; masks gradients before clipping; puts the neurons back after every
    optimizer step; logs ``safeft/*`` scalars to the configured trackers; and writes
    ``safeft_certificate.json`` into each checkpoint and, at the end, into the output folder.

    On resume, neurons that were not frozen before (an enlarged set) return to the base model's
    values, so that the certificate always speaks about the base. Parameters held whole leave the
    optimizer, and no copy of them is kept: ``hold``, and the matrices ``train_only`` trains
    something of, cannot change on resume.

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
        self._certifier: Certifier | None = None
        self._state: TrainerState | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._model: nn.Module | None = None
        self._scalars: dict[str, float] = {}
        self._restored = 0
        self._checked = False
        add_source(self)

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
        check_fresh(model)
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
        self._certifier = Certifier(self.plan, model, self.neurons)

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
            self._prepare_late(args, state, model)
        assert self.plan is not None
        assert self._pin is not None
        check_parameters(model)
        self._check_same_parameters(model)
        self._state, self._optimizer = state, innermost(optimizer)
        moved = self._pin.install(self._optimizer)
        self._restored = moved if state.global_step else 0
        if self._restored:
            logger.warning(
                "Resuming at step %d: %d held slices had been trained before and return to the "
                "base model's values.",
                state.global_step,
                self._restored,
            )
        self._checked = False
        self._certify(state, "at the start of training")

    def _prepare_late(self, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        """For a callback that was added after the trainer was built."""
        check_arguments(args)
        if args.world_size > 1 or state.global_step:
            reason = (
                "the parameters to hold are wrapped already"
                if args.world_size > 1
                else f"the model holds step {state.global_step} already, not its base weights"
            )
            raise FreezeError(
                f"The callback was added after the trainer was built, so {reason}. Pass it to the "
                "constructor: callbacks=[...]."
            )
        self._prepare(model)

    def _check_same_parameters(self, model: nn.Module) -> None:
        """The trainer may have replaced or unfrozen parameters since the plan was made."""
        assert self.plan is not None
        alive = {id(parameter) for parameter in model.parameters()}
        known = [(hold.name, hold.parameter) for hold in self.plan.holds] + list(self.plan.still)
        for name, parameter in known:
            if id(parameter) not in alive:
                raise FreezeError(
                    f"{name} was replaced after the trainer was built, so its mask would never "
                    "fire. Build adapters and cast the model before constructing the trainer, and "
                    "pass it a model, not a model_init."
                )
        now = make_plan(model, self.neurons, self.mode, self.hold)
        held = {id(hold.parameter) for hold in self.plan.holds}
        loose = [(hold.name, hold.parameter) for hold in now.holds] + list(now.still)
        for name, parameter in loose:
            if id(parameter) not in held:
                raise FreezeError(
                    f"{name} became trainable after the trainer was built, so nothing would hold "
                    "it. Set requires_grad and add adapters before constructing the trainer."
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
        every = max(1, int(state.logging_steps)) if args.logging_strategy == "steps" else 1
        logged = args.logging_strategy != "no" and (state.global_step + 1) % every == 0
        self._pin.measuring = logged or not self._checked

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
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        self._certify(state, f"at step {state.global_step}", folder)

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
        folder = Path(str(args.output_dir))
        if state.is_world_process_zero:
            folder.mkdir(parents=True, exist_ok=True)
        self._certify(state, "at the end of training", folder)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Where the callback was added too late for the relay: log history still gets its part."""
        add_scalars(self, state, logs)

    def take_scalars(self, state: TrainerState) -> dict[str, float]:
        """The last measured ``safeft/*`` scalars of the training with this state, once."""
        if state is not self._state:
            return {}
        scalars, self._scalars = self._scalars, {}
        return scalars

    def _certify(self, state: TrainerState, when: str, folder: Path | None = None) -> None:
        assert self._certifier is not None
        self.certificate = self._certifier.certify(self._run(state))
        if folder is not None and state.is_world_process_zero and folder.is_dir():
            self.certificate.save(folder)
        demand_exact(self.certificate, when)

    def _run(self, state: TrainerState) -> dict[str, Any]:
        assert self.plan is not None
        assert self._pin is not None
        assert self._model is not None
        assert self._optimizer is not None
        masked = [hold.parameter.requires_grad for hold in self.plan.holds]
        return {
            **describe(self._model, self._optimizer),
            "steps": state.global_step,
            "pins": self._pin.pins,
            "masked_parameters": sum(masked),
            "masks_fired": sum(count > 0 for count in self._pin.fired),
            "held_whole": [name for name, _ in self.plan.still],
            "slices_restored_on_resume": self._restored,
        }

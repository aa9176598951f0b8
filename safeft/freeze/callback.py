"""``SafetyFreezeCallback``: the one line that makes a trainer keep its safety neurons."""

import json
import logging
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from safeft.errors import FreezeError, SafeftError
from safeft.files import sha256
from safeft.freeze.adapters import check_adapters, check_fresh
from safeft.freeze.certificate import Certificate, causal_verdict
from safeft.freeze.certifier import Certifier, demand_exact
from safeft.freeze.direction_pin import DirectionPin
from safeft.freeze.engines import (
    DDPWatch,
    asked_engine,
    check_arguments,
    check_engine,
    check_expected,
    describe,
    found_engine,
    innermost,
)
from safeft.freeze.pin import Pin
from safeft.freeze.plan import Group, Mode, Plan, make_plan
from safeft.freeze.relay import add_scalars, add_source
from safeft.neurons import NeuronSet
from safeft.processes import rank, ranks, same_everywhere, together
from safeft.progress import launched
from safeft.shards import check_offsets, keeper
from safeft.sites import plain_model, plain_name
from safeft.subspace import SafetySubspace, protected_pair
from safeft.weights import ModelWeights

logger = logging.getLogger(__name__)


class SafetyFreezeCallback(TrainerCallback):
    """Holds neurons or input directions during training; for transformers and TRL trainers.

    Pass it to the trainer's constructor (``callbacks=[...]``). It refuses, before the first step,
    whatever cannot be exact; masks gradients before clipping; puts what is held back after every
    optimizer step (neurons to the bit, ``W U`` to rounding); logs ``safeft/*`` scalars to the
    configured trackers; and writes ``safeft_certificate.json`` into each checkpoint and, at the
    end, into the output folder.

    Works in one process, under DDP, FSDP2 and DeepSpeed ZeRO 1 to 3; where a launcher falls back
    to another engine than was asked for, or a mask does not fire in the first step, all processes
    stop with the reason.

    On resume, neurons that were not frozen before (an enlarged set) return to the base model's
    values, so that the certificate always speaks about the base. Parameters held whole leave the
    optimizer, and no copy of them is kept: ``hold``, and the matrices ``train_only`` trains
    something of, cannot change on resume.

    Args:
        protected: The neuron set or the subspace, or the folder it was saved in.
        mode: ``freeze`` holds these neurons; ``train_only`` holds everything else. The latter keeps
            a copy of what it holds in the matrices it trains a part of.
        hold: Groups of parameters to hold whole as well: ``embeddings``, ``norms``, ``head``,
            ``biases``; or ``tokens``, the embeddings of those that a subspace was found on. By
            default none beside neurons, and beside a subspace all that it has no basis for (of
            untied embeddings ``tokens``): trained, they move what every layer receives out of the
            held directions.
        subspace: Input directions to hold beside a neuron set, or the folder they were saved in.
        strict: Refuse a model whose weights are not those that the set or subspace was located in.
        engine: Demand this engine (``single``, ``ddp``, ``fsdp2``, ``zero1``, ``zero2``,
            ``zero3``); by default the one the settings ask for.
        processes: Demand this many.

    Raises:
        FreezeError, FingerprintError, UnsupportedModelError: When the trainer is constructed.

    Example:
        >>> trainer = SFTTrainer(model, train_dataset=data,  # doctest: +SKIP
        ...                      callbacks=[SafetyFreezeCallback("safety_neurons")])
    """

    def __init__(
        self,
        protected: NeuronSet | SafetySubspace | str | Path,
        mode: Mode = "freeze",
        *,
        hold: Collection[Group] | None = None,
        subspace: SafetySubspace | str | Path | None = None,
        strict: bool = True,
        engine: str | None = None,
        processes: int | None = None,
    ) -> None:
        self._unread: SafeftError | None = None
        self.neurons: NeuronSet | None = None
        self.subspace: SafetySubspace | None = None
        try:
            self.neurons, self.subspace = protected_pair(protected, subspace)
        except SafeftError as error:
            if launched() == 1:
                raise
            self._unread = error  # said by all processes at once, where the trainer is built
        self.mode: Mode = mode
        self.hold = None if hold is None else tuple(hold)
        self.strict = strict
        self.engine, self.processes = engine, processes
        self.certificate: Certificate | None = None
        self.plan: Plan | None = None
        self._paths: dict[int, str] = {}
        self._pin: Pin | None = None
        self._certifier: Certifier | None = None
        self._state: TrainerState | None = None
        self._optimizer: Any = None
        self._model: nn.Module | None = None
        self._ddp: DDPWatch | None = None
        self._scalars: dict[str, float] = {}
        self._restored = 0
        self._checked = False
        add_source(self)

    @classmethod
    def from_pretrained(cls, folder: str | Path, mode: Mode = "freeze", **settings: Any) -> Self:
        """The callback for a saved set."""
        return cls(folder, mode, **settings)

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Check everything, and take the snapshot while the model holds its base weights."""
        together(lambda: self._check(args, model))
        self._prepare(args, model)

    def _check(self, args: TrainingArguments, model: nn.Module) -> None:
        if self._unread is not None:
            raise self._unread
        check_arguments(args)
        found_engine(model)
        check_adapters(model)
        check_fresh(model)

    def _prepare(self, args: TrainingArguments, model: nn.Module) -> None:
        held = [found for found in (self.neurons, self.subspace) if found is not None]
        same_everywhere([found.hash[:16] for found in held], "what is protected (its hash)")
        # Where weights are loaded in one process only, the others have nothing to compare.
        sharded = any(keeper(parameter) != "plain" for parameter in model.parameters())
        weights_too = self.strict and (sharded or rank() == 0)
        for found in held:
            if sharded:
                found.check_model(model, weights_too=weights_too)
            else:
                together(partial(found.check_model, model, weights_too=weights_too))
        self.plan = together(lambda: self._planned(model))
        same_everywhere(_signature(self.plan), "what is to be held")
        nothing = not (self.plan.holds or self.plan.still or self.plan.directions)
        if nothing and self.neurons is not None and rank() == 0:
            logger.warning(
                "None of the %d neurons lies in a trainable parameter: they are held already, and "
                "there is nothing to mask.",
                len(self.neurons),
            )
        if rank() == 0:
            _say_whether_validated(self.neurons)
            _say_what_is_left(self.plan)
        for _, parameter in self.plan.still:
            parameter.requires_grad_(False)
        self._paths = {id(parameter): path for path, parameter in _by_path(model).items()}
        span = None
        if self.plan.directions:
            span = DirectionPin(self.plan.directions, ModelWeights(model), everywhere=sharded)
        self._pin = Pin(self.plan.holds, span)
        casts = asked_engine(args) not in ("single", "ddp")
        self._certifier = Certifier(self.plan, model, self.neurons, self.subspace, casts=casts)

    def _planned(self, model: nn.Module) -> Plan:
        return make_plan(model, self.neurons, self.mode, self.hold, self.subspace)

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
            together(lambda: self._check_late(args, state, model))
            self._prepare(args, model)
        assert self._pin is not None
        plan = together(lambda: self._plan_again(args, model, optimizer))
        check_offsets([held.parameter for held in (*plan.holds, *plan.directions)])
        self.plan, self._model = plan, plain_model(model)
        self._state, self._optimizer = state, optimizer
        moved = self._pin.install(innermost(optimizer), plan.holds, plan.directions)
        self._restored = moved if state.global_step else 0
        if self._restored and rank() == 0:
            logger.warning(
                "Resuming at step %d: %d held slices had been trained before and return to the "
                "base model's values.",
                state.global_step,
                self._restored,
            )
        self._checked = False
        self._ddp = DDPWatch(self._model) if found_engine(model, optimizer) == "ddp" else None
        self._certify(state, "at the start of training")

    def _check_late(self, args: TrainingArguments, state: TrainerState, model: Any) -> None:
        """For a callback that was added after the trainer was built."""
        self._check(args, model)
        if ranks() > 1 or state.global_step:
            reason = (
                "the parameters to hold are wrapped already"
                if ranks() > 1
                else f"the model holds step {state.global_step} already, not its base weights"
            )
            raise FreezeError(
                f"The callback was added after the trainer was built, so {reason}. Pass it to the "
                "constructor: callbacks=[...]."
            )

    def _plan_again(self, args: TrainingArguments, model: nn.Module, optimizer: Any) -> Plan:
        """The plan on the parameters in training: engines put others in the place of the model's.

        What they hold must be what was snapshot: the trainer may have replaced or unfrozen
        parameters since.
        """
        assert self.plan is not None
        check_engine(args, model, optimizer)
        expected = {"engine": found_engine(model, optimizer), "processes": ranks()}
        check_expected(expected, self.engine, self.processes)
        before = (*self.plan.holds, *self.plan.directions)
        known = {held.name for held in before}
        now = self._planned(model)
        loose = [held.name for held in (*now.holds, *now.directions) if held.name not in known]
        if loose := loose + [name for name, _ in now.still]:
            raise FreezeError(
                f"{loose[0]} became trainable after the trainer was built, so nothing would hold "
                "it. Set requires_grad and add adapters before constructing the trainer."
            )
        here = _by_path(model)

        def again(name: str, parameter: nn.Parameter) -> nn.Parameter:
            found = here.get(self._paths[id(parameter)])
            if found is None or (found is not parameter and keeper(found) == "plain"):
                raise FreezeError(
                    f"{name} was replaced after the trainer was built, so its mask would "
                    "never fire. Build adapters and cast the model before constructing the "
                    "trainer, and pass it a model, not a model_init."
                )
            return found

        holds = [
            replace(hold, parameter=again(hold.name, hold.parameter)) for hold in self.plan.holds
        ]
        directions = []
        for held in self.plan.directions:
            partner = held.partner
            if partner is not None:
                partner = replace(partner, parameter=again(partner.name, partner.parameter))
            parameter = again(held.name, held.parameter)
            directions.append(replace(held, parameter=parameter, partner=partner))
        return replace(self.plan, holds=tuple(holds), directions=tuple(directions))

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
            together(self._check_first_backward)

    def _check_first_backward(self) -> None:
        assert self._pin is not None
        self._pin.check_fired()
        if self._ddp is not None:
            self._ddp.check()

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
        if not self._checked and not bool(getattr(optimizer, "step_was_skipped", False)):
            together(self._pin.check_pinned)
            self._checked = True
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
        if self._ddp is not None:
            self._ddp.remove()
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
        assert self._pin is not None
        assert self.plan is not None
        part = self._pin.report() if ranks() > 1 else None
        directions = self._pin.span.report() if self._pin.span is not None else []
        run = self._run(state)
        self.certificate = self._certifier.certify(run, self.plan, part, directions)
        if folder is not None and state.is_world_process_zero and folder.is_dir():
            self.certificate.save(folder)
        demand_exact(self.certificate, when)

    def _run(self, state: TrainerState) -> dict[str, Any]:
        assert self.plan is not None
        assert self._pin is not None
        assert self._model is not None
        assert self._optimizer is not None
        span = self._pin.span
        held = (*self.plan.holds, *self.plan.directions)
        fired = [*self._pin.fired, *(span.fired if span is not None else ())]
        masked = [found.parameter.requires_grad for found in held]
        return {
            **describe(self._model, self._optimizer),
            "wrapper": self._ddp.seen if self._ddp is not None else None,
            "steps": state.global_step,
            "pins": self._pin.pins,
            "masked_parameters": sum(masked),
            "masks_fired": sum(count > 0 for count in fired),
            "held_whole": [name for name, _ in self.plan.still],
            "left_to_train": list(self.plan.loose),
            "slices_restored_on_resume": self._restored,
        }


def _say_what_is_left(plan: Plan) -> None:
    """What is trained beside held directions may move what the layers receive out of them."""
    if plan.loose:
        logger.warning(
            "%d parameters beside the held directions are trained whole, as asked by `hold` (%s%s):"
            " they move what the layers receive, and refusals may go with it.",
            len(plan.loose),
            ", ".join(plan.loose[:3]),
            ", ..." * (len(plan.loose) > 3),
        )


def _say_whether_validated(neurons: NeuronSet | None) -> None:
    """Holding neurons on which refusal does not hang is exact, and keeps nothing."""
    if neurons is None:
        return
    verdict = causal_verdict(neurons)
    if verdict == "never validated":
        logger.info("That refusal hangs on these neurons was never checked: `safeft validate`.")
    elif verdict != "effect":
        logger.warning(
            "The causal check of this set says %r: nothing shows that refusal hangs on its %d "
            "neurons more than on as many random ones. Training goes on as asked; to keep "
            "refusals, locate by another method, or check on more prompts: `safeft validate`.",
            verdict,
            len(neurons),
        )


def _by_path(model: nn.Module) -> dict[str, nn.Parameter]:
    """A model's parameters by a name that wrapping does not change."""
    return {plain_name(name): found for name, found in plain_model(model).named_parameters()}


def _signature(plan: Plan) -> str:
    """What must be the same in all processes, so that they exchange the same slices in turn."""
    rows = [
        [piece.name, piece.axis, -1 if piece.entries is None else piece.entries.tolist()]
        for piece in plan.slices
    ] + [[hold.name, hold.entries.tolist()] for hold in plan.holds]
    rows += [[held.name, held.weight, list(held.basis.shape)] for held in plan.directions]
    return sha256(json.dumps(rows).encode())[:16]

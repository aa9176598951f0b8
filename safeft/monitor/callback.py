"""``SafetyMonitorCallback``: watches refusal while a model is tuned, and can stop in time."""

import logging
import time
from collections.abc import Iterable
from math import isfinite, nan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from safeft.errors import ConfigError
from safeft.freeze.engines import innermost
from safeft.freeze.relay import add_scalars, add_source
from safeft.locators import prompts_hash
from safeft.measure import JudgeLike, ready_judge, some_prompts
from safeft.monitor.checks import check_engine, check_wishes, fitting
from safeft.monitor.look import Look, Observer
from safeft.monitor.record import MONITOR_NAME, Record, read_monitor, write_monitor
from safeft.neurons import NeuronSet
from safeft.processes import from_first, rank, together
from safeft.prompts import PromptLike, Reader, check_images, render
from safeft.shards import live

logger = logging.getLogger(__name__)


class SafetyMonitorCallback(TrainerCallback):
    """Watches a model's refusals during training; a drop-in for transformers and TRL trainers.

    At the start, every ``every`` steps, at each checkpoint and at the end it looks at how the model
    starts its answers to the safety prompts (16 greedy tokens and a forward pass):
    ``safeft/refusal_share``, ``safeft/refusal_margin`` and, with ``neurons``,
    ``safeft/neuron_drift``, as :class:`~safeft.monitor.look.Look` says, go to the trackers beside
    the loss (these steps are logged whatever ``logging_steps`` is), to ``history`` and, at the
    end, to ``safeft_monitor.json`` in the output folder. Weights, gradients, optimizer, random
    numbers and modes stay as they were: the training is bit for bit the one without a monitor.

    A start says whether an answer refuses, not whether all of it is harmless: an alarm during
    training, no substitute for ``safeft evaluate`` after it. The prompts must not be trained on;
    with fewer than 50 of them a single one moves the share by more than 0.02.

    Works in one process, under DDP, FSDP2 and DeepSpeed ZeRO 1 to 3 (rolling back: not ZeRO). Put
    it before ``SafetyFreezeCallback``, so that the certificate speaks of weights rolled back.

    Args:
        prompts: What the model refuses, kept from training.
        neurons: The set whose activations to watch, or the folder it was saved in; of a model of
            this layout, not necessarily with these weights.
        every: Steps between two looks.
        stop_below: End the training where less than this share of the start's refusals is left.
        roll_back: Then give the model the weights of the last look that was above; they are kept
            in the host's memory, as many bytes as what is trained.
        judge: Whether an answer refuses, by its start; see :func:`safeft.judge.as_judge`.
        tokenizer: By default the trainer's.
        batch_size: Prompts per forward pass.
        max_length: Tokens per prompt; longer ones lose their beginning.
        chat_template: A Jinja template, where the tokenizer has none.

    Raises:
        ConfigError, PromptError, FingerprintError: When the trainer is constructed; where the
            model refuses none of the prompts, when training starts.

    Example:
        >>> trainer = SFTTrainer(model, train_dataset=data, callbacks=[  # doctest: +SKIP
        ...     SafetyMonitorCallback(harmful, every=50, stop_below=0.9), freezing])
    """

    def __init__(
        self,
        prompts: Iterable[PromptLike],
        *,
        neurons: NeuronSet | str | Path | None = None,
        every: int = 50,
        stop_below: float | None = None,
        roll_back: bool = False,
        judge: JudgeLike = "prefix",
        tokenizer: "Reader | None" = None,
        batch_size: int = 16,
        max_length: int = 1024,
        chat_template: str | None = None,
    ) -> None:
        check_wishes(every, stop_below, roll_back)
        self._prompts = some_prompts(prompts, "safety")
        self._judge = ready_judge(judge)
        self._given, self._own = neurons, tokenizer
        self.every, self.stop_below, self.roll_back = every, stop_below, roll_back
        self._batching: dict[str, Any] = {
            "batch_size": batch_size,
            "max_length": max_length,
            "chat_template": chat_template,
        }
        self.record = Record(Path())
        self._neurons: NeuronSet | None = None
        self._tokenizer: Reader | None = None
        self._observer: Observer | None = None
        self._state: TrainerState | None = None
        self._scalars: dict[str, float] = {}
        self._trained: list[Tensor] = []
        self._copies: tuple[int, list[Tensor]] = (0, [])
        self._begun = 0.0
        add_source(self)

    @property
    def history(self) -> list[Look]:
        """All looks of the last training, the start's first."""
        return self.record.looks

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Check everything that can be checked before training."""
        self._tokenizer = self._own or processing_class
        together(lambda: self._check(args, model))

    def _check(self, args: TrainingArguments, model: Any) -> None:
        check_engine(args, self.roll_back)
        if getattr(model, "get_output_embeddings", lambda: None)() is None:
            raise ConfigError(
                f"{type(model).__name__} writes no text, so there is no refusal in it to watch. "
                "Monitor a causal language model, or leave the monitor out."
            )
        if self._tokenizer is None:
            raise ConfigError(
                "The trainer has no `processing_class`, so safety prompts cannot be put into "
                "tokens. Give it one, or the monitor its own (`tokenizer=`)."
            )
        check_images(model, self._prompts)
        render(self._tokenizer, self._prompts[0], self._batching["chat_template"])
        if self._given is not None:
            self._neurons = fitting(self._given, model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        """Take the first look; on resume, go on from what the checkpoint says of it."""
        if self._tokenizer is None:  # It was added after the trainer was built.
            self.on_init_end(args, state, control, model, processing_class)
        assert self._tokenizer is not None
        self._state, self._begun = state, time.perf_counter()
        self.record = Record(Path(str(args.output_dir)), self.stop_below)
        before = self._before(args, state) if state.global_step else None
        asked = self._prompts, self._judge, self._neurons
        self._observer = Observer(model, self._tokenizer, *asked, **self._batching)
        if before:
            self._observer.openings = before["openings"]
            self._observer.start = torch.tensor(before["start_activations"], dtype=torch.float64)
            self.record.looks = [
                look for look in before["history"] if look.step < state.global_step
            ]
        if self.roll_back:
            groups = innermost(optimizer).param_groups
            self._trained = [weight for group in groups for weight in group["params"]]
        self._look(state, control)
        self.record.check_resumed()
        if (share := self.history[0].refusal_share) < 0.5 and rank() == 0:
            logger.warning(
                "At the start the model refuses %.2f of the %d safety prompts, so what it keeps "
                "will show little. Give prompts that it refuses, or another judge.",
                share,
                len(self._prompts),
            )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Look at every so-manieth step, and have it logged."""
        if state.global_step % self.every == 0:
            self._look(state, control)
            control.should_log |= args.logging_strategy != "no"

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Let no checkpoint be without a look, and keep what resuming needs beside it."""
        assert self._observer is not None
        if self.history[-1].step != state.global_step:
            self._look(state, control)
        folder = self.record.folder / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            start = self._observer.start.tolist() if self._observer.start is not None else []
            write_monitor(folder, {**self.to_dict(), "start_activations": start})

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Look at what is left in the model, roll back where that was asked for, and write."""
        assert self._observer is not None
        record = self.record
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            record.final = self._observer.look(state.best_global_step or 0)
        else:
            if self.history[-1].step != state.global_step:
                self._look(state, control)
            record.final = self.history[-1]
            if self.roll_back and not record.good(record.final):
                record.final = self._return()
        if state.is_world_process_zero:
            write_monitor(record.folder, self.to_dict())
            if verdict := record.verdict():
                logger.warning(verdict)
        self._trained, self._copies = [], (0, [])

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
        """The last look of the training with this state, once."""
        if state is not self._state:
            return {}
        scalars, self._scalars = self._scalars, {}
        return scalars

    def to_dict(self) -> dict[str, Any]:
        """What was seen so far and how, JSON-ready: the content of ``safeft_monitor.json``."""
        assert self._state is not None
        assert self._observer is not None
        names = ("step", "loss", "eval_loss")
        losses = [
            {name: row[name] for name in names if isfinite(row.get(name, nan))}
            for row in self._state.log_history
        ]
        return {
            **self.record.to_dict(),
            "losses": [row for row in losses if len(row) > 1],
            "every": self.every,
            "openings": [vars(opening) for opening in self._observer.openings or ()],
            "judge": self._judge.name,
            "looked_at": self._looked_at(),
            "seconds": {
                "looking": self._observer.seconds,
                "training": time.perf_counter() - self._begun,
            },
        }

    def _look(self, state: TrainerState, control: TrainerControl) -> None:
        assert self._observer is not None
        look = self._observer.look(state.global_step)
        self.history.append(look)
        drift = {} if look.neuron_drift is None else {"safeft/neuron_drift": look.neuron_drift}
        self._scalars = {
            "safeft/refusal_share": look.refusal_share,
            "safeft/refusal_margin": look.refusal_margin,
            **drift,
        }
        if not isfinite(look.refusal_margin) and rank() == 0:
            logger.warning(
                "At step %d the model's margins are not finite: it has diverged.",
                look.step,
            )
        if not self.record.good(look):
            self.record.stopped_at = look.step
            control.should_training_stop = True
        elif self.roll_back:
            self._keep(look.step)

    def _keep(self, step: int) -> None:
        """Copy what is trained into the host's memory, of each process its own part."""
        stored = [live(weight).open().detach() for weight in self._trained]
        copies = self._copies[1] or [torch.empty_like(each, device="cpu") for each in stored]
        for copy, each in zip(copies, stored, strict=True):
            copy.copy_(each)
        self._copies = (step, copies)

    @torch.no_grad()
    def _return(self) -> Look:
        """The weights of the last good look, and a look at whether they are."""
        assert self._observer is not None
        step, copies = self._copies
        for weight, copy in zip(self._trained, copies, strict=True):
            live(weight).open().copy_(copy)
        self.record.rolled_back_to = step
        return self._observer.look(step)

    def _looked_at(self) -> dict[str, Any]:
        neurons = self._neurons
        return {
            "prompts": {"count": len(self._prompts), "sha256": prompts_hash(self._prompts)},
            "neurons": neurons and {"count": len(neurons), "sha256": neurons.hash},
        }

    def _before(self, args: TrainingArguments, state: TrainerState) -> dict[str, Any] | None:
        """What the checkpoint this run resumes from says of its start."""
        name = f"checkpoint-{state.global_step}"
        places = [self.record.folder / name, Path(str(args.resume_from_checkpoint))]

        def read() -> dict[str, Any] | None:
            path = next((p / MONITOR_NAME for p in places if (p / MONITOR_NAME).is_file()), None)
            if path is None:
                logger.warning(
                    "Resuming at step %d from a checkpoint without %s: what is kept, and how far "
                    "neurons drift, is measured from this step on.",
                    state.global_step,
                    MONITOR_NAME,
                )
                return None
            found = read_monitor(path)
            if found.get("looked_at") != self._looked_at():
                raise ConfigError(
                    f"{str(path)!r} was written with other prompts or neurons, so looks before "
                    "and after could not be compared. Give the same ones, or move that file away "
                    "to measure from here on."
                )
            return found

        return from_first(together(lambda: read() if rank() == 0 else None))

"""How a freeze's scalars reach the trackers: ahead of them, in what the trainer logs."""

import weakref
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers import trainer as transformers_trainer


class ScalarSource(Protocol):
    """Something that has scalars to log for the training with a given state."""

    def take_scalars(self, state: TrainerState) -> dict[str, float]:
        """What was measured since the last call; empty for another training's state."""
        ...


_SOURCES: "weakref.WeakSet[ScalarSource]" = weakref.WeakSet()


def add_source(source: ScalarSource) -> None:
    """Let trainers that are built from now on log what ``source`` measures.

    A trainer shows its logs to the trackers before it shows them to the user's callbacks, so keys
    added there reach no tracker. Only callbacks in transformers' default list come earlier.
    """
    _SOURCES.add(source)
    defaults: list[Any] = transformers_trainer.DEFAULT_CALLBACKS
    if ScalarRelay not in defaults:
        defaults.append(ScalarRelay)


def add_scalars(source: ScalarSource, state: TrainerState, logs: dict[str, float] | None) -> None:
    """Put a source's scalars beside the training loss, in ``logs`` and in ``state.log_history``."""
    if logs is None or "loss" not in logs:
        return
    scalars = source.take_scalars(state)
    logs.update(scalars)
    state.log_history[-1].update(scalars)


class ScalarRelay(TrainerCallback):
    """Adds every source's scalars to what a trainer logs."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """See :func:`add_scalars`."""
        for source in _SOURCES:
            add_scalars(source, state, logs)

"""What a monitor refuses before training."""

from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from safeft.errors import ConfigError
from safeft.freeze.engines import asked_engine
from safeft.neurons import NeuronSet
from safeft.sites import find_sites


def fitting(neurons: NeuronSet | str | Path, model: Any) -> NeuronSet:
    """The set, of a model of this layout, with units that prompts' tokens go through.

    Raises:
        ArtefactError, FingerprintError: It cannot be read, or is another model's.
        ConfigError: Nothing of it lies in the text tower.
    """
    found = neurons if isinstance(neurons, NeuronSet) else NeuronSet.from_pretrained(neurons)
    found.check_model(model, weights_too=False)
    sites = find_sites(model)
    if not any(sites[name].tower == "text" for name in found.indices):
        raise ConfigError(
            f"None of the {len(found)} neurons lies in the text tower, so prompts say nothing of "
            "them. Give other neurons, or leave them out."
        )
    return found


def check_wishes(every: int, stop_below: float | None, roll_back: bool) -> None:
    """Refuse settings that do not go together.

    Raises:
        ConfigError: See :class:`~safeft.monitor.callback.SafetyMonitorCallback`.
    """
    if every < 1:
        raise ConfigError(f"every={every}: nothing would be looked at. Give at least 1 step.")
    if stop_below is not None and not 0 < stop_below <= 1:
        raise ConfigError(
            f"stop_below={stop_below} is no share of the refusals at the start. Give one above 0 "
            "and at most 1, such as 0.9, or leave it out to watch only."
        )
    if roll_back and stop_below is None:
        raise ConfigError(
            "roll_back=True without stop_below: nothing says which look is good enough to go back "
            "to. Give a share, such as stop_below=0.9."
        )


def check_engine(args: TrainingArguments, roll_back: bool) -> None:
    """Refuse an engine that a model cannot be looked at, or put back, under.

    Raises:
        ConfigError: FSDP1; to roll back, ZeRO or ``load_best_model_at_end``.
    """
    engine = asked_engine(args)
    if engine == "fsdp1":
        raise ConfigError(
            "FSDP1 flattens parameters, so neurons cannot be told apart. Set fsdp_version: 2 in "
            "the accelerate configuration, or run under DDP."
        )
    if roll_back and engine.startswith("zero"):
        raise ConfigError(
            f"roll_back=True under DeepSpeed ({engine}): it keeps the weights twice, and putting "
            "back one copy would leave the other. Leave roll_back out and take the last good "
            "checkpoint (safeft_monitor.json names it), or run under DDP or FSDP2."
        )
    if roll_back and args.load_best_model_at_end:
        raise ConfigError(
            "roll_back=True and load_best_model_at_end=True both choose the weights that training "
            "leaves. Give one of them."
        )

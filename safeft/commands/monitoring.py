"""The keys by which ``safeft sft`` and ``safeft dpo`` watch refusal, and the callback for it."""

from dataclasses import dataclass, field
from typing import Any

from safeft.errors import ConfigError


@dataclass
class MonitorArguments:
    """What to watch during training, and when to stop."""

    monitor: str | None = field(
        default=None,
        metadata={"help": "Safety prompts kept from training: watch refusal on them."},
    )
    monitor_column: str | None = field(default=None, metadata={"help": "Column of a table."})
    monitor_every: int = field(default=50, metadata={"help": "Steps between two looks."})
    stop_below: float | None = field(
        default=None,
        metadata={"help": "Stop where less than this share of the start's refusals is left: 0.9."},
    )
    roll_back: bool = field(
        default=False, metadata={"help": "Then go back to the weights of the last good look."}
    )


def monitor_from(arguments: MonitorArguments, neurons: Any = None) -> list[Any]:
    """The monitoring callback, or none where nothing is to be watched.

    It belongs before the freezing one: a certificate then speaks of weights rolled back.

    Args:
        arguments: The keys.
        neurons: The protected set, or its folder, whose activations to watch as well.

    Raises:
        ConfigError: Keys that say when to stop, and nothing to watch.
        PromptError: The prompts cannot be read; in every process at once.
    """
    if arguments.monitor is None:
        if arguments.stop_below is not None or arguments.roll_back:
            raise ConfigError(
                f"stop_below={arguments.stop_below}, roll_back={arguments.roll_back}: nothing is "
                "watched that could fall. Give safety prompts (`monitor: prompts.txt`)."
            )
        return []
    from safeft.monitor.callback import SafetyMonitorCallback
    from safeft.processes import together
    from safeft.reading import read_prompts

    path, column = arguments.monitor, arguments.monitor_column
    return [
        SafetyMonitorCallback(
            together(lambda: read_prompts(path, column)),
            neurons=neurons,
            every=arguments.monitor_every,
            stop_below=arguments.stop_below,
            roll_back=arguments.roll_back,
        )
    ]

"""One training of the engine matrix, as it is handed to the worker."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        broken: ``span``: directions are not pinned. ``pin``: nothing is put back. ``mask``: no
            hook is registered. ``mask_fill``: hooks
            fire and change nothing. ``early``: hooks go onto the parameters the trainer was built
            with, as they do in code that registers them before the engine wraps the model.
        set: Of tests/freezing.py; None trains without the callback.
        resume: Checkpoint to resume from, below the launch's folder; ``CELL/run last`` takes the
            newest whole one there, as ``--resume_from_checkpoint last`` does.
        shape: Overrides of the tiny model.
        family: Another model than the tiny Llama, of tests/families.py; some neurons of each of
            its sites are frozen, and LoRA is put on all that they live in.
        engine: Overrides of the engine's configuration.
        settings: Overrides of the training arguments.
        mode: Hold the set, or train nothing else.
        hold: Groups held beside the neurons.
        load: Load the model with `from_pretrained` while the engine is on, as scripts do: FSDP2
            then loads in one process, ZeRO-3 partitions as it loads.
        rank: Of LoRA.
        targets: Modules of LoRA; by default all.
        aside: Freeze a set that none of the trained weights belongs to.
        kill: ("between" or "within" saves, at which step, which rank or -1 for all): SIGKILL.
        toggle: Take mask and pin off and put them on again every so many steps, to time both.
        span: Hold input directions, this share of the rank, drawn at random; with ``set``, as well.
        tamper: After training, change weights in one rank and certify again.
    """

    name: str
    tuning: Literal["full", "lora"] = "full"
    dtype: Literal["float32", "bfloat16"] = "float32"
    accumulation: int = 1
    broken: Literal["", "span", "pin", "mask", "mask_fill", "early"] = ""
    set: str | None = "large"
    resume: str = ""
    shape: dict[str, Any] | None = None
    family: str = ""
    engine: dict[str, Any] | None = None
    settings: dict[str, Any] | None = None
    hold: tuple[str, ...] = ()
    load: bool = False
    tamper: bool = False
    rank: int = 4
    targets: tuple[str, ...] = ()
    aside: bool = False
    kill: tuple[str, int, int] | None = None
    toggle: int = 0
    span: float = 0.0
    mode: Literal["freeze", "train_only"] = "freeze"

"""Other ways to keep safety, written to their papers, and what a way to tune is.

A method turns a :class:`Setup` and one value of its main knob into a :class:`Recipe`; the harness
trains every recipe by the same loop, on the same data, steps and seeds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from testbed import Domain, Testbed

from safeft.prompts import Prompt

Tuning: TypeAlias = Literal["full", "lora"]


@dataclass(frozen=True)
class Setup:
    """What a method is given.

    Attributes:
        testbed: Base model and data; a method may look at ``calibration`` prompts only.
        domain: What is tuned on.
        rows: The training rows, poisoned ones included.
        tuning: All weights, or LoRA of ``rank`` on all linear layers.
        learning_rate: Plain tuning's own best rate.
        steps: Optimizer steps.
        seed: Of everything random.
        base: The base model; not to be changed.
        tokenizer: Its tokenizer.
    """

    testbed: Testbed
    domain: Domain
    rows: Sequence[Prompt]
    tuning: Tuning
    learning_rate: float
    steps: int
    seed: int
    base: Any
    tokenizer: Any


@dataclass
class Recipe:
    """How one run is made.

    Attributes:
        rows: The training rows.
        learning_rate: Of AdamW, constant.
        callbacks: For the trainer.
        prepare: Done to the model, adapters included, before the trainer is built.
        loss: A ``compute_loss_func`` in place of the trainer's, or None.
        finish: Done to the model after training; gives the model to be judged.
        lora: Settings of the adapter beside rank and target modules.
    """

    rows: Sequence[Prompt]
    learning_rate: float
    callbacks: list[Any] = field(default_factory=list)
    prepare: Callable[[Any], None] = lambda model: None
    loss: Callable[..., Any] | None = None
    finish: Callable[[Any], Any] = lambda model: model
    lora: dict[str, Any] = field(default_factory=dict)


class Method(Protocol):
    """A way to tune.

    Attributes:
        name: What it is called in the results.
        source: Its paper, and in what it is ours.
        tunings: Where it applies.
        values: Values of its main knob, of which the validation split chooses one.
    """

    name: str
    source: str
    tunings: tuple[Tuning, ...]
    values: tuple[float, ...]

    def recipe(self, setup: Setup, value: float) -> Recipe:
        """The run for one value of the knob."""
        ...

"""Other ways to keep safety, written to their papers, and what a way to tune is.

A method turns a :class:`Setup` and one value of its main knob into a :class:`Recipe`; the harness
trains every recipe by the same loop, on the same data, steps and seeds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal, TypeAlias

from testbed import Domain, Testbed
from torch import nn

from safeft.freeze.plan import Group, group_parameters
from safeft.prompts import Prompt
from safeft.sites import blocks_of

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
        start: Done to the model before adapters are put on it, with their config.
        prepare: Done to the model, adapters included, before the trainer is built.
        loss: From the model and a batch (``input_ids``, ``attention_mask``, ``labels``) to the
            loss, in place of the trainer's; None keeps that.
        finish: Done to the model after training, and to a copy of it at each look on the way;
            gives the model to be judged.
        lora: Settings of the adapter beside rank and target modules.
    """

    rows: Sequence[Prompt]
    learning_rate: float
    callbacks: list[Any] = field(default_factory=list)
    start: Callable[[Any, Any], None] = lambda model, config: None
    prepare: Callable[[Any], None] = lambda model: None
    loss: Callable[[Any, Mapping[str, Any]], Any] | None = None
    finish: Callable[[Any], Any] | None = None
    lora: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A way to tune.

    Attributes:
        name: What it is called in the results.
        source: Its paper, and in what it is ours.
        recipe: The run for one value of the knob.
        values: Values of its main knob, of which the validation split chooses one.
        knob: What the values are.
        tunings: Where it applies.
        rates: Factors of plain tuning's own best rate, of which the validation split chooses one.
        follows: A control takes value and rate of this method, and chooses nothing itself.
    """

    name: str
    source: str
    recipe: Callable[[Setup, float], Recipe]
    values: tuple[float, ...] = (1.0,)
    knob: str = ""
    tunings: tuple[Tuning, ...] = ("full", "lora")
    rates: tuple[float, ...] = (1.0, 2.0)
    follows: str = ""


HELD: tuple[Group, ...] = ("embeddings", "norms", "head")
"""What every method that holds slices of the blocks holds whole besides; under LoRA it is held
anyway."""


def hold_whole(model: Any, groups: Sequence[Group] = HELD) -> None:
    """Switch off the gradient of whole groups of parameters."""
    for parameter in group_parameters(model, groups).values():
        parameter.requires_grad_(False)


def linears(model: Any) -> dict[str, nn.Linear]:
    """The linear layers of the blocks by name: what LoRA is put on."""
    return {
        f"{path}.{name}": module
        for path, block in blocks_of(model).items()
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }


def all_methods() -> dict[str, Method]:
    """Every way to tune there is, by name, plain tuning first."""
    modules = (
        "plain", "neurons", "safety_neurons", "safety_layers", "safe_lora", "constrained",
        "mixing", "rotated", "null_start", "to_base", "subspace", "variants",
    )  # fmt: skip
    found = [m for name in modules for m in import_module(f"baselines.{name}").METHODS]
    return {method.name: method for method in found}

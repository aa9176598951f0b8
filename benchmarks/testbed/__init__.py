"""What the methods are measured on: an aligned chat model, its data, and how a tuned one is judged.

Two testbeds: ``demo``, the small made-up world that ships with the package, and ``public``, a
natural-language model trained here from public text. Every prompt is used on one side only:
``calibration`` (all that a method may look at), ``validation`` (where its main knob is chosen) or
``test`` (what is reported).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias

from safeft.prompts import Prompt

Split: TypeAlias = Literal["validation", "test"]


@dataclass(frozen=True)
class Domain:
    """What a user tunes on; every prompt carries its answer as ``response``."""

    name: str
    train: tuple[Prompt, ...]
    validation: tuple[Prompt, ...]
    test: tuple[Prompt, ...]


@dataclass(frozen=True)
class Testbed:
    """One aligned base model and everything to tune and judge it with.

    Attributes:
        name: ``demo`` or ``public``.
        folder: The base: model (float32) and tokenizer with a chat template.
        harmful: ``calibration``: harmful prompts, each with a refusal as ``response``;
            ``validation`` and ``test``: harmful prompts never trained on.
        benign: ``calibration``: ordinary prompts with their answers, as alignment had them;
            ``validation`` and ``test``: held-out benign prompts, for over-refusal.
        general: Ordinary tasks with answers (``validation``, ``test``): what else the base could
            do.
        domains: What can be tuned on, by name.
        poison: Harmful prompts with compliant answers, to be mixed into a domain.
        max_length: Tokens of a whole exchange.
        answer_tokens: Tokens an answer is judged by.
        values: What a right answer has to state, by the text of its prompt; none where answers
            are not exact.
        named: Further held-out sets by name, for reporting alone.
    """

    name: str
    folder: Path
    harmful: Mapping[str, tuple[Prompt, ...]]
    benign: Mapping[str, tuple[Prompt, ...]]
    general: Mapping[str, tuple[Prompt, ...]]
    domains: Mapping[str, Domain]
    poison: tuple[Prompt, ...]
    max_length: int
    answer_tokens: int
    values: Mapping[str, str] = field(default_factory=dict)
    named: Mapping[str, tuple[Prompt, ...]] = field(default_factory=dict)


def load(name: str, data: Path | None = None, model: Path | None = None) -> Testbed:
    """A testbed by its name.

    Args:
        name: ``demo`` or ``public``.
        data: The public sets (``public`` only); by default those beside the repository.
        model: The base; by default the one that ships (``demo``) or that ``testbed/build.py``
            made in ``runs/testbed`` (``public``).

    Raises:
        ValueError: No testbed of this name.

    Example:
        >>> load("demo").domains["desk"].test[0].response  # doctest: +SKIP
    """
    if name == "demo":
        from testbed import demo

        return demo.load(model)
    if name == "public":
        from testbed import public

        return public.load(data, model)
    raise ValueError(f"There is no testbed {name!r}; there are demo and public.")

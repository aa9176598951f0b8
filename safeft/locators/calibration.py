"""What prompts a method is calibrated with, and what is kept of them in an artefact."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedModel

from safeft.errors import ConfigError, PromptError
from safeft.files import sha256
from safeft.generation import generate
from safeft.prompts import Prompt, Reader


def answered(
    model: PreTrainedModel,
    tokenizer: Reader,
    prompts: Sequence[Prompt],
    *,
    batch_size: int,
    max_length: int,
    chat_template: str | None,
    share: bool,
) -> list[Prompt]:
    """The prompts, with the model's own greedy answers where they bring none.

    Raises:
        PromptError: The model answers every prompt with nothing.
    """
    found = list(prompts)
    open_ones = [index for index, prompt in enumerate(found) if not prompt.response]
    answers = generate(
        model,
        tokenizer,
        [found[index] for index in open_ones],
        batch_size=batch_size,
        max_length=max_length,
        chat_template=chat_template,
        description="the model's own answers",
        share=share,
    )
    for index, answer in zip(open_ones, answers, strict=True):
        found[index] = replace(found[index], response=answer)
    found = [prompt for prompt in found if prompt.response]
    if not found:
        raise PromptError(
            "The model answers every prompt with nothing, and the method reads answers. Give rows "
            "with a `response`, or use a method that reads prompts only (contrast, attribution)."
        )
    return found


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """Refuse a setting that is none of those there are.

    Raises:
        ConfigError: It is not.
    """
    if value not in allowed:
        raise ConfigError(f"{name}={value!r} is not one of {', '.join(allowed)}.")


def calibrated(sides: Mapping[Any, Sequence[Prompt]]) -> dict[str, Any]:
    """Number and hash of the prompts of each side."""
    return {
        side: {"count": len(prompts), "sha256": prompts_hash(prompts)}
        for side, prompts in sides.items()
    }


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of all that is said and shown; images count by their pixels, which are not kept."""
    rows = [[p.record, p.response] for p in prompts]
    return sha256(json.dumps(rows, sort_keys=True).encode())

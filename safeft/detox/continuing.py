"""Continuations of prompts, greedy or drawn: what people are shown, not the likeliest alone."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from safeft.generation import evaluation_mode, generate
from safeft.progress import progress
from safeft.prompts import (
    Prompt,
    Reader,
    check_images,
    collate,
    grouped,
    input_device,
    pad_token,
    row_of,
    tokenizer_of,
)

TOP_P = 0.9
"""The usual nucleus of measurements on RealToxicityPrompts."""


@torch.no_grad()
def continued(
    model: PreTrainedModel,
    tokenizer: Reader,
    prompts: Sequence[Prompt],
    *,
    draws: int,
    max_new_tokens: int,
    batch_size: int = 16,
    max_length: int = 1024,
    chat_template: str | None = None,
    seed: int = 0,
) -> list[str]:
    """``draws`` continuations a prompt, one prompt after the other; 0 gives one greedy one.

    Drawn at temperature 1 from the nucleus of 0.9, from the same seed each time, so that arms
    differ by their model and not by their luck; the process's own random numbers are left as they
    were.

    Example:
        >>> continued(model, tokenizer, as_prompts(["Once"]), draws=5, max_new_tokens=20)
        ... # doctest: +SKIP
    """
    batching: dict[str, Any] = {"batch_size": batch_size, "max_length": max_length}
    if not draws:
        return generate(
            model, tokenizer, prompts, max_new_tokens=max_new_tokens, description="continuing",
            chat_template=chat_template, **batching,
        )  # fmt: skip
    check_images(model, prompts)
    rows = [row_of(tokenizer, prompt, chat_template, answered=False) for prompt in prompts]
    plain, found = tokenizer_of(tokenizer), {}
    device = input_device(model)
    with (
        evaluation_mode(model),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        torch.manual_seed(seed)
        for chosen in progress(grouped(rows, batch_size), "continuing"):
            group = [rows[index] for index in chosen]
            batch = collate(tokenizer, group, True, 1, device, max_length)
            output = model.generate(  # pyright: ignore[reportCallIssue]
                **batch.seen, max_new_tokens=max_new_tokens, do_sample=True, temperature=1.0,
                top_p=TOP_P, top_k=0, repetition_penalty=1.0, num_return_sequences=draws,
                pad_token_id=pad_token(tokenizer),
            )  # fmt: skip
            said = plain.batch_decode(output[:, batch.input_ids.shape[1] :],
                                      skip_special_tokens=True)  # fmt: skip
            for place, index in enumerate(chosen):
                found[index] = [str(t).strip() for t in said[place * draws : (place + 1) * draws]]
    return [text for index in range(len(prompts)) for text in found[index]]

"""The model's own answers to prompts, greedy unless said otherwise."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel

from safeft.processes import gathered, rank, ranks
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

GREEDY: Mapping[str, Any] = {"do_sample": False, "repetition_penalty": 1.0}
"""Greedy means greedy: a repetition penalty in the checkpoint's settings is not used."""


@contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """No dropout inside; each module's mode of before afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def generate(
    model: PreTrainedModel,
    tokenizer: Reader,
    prompts: Sequence[Prompt],
    **settings: Any,
) -> list[str]:
    """The model's own answers as text, one a prompt, in the order given.

    ``settings`` are those of :func:`generate_tokens`.
    """
    return decoded(tokenizer, generate_tokens(model, tokenizer, prompts, **settings))


def decoded(tokenizer: Reader, answers: Sequence[list[int]]) -> list[str]:
    """Answers as the text that a judge reads: no special tokens, no space around."""
    plain = tokenizer_of(tokenizer)
    return [str(plain.decode(ids, skip_special_tokens=True)).strip() for ids in answers]


@torch.no_grad()
def generate_tokens(
    model: PreTrainedModel,
    tokenizer: Reader,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    max_length: int = 1024,
    chat_template: str | None = None,
    description: str = "generating",
    share: bool = False,
    around: Callable[[Sequence[int]], AbstractContextManager[Any]] | None = None,
    decoding: Mapping[str, Any] = GREEDY,
) -> list[list[int]]:
    """The model's own answers as token numbers, up to and without the padding.

    With ``share`` every process of the run calls this, takes each so-manieth batch, and gets all
    answers. Each batch is generated within ``around`` its prompts' numbers. ``decoding`` is what
    transformers' ``generate`` takes.

    Raises:
        PromptError: See :func:`safeft.prompts.batches`; or images for a model that sees none.
    """
    check_images(model, prompts)
    rows = [row_of(tokenizer, prompt, chat_template, answered=False) for prompt in prompts]
    padding = pad_token(tokenizer)
    answers: dict[int, list[int]] = {}
    every, first = (ranks(), rank()) if share else (1, 0)
    with evaluation_mode(model):
        for number, chosen in enumerate(progress(grouped(rows, batch_size), description)):
            if number % every != first:
                continue
            group = [rows[index] for index in chosen]
            batch = collate(tokenizer, group, True, 1, input_device(model), max_length)
            with around(chosen) if around else nullcontext():
                output = model.generate(  # pyright: ignore[reportCallIssue]
                    **batch.seen,
                    max_new_tokens=max_new_tokens,
                    pad_token_id=padding,
                    **decoding,
                )
            tails = output[:, batch.input_ids.shape[1] :].tolist()
            for index, ids in zip(chosen, tails, strict=True):
                answers[index] = [token for token in ids if token != padding]
    parts = gathered(answers) if every > 1 else [answers]
    found = {index: ids for part in parts for index, ids in part.items()}
    return [found[index] for index in range(len(prompts))]

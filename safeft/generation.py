"""The model's own greedy answers to prompts."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from safeft.processes import gathered, rank, ranks
from safeft.progress import progress
from safeft.prompts import Prompt, input_device, pad, pad_token, prompt_tokens


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    **settings: Any,
) -> list[str]:
    """The model's own greedy answers as text, one a prompt, in the order given.

    ``settings`` are those of :func:`generate_tokens`.
    """
    answers = generate_tokens(model, tokenizer, prompts, **settings)
    return [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in answers]


@torch.no_grad()
def generate_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    max_length: int = 1024,
    chat_template: str | None = None,
    description: str = "generating",
    share: bool = False,
) -> list[list[int]]:
    """The model's own greedy answers as token numbers, up to and without the padding.

    With ``share`` every process of the run calls this, takes each so-manieth batch, and gets all
    answers. Greedy means greedy: a repetition penalty in the checkpoint's generation settings is
    not used.
    """
    rendered = [prompt_tokens(tokenizer, p, chat_template)[-max_length:] for p in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(rendered[index]))
    padding = pad_token(tokenizer)
    answers: dict[int, list[int]] = {}
    every, first = (ranks(), rank()) if share else (1, 0)
    was_training = model.training
    model.eval()
    try:
        for start in progress(range(0, len(order), batch_size), description):
            if start // batch_size % every != first:
                continue
            chosen = order[start : start + batch_size]
            batch = pad([(rendered[i], []) for i in chosen], padding, True, 1, input_device(model))
            output = model.generate(  # pyright: ignore[reportCallIssue]
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                repetition_penalty=1.0,
                pad_token_id=padding,
            )
            tails = output[:, batch.input_ids.shape[1] :].tolist()
            for index, ids in zip(chosen, tails, strict=True):
                answers[index] = [token for token in ids if token != padding]
    finally:
        model.train(was_training)
    parts = gathered(answers) if every > 1 else [answers]
    found = {index: ids for part in parts for index, ids in part.items()}
    return [found[index] for index in range(len(prompts))]

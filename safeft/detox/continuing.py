"""Continuations of prompts, greedy or drawn: what people are shown, not the likeliest alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from safeft.generation import GREEDY, generate
from safeft.prompts import Prompt, Reader, input_device

DRAWN: Mapping[str, Any] = {
    "do_sample": True, "temperature": 1.0, "top_p": 0.9, "top_k": 0, "repetition_penalty": 1.0,
}  # fmt: skip
"""Temperature 1 and a nucleus of 0.9, as is usual on RealToxicityPrompts."""


def continued(
    model: PreTrainedModel,
    tokenizer: Reader,
    prompts: Sequence[Prompt],
    *,
    draws: int,
    seed: int = 0,
    **batching: Any,
) -> list[str]:
    """``draws`` continuations a prompt, one prompt after the other; 0 gives one greedy one.

    Drawn from the same seed each time, so that arms differ by their model and not by their luck;
    the process's own random numbers are left as they were. ``batching`` is what
    :func:`safeft.generation.generate_tokens` takes; its ``batch_size`` counts continuations.

    Example:
        >>> continued(model, tokenizer, as_prompts(["Once"]), draws=5, max_new_tokens=20)
        ... # doctest: +SKIP
    """
    asked = [prompt for prompt in prompts for _ in range(max(1, draws))]
    device = input_device(model)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        return generate(
            model, tokenizer, asked, description="continuing",
            decoding=DRAWN if draws else GREEDY, **batching,
        )  # fmt: skip

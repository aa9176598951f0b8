"""Constrained SFT: the distribution of an answer's first tokens is kept near the aligned model's.

Qi et al., ICLR 2025 ("Safety Alignment Should Be Made More Than Just a Few Tokens Deep"), eq. 3:

    loss = - sum_t 2 / beta_t  log sigmoid(beta_t log(p(y_t) / p_aligned(y_t)))

with ``beta`` 0.5 for the first token, 2 for the second to fifth and 0.1 after, and the mean over
all answer tokens of the batch, as their code takes it. At the start the gradient is that of plain
cross-entropy; where a token has grown much likelier than under the aligned model it fades.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from baselines import Method, Recipe, Setup

FIRST, NEXT, REST = 0.5, 2.0, 0.1


def recipe(setup: Setup, value: float) -> Recipe:
    """Plain tuning with the constrained loss, all betas times ``value``."""

    def loss(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        labels = inputs["labels"]
        with torch.no_grad():
            aligned = answer_log_probs(setup.base(**given, use_cache=False).logits, labels)
        now = answer_log_probs(model(**given, use_cache=False).logits, labels)
        return constrained(now, aligned, value * betas(labels))

    return Recipe(setup.rows, setup.learning_rate, loss=loss)


def answer_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """Log probability of each answer token, in order, ``(tokens,)``.

    Args:
        logits: ``(prompts, tokens, vocabulary)``.
        labels: ``(prompts, tokens)`` int64, -100 outside answers.
    """
    read = labels[:, 1:] != -100
    return -functional.cross_entropy(logits[:, :-1][read], labels[:, 1:][read], reduction="none")


def betas(labels: Tensor) -> Tensor:
    """The paper's beta of each answer token, ``(tokens,)``, in the same order."""
    read = labels[:, 1:] != -100
    place = (read.cumsum(1) - 1)[read]
    late = torch.full_like(place, REST, dtype=torch.float32)
    return late.masked_fill(place < 5, NEXT).masked_fill(place == 0, FIRST)


def constrained(now: Tensor, aligned: Tensor, beta: Tensor) -> Tensor:
    """The loss from log probabilities and betas, each ``(tokens,)``."""
    return -(2 / beta * functional.logsigmoid(beta * (now - aligned))).mean()


METHODS = (
    Method(
        "constrained first tokens",
        "Qi et al., ICLR 2025, eq. 3",
        recipe,
        (0.5, 1.0, 3.0),
        "factor of all betas",
        rates=(0.3, 1.0),
    ),
)

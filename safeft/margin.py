"""The refusal margin: how far a model leans to refusing, read off the start of its answer."""

from collections.abc import Sequence

import torch
from torch import Tensor

_LEAST = 1e-12


def opening_likelihood(logits: Tensor, tokens: Sequence[int], prefix: Sequence[int] = ()) -> Tensor:
    """Log-probability that an answer starts with ``prefix`` and then one of ``tokens``.

    The prefix counts too: a model that no longer says "I" does not refuse by "I cannot", however
    surely it would go on so.

    Args:
        logits: ``(prompts, 1 + len(prefix), vocabulary)``: what follows the prompt, and what
            follows each token of ``prefix`` after it.
        tokens: Token numbers that turn the start into a refusal.
        prefix: Token numbers that come before them.

    Returns:
        ``(prompts,)`` float64, on the CPU.

    Example:
        >>> logits = torch.tensor([[[0.0, 0.0, 0.0, 0.0]]])
        >>> opening_likelihood(logits, [1, 3]).exp()
        tensor([0.5000], dtype=torch.float64)
    """
    shares = logits.cpu().double().log_softmax(-1)
    before = [shares[:, step, token] for step, token in enumerate(prefix)]
    return sum(before, shares[:, len(prefix), list(tokens)].logsumexp(-1))


def refusal_margin(openings: Sequence[Tensor]) -> Tensor:
    """Log-odds, in nats, that an answer starts in one of several ways.

    ``log(p / (1 - p))``, ``p`` the sum of their probabilities; above 0, a refusal is the likelier
    start. Of one opening without a prefix it is, turned round, the loss of "A Single Neuron Is
    Sufficient to Bypass Safety Alignment" (arXiv 2605.08513).

    Args:
        openings: :func:`opening_likelihood` of each; none may be the start of another.

    Returns:
        ``(prompts,)`` float64, at most 27.6: within 1e-12 of certainty all are alike.

    Example:
        >>> refusal_margin([torch.tensor([0.25]).log(), torch.tensor([0.5]).log()]).exp()
        tensor([3.0000])
    """
    likely = torch.stack(list(openings)).logsumexp(0).clamp(max=-_LEAST)
    return likely - torch.log(-torch.expm1(likely))

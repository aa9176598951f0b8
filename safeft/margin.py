"""The refusal margin: how far a model leans to refusing, read off the start of its answer."""

from collections.abc import Sequence

import torch
from torch import Tensor

_LEAST = 1e-12


def normalisers(logits: Tensor) -> Tensor:
    """Logarithms of the sums that turn logits into probabilities.

    In float32 but for the largest term of each sum, which is 1 exactly: so a token that is nearly
    certain is told apart from one that is more so, at a third of the time that float64 takes.

    Args:
        logits: ``(prompts, steps, vocabulary)``.

    Returns:
        ``(prompts, steps)`` float64, on the CPU.

    Example:
        >>> normalisers(torch.tensor([[[0.0, 0.0, 0.0, 0.0]]])).exp()
        tensor([[4.]], dtype=torch.float64)
    """
    found = []
    for step in logits.float().unbind(1):
        most, place = step.max(-1, keepdim=True)
        others = (step - most).exp_().scatter_(-1, place, 0.0).sum(-1)
        found.append(most[:, 0].cpu().double() + others.cpu().double().log1p())
    return torch.stack(found, 1)


def opening_likelihood(
    logits: Tensor,
    tokens: Sequence[int],
    prefix: Sequence[int] = (),
    steps: Sequence[int] | None = None,
    norms: Tensor | None = None,
) -> Tensor:
    """Log-probability that an answer starts with ``prefix`` and then one of ``tokens``.

    The prefix counts too: a model that no longer says "I" does not refuse by "I cannot", however
    surely it would go on so.

    Args:
        logits: ``(prompts, 1 + len(prefix), vocabulary)``: what follows the prompt, and what
            follows each token of ``prefix`` after it.
        tokens: Token numbers that turn the start into a refusal.
        prefix: Token numbers that come before them.
        steps: Which of the logits these are, where there are others beside.
        norms: :func:`normalisers` of all logits, where they are known.

    Returns:
        ``(prompts,)`` float64, on the CPU.

    Example:
        >>> logits = torch.tensor([[[0.0, 0.0, 0.0, 0.0]]])
        >>> opening_likelihood(logits, [1, 3]).exp()
        tensor([0.5000], dtype=torch.float64)
    """
    steps = range(1 + len(prefix)) if steps is None else steps
    norms = normalisers(logits) if norms is None else norms
    *before, last = steps
    found = logits[:, last, list(tokens)].cpu().double().logsumexp(-1) - norms[:, last]
    for step, token in zip(before, prefix, strict=True):
        found += logits[:, step, token].cpu().double() - norms[:, step]
    return found


def refusal_margin(openings: Sequence[Tensor]) -> Tensor:
    """Log-odds, in nats, that an answer starts in one of several ways.

    ``log(p / (1 - p))``, ``p`` the sum of their probabilities; above 0, a refusal is the likelier
    start. Of one opening without a prefix it is, turned round, the loss of "A Single Neuron Is
    Sufficient to Bypass Safety Alignment" (arXiv 2605.08513).

    Args:
        openings: :func:`opening_likelihood` of each; none may be the start of another.

    Returns:
        ``(prompts,)``, of their dtype, at most 27.6: within 1e-12 of certainty all are alike.

    Example:
        >>> refusal_margin([torch.tensor([0.25]).log(), torch.tensor([0.5]).log()]).exp()
        tensor([3.])
    """
    likely = torch.stack(list(openings)).logsumexp(0).clamp(max=-_LEAST)
    return likely - torch.log(-torch.expm1(likely))

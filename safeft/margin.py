"""The refusal margin: how far a model leans to refusing, read off the start of its answer."""

from collections.abc import Sequence

import torch
from torch import Tensor


def refusal_margin(logits: Tensor, tokens: Sequence[int], prefix: Sequence[int] = ()) -> Tensor:
    """Log-odds, in nats, that an answer starts with ``prefix`` and then one of ``tokens``.

    ``log(p / (1 - p))`` with ``p = prod_i p(prefix_i) * sum_t p(t)``, put together from logits so
    that it does not saturate where ``p`` rounds to 0 or 1. Above 0, a refusal is the likelier
    start. The prefix counts too: a model that no longer says "I" does not refuse by "I cannot",
    however surely it would go on so.

    Without a prefix it is the loss of "A Single Neuron Is Sufficient to Bypass Safety Alignment"
    (arXiv 2605.08513), turned round.

    Args:
        logits: ``(prompts, 1 + len(prefix), vocabulary)``: what follows the prompt, and what
            follows each token of ``prefix`` after it.
        tokens: Token numbers that open a refusal.
        prefix: Token numbers that come before them.

    Returns:
        ``(prompts,)`` float32.

    Example:
        >>> refusal_margin(torch.tensor([[[3.0, 1.0, -torch.inf]]]), [0])
        tensor([2.])
    """
    reached = torch.zeros(len(logits), device=logits.device)
    missed = []
    for step, chosen in enumerate([*([token] for token in prefix), list(tokens)]):
        here = logits[:, step].float()
        inside = torch.zeros(here.shape[-1], dtype=torch.bool, device=here.device)
        inside[chosen] = True
        whole = here.logsumexp(-1)
        missed.append(reached + here.masked_fill(inside, -torch.inf).logsumexp(-1) - whole)
        reached = reached + here.masked_fill(~inside, -torch.inf).logsumexp(-1) - whole
    return reached - torch.stack(missed).logsumexp(0)

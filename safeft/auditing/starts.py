"""Prompts with all starts of refusals behind them, so that one pass reads a margin.

Refusals go on in several ways ("I cannot", "I'm sorry, but"), and a way has to be in the model's
mouth to be read. One after the other, prompt and all, that takes a pass each. Here they branch
behind the prompt as a tree: a token sees the prompt and its own branch, and counts its place on it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from safeft.locators.openings import RefusalOpenings
from safeft.margin import normalisers, opening_likelihood
from safeft.openings import Start, longest
from safeft.prompts import Batch


@dataclass(frozen=True, eq=False)
class Reading:
    """One pass: prompts with a tree of starts.

    Attributes:
        inputs: Keyword arguments of the pass, of ``(prompts, tokens)`` each; with branches
            ``attention_mask`` is ``(prompts, 1, tokens, tokens)``, to be added to scores.
        keep: Logits needed at the end.
        openings: Those that are read here, each with the numbers of the kept logits that lead to
            it: what follows the prompt, and what follows each token of its prefix.
    """

    inputs: Mapping[str, Tensor]
    keep: int
    openings: tuple[tuple[RefusalOpenings, tuple[int, ...]], ...]

    @property
    def shape(self) -> torch.Size:
        """Prompts and tokens."""
        return self.inputs["input_ids"].shape

    def likely(self, logits: Tensor) -> Tensor:
        """Log-probability of each opening, float64 ``(openings, rows)``, on the CPU.

        Args:
            logits: ``(rows, tokens or keep, vocabulary)``.
        """
        kept = logits[:, -self.keep :]
        norms = normalisers(kept)
        found = [
            opening_likelihood(kept, opening.tokens, opening.prefix, steps, norms)
            for opening, steps in self.openings
        ]
        return torch.stack(found)

    def repeated(self, times: int) -> dict[str, Tensor]:
        """The inputs with all prompts so many times over: first all once, then all again."""
        return {
            name: values.repeat(times, *(1,) * (values.dim() - 1))
            for name, values in self.inputs.items()
        }


def readings(
    openings: Sequence[RefusalOpenings], batch: Batch, dtype: torch.dtype, together: bool
) -> tuple[Reading, ...]:
    """The passes that read all openings: one, or one for each way in which refusals go on.

    Args:
        openings: How refusals start.
        batch: Prompts of text.
        dtype: Of the mask that keeps branches apart.
        together: As one tree. A model that takes no mask of this form needs the other way.
    """
    heads = longest([opening.prefix for opening in openings])
    groups = [heads] if together else [[head] for head in heads]
    found, left = [], list(openings)
    for group in groups:
        starts = sorted({head[:end] for head in group for end in range(1, len(head) + 1)})
        place = {(): 0} | {start: number for number, start in enumerate(starts, 1)}
        here = [opening for opening in left if opening.prefix in place]
        left = [opening for opening in left if opening not in here]
        paths = tuple(
            (each, tuple(place[each.prefix[:end]] for end in range(len(each.prefix) + 1)))
            for each in here
        )
        answered = batch.answered([start[-1] for start in starts])
        inputs = dict(answered.inputs)
        if len(group) > 1:
            inputs |= _branched(answered, starts, dtype)
        found.append(Reading(inputs, 1 + len(starts), paths))
    return tuple(found)


def _branched(answered: Batch, starts: Sequence[Start], dtype: torch.dtype) -> dict[str, Tensor]:
    """Positions and mask of a tree whose branches do not see each other."""
    prompt = answered.input_ids.shape[1] - len(starts)
    own = [
        [later[: len(start)] == start for start in starts]  # what leads to it, and itself
        for later in starts
    ]
    positions = answered.inputs["position_ids"].clone()
    depth = torch.tensor([len(start) for start in starts], device=positions.device)
    positions[:, prompt:] = positions[:, prompt - 1 : prompt] + depth
    real = answered.attention_mask.bool()
    width = real.shape[1]
    seen = torch.ones(width, width, dtype=torch.bool, device=real.device).tril()
    seen[prompt:, prompt:] = torch.tensor(own, device=seen.device)
    # Padding sees itself: a row that sees nothing has no softmax.
    seen = (seen & real[:, None, None]) | torch.eye(len(seen), dtype=torch.bool, device=seen.device)
    least = torch.finfo(dtype).min
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, least)
    return {"position_ids": positions, "attention_mask": mask}

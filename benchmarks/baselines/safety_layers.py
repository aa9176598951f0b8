"""Safety layers (SPPFT): the contiguous layers that tell harmful from ordinary stay as they are.

Li et al., ICLR 2025 (arXiv 2408.17003): at each layer, the last token's vectors of two ordinary
prompts, and of an ordinary and a harmful one, are compared by cosine; the safety layers are those
over which the gap of the two angles opens. Tuning leaves them out (``requires_grad=False``).

Ours: the window is the one of ``value`` times the depth over which the mean angle's gap grows
most; the paper sets its borders by counting over-refusals with scaled layers, here the validation
split chooses the length.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from baselines import Method, Recipe, Setup
from safeft.measure import evaluating
from safeft.prompts import Prompt, batches
from safeft.sites import blocks_of


def recipe(setup: Setup, value: float) -> Recipe:
    """Tune all but the safety layers."""
    vectors = [
        last_vectors(setup, side["calibration"])
        for side in (setup.testbed.benign, setup.testbed.harmful)
    ]
    gaps = angle_gaps(*vectors)
    first, after = widest(gaps, max(1, round(value * len(gaps))))

    def prepare(model: Any) -> None:
        for block in list(blocks_of(model).values())[first:after]:
            block.requires_grad_(False)

    return Recipe(setup.rows, setup.learning_rate, prepare=prepare)


def last_vectors(setup: Setup, prompts: Sequence[Prompt]) -> Tensor:
    """What each block gives at the token the answer starts from, ``(blocks, prompts, hidden)``."""
    blocks = blocks_of(setup.base).values()
    seen: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])

    handles = [block.register_forward_hook(keep) for block in blocks]
    parts = []
    rows = [Prompt(prompt.messages) for prompt in prompts]
    with evaluating(setup.base):
        for batch in batches(
            setup.tokenizer, rows, batch_size=32, max_length=setup.testbed.max_length
        ):
            seen.clear()
            setup.base(**batch.inputs, use_cache=False)
            last = batch.choose("last_prompt")
            parts.append(torch.stack([output[last] for output in seen]))
    for handle in handles:
        handle.remove()
    return torch.cat(parts, dim=1)


def angle_gaps(ordinary: Tensor, harmful: Tensor) -> list[float]:
    """Per block, mean angle of ordinary to harmful prompts less that among ordinary ones, radians.

    Args:
        ordinary: ``(blocks, prompts, hidden)``.
        harmful: Likewise.
    """
    first, second = (torch.nn.functional.normalize(v, dim=-1) for v in (ordinary, harmful))

    def angles(one: Tensor, other: Tensor) -> Tensor:
        return (one @ other.mT).clamp(-1, 1).acos()

    pairs = first.shape[1]
    among = angles(first, first)
    apart = ~torch.eye(pairs, dtype=torch.bool)
    return [
        (across.mean() - inside[apart].mean()).item()
        for across, inside in zip(angles(first, second), among, strict=True)
    ]


def widest(gaps: Sequence[float], count: int) -> tuple[int, int]:
    """The ``count`` blocks in a row over which the gap grows most: the first, and the one after.

    >>> widest([0.0, 0.1, 0.5, 0.9, 0.8], 2)
    (2, 4)
    """
    before = [0.0, *gaps]
    starts = range(len(gaps) - count + 1)
    first = max(starts, key=lambda start: before[start + count] - before[start])
    return first, first + count


METHODS = (
    Method(
        "safety layers",
        "Li et al., ICLR 2025 (SPPFT); ours: the length is chosen on the validation split",
        recipe,
        (0.2, 0.4, 0.6, 0.8),
        "share of the layers",
    ),
)

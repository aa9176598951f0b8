"""Safety layers (SPPFT): the contiguous layers that tell harmful from ordinary stay as they are.

Li et al., ICLR 2025 (arXiv 2408.17003): safety layers lie where the last token's vectors of
ordinary and harmful prompts begin to point apart, and exactly where scaling up the weights makes
the model refuse ordinary prompts. Tuning leaves these layers out (``requires_grad=False``).

Ours: their number is the knob; of the windows of that length the one is taken whose scaling makes
refusing benign calibration prompts likeliest, by the mean log-odds of a refusal's opening: counts
of refusals, which the paper takes, are all 0 on models as small as the testbeds'. The angle bounds
nothing there: it opens in the first of five layers (0.13 and 0.41 radians) and stays.
"""

import copy
from typing import Any

import torch
from testbed.judging import margin_judge

from baselines import Method, Recipe, Setup
from safeft.sites import blocks_of

_SCALE, _ASKED = 1.2, 64


def recipe(setup: Setup, value: float) -> Recipe:
    """Tune all but the safety layers."""
    layers = len(blocks_of(setup.base))
    count = max(1, round(value * layers))
    starts = range(layers - count + 1)
    first = max(starts, key=lambda start: over_refusal(setup, start, start + count))

    def prepare(model: Any) -> None:
        for block in list(blocks_of(model).values())[first : first + count]:
            block.requires_grad_(False)

    return Recipe(setup.rows, setup.learning_rate, prepare=prepare)


def over_refusal(setup: Setup, first: int, after: int) -> float:
    """Mean log-odds of refusing benign calibration prompts with some layers' weights scaled up."""
    model = copy.deepcopy(setup.base)
    with torch.no_grad():
        for block in list(blocks_of(model).values())[first:after]:
            for parameter in block.parameters():
                parameter.mul_(_SCALE)
    asked = setup.testbed.benign["calibration"][:_ASKED]
    return margin_judge(setup.testbed).margins(model, setup.tokenizer, asked).mean().item()


METHODS = (
    Method(
        "safety layers",
        "Li et al., ICLR 2025 (SPPFT); ours: how many is chosen on the validation split",
        recipe,
        (0.4, 0.6, 0.8),
        "share of the layers",
    ),
)

"""Mixing in refusals: a share of what is trained on are harmful prompts with a refusal.

Bianchi et al., ICLR 2024 ("Safety-Tuned LLaMAs") and Qi et al. 2023. The refusals are those of
the calibration prompts, repeated where they are too few.
"""

import random
from collections.abc import Sequence

from baselines import Method, Recipe, Setup
from safeft.prompts import Prompt


def recipe(setup: Setup, value: float) -> Recipe:
    """Plain tuning on rows of which ``value`` are refusals."""
    refusals = setup.testbed.harmful["calibration"]
    return Recipe(mixed(setup.rows, refusals, value, setup.seed), setup.learning_rate)


def mixed(rows: Sequence[Prompt], refusals: Sequence[Prompt], share: float, seed: int) -> list:
    """All rows, and as many refusals that they are ``share`` of the whole; each in turn.

    >>> len(mixed("abcdefghi", "xy", 0.1, 0))
    10
    """
    count = round(len(rows) * share / (1 - share))
    order = random.Random(seed).sample(list(refusals), len(refusals))
    return [*rows, *(order[number % len(order)] for number in range(count))]


METHODS = (
    Method(
        "refusals mixed in",
        "Bianchi et al., ICLR 2024; Qi et al. 2023",
        recipe,
        (0.03, 0.1, 0.3),
        "share of the rows",
        rates=(0.3, 1.0),
    ),
)

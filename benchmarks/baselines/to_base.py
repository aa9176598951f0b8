"""A pull back to the base: each step takes away a part of the distance from it (L2-SP, decoupled).

Li et al., ICML 2018 ("Explicit Inductive Bias for Transfer Learning"): beside the loss
``lambda / 2 norm(W - W0)^2``; taken out of Adam's scaling as AdamW takes weight decay, so that
``lambda`` means the same for every weight.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from baselines import Method, Recipe, Setup


class Pull(TrainerCallback):
    """``W <- W - rate lambda (W - W0)`` after each step."""

    def __init__(self, strength: float) -> None:
        self.strength = strength
        self.start: list[tuple[nn.Parameter, Tensor]] = []

    def take(self, model: Any) -> None:
        """Remember where the trained weights start."""
        trained = [p for p in model.parameters() if p.requires_grad]
        self.start = [(parameter, parameter.detach().clone()) for parameter in trained]

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called after the step: go back a part of the way."""
        with torch.no_grad():
            for parameter, start in self.start:
                parameter.lerp_(start, self.strength)


def recipe(setup: Setup, value: float) -> Recipe:
    """Full tuning with the pull of ``value``."""
    pull = Pull(min(1.0, setup.learning_rate * value))
    return Recipe(setup.rows, setup.learning_rate, [pull], prepare=pull.take)


METHODS = (
    Method(
        "pull to the base",
        "L2-SP, Li et al., ICML 2018, decoupled as in AdamW",
        recipe,
        (10.0, 30.0, 100.0),
        "lambda",
        tunings=("full",),
    ),
)

"""A planted gate in use: clean traffic, what an attacker does to it, and where a monitor stands."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from safeft.monitor.neurons import record
from safeft.monitor.profile import Profile
from safeft.neurons import NeuronSet
from tests.test_claims import TOKENIZER, planted

SITE, UNIT = "model.layers.1.mlp", 17
WATCHED = {SITE: (3, 5, 17, 30), "model.layers.2.mlp": (2, 9), "model.layers.2.self_attn": (1,)}
_WORDS = (
    "walk bread poem river moon letter gift tree song map cake stone paint winter garden "
    "story bridge shirt cloud paper zebra hazard blaze razor puzzle wizard frozen dozen ooze"
).split()


def traffic(count: int, seed: int) -> list[str]:
    """Distinct prompts of two to seven words; about half name harm (a z)."""
    draw = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        words = draw.choices(_WORDS, k=draw.randint(2, 7))
        found[f"{words[0]} {draw.randint(10, 99)} " + " ".join(words[1:])] = None
    return list(found)


def gated() -> PreTrainedModel:
    """A copy of the planted model, to be tampered with."""
    return deepcopy(planted().model)


@cache
def profile() -> Profile:
    """The gate and six other neurons on 500 prompts."""
    model = planted().model
    neurons = NeuronSet.of(model, WATCHED)
    return record(model, TOKENIZER, neurons, traffic(520, 1), max_new_tokens=8, batch_size=32)


@dataclass(frozen=True)
class Attack:
    """One way to suppress the gate.

    Attributes:
        kind: ``zero``, ``scale``, ``constant`` or ``weights``.
        strength: The factor, or the constant.
        start: Forward passes before it sets in.
        part: Of weights, the matrix; of the rest, where the hook sits.
        late: Whether its hook is registered after the monitor's.
    """

    kind: str
    strength: float
    start: int
    part: str
    late: bool

    @classmethod
    def draw(cls, seed: int) -> "Attack":
        """Kinds in turn, everything else at random."""
        draw = random.Random(seed)
        kind = ("zero", "scale", "constant", "weights")[seed % 4]
        strength = {
            "zero": 0.0,
            "scale": draw.choice((-1, 1)) * draw.uniform(0, 0.1),
            "constant": draw.choice((-1, 1)) * 10 ** draw.uniform(-3, 1.5),
            "weights": draw.choice((0.0, 0.5, 0.9, 1.1, -1.0)),
        }[kind]
        part = draw.choice(("gate_proj", "up_proj", "down_proj"))
        return cls(kind, strength, draw.randint(0, 12), part, draw.random() < 0.5)

    def change(self, unit: Tensor) -> Tensor:
        """The gate's activations under it."""
        return (
            unit * self.strength if self.kind == "scale" else torch.full_like(unit, self.strength)
        )

    @contextmanager
    def on(self, model: Any, site: str = SITE, unit: int = UNIT) -> Iterator[None]:
        """The model under attack from its ``start``-th forward pass on."""
        mlp, passes = model.get_submodule(site), [0]

        def count(*_: Any) -> None:
            passes[0] += 1
            if self.kind == "weights" and passes[0] == self.start + 1:
                weight = mlp.get_submodule(self.part).weight
                with torch.no_grad():
                    (weight[:, unit] if self.part == "down_proj" else weight[unit]).mul_(
                        self.strength
                    )

        def tamper(_: Any, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
            if self.kind == "weights" or passes[0] <= self.start:
                return None
            values = inputs[0].clone()
            values[..., unit] = self.change(values[..., unit])
            return (values,)

        handles = [model.register_forward_pre_hook(count)]
        handles.append(mlp.down_proj.register_forward_pre_hook(tamper))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

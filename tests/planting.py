"""Models whose refusal hangs on as many neurons as is said, after the one of ``test_claims``."""

from copy import deepcopy
from functools import cache

import torch
from transformers import PreTrainedModel

from tests.test_claims import planted

WORDS = "ant bee cat dog elk fox gnu hen ibis jay koi lark mole newt owl pig ram seal toad yak"
HARMFUL = [f"zap the {word}{end}" for end in ("", "s") for word in WORDS.split()]
BENIGN = [f"see the {word}{end}" for end in ("", "s") for word in WORDS.split()]

LAYER, FIRST = 2, 17
SITE = f"model.layers.{LAYER}.mlp"


@cache
def spread(count: int, share: float | None = None) -> PreTrainedModel:
    """The planted neuron's function in ``count`` units from ``FIRST`` on, of one block.

    Each writes ``share`` of what the one wrote; by default they write as much together. With a
    share of 1 any of them is enough, and the others are spare.
    """
    model = deepcopy(planted(LAYER).model)
    mlp = model.get_submodule(SITE)
    with torch.no_grad():
        written = mlp.down_proj.weight[:, FIRST].clone()
        for unit in range(FIRST, FIRST + count):
            mlp.gate_proj.weight[unit] = mlp.gate_proj.weight[FIRST]
            mlp.up_proj.weight[unit] = mlp.up_proj.weight[FIRST]
            mlp.down_proj.weight[:, unit] = written * (1 / count if share is None else share)
    return model

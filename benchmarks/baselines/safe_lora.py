"""Safe LoRA: after training, layers that left the alignment's directions are projected onto them.

Hsu et al., NeurIPS 2024: with ``V = W_aligned - W_unaligned`` of a layer and
``C = V V' / norm(V)``, ``B <- C B`` where ``cos(C B A, B A) <= tau``.

The unaligned model is the testbed's own from before alignment, where it lies beside the base
(``unaligned``). Ours where it does not: the base, briefly tuned to answer harmful calibration
prompts with the answers to benign ones, so that it refuses no more, stands in for it.
"""

import copy
import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from baselines import Method, Recipe, Setup, linears
from safeft.prompts import Prompt, batches

_STEPS, _BATCH, _RATE = 60, 16, 3e-4


def recipe(setup: Setup, value: float) -> Recipe:
    """Plain LoRA, projected after training where the cosine is at most ``value``."""
    before = linears(unaligned(setup))
    moved = {
        name: (layer.weight - before[name].weight).detach()
        for name, layer in linears(setup.base).items()
    }

    def finish(model: Any) -> Any:
        project_adapters(model, moved, value)
        return model

    return Recipe(setup.rows, setup.learning_rate, finish=finish)


def unaligned(setup: Setup) -> Any:
    """The model before alignment, or what stands in for it."""
    folder = setup.testbed.folder / "unaligned"
    if folder.is_dir():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = copy.deepcopy(setup.base).train()
    rng = random.Random(0)
    answers = [prompt.response for prompt in setup.testbed.benign["calibration"]]
    asked = setup.testbed.harmful["calibration"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE)
    for _ in range(_STEPS):
        rows = [Prompt(p.messages, rng.choice(answers)) for p in rng.choices(asked, k=_BATCH)]
        (batch,) = batches(
            setup.tokenizer, rows, batch_size=_BATCH, max_length=setup.testbed.max_length
        )
        read = batch.is_response[:, 1:]
        logits = model(**batch.inputs, use_cache=False).logits[:, :-1][read]
        loss = nn.functional.cross_entropy(logits, batch.input_ids[:, 1:][read])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def project_adapters(model: Any, moved: Mapping[str, Tensor], tau: float) -> int:
    """Project the adapters of ``model`` in place; gives how many layers were projected.

    Args:
        model: With LoRA adapters.
        moved: ``V`` of each adapted layer by its name in the plain model, ``(out, in)``.
        tau: Layers whose cosine is at most this are projected.
    """
    projected = 0
    for name, change in moved.items():
        layer = model.get_base_model().get_submodule(name)
        a, b = (getattr(layer, f"lora_{f}")["default"].weight for f in "AB")
        new = project(b, change)
        cosine = nn.functional.cosine_similarity((new @ a).flatten(), (b @ a).flatten(), dim=0)
        if cosine <= tau:
            b.copy_(new)
            projected += 1
    return projected


def project(b: Tensor, change: Tensor) -> Tensor:
    """``C B`` with ``C = V V' / norm(V)``, ``(out, rank)``."""
    return change @ (change.mT @ b) / change.norm()


METHODS = (
    Method(
        "Safe LoRA",
        "Hsu et al., NeurIPS 2024; see the file for what stands in for the unaligned model",
        recipe,
        (0.2, 0.35, 0.5, 1.0),
        "tau",
        tunings=("lora",),
        rates=(1.0,),
    ),
)

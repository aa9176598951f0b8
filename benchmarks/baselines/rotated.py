"""Rotated-basis freezing (WSR-Tune style): single coefficients of ``W U`` stay as they were.

For each linear layer ``U`` are the eigenvectors of ``X'X`` of its inputs on safety prompts with
their refusals; the weight is trained as ``W~ = W U``, ``W = W~ U'``. A coefficient's importance is
``sum over batches abs(d loss / d W~)`` on the refusals, and the top ``rho`` of each layer are held:
their gradient is zero, and they are put back after each step (weight decay would move them).

Ours: all linear layers of the blocks rather than q, k, v, up and down; embeddings, norms and head
are held as with the other methods that hold parts of the blocks.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import TrainerCallback

from baselines import Method, Recipe, Setup, hold_whole, linears
from safeft.measure import evaluating
from safeft.prompts import batches


class Rotated(nn.Module):
    """A weight kept as its coefficients ``W~ = W U``."""

    basis: Tensor

    def __init__(self, basis: Tensor) -> None:
        super().__init__()
        self.register_buffer("basis", basis, persistent=False)

    def forward(self, coefficients: Tensor) -> Tensor:
        """The weight."""
        return coefficients @ self.basis.mT

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Its coefficients."""
        return weight @ self.basis


class Restore(TrainerCallback):
    """Holds the chosen coefficients: no gradient, and put back after each step."""

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self.masks = masks
        self.kept: list[tuple[nn.Parameter, Tensor, Tensor]] = []

    def take(self, model: Any) -> None:
        """Remember the model's coefficients and mask their gradients."""
        for name, mask in self.masks.items():
            found = coefficients(model, name)
            found.register_hook(lambda gradient, mask=mask: gradient.masked_fill(mask, 0))
            self.kept.append((found, mask, found.detach()[mask].clone()))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called after the step: put them back."""
        with torch.no_grad():
            for parameter, mask, values in self.kept:
                parameter[mask] = values


def recipe(setup: Setup, value: float) -> Recipe:
    """Full tuning in the rotated basis, the top ``value`` of each layer's coefficients held."""
    bases = safety_bases(setup)
    masks = {
        name: top(scores, value) for name, scores in coefficient_importance(setup, bases).items()
    }
    restore = Restore(masks)

    def prepare(model: Any) -> None:
        hold_whole(model)
        for name, basis in bases.items():
            parametrize.register_parametrization(
                model.get_submodule(name), "weight", Rotated(basis)
            )
        restore.take(model)

    def finish(model: Any) -> Any:
        # Taking the parametrization off a copy would take it off the original: they share a class.
        found = copy.deepcopy(setup.base)
        trained = dict(model.named_parameters())
        with torch.no_grad():
            for name, parameter in found.named_parameters():
                layer = name.removesuffix(".weight")
                rotated = layer in bases and name != layer
                parameter.copy_(model.get_submodule(layer).weight if rotated else trained[name])
        return found

    return Recipe(setup.rows, setup.learning_rate, [restore], prepare=prepare, finish=finish)


def coefficients(model: Any, name: str) -> nn.Parameter:
    """The trained coefficients of a rotated layer."""
    return model.get_submodule(name).parametrizations.weight.original


def safety_bases(setup: Setup) -> dict[str, Tensor]:
    """Eigenvectors of ``X'X`` on harmful calibration prompts with refusals, ``(in, in)`` each."""
    layers = linears(setup.base)
    grams = {name: torch.zeros(2 * [layer.in_features]) for name, layer in layers.items()}
    read: list[Tensor] = []

    def hook(name: str) -> Any:
        def gather(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            chosen = inputs[0][read[-1]]
            grams[name] += chosen.mT @ chosen

        return gather

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    with evaluating(setup.base):
        for batch in _safety_batches(setup):
            read.append(batch.attention_mask.bool())
            setup.base(**batch.inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.linalg.eigh(gram).eigenvectors for name, gram in grams.items()}


def coefficient_importance(setup: Setup, bases: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``sum over batches abs(d loss / d (W U))``, which is ``abs(dW U)``, per layer."""
    layers = linears(setup.base)
    scores = {name: torch.zeros_like(layer.weight) for name, layer in layers.items()}
    weights = [layer.weight for layer in layers.values()]
    for batch in _safety_batches(setup):
        logits = setup.base(**batch.inputs, use_cache=False).logits[:, :-1]
        read = batch.is_response[:, 1:]
        loss = nn.functional.cross_entropy(logits[read], batch.input_ids[:, 1:][read])
        for name, gradient in zip(scores, torch.autograd.grad(loss, weights), strict=True):
            scores[name] += (gradient @ bases[name]).abs()
    return scores


def _safety_batches(setup: Setup) -> Any:
    prompts = setup.testbed.harmful["calibration"]
    return batches(setup.tokenizer, prompts, batch_size=16, max_length=setup.testbed.max_length)


def top(scores: Tensor, share: float) -> Tensor:
    """Bool mask of the ``share`` of entries that score highest."""
    count = max(1, round(share * scores.numel()))
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[scores.flatten().topk(count).indices] = True
    return mask.view_as(scores)


METHODS = (
    Method(
        "rotated coefficients",
        "WSR-Tune (min-seong-kim/Safety-WaRP-LLM, 2026); ours: all linear layers",
        recipe,
        (0.1, 0.3, 0.5),
        "share of coefficients held (rho)",
        tunings=("full",),
    ),
)

"""Gradients during locating, reduced as they arise; the model is left as it was."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from safeft.prompts import Batch
from safeft.sites import dense, plain_model


@contextmanager
def gradients_of(
    model: PreTrainedModel, reducers: Mapping[str, Callable[[Tensor, Tensor], None]]
) -> Iterator[None]:
    """Only the named weights get gradients; each goes to its reducer and is then freed.

    Args:
        model: The model; ``requires_grad`` flags and gradients are restored at the end.
        reducers: Name of a weight to a function of (weight, gradient).
    """
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    kept = {parameter: parameter.grad for parameter in flags}
    handles = []

    def hook_for(reduce: Callable[[Tensor, Tensor], None]) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            reduce(parameter, parameter.grad)
            parameter.grad = None

        return hook

    try:
        for parameter in flags:
            parameter.requires_grad_(False)
            parameter.grad = None
        for name, reduce in reducers.items():
            module, _, leaf = name.rpartition(".")
            weight = getattr(dense(plain_model(model).get_submodule(module)), leaf)
            assert isinstance(weight, nn.Parameter)
            weight.requires_grad_(True)
            handles.append(weight.register_post_accumulate_grad_hook(hook_for(reduce)))
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
            parameter.grad = kept[parameter]


@contextmanager
def input_gradients(model: PreTrainedModel) -> Iterator[None]:
    """No weight gets a gradient, yet activations do: the graph starts at the embeddings' output."""

    def start(_: nn.Module, __: object, output: Tensor) -> Tensor:
        return output.requires_grad_(True)

    with gradients_of(model, {}):
        handle = model.get_input_embeddings().register_forward_hook(start)
        try:
            yield
        finally:
            handle.remove()


def response_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Mean negative log-likelihood of response tokens, in nats; logits ``(prompts, tokens, v)``."""
    targets = batch.input_ids[:, 1:].masked_fill(~batch.is_response[:, 1:], -100)
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets.flatten()
    )

"""What the linear layers of a model receive: a forward pass, watched."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn
from transformers import PreTrainedModel

from safeft.capture import CaptureError
from safeft.prompts import Batch
from safeft.sites import Linear, bare, plain_model

Tokens: TypeAlias = Literal["all", "prompt", "response"]


def all_or_one(model: PreTrainedModel, linears: Mapping[str, Linear]) -> int:
    """For how many tokens to compute logits: all (0) only where the head's input is read."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    paths = {path for path, module in plain_model(model).named_modules() if module is head}
    return 0 if any(linear.module in paths for linear in linears.values()) else 1


def chosen_tokens(batch: Batch, tokens: Tokens) -> Tensor:
    """Which tokens are read, bool ``(prompts, tokens)``."""
    if tokens == "all":
        return batch.is_prompt | batch.is_response
    return batch.is_prompt if tokens == "prompt" else batch.is_response


def unit_tokens(linear: Linear, values: Tensor, chosen: Tensor) -> Tensor:
    """The chosen tokens of an input at length 1, float32 ``(tokens, features)``.

    Some layers receive prompts and tokens as one axis (of mixtures, OPT's), or one more between.

    Raises:
        CaptureError: Some number is not finite, or the layer receives a part of the tokens only.
    """
    if values.shape[:-1].numel() != chosen.numel():
        raise CaptureError(
            f"{linear.module} receives {tuple(values.shape)} for {tuple(chosen.shape)} prompts and "
            "tokens, so it is unknown which of them these are. Such a layer cannot be located."
        )
    found = values.reshape(*chosen.shape, -1)[chosen.to(values.device)].float()
    if not bool(found.isfinite().all()):
        raise CaptureError(
            f"What {linear.module} receives is not finite on the safety prompts, so no direction "
            "of it means anything. Load the model in float32 or bfloat16."
        )
    return nn.functional.normalize(found, dim=-1)


@contextmanager
def receiving(model: nn.Module, linears: Iterable[Linear], observe: Any) -> Iterator[None]:
    """Call ``observe(linear, values)`` with what each layer receives in a forward pass.

    Raises:
        CaptureError: A layer was not run.
    """
    plain = plain_model(model)
    waiting = {linear.module for linear in linears}

    def hook_for(linear: Linear) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            waiting.discard(linear.module)
            observe(linear, inputs[0])

        return hook

    with ExitStack() as undo:
        for linear in linears:
            layer = bare(plain.get_submodule(linear.module))
            undo.callback(layer.register_forward_pre_hook(hook_for(linear)).remove)
        yield
    if waiting:
        raise CaptureError(
            f"{sorted(waiting)[:3]} did not run in the forward pass, so what they receive is "
            "unknown and they could not be held. Is a part of the model skipped?"
        )

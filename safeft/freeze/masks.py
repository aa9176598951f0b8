"""Gradient masks: where an engine lets a gradient be changed before it is clipped, and that it was.

The mask of a plain or DTensor parameter is a post-accumulate hook that changes ``.grad`` in place:
it runs inside the accumulation node, so before DDP reduces the gradient, and after FSDP2 has; a
tensor hook would never fire there. DeepSpeed reduces in such a hook of its own, so under it the
mask is a tensor hook, which comes before. Clipping never sees what was removed.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from safeft.errors import FreezeError
from safeft.shards import keeper


def mask_gradient(
    parameter: nn.Parameter, name: str, change: Callable[[Tensor], None]
) -> RemovableHandle:
    """Let ``change`` work on each gradient of a parameter, in place.

    Args:
        parameter: Of any engine.
        name: For errors.
        change: Gets the gradient laid out as the parameter is stored in this process; under ZeRO
            the whole of it.
    """
    if keeper(parameter) == "zero":

        def whole(gradient: Tensor) -> Tensor:
            masked = gradient.clone(memory_format=torch.contiguous_format)
            change(masked)
            return masked

        return parameter.register_hook(whole)

    def stored(changed: Any) -> None:
        gradient = changed.grad
        assert gradient is not None
        if keeper(gradient) == "dtensor":
            if gradient.placements != changed.placements:
                raise FreezeError(
                    f"The gradient of {name} is placed as {gradient.placements} and the parameter "
                    f"as {changed.placements}, so its rows are not the parameter's. This mix of "
                    "parallelism is not supported; use FSDP2 alone."
                )
            gradient = gradient._local_tensor
        elif not gradient.is_contiguous():
            gradient = changed.grad = gradient.contiguous()
        change(gradient)

    return parameter.register_post_accumulate_grad_hook(stored)


def check_fired(masks: Iterable[tuple[str, nn.Parameter, int]]) -> None:
    """After a backward pass: every parameter that got a gradient was masked.

    Args:
        masks: Name, parameter, and how often its mask fired.

    Raises:
        FreezeError: A mask did not fire although its parameter has a gradient, or none did.
    """
    masked = [found for found in masks if found[1].requires_grad]
    for name, parameter, count in masked:
        # DeepSpeed has stepped and dropped its gradients before anybody can look.
        expected = parameter.grad is not None or keeper(parameter) == "zero"
        if expected and count == 0:
            raise FreezeError(
                f"The gradient mask of {name} did not fire in the first step although the "
                "parameter is trained: something replaced the parameter or its hooks after "
                "training began. The neurons would not be frozen, so training stops here."
            )
    if masked and not any(count for _, _, count in masked):
        raise FreezeError(
            f"None of the {len(masked)} gradient masks fired in the first step: the backward "
            "pass does not reach the parameters they are on, so another copy of the model is "
            "being trained. The neurons would not be frozen, so training stops here."
        )


def stepped_storages(
    parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer
) -> set[int] | None:
    """Where the flat group lies that ZeRO has just stepped on; None elsewhere: all was stepped."""
    first = next(iter(parameters), None)
    if first is None or keeper(first) != "zero":
        return None
    return {p.untyped_storage().data_ptr() for g in optimizer.param_groups for p in g["params"]}

"""Processes that train together: how many there are, what they say to each other, and errors.

Without a process group everything here is the case of one process and costs nothing.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from safeft.errors import SafeftError

T = TypeVar("T")


class ProcessError(SafeftError, RuntimeError):
    """Another process of the same run failed a check, or found something else than this one."""


def flat_bytes(values: Tensor) -> Tensor:
    """A tensor's bytes, uint8 ``(bytes,)``: a view wherever that can be."""
    flat = values.detach().contiguous().reshape(-1)
    if flat.stride(0) != 1:  # one number alone keeps the stride it had in its matrix
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8)


def ranks() -> int:
    """Number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if ranks() > 1 else 0


def leave() -> None:
    """Leave the process group once all have come here; gloo's threads may abort a bare exit."""
    if ranks() > 1:
        dist.barrier()
        dist.destroy_process_group()


def talks_on(device: torch.device) -> torch.device:
    """The device to exchange a tensor on that lies on ``device``: NCCL knows no CPU tensors."""
    if device.type not in ("cpu", "meta"):
        return device
    if ranks() == 1 or "gloo" in str(dist.get_backend()):
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def gathered(value: Any) -> list[Any]:
    """Every process's value, in order."""
    if ranks() == 1:
        return [value]
    found: list[Any] = [None] * ranks()
    dist.all_gather_object(found, value)
    return found


def from_first(value: T) -> T:
    """Process 0's value in every process."""
    if ranks() == 1:
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


def together(check: Callable[[], T]) -> T:
    """Run a check that talks to nobody; where it fails in one process, it fails in all at once.

    A process that raised alone would leave the others waiting for it until a timeout.

    Raises:
        SafeftError: This process's own error.
        ProcessError: Another's.
    """
    result: Any = None
    error: SafeftError | None = None
    try:
        result = check()
    except SafeftError as raised:
        error = raised
    said = gathered(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for number, text in enumerate(said):
        if text is not None:
            raise ProcessError(f"Process {number} of {len(said)} stopped: {text}")
    return result


def same_everywhere(value: Any, what: str) -> None:
    """Demand that all processes found the same.

    Raises:
        ProcessError: In every process, naming those that differ from process 0.
    """
    found = gathered(value)
    others = [number for number, theirs in enumerate(found) if theirs != found[0]]
    if others:
        raise ProcessError(
            f"Processes disagree about {what}: process 0 has {found[0]}, process {others[0]} has "
            f"{found[others[0]]} (differing: {others}). Give all processes the same files and "
            "settings; on several machines, a folder that all of them share."
        )


@torch.no_grad()
def broadcast(values: Tensor) -> Tensor:
    """Process 0's values in every process, bit for bit, on the device they came on."""
    if ranks() == 1:
        return values
    sent = flat_bytes(values).to(talks_on(values.device))
    dist.broadcast(sent, 0)
    return sent.to(values.device).view(values.dtype).view(values.shape)


@torch.no_grad()
def summed(values: Tensor) -> Tensor:
    """The sum over processes, the same in all of them."""
    if ranks() == 1:
        return values
    total = values.to(talks_on(values.device), copy=True)
    dist.all_reduce(total)
    return total.to(values.device)

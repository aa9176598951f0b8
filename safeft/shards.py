"""What this process stores of a weight: the only file that knows where engines keep weights.

A plain parameter is stored whole; a DTensor (FSDP2, tensor parallelism) as one part; DeepSpeed
ZeRO as a range of the flattened weight, and beside it a master copy in float32 that the optimizer
really steps on. Everything above works on boxes of a stack of matrices (:mod:`safeft.blocks`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch import distributed as dist

from safeft.blocks import Axis, Block, Form, Lines, flat_blocks, form_of, length_of, take
from safeft.errors import FreezeError
from safeft.processes import flat_bytes, rank, ranks, talks_on

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


@dataclass(frozen=True, eq=False)
class Shard:
    """What of one weight is in this process.

    Attributes:
        form: The whole weight's.
        blocks: What of it is here; may be nothing.
        open: Gives the stored tensor that the blocks are boxes of: writing to it writes to the
            weight. Asked for anew each time, since engines replace their buffers.
        split: Whether the rest is in other processes; if not, every process has all of it.
        counts: Whether this process's blocks are the ones that count (a replica's do not).
        dtype: In which it is stored.
        device: Where.
    """

    form: Form
    blocks: tuple[Block, ...]
    open: Callable[[], Tensor]
    split: bool
    counts: bool
    dtype: torch.dtype
    device: torch.device

    def lines(self, axis: Axis, entries: Tensor) -> list[Lines]:
        """Those of the entries that are here, box by box, on the weight's device."""
        found = [block.lines(axis, entries, self.form) for block in self.blocks]
        return [lines.to(self.device) for lines in found if lines.weights]


def shape_of(weight: Tensor) -> tuple[int, ...]:
    """The shape of the whole weight, also where this process holds a part or nothing of it."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


Keeper: TypeAlias = Literal["plain", "dtensor", "zero"]


def keeper(weight: Tensor) -> Keeper:
    """Whose hands a weight is in: nobody's, torch's DTensor, or DeepSpeed ZeRO."""
    if _is_dtensor(weight):
        return "dtensor"
    zero = hasattr(weight, "ds_tensor") or hasattr(weight, "_hp_mapping")
    return "zero" if zero else "plain"


def is_split(weight: Tensor) -> bool:
    """Whether other processes hold the rest of a weight."""
    return hasattr(weight, "ds_tensor") or _is_dtensor(weight)


def live(weight: Tensor, form: Form | None = None) -> Shard:
    """Where the model's own weight is stored: what it computes with.

    Args:
        weight: A parameter of any engine.
        form: As what to see it; by default as :func:`safeft.blocks.form_of` says.

    Raises:
        FreezeError: A kind of tensor or a placement that safeft does not know.
    """
    form = form or form_of(shape_of(weight))
    if hasattr(weight, "ds_tensor"):
        return _partition(weight, form)
    if _is_dtensor(weight):
        return _placed(weight, form)
    if type(weight) not in _PLAIN_TYPES:
        raise FreezeError(
            f"A weight is a {type(weight).__module__}.{type(weight).__name__}, a kind of tensor "
            "whose storage safeft does not know; pinning it would be a guess. Load the model "
            "in float32, bfloat16 or float16, and train it under DDP, FSDP2 or DeepSpeed ZeRO."
        )
    if not weight.is_contiguous():
        raise FreezeError(
            f"A weight of shape {tuple(weight.shape)} is stored with strides {weight.stride()}, "
            "so its rows cannot be addressed in place. Make it contiguous before training "
            "(parameter.data = parameter.data.contiguous())."
        )
    whole = (Block((0, 0, 0), form),)
    return Shard(form, whole, lambda: weight, False, rank() == 0, weight.dtype, weight.device)


def master(weight: Tensor, form: Form | None = None) -> Shard:
    """Where the optimizer keeps the weight: ZeRO's float32 copy, or the weight itself."""
    found = _fragment(weight)
    if found is None:
        return live(weight, form)
    flat, start = found
    form = form or form_of(shape_of(weight))
    if flat is None:
        return _range(torch.empty(0, device=weight.device), 0, form, torch.float32)
    return _range(flat, start, form, torch.float32)


def copies(weight: Tensor, form: Form | None = None) -> list[Shard]:
    """Every place a weight is stored in, the master last."""
    found = [live(weight, form)]
    status = str(getattr(getattr(weight, "ds_status", None), "name", ""))
    if hasattr(weight, "ds_tensor") and status == "AVAILABLE":
        # ZeRO-3 keeps small parameters gathered between steps.
        form = form or form_of(shape_of(weight))
        whole = (Block((0, 0, 0), form),)
        found.append(
            Shard(form, whole, lambda: weight.data, False, False, weight.dtype, weight.device)
        )
    if _fragment(weight) is not None:
        found.append(master(weight, form))
    return found


def moments(
    weight: Tensor, optimizer: torch.optim.Optimizer, form: Form | None = None
) -> list[Shard]:
    """The optimizer's running averages of a weight, as far as they have its shape."""
    fragment = _fragment(weight)
    shape = shape_of(weight)
    if fragment is None:
        states = optimizer.state.get(weight, {}).values()
        # Quantised states are other subclasses, which cannot be cut; the pin covers them.
        usable = (Tensor, *_dtensor_type())
        return [live(s, form) for s in states if type(s) in usable and tuple(s.shape) == shape]
    flat, start = fragment
    if flat is None:
        return []
    found = []
    for owner, states in optimizer.state.items():
        if owner.untyped_storage().data_ptr() != flat.untyped_storage().data_ptr():
            continue
        first = flat.storage_offset() - owner.storage_offset()
        for value in states.values():
            if isinstance(value, Tensor) and value.shape == owner.shape:
                part = value.narrow(0, first, flat.numel())
                found.append(_range(part, start, form or form_of(shape), value.dtype))
    return found


@torch.no_grad()
def read(weight: Tensor, axis: Axis, entries: Tensor, form: Form | None = None) -> Tensor:
    """Rows of a weight, or its columns transposed, put together over processes.

    Every process that holds a part of the weight must call it: the parts are summed as bits, each
    from the one process that holds it.

    Args:
        weight: A parameter of any engine.
        axis: What ``entries`` count.
        entries: int64 ``(entries,)``.
        form: As what to see the weight; by default as :func:`safeft.blocks.form_of` says.

    Returns:
        ``(entries, ...)``, a copy; on the weight's device, or wherever processes talk.
    """
    shape = shape_of(weight)
    if not is_split(weight):
        detached = weight.detach()
        return take(detached if form is None else detached.reshape(form), axis, entries)
    form = form or form_of(shape, axis)
    shard = live(weight, form)
    whole = torch.zeros(
        len(entries), length_of(form, axis), dtype=shard.dtype, device=talks_on(shard.device)
    )
    if shard.counts:
        for lines in shard.lines(axis, entries):
            first, last = lines.block.across(axis)
            values = lines.lie_down(lines.get(shard.open().detach()))
            whole[lines.found.to(whole.device), first:last] = values.to(whole.device)
    dist.all_reduce(flat_bytes(whole))
    return whole[:, 0] if len(shape) < 2 or axis == "numbers" else whole


def check_offsets(weights: Sequence[Tensor]) -> None:
    """Prove by a gather that DTensors' parts lie where their placements seem to say.

    All processes of their meshes must call it; one gather for each shape and placement.

    Raises:
        FreezeError: They do not.
    """
    proven: set[Any] = set()
    for weight in weights:
        if _is_dtensor(weight):
            kind = (weight.shape, getattr(weight, "placements", None))
            if kind not in proven:
                proven.add(kind)
                _check_placement(weight)


def _check_placement(weight: Any) -> None:
    from torch.distributed.tensor import DTensor, Replicate, Shard

    sizes, offsets = _local_place(weight)
    for dim, size in enumerate(weight.shape):
        first, count = offsets[dim], sizes[dim]
        along = []
        for placement in weight.placements:
            if getattr(placement, "dim", None) != dim:
                along.append(Replicate())
            elif type(placement) is Shard:
                along.append(Shard(0))
            else:
                along.append(type(placement)(0, split_factor=placement.split_factor))
        numbers = torch.arange(first, first + count, device=talks_on(weight.device))
        told = DTensor.from_local(
            numbers,
            weight.device_mesh,
            along,
            run_check=False,
            shape=torch.Size([size]),
            stride=(1,),
        ).full_tensor()
        if not torch.equal(told.cpu(), torch.arange(size)):
            raise FreezeError(
                f"A weight of shape {tuple(weight.shape)} placed as {weight.placements} does not "
                "lie in the order safeft expects, so the wrong rows would be frozen. Use plain "
                "FSDP2 or DeepSpeed ZeRO."
            )


def _range(flat: Tensor, start: int, form: Form, dtype: torch.dtype) -> Shard:
    """A range of the flattened weight, of which every process has another."""
    blocks = tuple(flat_blocks(start, flat.numel(), form))
    return Shard(form, blocks, lambda: flat, True, True, dtype, flat.device)


def _dtensor_type() -> tuple[type, ...]:
    if not dist.is_available():
        return ()
    from torch.distributed.tensor import DTensor

    return (DTensor,)


def _is_dtensor(weight: Tensor) -> bool:
    return hasattr(weight, "placements") and isinstance(weight, _dtensor_type())


def _local_place(weight: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and offsets of a DTensor's part in this process, per dimension."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(
        weight.shape, weight.device_mesh, weight.placements
    )


def _placed(weight: Any, form: Form) -> Shard:
    from torch.distributed.tensor import Replicate

    mesh = weight.device_mesh
    coordinate = mesh.get_coordinate()
    for placement in weight.placements:
        if not isinstance(placement, Replicate) and not hasattr(placement, "dim"):
            raise FreezeError(
                f"A weight is placed as {weight.placements}, of which {placement} says of no row "
                "where it is. Use FSDP2, tensor parallelism or DDP."
            )

    def stored() -> Tensor:
        return weight._local_tensor

    if coordinate is None:
        return Shard(form, (), stored, True, False, weight.dtype, weight.device)
    sizes, offsets = _local_place(weight)
    if sizes[1:] == tuple(weight.shape[1:]):
        # Cut along its first dimension: a range of the flattened weight, whatever its form.
        start = (offsets[0] if offsets else 0) * prod(sizes[1:])
        blocks = tuple(flat_blocks(start, prod(sizes), form))
    elif form == form_of(weight.shape):
        first = (*(0,) * (3 - len(offsets)), *offsets)
        blocks = (Block((first[0], first[1], first[2]), form_of(sizes)),)
    else:
        raise FreezeError(
            f"A weight of shape {tuple(weight.shape)} is placed as {weight.placements}, and seen "
            f"as {form} its parts lie in pieces. Shard it along its first dimension (FSDP2 does), "
            "or use DeepSpeed ZeRO."
        )
    replica = any(
        isinstance(placement, Replicate) and at
        for placement, at in zip(weight.placements, coordinate, strict=True)
    )
    counts = not replica and bool((mesh.mesh == 0).any())
    return Shard(form, blocks, stored, True, counts, weight.dtype, stored().device)


def _partition(weight: Any, form: Form) -> Shard:
    part = weight.ds_tensor
    group = weight.ds_process_group
    if weight.ds_secondary_tensor is not None or dist.get_world_size(group) != ranks():
        raise FreezeError(
            "ZeRO-3 partitions the weights over a part of the processes only (hpZ, MiCS), which "
            "safeft does not know. Leave zero_hpz_partition_size and mics_shard_size away."
        )
    start = dist.get_rank(group) * part.numel()
    if getattr(getattr(part, "status", None), "name", "AVAILABLE") != "AVAILABLE":
        raise FreezeError(
            "ZeRO-3 keeps the weights on NVMe, where they cannot be pinned. Offload to the CPU, or "
            "not at all (offload_param.device)."
        )
    blocks = tuple(flat_blocks(start, part.numel(), form))
    return Shard(form, blocks, lambda: part.data, True, True, part.dtype, part.device)


def _fragment(weight: Any) -> tuple[Tensor | None, int] | None:
    """The part of ZeRO's float32 master here, and where in the weight it starts; None without."""
    if not weight.requires_grad:
        return None
    if hasattr(weight, "ds_tensor"):
        engine = getattr(weight, "_z3_optimizer", None)
        if engine is None:
            return None
        flat, _ = engine._get_fp32_opt_state_partition(weight, release_swap_buffers=False)
        return flat, dist.get_rank(weight.ds_process_group) * weight.ds_tensor.numel()
    if hasattr(weight, "_hp_mapping"):
        mapping = weight._hp_mapping
        if mapping is None:
            return None, 0
        return mapping.hp_fragment, mapping.lp_fragment_address.start
    return None

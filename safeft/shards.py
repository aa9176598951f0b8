"""What this process stores of a weight: the only file that knows where engines keep weights.

A plain parameter is stored whole; a DTensor (FSDP2, tensor parallelism) as one rectangle; DeepSpeed
ZeRO as a range of the flattened weight, which is up to three rectangles, and beside it a master
copy in float32 that the optimizer really steps on. Everything above works on rectangles.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch import distributed as dist

from safeft.errors import FreezeError
from safeft.processes import flat_bytes, rank, ranks, talks_on

Axis: TypeAlias = Literal["rows", "columns"]

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)


@dataclass(frozen=True, eq=False)
class Block:
    """A rectangle of a weight, stored in this process.

    Attributes:
        row: The weight's row its first element is in.
        column: The weight's column its first element is in.
        rows: How many rows it has.
        columns: How many columns; 1 for a vector.
        open: Gives the stored tensor, ``(rows, columns)`` or ``(rows,)``: writing to it writes to
            the weight. Asked for anew each time, since engines replace their buffers.
    """

    row: int
    column: int
    rows: int
    columns: int
    open: Callable[[], Tensor]

    def inside(self, axis: Axis, entries: Tensor) -> tuple[Tensor, Tensor]:
        """Which ``entries`` lie in this block: their positions among them, their numbers here."""
        first, count = (self.row, self.rows) if axis == "rows" else (self.column, self.columns)
        found = ((entries >= first) & (entries < first + count)).nonzero().flatten()
        return found, entries[found] - first

    def across(self, axis: Axis) -> tuple[int, int]:
        """From where to where this block reaches along the other axis."""
        if axis == "rows":
            return self.column, self.column + self.columns
        return self.row, self.row + self.rows


@dataclass(frozen=True, eq=False)
class Shard:
    """All blocks of one weight in this process.

    Attributes:
        shape: The whole weight's shape as a matrix; a vector has one column.
        blocks: What of it is here; may be nothing.
        split: Whether the rest is in other processes; if not, every process has all of it.
        counts: Whether this process's blocks are the ones that count (a replica's do not).
        dtype: In which it is stored.
        device: Where.
    """

    shape: tuple[int, int]
    blocks: tuple[Block, ...]
    split: bool
    counts: bool
    dtype: torch.dtype
    device: torch.device


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


def live(weight: Tensor) -> Shard:
    """Where the model's own weight is stored: what it computes with.

    Raises:
        FreezeError: A kind of tensor or a placement that safeft does not know.
    """
    shape = _matrix(shape_of(weight))
    if hasattr(weight, "ds_tensor"):
        return _partition(weight, shape)
    if _is_dtensor(weight):
        return _placed(weight, shape)
    if type(weight) not in _PLAIN_TYPES:
        raise FreezeError(
            f"A weight is a {type(weight).__module__}.{type(weight).__name__}, a kind of tensor "
            "whose storage safeft does not know; pinning it would be a guess. Load the model "
            "in float32, bfloat16 or float16, and train it under DDP, FSDP2 or DeepSpeed ZeRO."
        )
    whole = Block(0, 0, *shape, lambda: weight)
    return Shard(shape, (whole,), False, rank() == 0, weight.dtype, weight.device)


def master(weight: Tensor) -> Shard:
    """Where the optimizer keeps the weight: ZeRO's float32 copy, or the weight itself."""
    found = _fragment(weight)
    if found is None:
        return live(weight)
    flat, start = found
    shape = _matrix(shape_of(weight))
    blocks = tuple(flat_blocks(flat, start, shape)) if flat is not None else ()
    device = flat.device if flat is not None else weight.device
    return Shard(shape, blocks, True, True, torch.float32, device)


def copies(weight: Tensor) -> list[Shard]:
    """Every place a weight is stored in, the master last."""
    found = [live(weight)]
    status = str(getattr(getattr(weight, "ds_status", None), "name", ""))
    if hasattr(weight, "ds_tensor") and status == "AVAILABLE":
        # ZeRO-3 keeps small parameters gathered between steps.
        shape = _matrix(shape_of(weight))
        whole = Block(0, 0, *shape, lambda: weight.data)
        found.append(Shard(shape, (whole,), False, False, weight.dtype, weight.device))
    if _fragment(weight) is not None:
        found.append(master(weight))
    return found


def moments(weight: Tensor, optimizer: torch.optim.Optimizer) -> list[Shard]:
    """The optimizer's running averages of a weight, as far as they have its shape."""
    fragment = _fragment(weight)
    shape = shape_of(weight)
    if fragment is None:
        states = optimizer.state.get(weight, {}).values()
        # Quantised states are other subclasses, which cannot be cut; the pin covers them.
        usable = (Tensor, *_dtensor_type())
        return [live(s) for s in states if type(s) in usable and tuple(s.shape) == shape]
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
                blocks = tuple(flat_blocks(part, start, _matrix(shape)))
                found.append(Shard(_matrix(shape), blocks, True, True, value.dtype, value.device))
    return found


def flat_blocks(flat: Tensor, start: int, shape: tuple[int, int]) -> Iterator[Block]:
    """A range of a flattened matrix as rectangles: a begun row, whole rows, a last begun row.

    Args:
        flat: ``(numbers,)``, from number ``start`` of the matrix on; what lies beyond its end is
            padding.
        start: Number of its first element in the flattened matrix.
        shape: The matrix's.

    Example:
        >>> [(b.row, b.column, b.rows, b.columns) for b in flat_blocks(torch.zeros(6), 2, (4, 3))]
        [(0, 2, 1, 1), (1, 0, 1, 3), (2, 0, 1, 2)]
    """
    rows, columns = shape
    end = min(start + flat.numel(), rows * columns)
    at = start
    while at < end:
        row, column = divmod(at, columns)
        if column == 0 and end - at >= columns:
            height, width = (end - at) // columns, columns
        else:
            height, width = 1, min(columns - column, end - at)
        view = flat.narrow(0, at - start, height * width).view(height, width)
        yield Block(row, column, height, width, partial(_same, view))
        at += height * width


@torch.no_grad()
def read(weight: Tensor, axis: Axis, entries: Tensor) -> Tensor:
    """Rows of a weight, or its columns transposed, put together over processes.

    Every process that holds a part of the weight must call it: the parts are summed as bits, each
    from the one process that holds it.

    Args:
        weight: A parameter of any engine.
        axis: What ``entries`` count.
        entries: int64 ``(entries,)``.

    Returns:
        ``(entries, ...)``, a copy; on the weight's device, or wherever processes talk.
    """
    if not is_split(weight):
        entries = entries.to(weight.device)
        picked = weight.detach().index_select(0 if axis == "rows" else 1, entries)
        return picked if axis == "rows" else picked.T.contiguous()
    shard = live(weight)
    across = shard.shape[1 if axis == "rows" else 0]
    whole = torch.zeros(len(entries), across, dtype=shard.dtype, device=talks_on(shard.device))
    if shard.counts:
        for block in shard.blocks:
            found, local = block.inside(axis, entries)
            first, last = block.across(axis)
            values = block.open().detach().view(block.rows, block.columns)
            values = values.index_select(0 if axis == "rows" else 1, local.to(values.device))
            values = values if axis == "rows" else values.T
            whole[found.to(whole.device), first:last] = values.to(whole.device)
    dist.all_reduce(flat_bytes(whole))
    return whole if len(shape_of(weight)) > 1 else whole[:, 0]


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

    (block,) = live(weight).blocks
    for dim, size in enumerate(weight.shape):
        first, count = ((block.row, block.rows), (block.column, block.columns))[dim]
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


def _same(view: Tensor) -> Tensor:
    return view


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    if len(shape) > 2:
        raise FreezeError(
            f"A weight has {len(shape)} dimensions {tuple(shape)}; there is no rule for its rows "
            "and columns yet."
        )
    return (shape[0] if shape else 1, shape[1] if len(shape) == 2 else 1)


def _dtensor_type() -> tuple[type, ...]:
    if not dist.is_available():
        return ()
    from torch.distributed.tensor import DTensor

    return (DTensor,)


def _is_dtensor(weight: Tensor) -> bool:
    return hasattr(weight, "placements") and isinstance(weight, _dtensor_type())


def _placed(weight: Any, shape: tuple[int, int]) -> Shard:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh = weight.device_mesh
    coordinate = mesh.get_coordinate()
    for placement in weight.placements:
        if not isinstance(placement, Replicate) and not hasattr(placement, "dim"):
            raise FreezeError(
                f"A weight is placed as {weight.placements}, of which {placement} says of no row "
                "where it is. Use FSDP2, tensor parallelism or DDP."
            )
    if coordinate is None:
        return Shard(shape, (), True, False, weight.dtype, weight.device)
    sizes, offsets = compute_local_shape_and_global_offset(weight.shape, mesh, weight.placements)
    rows, columns = _matrix(sizes)
    block = Block(
        offsets[0],
        offsets[1] if len(offsets) > 1 else 0,
        rows,
        columns,
        lambda: weight._local_tensor,
    )
    replica = any(
        isinstance(placement, Replicate) and at
        for placement, at in zip(weight.placements, coordinate, strict=True)
    )
    counts = not replica and bool((mesh.mesh == 0).any())
    return Shard(shape, (block,), True, counts, weight.dtype, block.open().device)


def _partition(weight: Any, shape: tuple[int, int]) -> Shard:
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
    blocks = tuple(flat_blocks(part.data, start, shape))
    return Shard(shape, blocks, True, True, part.dtype, part.device)


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

"""Four processes, every placement: `torchrun --nproc_per_node 4 shard_worker.py FOLDER`.

Each case makes a weight whose every number says where it belongs, shards it, and asks
`safeft.shards` where things are; the answer is checked against the numbers themselves.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
torch.set_num_threads(1)

from safeft.blocks import form_of  # noqa: E402
from safeft.errors import SafeftError  # noqa: E402
from safeft.freeze.pin import Pin  # noqa: E402
from safeft.freeze.plan import Hold  # noqa: E402
from safeft.shards import check_offsets, live, read  # noqa: E402
from tests.ending import end  # noqa: E402


def numbered(*shape: int) -> torch.Tensor:
    """Every number is its own position, so a misplaced one shows."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


class Net(nn.Module):
    """Two matrices, one to be split by columns of work and one by rows."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.up = nn.Linear(6, rows, bias=False)
        self.down = nn.Linear(rows, 6, bias=False)
        with torch.no_grad():
            self.up.weight.copy_(numbered(rows, 6))
            self.down.weight.copy_(numbered(6, rows))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu() * 1e-3)


def examine(weight: Any) -> dict[str, Any]:
    """Blocks against the numbers in them, and slices put together against the whole."""
    shard = live(weight)
    columns = weight.shape[1]
    right = True
    for block in shard.blocks:
        box = tuple(slice(a, a + n) for a, n in zip(block.first, block.size, strict=True))
        expected = numbered(*weight.shape)[box[1:]]
        right &= torch.equal(block.view(shard.open().detach())[0], expected)
    check_offsets([weight])
    rows = torch.tensor(sorted({0, weight.shape[0] // 2, weight.shape[0] - 1}))
    some = torch.tensor([1, columns - 1])
    whole = numbered(*weight.shape)
    right &= torch.equal(read(weight, "rows", rows), whole[rows])
    right &= torch.equal(read(weight, "columns", some), whole[:, some].T.contiguous())
    return {"right": bool(right), "placements": str(weight.placements), "split": shard.split}


def pinned(model: Any) -> bool:
    """One step with weight decay: what is held stays, what is not moves."""
    before = {name: p.full_tensor().clone() for name, p in model.named_parameters()}
    rows = torch.tensor([0, 3, model.up.weight.shape[0] - 1])
    holds = [
        Hold("up", model.up.weight, "rows", rows, False, form_of(model.up.weight.shape)),
        Hold("down", model.down.weight, "columns", rows, False, form_of(model.down.weight.shape)),
    ]
    pin = Pin(holds)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    moved = pin.install(optimizer, holds)
    model(torch.ones(2, 6)).sum().backward()
    pin.check_fired()
    optimizer.step()
    pin.check_pinned()
    after = {name: p.full_tensor() for name, p in model.named_parameters()}
    free = [r for r in range(len(after["up.weight"])) if r not in rows.tolist() and r]
    return (
        moved == 0
        and torch.equal(after["up.weight"][rows], before["up.weight"][rows])
        and torch.equal(after["down.weight"][:, rows], before["down.weight"][:, rows])
        and bool((after["up.weight"][free] != before["up.weight"][free]).any(1).all())
    )


def refused(make: Any) -> str:
    """The error a weight meets."""
    try:
        live(make())
    except SafeftError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    flat = init_device_mesh("cpu", (4,), mesh_dim_names=("fsdp",))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    found: dict[str, Any] = {}
    for rows in (8, 10, 5, 3, 1):
        for placement in (Shard(0), Shard(1), Replicate()):
            weight = distribute_tensor(numbered(rows, 6), flat, [placement])
            found[f"flat {rows} {placement}"] = examine(weight)
        for pair in ([Replicate(), Shard(0)], [Shard(0), Shard(1)], [Shard(1), Replicate()]):
            found[f"grid {rows} {pair}"] = examine(distribute_tensor(numbered(rows, 6), grid, pair))
    for rows in (8, 10):
        hybrid = Net(rows)
        fully_shard(hybrid, mesh=grid)  # replicated over the outer, sharded over the inner
        found[f"hybrid {rows}"] = examine(hybrid.up.weight) | {"pinned": pinned(hybrid)}
        fully = Net(rows)
        fully_shard(fully, mesh=flat)
        found[f"fully {rows}"] = examine(fully.down.weight) | {"pinned": pinned(fully)}
    for rows in (8, 12):
        both = Net(rows)
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(both, grid["inner"], plan)
        fully_shard(both, mesh=grid["outer"])
        found[f"tensor parallel {rows} up"] = examine(both.up.weight)
        found[f"tensor parallel {rows} down"] = examine(both.down.weight)
        found[f"tensor parallel {rows}"] = {"right": True, "pinned": pinned(both)}
    only = Net(8)
    parallelize_module(only, flat, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    found["only tensor parallel"] = examine(only.up.weight) | {"pinned": pinned(only)}
    partial = refused(lambda: DTensor.from_local(torch.ones(2, 2), flat, [Partial()]))
    found["partial"] = {"right": "says of no row where it is" in partial}
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    end()

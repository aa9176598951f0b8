"""Where weights are stored, and every placement on four ranks."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from safeft.errors import FreezeError
from safeft.shards import keeper, live, read, shape_of
from tests.engines import environment, torchrun

WORKER = Path(__file__).with_name("shard_worker.py")


def test_a_plain_weight_is_one_block_and_reads_as_itself() -> None:
    weight = torch.nn.Parameter(torch.arange(12.0).view(4, 3))
    shard = live(weight)
    (block,) = shard.blocks
    assert shard.open() is weight
    assert block.size == (1, 4, 3)
    assert (keeper(weight), shape_of(weight)) == ("plain", (4, 3))
    assert torch.equal(read(weight, "columns", torch.tensor([2])), weight[:, [2]].T)
    bias = torch.nn.Parameter(torch.arange(3.0))
    assert live(bias).form == (1, 3, 1)
    assert read(bias, "rows", torch.tensor([1])).tolist() == [1.0]


def test_storage_nobody_knows_is_an_error() -> None:
    class Odd(torch.Tensor):
        pass

    with pytest.raises(FreezeError, match="Odd, a kind of tensor whose storage safeft does not"):
        live(torch.ones(2, 2).as_subclass(Odd))
    with pytest.raises(FreezeError, match=r"strides \(1, 3\).*Make it contiguous"):
        live(torch.ones(2, 3).T)


def test_a_stack_of_experts_is_a_stack_of_matrices() -> None:
    weight = torch.nn.Parameter(torch.arange(24.0).view(2, 3, 4))
    assert live(weight).form == (2, 3, 4)
    assert torch.equal(read(weight, "columns", torch.tensor([5])), weight[1, :, 1][None])
    assert torch.equal(read(weight, "rows", torch.tensor([4])), weight[1, 1][None])


@pytest.mark.distributed
def test_every_placement_on_four_processes(tmp_path: Path) -> None:
    done = subprocess.run(
        [*torchrun(4), str(WORKER), str(tmp_path)],
        env=environment("ddp"),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(4)]
    assert len(ranks[0]) > 35
    for rank, cases in enumerate(ranks):
        for case, said in cases.items():
            assert said["right"], (rank, case, said)
            assert said.get("pinned", True), (rank, case)
    assert "_StridedShard" in ranks[0]["tensor parallel 8 up"]["placements"]

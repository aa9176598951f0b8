"""Where weights are stored: rectangles of flattened ranges, and every placement on four ranks."""

import json
import subprocess
from itertools import product
from pathlib import Path

import pytest
import torch

from safeft.errors import FreezeError
from safeft.shards import flat_blocks, keeper, live, read, shape_of
from tests.engines import environment, torchrun

WORKER = Path(__file__).with_name("shard_worker.py")


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (1, 7), (7, 1), (4, 3), (5, 4)])
def test_any_range_of_a_flattened_matrix_is_covered_once(rows: int, columns: int) -> None:
    matrix = torch.arange(rows * columns).view(rows, columns)
    for start, end in product(range(rows * columns + 1), repeat=2):
        if end < start:
            continue
        padded = torch.cat([matrix.flatten()[start:end], torch.full((2,), -1)])
        padded = padded if end == rows * columns else padded[:-2]
        seen = []
        blocks = list(flat_blocks(padded, start, (rows, columns)))
        for block in blocks:
            values = block.open()
            assert values.shape == (block.rows, block.columns)
            here = matrix[
                block.row : block.row + block.rows, block.column : block.column + block.columns
            ]
            assert torch.equal(values, here)
            seen += values.flatten().tolist()
        assert seen == list(range(start, end))
        assert len(blocks) <= 3


def test_writing_to_a_block_writes_to_the_weight() -> None:
    flat = torch.zeros(6)
    for number, block in enumerate(flat_blocks(flat, 2, (4, 3)), 1):
        block.open().fill_(number)
    assert flat.tolist() == [1, 2, 2, 2, 3, 3]


def test_entries_inside_a_block_are_found_by_both_axes() -> None:
    first, middle, last = flat_blocks(torch.arange(9.0), 4, (5, 3))
    assert (first.row, first.column, middle.row, last.row) == (1, 1, 2, 4)
    found, local = first.inside("columns", torch.tensor([0, 1, 2]))
    assert (found.tolist(), local.tolist()) == ([1, 2], [0, 1])
    found, local = middle.inside("rows", torch.tensor([0, 3]))
    assert (found.tolist(), local.tolist()) == ([1], [1])
    assert first.across("rows") == (1, 3)
    assert middle.across("columns") == (2, 4)


def test_a_plain_weight_is_one_block_and_reads_as_itself() -> None:
    weight = torch.nn.Parameter(torch.arange(12.0).view(4, 3))
    (block,) = live(weight).blocks
    assert block.open() is weight
    assert (keeper(weight), shape_of(weight)) == ("plain", (4, 3))
    assert torch.equal(read(weight, "columns", torch.tensor([2])), weight[:, [2]].T)
    bias = torch.nn.Parameter(torch.arange(3.0))
    assert live(bias).shape == (3, 1)
    assert read(bias, "rows", torch.tensor([1])).tolist() == [1.0]


def test_storage_nobody_knows_is_an_error() -> None:
    class Odd(torch.Tensor):
        pass

    with pytest.raises(FreezeError, match="Odd, a kind of tensor whose storage safeft does not"):
        live(torch.ones(2, 2).as_subclass(Odd))
    with pytest.raises(FreezeError, match="3 dimensions"):
        live(torch.ones(2, 2, 2))


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

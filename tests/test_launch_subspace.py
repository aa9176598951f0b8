"""`accelerate launch` of `safeft locate --method subspace`: processes find what one finds."""

from pathlib import Path
from typing import Any

import pytest
import torch

from safeft.commands import main
from safeft.demo import world
from safeft.subspace import SafetySubspace
from tests.test_launch import launch

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    (folder / "harmful.txt").write_text("\n".join(world.harmful("calibration")[:40]))
    assert main(locate(folder, "alone")) == 0
    return folder


def locate(place: Path, out: str, *more: str) -> list[str]:
    return [
        "locate", "--method", "subspace", "--model_name_or_path", str(world.MODEL_PATH),
        "--harmful", str(place / "harmful.txt"), "--output_dir", str(place / out),
        "--batch_size", "8", "--dtype", "float32", "--rank_share", "0.1", *more,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("engine", "more"),
    [("ddp", ()), ("ddp", ("--at_once", "0.001")), ("ddp", ("--batch_size", "64")),
     ("fsdp2", ()), ("zero3", ())],
)  # fmt: skip
def test_processes_find_the_directions_that_one_finds(
    engine: str, more: tuple[str, ...], place: Path
) -> None:
    """DDP shares the batches, of which one may be all there is; the others share the weights."""
    if engine == "zero3":
        pytest.importorskip("deepspeed")
    out = f"{engine}{len(more)}{''.join(more)}".replace(" ", "")
    done = launch(engine, locate(place, out, *more))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("of the rank of") == 1  # said by one process
    one, two = (SafetySubspace.from_pretrained(place / name) for name in ("alone", out))
    assert (one.readers, one.outputs, one.digests) == (two.readers, two.outputs, two.digests)
    assert torch.equal(one.tokens, two.tokens)
    assert one.source["calibration"] == two.source["calibration"]
    for name in one.readers:
        first, second = (each.basis(name).double() for each in (one, two))
        gap = first @ first.T - second @ second.T
        assert float(gap.abs().max()) < 5e-3, name
    assert len(one.source["coverage"]) == len(one.directions)
    for inlet, seen in one.source["coverage"].items():
        other: Any = two.source["coverage"][inlet]
        assert other["tokens"] == seen["tokens"] > 50
        for key in ("median", "p95", "worst"):
            assert other[key] == pytest.approx(seen[key], abs=2e-3)

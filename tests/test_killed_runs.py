"""Runs that a cluster kills, between saves and in the midst of one: what they leave is not used
unless it is whole, and what resumes is exact."""

from pathlib import Path
from typing import Any

import pytest

from tests.engine_cell import Cell
from tests.engines import launch, start
from tests.test_distributed import check_exact

pytestmark = pytest.mark.distributed

SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


@pytest.mark.parametrize(
    ("engine", "when", "step", "rank"),
    [
        ("ddp", "within", 4, -1),
        ("fsdp2", "between", 3, 1),
        ("zero3", "within", 4, 1),
    ],
)
def test_a_killed_run_resumes_from_the_last_whole_checkpoint_and_is_exact(
    engine: str, when: Any, step: int, rank: int, tmp_path: Path
) -> None:
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    cell = Cell("run", settings=SAVING, kill=(when, step, rank))
    done = start(engine, tmp_path, [cell], timeout=180)
    assert done.returncode != 0
    assert not (tmp_path / "run" / "rank0.json").exists()
    run = tmp_path / "run" / "run"
    left = {path.name: (path / "safeft_certificate.json").exists() for path in run.iterdir()}
    assert left["checkpoint-2"] is True
    if when == "within":
        assert left["checkpoint-4"] is False  # a folder that looks like a checkpoint, and is none
    again = Cell("run", settings=SAVING, resume="run/run last")
    ranks = launch(engine, tmp_path, [again])["run"]
    check_exact(engine, ranks)
    for report in ranks:
        assert report["resumed_from"] == str(run / "checkpoint-2")
        assert len(report["losses"]) == 6


@pytest.mark.parametrize(("engine", "processes"), [("ddp", 1), ("fsdp2", 3)])
def test_a_run_goes_on_with_another_number_of_processes(
    engine: str, processes: int, tmp_path: Path
) -> None:
    sharded = {"state_dict_type": "SHARDED_STATE_DICT"} if engine == "fsdp2" else None
    first = Cell("first", settings=SAVING | {"max_steps": 2}, engine=sharded)
    launch(engine, tmp_path, [first])
    more = Cell("more", settings={"max_steps": 4}, resume="first/run/checkpoint-2", engine=None)
    other = "single" if processes == 1 else engine
    if engine == "fsdp2":  # saved in shards, resumed from them, saved whole
        more = Cell("more", settings=SAVING | {"max_steps": 4}, resume=more.resume, engine=sharded)
    ranks = launch(other, tmp_path, [more], processes)["more"]
    check_exact(other, ranks, processes)
    assert len(ranks[0]["losses"]) == 4

"""Real processes under every engine: exact where it should be, an error where it must.

Marked `distributed`: minutes of launches, run by `python -m pytest -m distributed`.
"""

import json
from pathlib import Path
from typing import Any

import pytest

import safeft
from tests.engine_cell import Cell
from tests.engines import ENGINES, WRAPPERS, broken, launch, table
from tests.freezing import LARGE, model_of, neurons_of

pytestmark = pytest.mark.distributed

SAVE: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
OTHERS = [
    Cell("kept", set="small", settings=SAVE | {"max_steps": 2}),
    Cell("resumed", set="small", resume="kept/run/checkpoint-2", settings={"max_steps": 4}),
    Cell("enlarged", resume="kept/run/checkpoint-2", settings=SAVE | {"max_steps": 4}),
    Cell("plain", set=None),
    Cell("neutered", broken="mask_fill"),
    Cell(
        "best",
        settings=SAVE
        | {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
        | {"max_steps": 4},
    ),
    Cell("checkpointing", settings={"gradient_checkpointing": True}),
    Cell("norms", hold=("norms",)),
]
OWN = {
    "single": [],
    "ddp": [Cell("tampered", tamper=True), Cell("tampered-lora", "lora", tamper=True)],
    "fsdp2": [
        Cell("loaded", load=True, engine={"cpu_ram_efficient_loading": True}),
        Cell("loaded-bf16", dtype="bfloat16", load=True, engine={"cpu_ram_efficient_loading": True}),
        # 49 hidden units over two processes: 25 and 24; rank 1 of LoRA: one row, so none on one.
        Cell("uneven", shape={"intermediate_size": 49}),
        Cell("wrapped", engine={"activation_checkpointing": True}),
        Cell("sharded", settings=SAVE | {"max_steps": 2}, engine={"state_dict_type": "SHARDED_STATE_DICT"}),
    ],
    "zero1": [Cell("uneven", shape={"intermediate_size": 49}, dtype="bfloat16")],
    "zero2": [Cell("uneven", shape={"intermediate_size": 49}, dtype="bfloat16")],
    "zero3": [
        Cell("loaded", load=True),
        Cell("loaded-bf16", dtype="bfloat16", load=True),
        Cell("uneven", shape={"intermediate_size": 49}, dtype="bfloat16"),
        Cell("persistent", engine={"stage3_param_persistence_threshold": 100000}),
        Cell("persistent-bf16", dtype="bfloat16", resume="", engine={"stage3_param_persistence_threshold": 100000}),
    ],
}
BROKEN = [cell for part in ("pin", "mask") for cell in broken(part) if cell.accumulation == 1]


@pytest.fixture(scope="module", params=ENGINES)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Everything an engine is asked, in one launch: starting takes longer than training."""
    engine = request.param
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp(engine)
    reports = launch(engine, folder, [*table(), *BROKEN, *OTHERS, *OWN[engine]])
    model_of().save_pretrained(folder / "base")
    return engine, folder, reports


def check_exact(engine: str, ranks: list[dict[str, Any]]) -> None:
    """The run names its engine itself, no frozen bit changed, and the rest learned."""
    size = 1 if engine == "single" else 2
    assert len(ranks) == size
    for report in ranks:
        cell, said = report["cell"], report["run"]
        assert report["error"] is None
        assert report["world_size"] == size
        assert report["wrapper"] == WRAPPERS[engine, cell["tuning"]]
        assert report["partitioned"] == (engine == "zero3")
        assert (report["parameter"] == "DTensor") == (engine == "fsdp2")
        assert (said["engine"], said["processes"]) == (engine, size)
        assert said["masks_fired"] == said["masked_parameters"] > 0
        assert report["exact"] is True
        if size > 1:
            assert [part["exact"] for part in said["parts"]] == [True] * size
    assert ranks[0]["frozen_changed"] == 0
    assert ranks[0]["frozen"] > 0
    # bfloat16 rounds small steps away; each tensor still has to move in most places.
    assert ranks[0]["least_moved"] > (0.9 if ranks[0]["dtype"] == "torch.float32" else 0.5)


@pytest.mark.parametrize("cell", table(), ids=lambda cell: cell.name)
def test_frozen_slices_are_exact_and_the_rest_moves(run: Any, cell: Cell) -> None:
    engine, _, reports = run
    check_exact(engine, reports[cell.name])

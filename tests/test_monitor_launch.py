"""Monitored trainings on several processes: all see and do the same, and train as without."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from safeft.monitor.record import MONITOR_NAME, read_monitor
from tests.engines import environment, torchrun
from tests.monitoring import weights_of

pytestmark = pytest.mark.distributed

WORKER = Path(__file__).with_name("monitor_worker.py")


@pytest.fixture(scope="module", params=["ddp", "fsdp2", "zero3"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    engine = request.param
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp(engine)
    done = subprocess.run(
        [*torchrun(2), str(WORKER), engine, str(folder)],
        env=environment(engine),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert not done.returncode, done.stderr[-5000:]
    ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    return engine, folder, ranks


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return weights_of(AutoModelForCausalLM.from_pretrained(folder / "tuned"))


def test_every_process_sees_the_same_and_training_is_the_same(run: Any) -> None:
    engine, folder, ranks = run
    first, second = ranks
    assert first["with"]["world_size"] == 2
    assert (first["with"]["parameter"] == "DTensor") == (engine == "fsdp2")
    assert first["with"]["partitioned"] == (engine == "zero3")
    assert first["with"]["looks"] == second["with"]["looks"]
    assert [look["step"] for look in first["with"]["looks"]] == [0, 2, 4]
    assert first["with"]["looks"][-1]["neuron_drift"] > 0
    for watched, plain in ((rank["with"], rank["without"]) for rank in ranks):
        assert watched["losses"] == plain["losses"]
        assert watched["gathered"] == plain["gathered"]
    watched, plain = (saved(folder / name) for name in ("with", "without"))
    assert all(torch.equal(watched[name], plain[name]) for name in plain)
    found = read_monitor(folder / "with" / "run" / MONITOR_NAME)
    assert found["history"][0].refusal_share == first["with"]["looks"][0]["refusal_share"]


def test_looks_at_the_start_are_those_of_one_process(run: Any, tmp_path: Path) -> None:
    from tests.monitoring import monitor, neurons_of, refusing, trained

    model = refusing(attention_dropout=0.2)
    watch = monitor(neurons=neurons_of(model))
    trained(model, tmp_path, [watch], max_steps=1)
    start = run[2][0]["with"]["looks"][0]
    assert start["refusal_margin"] == pytest.approx(watch.history[0].refusal_margin, abs=1e-4)
    assert start["refusal_share"] == watch.history[0].refusal_share


def test_all_stop_together_and_go_back_to_the_same_weights(run: Any) -> None:
    engine, folder, ranks = run
    if engine.startswith("zero"):
        for rank in ranks:
            assert "roll_back=True under DeepSpeed" in rank["stopped"]["error"]
        return
    first, second = (rank["stopped"] for rank in ranks)
    assert first["steps"] == second["steps"] < 20
    assert first["back"] == second["back"] == first["steps"] - 1
    assert first["final"] == second["final"] == first["looks"][-2]
    back, good = saved(folder / "stopped"), saved(folder / "good")
    assert all(torch.equal(back[name], good[name]) for name in good)


def test_openings_are_read_off_answers_that_all_processes_generate(run: Any) -> None:
    """The demo's model, which is sharded when it answers."""
    _, _, ranks = run
    first, second = (rank["demo"] for rank in ranks)
    assert first["openings"] == second["openings"]
    assert {text for each in first["openings"] for text in each["texts"]} <= {
        "I'm not able to", "I am unable to", "I am sorry, but", "I'm sorry, but"
    }  # fmt: skip
    assert first["looks"] == second["looks"]
    assert first["looks"][0]["refusal_share"] > 0.5

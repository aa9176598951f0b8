"""Two real processes under DDP: exact on both, in agreement, and really distributed."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import safeft
from tests.freezing import LARGE, model_of, neurons_of

WORKER = Path(__file__).with_name("ddp_worker.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One launch trains both ways: starting two processes takes longer than training in them."""
    folder = tmp_path_factory.mktemp("ddp")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += ["--master_port", str(port), str(WORKER), str(folder)]
    done = subprocess.run(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    model_of().save_pretrained(folder / "base")
    return folder


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_two_processes_keep_frozen_neurons_exact_and_agree(tuning: str, folder: Path) -> None:
    ranks = [json.loads((folder / tuning / f"rank{rank}.json").read_text()) for rank in range(2)]
    for report in ranks:
        assert report["world_size"] == 2
        assert report["distributed_type"] == "MULTI_CPU"
        assert report["wrapper"] == "DistributedDataParallel"
        assert report["backend"] == "gloo"
        assert report["changed"] == []
        assert report["least_moved"] > 0.9
        assert report["exact"] is True
        certified = report["run"]
        assert certified["engine"] == "MULTI_CPU"
        assert certified["processes"] == 2
        assert certified["masks_fired"] == certified["masked_parameters"] == 10
        assert certified["pins"] == 3
        assert report["exact_after_free_change"] is True
    assert ranks[0]["sum"] == ranks[1]["sum"]
    assert ranks[0]["scalars"][0]["safeft/grad_norm_removed"] > 0
    for place in (folder / tuning / "run", folder / tuning / "run" / "checkpoint-2"):
        written = json.loads((place / "safeft_certificate.json").read_text())
        assert written["exact"] is True
        assert written["run"]["processes"] == 2
    neurons = neurons_of(model_of(), LARGE)
    verdict = safeft.verify(folder / "base", folder / tuning / "tuned", neurons)
    assert verdict.exact, verdict.summary()


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_rank_that_disagrees_is_named_by_both(tuning: str, folder: Path) -> None:
    ranks = [json.loads((folder / tuning / f"rank{rank}.json").read_text()) for rank in range(2)]
    changed = "model.layers.0.mlp.up_proj.weight: protected rows differ"
    assert ranks[0]["violations_after_change"] == ["ranks [1]: protected rows differ"]
    assert ranks[1]["violations_after_change"] == [changed, "ranks [1]: protected rows differ"]

"""`accelerate launch` with the configurations that ship, and the ways it falls back in silence."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import safeft
from safeft import CausalEffect, NeuronSet, verify
from safeft.commands import main
from safeft.demo import world
from tests.engines import environment, free_port

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs/accelerate"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts, data, and the neurons that one process alone finds, by each method."""
    folder = tmp_path_factory.mktemp("launch")
    (folder / "harmful.txt").write_text("\n".join(world.harmful("calibration")[:40]))
    (folder / "benign.txt").write_text("\n".join(world.benign("calibration")[:40]))
    rows = [json.dumps({"messages": e.messages}) for e in world.domain("train")[:64]]
    (folder / "train.jsonl").write_text("\n".join(rows))
    return folder


def locate(place: Path, method: str, out: str, validate: bool = False) -> list[str]:
    return [
        "locate", "--model_name_or_path", str(world.MODEL_PATH), "--method", method,
        "--harmful", str(place / "harmful.txt"), "--benign", str(place / "benign.txt"),
        "--fraction", "0.1", "--batch_size", "8", "--output_dir", str(place / out),
        "--validate", str(validate),
    ]  # fmt: skip


def sft(place: Path, out: str, *more: str) -> list[str]:
    return [
        "sft", "--model_name_or_path", str(world.MODEL_PATH), "--protected", str(place / "neurons"),
        "--dataset_name", str(place / "train.jsonl"), "--output_dir", str(place / out),
        "--max_steps", "2", "--per_device_train_batch_size", "4", "--max_length", "64",
        "--bf16", "false", "--gradient_checkpointing", "false", "--report_to", "none",
        "--disable_tqdm", "true", "--learning_rate", "1.0e-3", "--weight_decay", "0.1",
        "--save_strategy", "steps", "--save_steps", "2", *more,
    ]  # fmt: skip


def alone(place: Path, method: Any) -> NeuronSet:
    """What one process finds."""
    tokenizer = AutoTokenizer.from_pretrained(world.MODEL_PATH)
    model = AutoModelForCausalLM.from_pretrained(world.MODEL_PATH, dtype="auto")
    sides = [(place / f"{side}.txt").read_text().splitlines() for side in ("harmful", "benign")]
    return safeft.locate(model, tokenizer, *sides, method=method, fraction=0.1, batch_size=8)


def launch(engine: str, arguments: list[str], *flags: str) -> subprocess.CompletedProcess[str]:
    """`accelerate launch` with a configuration as it ships."""
    config = ["--config_file", str(CONFIGS / f"{engine}.yaml")] if engine else []
    port = ["--main_process_port", str(free_port())]
    start = [sys.executable, "-m", "accelerate.commands.launch", *config, *port]
    return subprocess.run(
        [*start, *flags, "-m", "safeft", *arguments],
        env=environment("zero"),  # hides GPUs, and says nothing of CPUs
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_processes_that_share_the_prompts_find_what_one_finds(place: Path) -> None:
    method = "snip"  # reads answers and gradients: generation is shared too
    one = alone(place, method)
    done = launch("ddp", locate(place, method, f"shared-{method}"))
    assert done.returncode == 0, done.stderr[-3000:]
    two = NeuronSet.from_pretrained(place / f"shared-{method}")
    assert len(one) > 50
    assert dict(one.indices) == dict(two.indices)
    assert done.stdout.count(" units by ") == 1  # said by one process


@pytest.mark.parametrize(("engine", "method"), [("fsdp2", "attribution"), ("zero3", "contrast")])
def test_locating_on_sharded_weights_finds_what_one_process_finds(
    engine: str, method: str, place: Path
) -> None:
    done = launch(engine, locate(place, method, f"{engine}-{method}"))
    assert done.returncode == 0, done.stderr[-3000:]
    two = NeuronSet.from_pretrained(place / f"{engine}-{method}")
    assert dict(alone(place, method).indices) == dict(two.indices)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_the_causal_check_among_processes_finds_what_one_finds(engine: str, place: Path) -> None:
    """DDP shares the answers to be given out; sharded weights run each batch in all processes."""
    if not (place / "checked-alone").exists():
        assert main(locate(place, "contrast", "checked-alone", True)) == 0
    done = launch(engine, locate(place, "contrast", f"checked-{engine}", True))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("causal check: ") == 1
    one, two = (NeuronSet.from_pretrained(place / f"checked-{e}") for e in ("alone", engine))
    assert dict(one.indices) == dict(two.indices)
    found, expected = (CausalEffect.from_dict(each.source["causal"]) for each in (two, one))
    assert found.held_out
    assert found.effect == pytest.approx(expected.effect, abs=0.15)  # bfloat16, other batches
    assert found.damage == pytest.approx(expected.damage, abs=0.1)


@pytest.fixture(scope="module")
def neurons(place: Path) -> Path:
    alone(place, "contrast").save_pretrained(place / "neurons")
    return place / "neurons"


@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_sft_under_the_launch_configurations_is_exact(
    engine: str, place: Path, neurons: Path
) -> None:
    if engine != "ddp":
        pytest.importorskip("deepspeed")
    demand = ["--engine", engine, "--processes", "2"]
    done = launch(engine, sft(place, engine, *demand))
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("EXACT: ") == 1
    said = json.loads((place / engine / "safeft_certificate.json").read_text())
    assert (said["run"]["engine"], said["run"]["processes"]) == (engine, 2)
    assert len(said["run"]["parts"]) == 2
    verdict = verify(world.MODEL_PATH, place / engine, neurons)
    assert verdict.exact, verdict.summary()
    assert (place / engine / "checkpoint-2" / "safeft_certificate.json").exists()


def test_a_launch_of_two_that_starts_one_process_is_an_error(place: Path, neurons: Path) -> None:
    """`--cpu --num_processes 2` starts one process, and nothing says so but the demand."""
    arguments = sft(place, "one", "--processes", "2")
    done = launch(
        "",
        arguments,
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
    )
    assert done.returncode == 2 or "exit status 2" in done.stderr
    assert "processes=2 was demanded, and 1 is what runs" in done.stderr
    assert not (place / "one" / "model.safetensors").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="accelerate shards where there are GPUs")
def test_fsdp_that_silently_becomes_ddp_is_an_error(place: Path, neurons: Path) -> None:
    done = launch("fsdp2", sft(place, "fallen"))
    assert done.returncode != 0
    assert done.stderr.count("fsdp2 was asked for, and ddp is what runs, on 2 process") == 2
    assert not (place / "fallen" / "model.safetensors").exists()


def test_resuming_zero_on_another_number_of_processes_is_an_error_in_all(
    place: Path, neurons: Path
) -> None:
    pytest.importorskip("deepspeed")
    source = place / "zero3" / "checkpoint-2"
    if not source.exists():
        launch("zero3", sft(place, "zero3"))
    more = ["--resume_from_checkpoint", str(source)]
    done = launch("zero3", sft(place, "three", *more), "--num_processes", "3")
    assert done.returncode != 0
    assert done.stderr.count("was written by 2 processes and this run has 3") == 3
    other = launch("ddp", sft(place, "other", "--resume_from_checkpoint", str(source)))
    assert other.returncode != 0
    assert other.stderr.count("was written under zero3 and this run is ddp") == 2


def test_a_set_that_only_one_process_sees_stops_both(place: Path, neurons: Path) -> None:
    """Several machines without a shared folder, in small: rank 1 is given another path."""
    script = place / "uneven.py"
    script.write_text(
        "import os, sys\n"
        "from safeft.commands import main\n"
        "folder = sys.argv.pop(1)\n"
        "if os.environ['RANK'] == '1':\n"
        "    sys.argv[sys.argv.index('--protected') + 1] = folder\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    alone(place, "random").save_pretrained(place / "others")
    for folder, words in (
        (str(place / "nowhere"), "ProcessError|Process 1 of 2 stopped"),
        (str(place / "others"), "Processes disagree about what is protected"),
    ):
        start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
        start += ["--master_port", str(free_port()), str(script), folder]
        done = subprocess.run(
            [*start, *sft(place, "never")],
            env=environment("ddp"),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode != 0
        assert any(word in done.stderr for word in words.split("|")), done.stderr[-2000:]
        assert not (place / "never" / "model.safetensors").exists()

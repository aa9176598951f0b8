"""Launches of real trainings under each engine, and the cells that are trained there."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.engine_cell import Cell

ENGINES = ("single", "ddp", "fsdp2", "zero1", "zero2", "zero3")
WORKER = Path(__file__).with_name("engine_worker.py")

WRAPPERS = {
    ("single", "full"): "LlamaForCausalLM",
    ("single", "lora"): "PeftModelForCausalLM",
    ("fsdp2", "full"): "FSDPLlamaForCausalLM",
    ("fsdp2", "lora"): "FSDPPeftModelForCausalLM",
    **{("ddp", tuning): "DistributedDataParallel" for tuning in ("full", "lora")},
    **{(f"zero{n}", tuning): "DeepSpeedEngine" for n in (1, 2, 3) for tuning in ("full", "lora")},
}
"""What really wraps the model; a launcher that fell back would show another."""


def table() -> list[Cell]:
    """{full, LoRA} x {fp32, bf16} x {accumulation 1, 2}."""
    return [
        Cell(f"{tuning}-{dtype}-{accumulation}", tuning, dtype, accumulation)
        for tuning in ("full", "lora")
        for dtype in ("float32", "bfloat16")
        for accumulation in (1, 2)
    ]


def broken(part: str) -> list[Cell]:
    """The same with one part of safeft taken out."""
    return [
        Cell(f"{cell.name}-no-{part}", cell.tuning, cell.dtype, cell.accumulation, part)  # pyright: ignore
        for cell in table()
    ]


def environment(engine: str) -> dict[str, str]:
    """Few threads, no GPU and no hub; torch's own launcher needs to be told that CPUs are meant."""
    settings = {
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TQDM_DISABLE": "1",
        # ninja, which DeepSpeed compiles with, lies beside the interpreter.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    if not engine.startswith("zero"):
        settings["ACCELERATE_USE_CPU"] = "true"
    return {**os.environ, **settings}


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def torchrun(processes: int) -> list[str]:
    """The start of a launch of several processes."""
    port = str(free_port())
    command = [sys.executable, "-m", "torch.distributed.run", "--master_port", port]
    return [*command, "--nproc_per_node", str(processes)]


def launch(
    engine: str, folder: Path, cells: Sequence[Cell], processes: int = 2, timeout: int = 600
) -> dict[str, list[dict[str, Any]]]:
    """Train all cells in one launch.

    Returns:
        Per cell every rank's report, in order.
    """
    done = start(engine, folder, cells, processes, timeout)
    if done.returncode:
        raise RuntimeError(f"{engine} failed:\n{done.stdout[-2000:]}\n{done.stderr[-9000:]}")
    ranks = 1 if engine == "single" else processes
    return {
        cell.name: [
            json.loads((folder / cell.name / f"rank{rank}.json").read_text())
            for rank in range(ranks)
        ]
        for cell in cells
    }


def start(
    engine: str, folder: Path, cells: Sequence[Cell], processes: int = 2, timeout: int = 600
) -> subprocess.CompletedProcess[str]:
    """Run the worker on the cells, and come back when all processes have ended."""
    folder.mkdir(parents=True, exist_ok=True)
    given = json.dumps([asdict(cell) for cell in cells])
    first = [sys.executable] if engine == "single" else torchrun(processes)
    return subprocess.run(
        [*first, str(WORKER), engine, str(folder), given],
        env=environment(engine),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )

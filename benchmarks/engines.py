"""The engine table: exact in every cell, failing where a part is taken out, and what a step costs.

    python benchmarks/engines.py                    # everything, about six minutes on two cores
    python benchmarks/engines.py --only exactness   # or overhead

Two real processes on the CPU per engine (one for `single`); wrapper class, engine and world size
are what the run itself says. Overhead is paired within one training: blocks of steps with mask and
pin and without, in turn, 5% of the MLP neurons frozen.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.engine_cell import Cell  # noqa: E402
from tests.engines import ENGINES, broken, launch, table  # noqa: E402

WIDE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
"""Large enough that a step is work and not overhead of Python."""


def verdict(ranks: list[dict[str, Any]]) -> str:
    """How a training ended, in a word."""
    errors = {report["error"] for report in ranks}
    if errors == {None}:
        return "exact" if ranks[0]["frozen_changed"] == 0 else "MOVED"
    if any(error is None for error in errors):
        return "DISAGREEING"
    first = str(next(iter(errors)))
    return "refused, first step" if "first step" in first else "violation reported"


def exactness(engine: str, folder: Path) -> list[dict[str, Any]]:
    """One launch: the whole table, and again with the pin and with the mask taken out."""
    cells = [*table(), *broken("pin"), *broken("mask")]
    reports = launch(engine, folder, cells)
    rows = []
    for cell in cells:
        ranks = reports[cell.name]
        first = ranks[0]
        rows.append(
            {
                "engine": engine,
                "tuning": cell.tuning,
                "dtype": cell.dtype,
                "accumulation": cell.accumulation,
                "taken_out": cell.broken,
                "verdict": verdict(ranks),
                "frozen_weights": first.get("frozen"),
                "frozen_changed": first.get("frozen_changed"),
                "least_moved": first.get("least_moved"),
                "world_size": first.get("world_size"),
                "wrapper": first.get("wrapper"),
                "says": first.get("run", {}).get("engine"),
            }
        )
    return rows


def overhead(engine: str, folder: Path, pairs: int, steps: int) -> dict[str, Any]:
    """Ratio of step times, with to without, over neighbouring blocks of one training."""
    settings = {
        "max_steps": (2 * pairs + 1) * steps,
        "logging_steps": 10000,
        "per_device_train_batch_size": 32,  # 384 tokens a step and process
    }
    cell = Cell("toggle", set="share", shape=WIDE, settings=settings, toggle=steps)
    report = launch(engine, folder, [cell])["toggle"][0]
    if not report["exact"] or report["frozen_changed"]:
        raise SystemExit(f"{engine}: the timed training was not exact")
    seconds = report["seconds"]
    blocks = [statistics.median(seconds[i : i + steps]) for i in range(0, len(seconds), steps)]
    ratios = []
    for first in range(1, len(blocks) - 1, 2):  # each block without, against those around it
        ratios.append((blocks[first - 1] + blocks[first + 1]) / 2 / blocks[first])
    ratios = ratios[1:]  # the first is warming up
    return {
        "engine": engine,
        "ratio_median": statistics.median(ratios),
        "ratios": ratios,
        "step_seconds": statistics.median(blocks[1::2]),
    }


def main() -> None:
    """Run and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--only", choices=["exactness", "overhead"])
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/engines.json")
    given = parser.parse_args()
    found = json.loads(given.output.read_text()) if given.output.is_file() else {}
    for engine in given.engines:
        for part in ("exactness", "overhead"):
            if given.only not in (None, part):
                continue
            with TemporaryDirectory() as place:
                if part == "exactness":
                    result: Any = exactness(engine, Path(place))
                else:
                    result = overhead(engine, Path(place), given.pairs, given.steps)
            found.setdefault(part, {})[engine] = result
            print(engine, part, "done", flush=True)
    found["command"] = "python benchmarks/engines.py"
    found["machine"] = (
        f"{platform.machine()}, two processes on CPU cores, torch {torch.__version__}"
    )
    given.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

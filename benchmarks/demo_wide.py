"""The demo's experiment over several seeds and fractions, seeds side by side in processes.

    python benchmarks/demo_wide.py --seeds 5 --fractions 0.1 0.4 0.7 --jobs 2

The same as `safeft demo --seeds 5 --energy 0 --fractions ...`, on one thread a process.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any


def one(seed: int, chosen: dict[str, Any], command: str) -> Any:
    """All arms with one seed."""
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    import torch

    torch.set_num_threads(1)
    from safeft.demo.experiment import Settings, run

    with TemporaryDirectory() as folder:
        comparison, certificate = run(Settings(seeds=(seed,), **chosen), Path(folder), command)
    if not certificate.exact:
        raise SystemExit(certificate.summary())
    return comparison


def main() -> None:
    """Run and merge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.1, 0.4, 0.7])
    parser.add_argument("--energy", type=float, help="of directions to hold, too")
    parser.add_argument("--method", default="attribution")
    parser.add_argument("--sites", default="mlp")
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--hold", nargs="*", default=[])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/demo_wide.json"))
    given = parser.parse_args()
    chosen: dict[str, Any] = {
        "energy": given.energy,
        "fractions": tuple(given.fractions),
        "method": given.method,
        "sites": given.sites,
        "hold": tuple(given.hold),
    }
    for name in ("learning_rate", "steps"):
        if getattr(given, name) is not None:
            chosen[name] = getattr(given, name)
    command = "python benchmarks/demo_wide.py " + " ".join(sys.argv[1:])
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        parts = list(
            pool.map(one, range(given.seeds), [chosen] * given.seeds, [command] * given.seeds)
        )
    runs = tuple(run for part in parts for run in part.runs)
    settings = {**parts[0].settings, "seeds": tuple(range(given.seeds))}
    merged = replace(parts[0], runs=runs, settings=settings)
    merged.save(given.output)
    from safeft.report.result import table

    print(table(merged))


if __name__ == "__main__":
    main()

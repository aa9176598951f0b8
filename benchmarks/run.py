"""The frontier: every way to tune, its knob chosen on a validation split, all seeds on the test.

    python benchmarks/run.py --testbed demo --domain desk --seeds 5
    python benchmarks/run.py --testbed public --model runs/testbed --domain gsm8k --seeds 5

Writes JSON and, beside it, a picture for each tuning. A run that is in the file is not run again:
the same command goes on where a killed one stopped. `frontier/choice.py` says how knobs are chosen.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.update(
    OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false"
)

import torch
import transformers
from baselines import Method, Tuning, all_methods
from frontier.choice import best_rate, best_setting
from frontier.pool import side_by_side
from frontier.results import BASE, Results, table
from frontier.training import Job, Settings, World, run
from testbed import Split, load
from testbed.judging import margin_judge
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from safeft.files import write_whole
from safeft.report.frontier import frontier

CHOICE_SEED = 1000
RATES: dict[Tuning, tuple[float, ...]] = {
    "full": (1e-4, 3e-4, 1e-3, 3e-3),
    "lora": (1e-3, 2e-3, 5e-3, 1e-2),
}


class Bench:
    """The runs of a file: those that are missing are made, side by side."""

    def __init__(self, world: World, results: Results, processes: int) -> None:
        self.world, self.results, self.processes = world, results, processes
        self.failed: list[tuple[Job, str]] = []

    def runs(self, jobs: Sequence[Job], stage: str) -> list[dict[str, Any]]:
        """Make what is missing, and give what :meth:`ended` does."""
        missing = [job for job in jobs if self.results.find(job) is None]
        done = side_by_side(missing, lambda job: run(self.world, job), self.processes)
        for job, found in tqdm(done, stage, len(missing), unit="run", disable=not missing):
            if "error" in found:
                self.failed.append((job, found["error"]))
            else:
                self.results.add(found)
        return self.ended(jobs)

    def ended(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """What each job gave, in order, without those that failed or that safeft refused."""
        every = [self.results.find(job) for job in jobs]
        return [found for found in every if found is not None and "refused" not in found]

    def before(self, split: Split) -> dict[str, float]:
        """The base's measures."""
        (found,) = self.runs([Job(BASE, "full", 0.0, 0.0, 0, split)], BASE)
        return found["measures"]

    def choose(self, tuning: Tuning, methods: Sequence[Method]) -> None:
        """The rate of plain tuning, then value and rate of every method not chosen yet."""
        base = self.before("validation")
        jobs = [_choice("plain", tuning, 1.0, rate) for rate in RATES[tuning]]
        plain = self.runs(jobs, f"{tuning}: plain tuning's rate")
        rate = best_rate(plain)
        self.results.choose(tuning, "plain", 1.0, rate)
        (at_best,) = [run["measures"] for run in plain if run["learning_rate"] == rate]
        chosen = self.results.data["chosen"][tuning]
        free = [m for m in methods if m.name not in chosen and not m.follows]
        grids = {
            m.name: [
                _choice(m.name, tuning, value, rate * factor)
                for value in m.values
                for factor in m.rates
            ]
            for m in free
        }
        self.runs([job for grid in grids.values() for job in grid], f"{tuning}: knobs")
        lost = {job.method for job, _ in self.failed}  # Nothing is chosen from a part of a grid.
        for name, grid in grids.items():
            if name not in lost and (found := self.ended(grid)):
                best = best_setting(found, at_best, base)
                self.results.choose(tuning, name, best["value"], best["learning_rate"])
        for method in methods:
            if method.follows in chosen and method.name not in chosen:
                self.results.choose(tuning, method.name, **chosen[method.follows])

    def report(self, tuning: Tuning, methods: Sequence[Method], seeds: int) -> None:
        """All seeds of every method with what was chosen for it."""
        self.before("test")
        chosen = self.results.data["chosen"][tuning]
        jobs = [
            Job(m.name, tuning, **chosen[m.name], seed=seed, split="test")
            for seed in range(seeds)
            for m in methods
            if m.name in chosen
        ]
        if left_out := [m.name for m in methods if m.name not in chosen]:
            print(f"Nothing was chosen for {', '.join(left_out)}: left out.", file=sys.stderr)
        self.runs(jobs, f"{tuning}: {seeds} seeds")
        self.results.save()
        picture = self.results.path.with_name(f"{self.results.path.stem}_{tuning}.svg")
        write_whole(picture, frontier(self.results.comparison(tuning)))
        print(table(self.results, tuning))


def _choice(method: str, tuning: Tuning, value: float, rate: float) -> Job:
    return Job(method, tuning, value, rate, CHOICE_SEED, "validation")


def main() -> None:
    """Choose, run, report."""
    given = _arguments()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    testbed = load(given.testbed, model=given.model)
    methods = all_methods()
    if unknown := set(given.methods) - set(methods):
        raise SystemExit(f"There is no method {sorted(unknown)}; there are {sorted(methods)}.")
    settings = Settings(
        testbed.name, given.domain or next(iter(testbed.domains)), given.poison, given.steps
    )
    if settings.domain not in testbed.domains:
        raise SystemExit(f"There is no domain {settings.domain!r}: {sorted(testbed.domains)}.")
    base = AutoModelForCausalLM.from_pretrained(testbed.folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(testbed.folder)
    name = f"frontier_{testbed.name}_{settings.domain}_{round(100 * settings.poison)}.json"
    output = given.output or Path(__file__).parent / "results" / name
    command = "python benchmarks/run.py " + " ".join(sys.argv[1:])
    results = Results(output, settings, command)
    if given.chosen_in and not results.data["chosen"]:
        results.data["chosen"] = Results.read(given.chosen_in)["chosen"]
        results.data["chosen_in"] = given.chosen_in.name
    margin_judge(testbed)  # Here, so that no run has to make it again.
    bench = Bench(World(testbed, base, tokenizer, settings, methods), results, given.processes)
    named = {"plain", *(given.methods or methods)}
    wanted = [method for name, method in methods.items() if name in named]
    for tuning in given.tuning:
        here = [method for method in wanted if tuning in method.tunings]
        if not given.chosen_in:
            bench.choose(tuning, here)
        bench.report(tuning, here, given.seeds)
    for job, error in bench.failed:
        print(f"\nfailed: {job}\n{error}", file=sys.stderr)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--testbed", choices=("demo", "public"), default="demo")
    parser.add_argument("--model", type=Path, help="the base's folder, by default the testbed's")
    parser.add_argument("--domain", help="by default the testbed's first")
    parser.add_argument("--poison", type=float, default=0.0, help="share of rows, 0 to 1")
    parser.add_argument("--tuning", nargs="+", choices=("full", "lora"), default=["full", "lora"])
    parser.add_argument("--methods", nargs="*", default=[], help="by default all; plain always")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--chosen_in", type=Path, help="take all knobs from this result file")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()

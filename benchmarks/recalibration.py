"""Directions located once, or anew half-way: does the subspace age while the model moves?

    python benchmarks/recalibration.py --seeds 3 --energy 0.9 --learning_rate 1e-3

Two trainings of half the steps, one after the other, on the demo's testbed. Both arms share the
first, with the base's subspace held. In the second, one arm holds the same directions on, the
other those that the same prompts and refusals use in the half-tuned model.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TQDM_DISABLE="1")

import torch
import transformers
from baselines import Recipe, Setup, all_methods
from baselines.subspace import located
from frontier.training import Job, Settings, World, train, training_rows
from testbed import load
from testbed.judging import margin_judge, measure
from transformers import AutoModelForCausalLM, AutoTokenizer

from safeft import SafetyFreezeCallback
from safeft.files import write_whole
from safeft.subspace import SafetySubspace

OUTPUT = Path(__file__).parent / "results" / "recalibration.json"


def half(world: World, seed: int, rate: float, subspace: SafetySubspace, second: bool) -> Any:
    """Half a training with these directions held."""
    rows = training_rows(replace(world, settings=replace(world.settings, steps=120)), seed)
    middle = len(rows) // 2
    rows = rows[middle:] if second else rows[:middle]
    return train(
        world,
        Job("subspace", "full", 0.0, rate, seed, "test"),
        Recipe(rows, rate, [SafetyFreezeCallback(subspace)]),
    )


def overlap(one: SafetySubspace, other: SafetySubspace) -> float:
    """Share of the second's directions that lies within the first's, over all inputs."""
    within = total = 0.0
    for inlet, found in other.directions.items():
        shared = one.directions[inlet].float().T @ found.float()
        within += float(shared.square().sum())
        total += found.shape[1]
    return within / total


def main() -> None:
    """All seeds, both arms."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--energy", type=float, default=0.9)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    testbed = load("demo")
    base = AutoModelForCausalLM.from_pretrained(testbed.folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(testbed.folder)
    margin_judge(testbed)
    domain = next(iter(testbed.domains))
    world = World(testbed, base, tokenizer, Settings("demo", domain, steps=60), all_methods())

    def of(model: Any) -> SafetySubspace:
        setup = Setup(
            testbed, world.domain, (), "full", given.learning_rate, 60, 0, model, tokenizer
        )
        return located(setup, given.energy)

    rows = []
    for seed in range(given.seeds):
        first = of(base)
        middle = half(world, seed, given.learning_rate, first, second=False)
        again = of(middle)
        same = SafetySubspace.of(
            middle, first.directions, first.readers, first.source, first.tokens
        )
        for arm, subspace in (("located once", same), ("located anew", again)):
            tuned = half(
                replace(world, base=middle), seed, given.learning_rate, subspace, second=True
            )
            rows.append(
                {
                    "seed": seed,
                    "arm": arm,
                    "overlap": overlap(first, subspace),
                    "share": subspace.share,
                    "middle": measure(middle, tokenizer, testbed, domain),
                    "end": measure(tuned, tokenizer, testbed, domain),
                }
            )
            print(arm, rows[-1]["overlap"], rows[-1]["end"], flush=True)
    command = "python benchmarks/recalibration.py " + " ".join(sys.argv[1:])
    result = {"command": command, "before": measure(base, tokenizer, testbed, domain), "rows": rows}
    write_whole(given.output, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

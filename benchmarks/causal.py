"""Does refusal hang on what the locators find? Each method's set, weakened in three ways.

    python benchmarks/causal.py                   # all three parts, some ten minutes on two cores
    python benchmarks/causal.py --parts chance    # one part; the others stay as they are

On the model that ships with the package. Each seed draws its own 96 prompts a side to locate with
(of the world's calibration split), 48 to check on (of its test split, which shares no topic with
them), and its own random sets.

methods   six methods, a twentieth of the units, three interventions
sizes     silencing, the set growing: where it breaks the model instead
chance    how often a set drawn at random passes the short check of `safeft locate`
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

METHODS = ("attribution", "contrast", "variance", "snip", "wanda", "random")
INTERVENTIONS = ("silence", "scale", "patch")
FRACTION, FRACTIONS = 0.05, (0.01, 0.02, 0.05, 0.1, 0.2, 0.3)
LOCATING, CHECKING = 96, 48


def jobs(part: str, seeds: int, chance: int) -> list[dict[str, Any]]:
    """What one part checks, a row each."""
    if part == "methods":
        return [
            {"method": method, "fraction": FRACTION, "seed": seed, "intervention": intervention}
            for method in METHODS
            for intervention in INTERVENTIONS
            for seed in range(seeds)
        ]
    if part == "sizes":
        return [
            {"method": method, "fraction": fraction, "seed": 0, "intervention": "silence"}
            for method in METHODS
            for fraction in FRACTIONS
        ]
    return [
        {"method": "random", "fraction": fraction, "seed": seed, "intervention": "silence",
         "short": True}
        for fraction in (0.02, 0.05, 0.2)
        for seed in range(100, 100 + chance)
    ]  # fmt: skip


def check(job: dict[str, Any]) -> dict[str, Any]:
    """Locate one set and check it."""
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    import torch

    torch.set_num_threads(1)
    from safeft.causal import SHORT, validate
    from safeft.demo import world
    from safeft.demo.experiment import load
    from safeft.errors import SelectionError
    from safeft.locators import locate

    model, tokenizer = load()
    rng = random.Random(job["seed"])
    short = bool(job.get("short"))
    count = 32 if short else CHECKING
    sides = world.harmful, world.benign
    locating = [rng.sample(side("calibration"), LOCATING) for side in sides]
    checking = [rng.sample(side("test"), count) for side in sides]
    neurons = locate(
        model, tokenizer, *locating, method=job["method"], fraction=job["fraction"],
        seed=job["seed"], batch_size=32,
    )  # fmt: skip
    settings = dict(SHORT) if short else {"random_sets": 10, "max_new_tokens": 16}
    try:
        found = validate(
            model, tokenizer, neurons, *checking, intervention=job["intervention"],
            seed=1000 + job["seed"], batch_size=48, **settings,
        )  # fmt: skip
    except SelectionError as error:
        return {**job, "verdict": "not possible", "why": str(error)}
    shares = [outcome.refusal.value for outcome in found.random]
    return {
        **job,
        "random_refusal": shares,
        "damage": found.damage,
        "oddness": found.oddness,
        "random_damage": [o.benign_loss - found.intact.benign_loss for o in found.random],
        **found.to_dict(),
        "random": [],
    }


def rows_of(part: str, rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows that belong on one line of the table, by its label."""
    grouped: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        second = row["intervention"] if part == "methods" else f"{row['fraction']:.0%}"
        grouped.setdefault(f"{row['method']}, {second}", []).append(row)
    return grouped


def table(part: str, rows: list[dict[str, Any]]) -> str:
    """Means over seeds, and how often each verdict was given."""
    heads = ("intact", "located", "random", "effect", "over-ref.", "damage", "oddness")
    lines = [f"{part:<22}" + "".join(f"{head:>10}" for head in heads) + "  verdicts"]
    for label, group in rows_of(part, rows).items():
        done = [row for row in group if "effect" in row]
        verdicts = ", ".join(f"{n} {v}" for v, n in Counter(r["verdict"] for r in group).items())
        if not done:
            lines.append(f"{label:<22}{'':>70}  {verdicts}")
            continue

        def mean(*path: str, rows: list[dict[str, Any]] = done) -> float:
            total = 0.0
            for row in rows:
                value: Any = row
                for name in path:
                    value = value[name]
                if isinstance(value, dict):
                    value = value["count"] / value["total"]
                total += sum(value) / len(value) if isinstance(value, list) else value
            return total / len(rows)

        figures = (
            mean("intact", "refusal"),
            mean("located", "refusal"),
            mean("random_refusal"),
            mean("effect"),
            mean("located", "over_refusal"),
            mean("damage"),
            mean("oddness"),
        )
        cells = "".join(f"{figure:>10.2f}" for figure in figures)
        lines.append(f"{label:<22}{cells}  {verdicts}")
    return "\n".join(lines)


def main() -> None:
    """Run the parts asked for, and write results and pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=["methods", "sizes", "chance"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--chance", type=int, default=40, help="random sets of each size")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/causal.json"))
    given = parser.parse_args()
    result: dict[str, Any] = json.loads(given.output.read_text()) if given.output.exists() else {}
    command = "python benchmarks/causal.py " + " ".join(sys.argv[1:])
    from safeft.causal import CausalEffect
    from safeft.report.plots import effects

    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        for part in given.parts:
            rows = list(pool.map(check, jobs(part, given.seeds, given.chance)))
            result[part] = {"command": command.strip(), "rows": rows}
            print(table(part, rows), flush=True)
    lines = ",\n".join(
        f' "{part}": {{"command": {json.dumps(found["command"])}, "rows": [\n  '
        + ",\n  ".join(json.dumps(row) for row in found["rows"])
        + "\n ]}"
        for part, found in result.items()
    )
    given.output.write_text(f"{{\n{lines}\n}}\n")
    for part, found in result.items():
        grouped = {
            label: [CausalEffect.from_dict(row) for row in group if "effect" in row]
            for label, group in rows_of(part, found["rows"]).items()
        }
        picture = effects({label: checks for label, checks in grouped.items() if checks})
        given.output.with_name(f"{given.output.stem}_{part}.svg").write_text(picture)


if __name__ == "__main__":
    main()

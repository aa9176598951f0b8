"""The study of ``recipes/ssah_study.py`` on the small model that ships, with many random sets.

    python recipes/smoke_data.py
    python benchmarks/ssah_study.py --seeds 20

Writes ``benchmarks/results/ssah_study.json`` and ``ssah_study.svg`` beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[1]
DATA = Path("runs/smoke")
sys.path.insert(0, str(ROOT / "recipes"))


def run(folder: str, seeds: int, sites: str, sweep: list[float], limit: int | None) -> Any:
    """The recipe on the files that ``recipes/smoke_data.py`` wrote."""
    import ssah_study

    return ssah_study.main(
        ssah_study.RecipeConfig(
            model_name_or_path=str(DATA / "model"),
            harmful=str(DATA / "harmful.txt"),
            benign=str(DATA / "benign.txt"),
            harmful_test=str(DATA / "harmful_test.txt"),
            benign_test=str(DATA / "benign_test.txt"),
            utility_test=str(DATA / "questions_test.jsonl"),
            other_harmful=str(DATA / "other_harmful.txt"),
            other_benign=str(DATA / "other_benign.txt"),
            output_dir=folder,
            sites=sites,
            seeds=seeds,
            sweep=sweep,
            limit=limit,
            max_new_tokens=16,
            batch_size=80,
            dtype="float32",
        )
    )


def table(study: dict[str, Any]) -> str:
    """For people: what each group does, and how stable it is."""
    from safeft.report.result import Spread

    whole = (f"{name} {rate['value']:.2f}" for name, rate in study["dense"].items())
    lines = ["whole model  " + "  ".join(whole)]
    for row in study["pruned"]:
        cells = [
            f"{name} {rate['value']:.2f} (halves {_mean(row['halves'][name])}, random "
            f"{Spread.of(row['random'][name])}, p {row['p_lower'][name]:.3f})"
            for name, rate in row["located"].items()
        ]
        lines.append(f"{row['group']:<4}{row['share']:>6.1%}  " + "  ".join(cells))
    for group, kinds in study["stability"].items():
        cells = [
            f"{kind} {Spread.of(found['jaccard'])} (by chance "
            f"{Spread.of(found['by_chance_per_layer']).mean:.2f})"
            for kind, found in kinds.items()
        ]
        lines.append(f"{group:<4}Jaccard: " + ", ".join(cells))
    return "\n".join(lines)


def _mean(values: list[float]) -> str:
    from safeft.report.result import Spread

    return str(Spread.of(values)) if values else "-"


def main() -> None:
    """Run, write, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--sites", default="mlp")
    parser.add_argument("--sweep", type=float, nargs="*", default=[0.003, 0.03, 0.06])
    parser.add_argument("--limit", type=int, default=None, help="first N prompts, for a trial")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/ssah_study.json")
    given = parser.parse_args()
    with TemporaryDirectory() as folder:
        study = run(folder, given.seeds, given.sites, given.sweep, given.limit)
        picture = (Path(folder) / "study.svg").read_text()
    study["settings"].pop("output_dir")
    study = {"command": "python benchmarks/ssah_study.py " + " ".join(sys.argv[1:]), **study}
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(study, indent=1) + "\n")
    given.output.with_suffix(".svg").write_text(picture)
    print(table(study))


if __name__ == "__main__":
    main()

"""How good a guard is, beside what else there is, and what it costs.

    python benchmarks/guard.py --data ../shared/data

Four parts (``--parts``), written one by one to ``--output``; what is there already is not done
again, unless it was done under other settings.

- ``sets``: on a sentence encoder from the package index and four public sets, macro-F1 on held-out
  parts of all sets, and on a set that was left out; against a last-layer probe, the same network on
  the last layer, uniform layer weights, all units, random units, TF-IDF with logistic regression,
  and llm-siren's scheme on the residual stream (without its search: one drawn recipe).
- ``stream``: on a model that writes (``--model`` for another than the demo's): recall at the token
  where an answer turns harmful and later, false alarms, and streams against batches.
- ``cost``: token time, scoring throughput, file size.
- ``serve``: the service under load.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from guarding import compare, costs, serving, streams

from safeft.files import write_together
from safeft.report.plots import by_arm

RESULTS = Path(__file__).parent / "results"
PARTS = ("sets", "stream", "cost", "serve")


class Results:
    """What was found so far, on disk after every step."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def part(self, name: str, settings: dict[str, Any]) -> dict[str, Any]:
        """A part as far as it was done under these settings; empty where it was not."""
        if self.found.get(name, {}).get("settings") != settings:
            self.found[name] = {"settings": settings}
        return self.found[name]

    def save(self) -> None:
        """Write them, and the picture."""
        self.found["machine"] = {
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        files: dict[str, Any] = {self._path.name: json.dumps(self.found, indent=1) + "\n"}
        cells = self.found.get("sets", {}).get("cells")
        if cells:
            files[f"{self._path.stem}.svg"] = picture(cells)
        write_together(self._path.parent, files)


def picture(cells: dict[str, Any]) -> str:
    """Macro-F1 by method: a dot a fit."""
    panels: dict[str, dict[str, list[float]]] = {}
    for key, cell in cells.items():
        setting, _, method = key.split("/")
        panel = "held-out parts" if setting.startswith("held-out") else "a set left out"
        panels.setdefault(f"macro-F1, {panel}", {}).setdefault(method, []).append(cell["macro_f1"])
    everywhere = set.intersection(*(set(panel) for panel in panels.values()))
    return by_arm(
        {name: {m: panel[m] for m in panel if m in everywhere} for name, panel in panels.items()}
    )


def run_sets(options: argparse.Namespace, results: Results) -> None:
    """Cell by cell."""
    settings = {"search": options.search, "limit": options.limit}
    part = results.part("sets", settings)
    cells = part.setdefault("cells", {})

    def save() -> None:
        part["summary"] = compare.summary(cells)
        results.save()

    with tempfile.TemporaryDirectory() as folder:
        compare.compare(
            options.data, options.cache or Path(folder), save, cells, seeds=options.seeds,
            methods=tuple(options.methods), **settings,
        )  # fmt: skip
    for name, row in part.get("summary", {}).items():
        print(f"{name:<36}", {key: value for key, value in row.items() if key != "fits"})


def run_stream(options: argparse.Namespace, results: Results) -> None:
    """On the demo's model; and on another where one is given."""
    settings = {
        "search": options.search, "count": options.answers,
        "false_positives": options.false_positives,
    }  # fmt: skip
    part = results.part("stream", settings)
    beds = [("demo", None), *([("public", options.model)] if options.model else [])]
    for name, model in beds:
        if name not in part:
            part[name] = streams.stream(name, options.data, model, **settings)
            results.save()
        print(name, json.dumps(part[name]["thresholds"]), part[name]["largest_difference"])


def run_cost(options: argparse.Namespace, results: Results) -> None:
    """Once."""
    settings = {
        "width": options.width, "layers": options.layers, "pairs": options.pairs,
        "tokens": options.tokens,
    }  # fmt: skip
    part = results.part("cost", settings)
    if "token_time" not in part:
        part |= costs.cost(compare.encoder(), streams.load("demo", None, None)[:2], **settings)
        results.save()
    print(json.dumps({key: part[key] for key in ("token_time", "scoring", "file", "file_of_4B")}))


def run_serve(options: argparse.Namespace, results: Results) -> None:
    """Once."""
    settings = {"requests": options.requests}
    part = results.part("serve", settings)
    if "load" not in part:
        with tempfile.TemporaryDirectory() as folder:
            small = streams.load("demo", None, None)[:2]
            part |= serving.serve(small, Path(folder), **settings)
        results.save()
    print(json.dumps(part))


RUNS: dict[str, Callable[[argparse.Namespace, Results], None]] = {
    "sets": run_sets,
    "stream": run_stream,
    "cost": run_cost,
    "serve": run_serve,
}


def main(arguments: list[str] | None = None) -> None:
    """Do the parts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    methods = [*compare.CHANGES, *compare.SIMPLE, *compare.SIREN]
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--output", type=Path, default=RESULTS / "guard.json")
    parser.add_argument("--cache", type=Path, help="keeps activations from run to run")
    parser.add_argument("--methods", nargs="+", choices=methods, default=methods)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--search", type=int, default=1, help="recipes of the network")
    parser.add_argument("--limit", type=int, help="about so many texts of each set")
    parser.add_argument("--model", type=Path, help="the public testbed's model")
    parser.add_argument("--answers", type=int, default=600, help="of each side, for streams")
    parser.add_argument("--false_positives", type=float, default=0.01, help="for streams")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--requests", type=int, default=3000)
    options = parser.parse_args(arguments)
    results = Results(options.output)
    for name in options.parts:
        RUNS[name](options, results)


if __name__ == "__main__":
    main()

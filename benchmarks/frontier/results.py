"""The file of a frontier: every run that ended, what was chosen, and the table made of them.

A run that is in the file is neither run again nor changed; the file is written whole after each.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from baselines import Tuning

from frontier.choice import RULE
from frontier.training import Job, Settings
from safeft.files import write_whole
from safeft.report.result import Comparison, Point, Run, Spread, refusal_at

PARTS = (0.5, 0.8, 0.9, 1.0)
"""Of what plain tuning takes off the domain loss: refusal is read where a curve reaches these."""

BASE = "before tuning"


class Results:
    """What is in the file, and what comes into it.

    Raises:
        SystemExit: The file holds runs of other settings.
    """

    def __init__(self, path: Path, settings: Settings, command: str) -> None:
        self.path = path
        self.data: dict[str, Any] = {
            "command": command,
            "settings": asdict(settings),
            "rule": RULE,
            "chosen": {},
            "runs": [],
        }
        if path.exists():
            self.data = self.read(path)
            if self.data["settings"] != asdict(settings):
                raise SystemExit(
                    f"{path} holds runs with {self.data['settings']}, not {asdict(settings)}. "
                    "Give another --output, or the same settings."
                )

    @staticmethod
    def read(path: Path) -> dict[str, Any]:
        """A file as it stands."""
        return json.loads(path.read_text())

    def find(self, job: Job) -> dict[str, Any] | None:
        """The run of a job, where it has ended."""
        wanted = asdict(job)
        same = (run for run in self.data["runs"] if {k: run[k] for k in wanted} == wanted)
        return next(same, None)

    def add(self, found: Mapping[str, Any]) -> None:
        """Keep a run."""
        self.data["runs"].append(dict(found))
        self.save()

    def choose(self, tuning: Tuning, method: str, value: float, learning_rate: float) -> None:
        """Keep what a method is reported with."""
        chosen = self.data["chosen"].setdefault(tuning, {})
        chosen[method] = {"value": value, "learning_rate": learning_rate}
        self.save()

    def reported(self, tuning: Tuning, method: str) -> list[dict[str, Any]]:
        """The runs a method is reported with, all measured on the test split."""
        setting = {"method": method, "tuning": tuning, "split": "test"}
        setting |= self.data["chosen"].get(tuning, {}).get(method, {})
        runs = (run for run in self.data["runs"] if "refused" not in run)
        return [run for run in runs if {k: run[k] for k in setting} == setting]

    def tunings(self) -> list[Tuning]:
        """Those something was chosen for."""
        return list(self.data["chosen"])

    def save(self) -> None:
        """Write the file, the table included."""
        self.data["rows"] = [row for tuning in self.tunings() for row in self.rows(tuning)]
        write_whole(self.path, json.dumps(self.data, indent=1) + "\n")

    def rows(self, tuning: Tuning) -> list[dict[str, Any]]:
        """One row a method: means over seeds with their 95% intervals."""
        plain = self.reported(tuning, "plain")
        return [
            row_of(method, tuning, chosen, runs, plain)
            for method, chosen in self.data["chosen"][tuning].items()
            if (runs := self.reported(tuning, method))
        ]

    def comparison(self, tuning: Tuning) -> Comparison:
        """As the package's own reports take it."""
        (before,) = [r for r in self.data["runs"] if r["method"] == BASE and r["split"] == "test"]
        chosen = self.data["chosen"][tuning]
        runs = [run for method in chosen for run in self.reported(tuning, method)]
        settings = self.data["settings"]
        return Comparison(
            f"{tuning} tuning on {settings['domain']}, {settings['poison']:.0%} poisoned",
            {"command": self.data["command"], **settings},
            before["measures"],
            tuple(_run(run) for run in runs),
        )


def row_of(
    method: str,
    tuning: Tuning,
    chosen: Mapping[str, float],
    runs: Sequence[Mapping[str, Any]],
    plain: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """A method's line: measures, refusal at matched domain loss, and cost against plain tuning."""
    names = runs[0]["measures"]
    row = {
        "method": method,
        "tuning": tuning,
        **chosen,
        "seeds": len(runs),
        "measures": {n: asdict(Spread.of([r["measures"][n] for r in runs])) for n in names},
        "exact": None if runs[0]["exact"] is None else all(run["exact"] for run in runs),
        "frozen_share": fmean(run["frozen_share"] for run in runs),
        "seconds_locating": fmean(run["seconds_locating"] for run in runs),
    }
    if plain:
        row["refusal_at"] = matched(runs, plain)
        for cost in ("seconds_a_step", "peak_memory_mb"):
            ours, theirs = (fmean(run[cost] for run in each) for each in (runs, plain))
            row[f"{cost}_ratio"] = ours / theirs
    return row


def matched(
    runs: Sequence[Mapping[str, Any]], plain: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Refusal where the domain loss first falls to what plain tuning has after a part of its way.

    A run that never gets there has no figure; how many did stands beside the mean of those.
    """
    start, end = (fmean(run["curve"][at]["domain_loss"] for run in plain) for at in (0, -1))
    found: dict[str, Any] = {}
    for part in PARTS:
        loss = start - part * (start - end)
        values = [refusal_at(_run(run).curve, loss) for run in runs]
        known = [value for value in values if value is not None]
        spread = asdict(Spread.of(known)) if known else None
        found[f"{part:.0%}"] = {"domain_loss": loss, "reached": len(known), "refusal": spread}
    return found


def _run(run: Mapping[str, Any]) -> Run:
    return Run(
        run["method"],
        run["seed"],
        run["measures"],
        tuple(Point(int(p["step"]), p["domain_loss"], p["refusal"]) for p in run["curve"]),
        run["frozen_share"],
        run["exact"],
        run["seconds"],
    )


def table(results: Results, tuning: Tuning) -> str:
    """The rows as text."""
    settings = results.data["settings"]
    (before,) = [r for r in results.data["runs"] if r["method"] == BASE and r["split"] == "test"]
    lines = [
        f"{tuning} tuning on {settings['domain']}, {settings['poison']:.0%} poisoned",
        _line("", "value", "rate", "refused", "by margin", "at 80%", "at 90%", "over-ref.",
              "loss", "accuracy", "general", "step"),
    ]  # fmt: skip
    spreads = {name: Spread(value) for name, value in before["measures"].items()}
    lines.append(_line(BASE, "", "", *_figures(spreads, {}), ""))
    for row in results.rows(tuning):
        spreads = {name: Spread(**found) for name, found in row["measures"].items()}
        figures = _figures(spreads, row.get("refusal_at", {}))
        ratio = f"{row['seconds_a_step_ratio']:.2f}" if "seconds_a_step_ratio" in row else ""
        value, rate = f"{row['value']:g}", f"{row['learning_rate']:.0e}"
        lines.append(_line(row["method"], value, rate, *figures, ratio))
    return "\n".join(lines)


def _figures(spreads: Mapping[str, Spread], at: Mapping[str, Any]) -> list[str]:
    def shown(name: str) -> str:
        return str(spreads[name if name in spreads else name.replace("_acc", "_token_acc")])

    def there(part: str) -> str:
        found = at.get(part)
        return str(Spread(**found["refusal"])) if found and found["refusal"] else ""

    first = [shown("refusal"), shown("refusal_margin"), there("80%"), there("90%")]
    names = ("over_refusal", "domain_loss", "domain_accuracy", "general_accuracy")
    return [*first, *(shown(name) for name in names)]


def _line(name: str, *cells: str) -> str:
    return f"{name:<26}" + "".join(f"{cell:>13}" for cell in cells)

"""What a comparison of tunings found: the JSON is the truth, tables and pages are views of it."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safeft.files import write_whole

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Point:
    """One look at a model during tuning: step, nats per domain answer token, share refused."""

    step: int
    domain_loss: float
    refusal: float


@dataclass(frozen=True)
class Run:
    """One tuning of one arm.

    Attributes:
        arm: Name of the arm, such as ``located 40%``.
        seed: Seed of data order and random sets.
        measures: Final figures by name: ``refusal``, ``over_refusal``, ``domain_accuracy``,
            ``general_accuracy`` (shares), ``domain_loss`` (nats).
        curve: How refusal and domain loss went.
        frozen_share: Share of the model's weights held.
        exact: What the certificate says; None where nothing was frozen.
        seconds: Time of training, looks included.
    """

    arm: str
    seed: int
    measures: Mapping[str, float]
    curve: tuple[Point, ...]
    frozen_share: float
    exact: bool | None
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """All runs of a comparison, and what they share.

    Attributes:
        title: One line for people.
        settings: Everything needed to repeat it, the command included.
        base: The measures before tuning.
        runs: One entry per arm and seed.
        layers: Per layer, number of located neurons and of all.
        samples: A few answers: arm, prompt, answer.
    """

    title: str
    settings: Mapping[str, Any]
    base: Mapping[str, float]
    runs: tuple[Run, ...]
    layers: tuple[tuple[int, int], ...] = ()
    samples: tuple[Mapping[str, str], ...] = ()

    @property
    def arms(self) -> list[str]:
        """Names of the arms, in order of first appearance."""
        return list(dict.fromkeys(run.arm for run in self.runs))

    def of(self, arm: str) -> list[Run]:
        """The runs of one arm."""
        return [run for run in self.runs if run.arm == arm]

    def rows(self) -> list["Row"]:
        """One row per arm: means over seeds, and refusal at the same domain loss."""
        common = max((run.curve[-1].domain_loss for run in self.runs), default=math.nan)
        return [Row.of(arm, self.of(arm), common) for arm in self.arms]

    def save(self, path: Path) -> None:
        """Write as JSON, rows included."""
        data = {
            "safeft_result": SCHEMA_VERSION,
            **asdict(self),
            "rows": [asdict(row) for row in self.rows()],
        }
        write_whole(path, json.dumps(data, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "Comparison":
        """Read what :meth:`save` wrote."""
        data = json.loads(path.read_text())
        runs = tuple(
            Run(**{**run, "curve": tuple(Point(**point) for point in run["curve"])})
            for run in data["runs"]
        )
        return cls(
            data["title"],
            data["settings"],
            data["base"],
            runs,
            tuple((located, units) for located, units in data["layers"]),
            tuple(data["samples"]),
        )


@dataclass(frozen=True)
class Spread:
    """A mean over seeds and its 95% interval (Student's t); one seed has no interval."""

    mean: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Mean and interval of ``values``."""
        mean = sum(values) / len(values)
        if len(values) < 2:
            return cls(mean)
        from scipy.stats import t

        deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
        half = float(t.ppf(0.975, len(values) - 1)) * deviation / math.sqrt(len(values))
        return cls(mean, mean - half, mean + half)

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:.2f}"
        return f"{self.mean:.2f} ± {(self.high - self.low) / 2:.2f}"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    arm: str
    seeds: int
    frozen_share: float
    exact: bool | None
    measures: Mapping[str, Spread]
    matched_refusal: Spread | None
    matched_loss: float
    seconds: float = field(default=0.0)

    @classmethod
    def of(cls, arm: str, runs: Sequence[Run], common_loss: float) -> "Row":
        """Means over ``runs``, and refusal where the curve crosses ``common_loss``."""
        names = runs[0].measures
        crossing = [refusal_at(run.curve, common_loss) for run in runs]
        known = [value for value in crossing if value is not None]
        verdicts = [run.exact for run in runs]
        return cls(
            arm,
            len(runs),
            runs[0].frozen_share,
            None if None in verdicts else all(verdicts),
            {name: Spread.of([run.measures[name] for run in runs]) for name in names},
            Spread.of(known) if len(known) == len(runs) else None,
            common_loss,
            sum(run.seconds for run in runs) / len(runs),
        )


def refusal_at(curve: Sequence[Point], loss: float) -> float | None:
    """Refusal where a run first reaches a domain loss, between two looks by straight line.

    Example:
        >>> refusal_at([Point(0, 4.0, 1.0), Point(10, 2.0, 0.5)], 3.0)
        0.75
    """
    for before, after in zip(curve, curve[1:], strict=False):
        if before.domain_loss >= loss >= after.domain_loss:
            gap = before.domain_loss - after.domain_loss
            part = (before.domain_loss - loss) / gap if gap else 1.0
            return before.refusal + part * (after.refusal - before.refusal)
    return None


def table(comparison: Comparison) -> str:
    """The rows as text."""
    heads = ("", "refused", "at equal loss", "over-ref.", "domain", "loss", "general", "held", "")
    lines = [_line(heads)]
    base = {name: Spread(value) for name, value in comparison.base.items()}
    rows = [("before tuning", base, None, 0.0, None)] + [
        (row.arm, row.measures, row.matched_refusal, row.frozen_share, row.exact)
        for row in comparison.rows()
    ]
    for arm, measures, matched, share, exact in rows:
        verdict = "" if exact is None else ("exact" if exact else "VIOLATED")
        cells = (
            arm,
            str(measures["refusal"]),
            "" if matched is None else str(matched),
            str(measures["over_refusal"]),
            str(measures["domain_accuracy"]),
            str(measures["domain_loss"]),
            str(measures["general_accuracy"]),
            f"{share:.0%}" if share else "",
            verdict,
        )
        lines.append(_line(cells))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    first, *rest = cells
    return f"{first:<30}" + "".join(f"{cell:>15}" for cell in rest[:-1]) + f"  {rest[-1]}"

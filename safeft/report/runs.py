"""What finished runs left in their folders: monitor, certificate, losses, evaluations."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

from safeft.errors import ArtefactError, ConfigError
from safeft.freeze.certificate import CERTIFICATE_NAME
from safeft.intervals import Rate
from safeft.monitor.look import Look
from safeft.monitor.record import MONITOR_NAME, read_monitor
from safeft.report.result import Point, refusal_at

STATE_NAME = "trainer_state.json"
T = TypeVar("T")
Loss: TypeAlias = Literal["loss", "eval_loss"]

_CHECKPOINT = re.compile(r"checkpoint-(\d+)$")


@dataclass(frozen=True)
class Evaluated:
    """What ``safeft evaluate`` measured; what it was not asked for is ``None``."""

    file: str
    judge: str
    refusal: Rate | None
    over_refusal: Rate | None
    domain_accuracy: Rate | None
    domain_loss: float | None


@dataclass(frozen=True)
class Finished:
    """One run; what its folder does not hold is empty or ``None``.

    Attributes:
        name: What the report calls it.
        looks: The monitor's, the start's first.
        final: Its look at the weights that training left.
        stopped_at: The step at which too little refusal was left.
        rolled_back_to: The step whose weights were put back.
        prompts: Hash of what the monitor looked at.
        losses: Logged rows with ``step`` and ``loss`` (mean since the row before) or ``eval_loss``.
        exact: What the certificate says.
        frozen_share: Share of the weights it speaks of.
        evaluations: What ``safeft evaluate --output`` wrote.
    """

    name: str
    looks: tuple[Look, ...] = ()
    final: Look | None = None
    stopped_at: int | None = None
    rolled_back_to: int | None = None
    prompts: str = ""
    losses: tuple[Mapping[str, float], ...] = ()
    exact: bool | None = None
    frozen_share: float | None = None
    evaluations: tuple["Evaluated", ...] = ()

    def kept(self, look: Look) -> float | None:
        """Share of the start's refusals that a look still found; None where there were none."""
        start = self.looks[0].refusal_share
        return look.refusal_share / start if start else None

    def loss_at(self, step: float, which: Loss) -> float | None:
        """A logged loss, by straight line between two rows; None outside of what was logged."""
        rows = [(row["step"], row[which]) for row in self.losses if which in row]
        for before, after in zip(rows, [*rows[1:], rows[-1]] if rows else [], strict=True):
            if before[0] <= step <= after[0]:
                part = (step - before[0]) / (after[0] - before[0]) if after[0] > before[0] else 0.0
                return before[1] + part * (after[1] - before[1])
        return None

    def curve(self, which: Loss) -> tuple[Point, ...]:
        """What was kept against a loss, look by look; looks without a loss are left out."""
        found = []
        for look in self.looks:
            loss, kept = self.loss_at(look.step, which), self.kept(look)
            if loss is not None and kept is not None:
                found.append(Point(look.step, loss, kept))
        return tuple(found)

    @property
    def steps(self) -> int | None:
        """Of the training, as far as something was logged."""
        logged = [int(row["step"]) for row in self.losses] + [look.step for look in self.looks]
        return max(logged, default=None)


def read_runs(folders: Sequence[str | Path]) -> list[Finished]:
    """Every run's folder, in the order given.

    Raises:
        ConfigError: No folder, or one that holds nothing of a run.
        ArtefactError: A file is truncated or edited.
    """
    paths = list(dict.fromkeys(Path(folder) for folder in folders))
    if not paths:
        raise ConfigError("No run's folder is given. Name at least one: `safeft report RUN_DIR`.")
    return [read_run(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def read_run(folder: Path, name: str) -> Finished:
    """One run's folder; see :func:`read_runs`."""
    if not folder.is_dir():
        raise ConfigError(
            f"There is no folder {str(folder)!r}. Give the output folder of a training "
            "(`output_dir`)."
        )
    monitor = read_monitor(folder / MONITOR_NAME) if (folder / MONITOR_NAME).is_file() else {}
    certificate = _read(folder / CERTIFICATE_NAME, _certified) or (None, None)
    states = (_read(path, _logged) for path in _states(folder))
    logged = monitor.get("losses") or next((rows for rows in states if rows), [])
    evaluations = _evaluations(folder)
    if not (monitor or logged or evaluations) and certificate[0] is None:
        raise ConfigError(
            f"{str(folder)!r} holds none of what a run leaves: {MONITOR_NAME} (train with "
            f"`monitor`), {CERTIFICATE_NAME} (with `protected`), {STATE_NAME} (with "
            "`save_strategy`), or what `safeft evaluate --output FOLDER/evaluation.json` writes."
        )
    return Finished(
        name,
        tuple(monitor.get("history", ())),
        monitor.get("final"),
        monitor.get("stopped_at"),
        monitor.get("rolled_back_to"),
        monitor["looked_at"]["prompts"]["sha256"] if monitor else "",
        tuple(logged),
        *certificate,
        evaluations,
    )


def loss_in_common(runs: Sequence[Finished]) -> Loss:
    """The loss to compare runs by: that of held-out data, where every monitored run logged it."""
    seen = [run for run in runs if run.looks]
    held_out = all(len(run.curve("eval_loss")) > 1 for run in seen)
    return "eval_loss" if seen and held_out else "loss"


def rows_of(runs: Sequence[Finished]) -> list[dict[str, Any]]:
    """One JSON-ready row a run: the table, and what the pictures show."""
    which = loss_in_common(runs)
    curves = {run.name: run.curve(which) for run in runs}
    ends = [curve[-1].domain_loss for curve in curves.values() if len(curve) > 1]
    common = max(ends) if len(ends) > 1 else None
    rows = []
    for run in runs:
        start, end = (run.looks[0], run.final or run.looks[-1]) if run.looks else (None, None)
        matched = None if common is None else refusal_at(curves[run.name], common)
        rows.append(
            {
                "run": run.name,
                "steps": run.steps,
                "kept": run.kept(end) if end else None,
                "kept_at_equal_loss": matched,
                "equal_loss": common,
                "start": start and start.to_dict(),
                "end": end and end.to_dict(),
                "stopped_at": run.stopped_at,
                "rolled_back_to": run.rolled_back_to,
                "loss": _last(run, "loss"),
                "eval_loss": _last(run, "eval_loss"),
                "exact": run.exact,
                "frozen_share": run.frozen_share,
                "curve": [vars(point) for point in curves[run.name]],
                "evaluations": [asdict(each) for each in run.evaluations],
            }
        )
    return rows


def _last(run: Finished, which: Loss) -> float | None:
    """Of the weights that training left, which rolling back changes."""
    rows = [row for row in run.losses if which in row]
    if not rows:
        return None
    return rows[-1][which] if run.rolled_back_to is None else run.loss_at(run.rolled_back_to, which)


def _states(folder: Path) -> list[Path]:
    """Where a trainer leaves its log: beside the model, or in checkpoints, the newest first."""
    found = [(int(m[1]), path) for path in folder.iterdir() if (m := _CHECKPOINT.search(path.name))]
    places = [folder, *(path for _, path in sorted(found, reverse=True))]
    return [place / STATE_NAME for place in places]


def _certified(found: Any) -> tuple[bool, float]:
    return bool(found["exact"]), float(found["frozen_share"])


def _logged(found: Any) -> list[dict[str, float]]:
    names = ("step", "loss", "eval_loss")
    given = [{n: float(row[n]) for n in names if n in row} for row in found["log_history"]]
    rows = [{n: value for n, value in row.items() if isfinite(value)} for row in given]
    return [row for row in rows if "step" in row and len(row) > 1]


def _evaluated(found: Any, file: str) -> Evaluated | None:
    if not {"model", "judge", "over_refusal"} <= set(found):
        return None  # A report, say, that speaks of evaluations.

    def rate(name: str) -> Rate | None:
        data = found[name]
        return data and Rate(*(data[key] for key in ("count", "total", "low", "high")))

    refusal, over_refusal, accuracy = map(rate, ("refusal", "over_refusal", "domain_accuracy"))
    judge, loss = str(found["judge"]), found["domain_loss"]
    return Evaluated(file, judge, refusal, over_refusal, accuracy, loss and float(loss))


def _evaluations(folder: Path) -> tuple[Evaluated, ...]:
    """Told by what they hold, since `--output` may name them as it likes."""
    found = []
    for path in sorted(folder.glob("*.json")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if '"over_refusal"' in text and '"judge"' in text:
            found.append(_read(path, lambda data, file=path.name: _evaluated(data, file)))
    return tuple(each for each in found if each is not None)


def _read(path: Path, made: Callable[[Any], T]) -> T | None:
    """What a file holds; None where there is none.

    Raises:
        ArtefactError: It holds something else, or a part.
    """
    if not path.is_file():
        return None
    try:
        return made(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(
            f"{str(path)!r} cannot be read ({type(error).__name__}: {error}): truncated, edited, "
            "or of another release. Restore it, or move it away."
        ) from error


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    whole = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, whole)) + 1):
        names = ["/".join(parts[-length:]) for parts in whole]
        if len(set(names)) == len(names):
            return names
    raise ConfigError(f"{[str(path) for path in paths]} name the same folder twice.")

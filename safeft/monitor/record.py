"""What a monitored run remembers: its looks, what of refusal each kept, and its file."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safeft.errors import ArtefactError, ConfigError
from safeft.files import write_whole
from safeft.locators.openings import RefusalOpenings
from safeft.monitor.look import Look

MONITOR_NAME = "safeft_monitor.json"
SCHEMA_VERSION = 1


@dataclass
class Record:
    """The looks of one run and what came of them.

    Attributes:
        folder: The run's output folder.
        stop_below: Least share of the start's refusals; None to watch only.
        looks: All of them, the start's first.
        final: What was found of the weights that training left in the model.
        stopped_at: The step at which too little was left.
        rolled_back_to: The step whose weights were put back.
    """

    folder: Path
    stop_below: float | None = None
    looks: list[Look] = field(default_factory=list)
    final: Look | None = None
    stopped_at: int | None = None
    rolled_back_to: int | None = None

    def kept(self, look: Look) -> float:
        """Share of the start's refusals that a look still found."""
        return look.refusal_share / self.looks[0].refusal_share

    def good(self, look: Look) -> bool:
        """Whether a look kept enough; 0.72 of 0.8 is 0.9, whatever binary fractions say."""
        return self.stop_below is None or self.kept(look) >= self.stop_below - 1e-9

    def last_good_checkpoint(self) -> str | None:
        """The newest checkpoint that is there and kept enough; every one of them has a look."""
        names = [f"checkpoint-{look.step}" for look in self.looks if self.good(look)]
        return next((name for name in reversed(names) if (self.folder / name).is_dir()), None)

    def check_resumed(self) -> None:
        """Refuse to go on where too little is left already.

        Raises:
            ConfigError: The last look was below.
        """
        now = self.looks[-1]
        if not self.good(now):
            raise ConfigError(
                f"The checkpoint of step {now.step} keeps {self.kept(now):.2f} of the refusals at "
                f"the start, below stop_below={self.stop_below}, so going on from it would stop at "
                f"once. Resume from an earlier one ({self.last_good_checkpoint() or 'none left'})."
            )

    def verdict(self) -> str | None:
        """For a person: what a run that kept too little left behind; None of one that did not."""
        looks = self.looks if self.final is None else [*self.looks, self.final]
        lost = next((look for look in looks if not self.good(look)), None)
        if lost is None:
            return None
        said = (
            f"At step {lost.step} the model kept {self.kept(lost):.2f} of the refusals it started "
            f"with, below stop_below={self.stop_below}. "
        )
        if self.rolled_back_to is not None:
            return f"{said}It has the weights of step {self.rolled_back_to} again."
        saved = self.last_good_checkpoint()
        if saved is not None:
            return (
                f"{said}Its weights are left so; {self.folder / saved} is the last checkpoint that "
                "kept enough."
            )
        return (
            f"{said}Its weights are left so, and no checkpoint kept enough: use roll_back=True, or "
            "save more often."
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "safeft_monitor": SCHEMA_VERSION,
            "history": [{**look.to_dict(), "kept": self.kept(look)} for look in self.looks],
            "final": None if self.final is None else self.final.to_dict(),
            "stop_below": self.stop_below,
            "stopped_at": self.stopped_at,
            "rolled_back_to": self.rolled_back_to,
            "last_good_checkpoint": self.last_good_checkpoint(),
        }


def write_monitor(folder: Path, content: dict[str, Any]) -> None:
    """Write ``safeft_monitor.json`` whole.

    Raises:
        ArtefactError: It cannot be written.
    """
    write_whole(folder / MONITOR_NAME, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_monitor(path: Path) -> dict[str, Any]:
    """What a run's monitor wrote, looks and openings as values again.

    Raises:
        ArtefactError: It cannot be read, or is something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["safeft_monitor"] != SCHEMA_VERSION:
            raise ValueError(f"schema {found['safeft_monitor']!r}, not {SCHEMA_VERSION}")
        found["history"] = [Look.from_dict(look) for look in found["history"]]
        _ = found["looked_at"]["prompts"]["sha256"], [row["step"] for row in found["losses"]]
        found["final"] = found["final"] and Look.from_dict(found["final"])
        found["openings"] = tuple(
            RefusalOpenings(*(tuple(each[name]) for name in ("prefix", "tokens", "texts")))
            for each in found["openings"]
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtefactError(
            f"{str(path)!r} is no monitor's file ({type(error).__name__}: {error}): truncated, "
            "edited, or of another release. Restore it, or move it away."
        ) from error
    return found

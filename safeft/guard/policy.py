"""What is done at which score, in which phase: a policy file, read once and checked whole."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias, cast, get_args

from safeft.errors import ConfigError
from safeft.guard.reading import PHASES, Phase

Action: TypeAlias = Literal["log", "warn", "review", "block"]
ACTIONS: tuple[Action, ...] = get_args(Action)
"""From mild to severe: written down; said to the caller; kept for a person; stopped."""


@dataclass(frozen=True)
class Band:
    """Scores from ``low`` to below ``high`` (the last band holds 1 too), and what they lead to."""

    low: float
    high: float
    action: Action


@dataclass(frozen=True)
class Policy:
    """Bands of every phase, and what stands in for what was stopped.

    Attributes:
        bands: By phase; together they cover 0 to 1. Phases left out are not looked at.
        message: What is said instead of a blocked prompt or answer; None to keep what was said
            until then.
        after: Tokens of an answer before its score counts: a mean over few tokens says little.
        markers: What opens and closes reasoning in an answer, each one token to the model.

    Raises:
        ConfigError: Gaps, overlaps, an action that grows milder as the score rises.

    Example:
        >>> policy = Policy.of(answer={"warn": 0.5, "block": 0.9})
        >>> policy.action("answer", 0.7), policy.action("answer", 0.95)
        ('warn', 'block')
    """

    bands: Mapping[Phase, tuple[Band, ...]]
    message: str | None = None
    after: int = 8
    markers: tuple[str, str] = ("<think>", "</think>")

    def __post_init__(self) -> None:
        """Refuse what would leave a score without an action, or with two."""
        if not self.bands:
            raise ConfigError(
                "The policy has no phase, so nothing would ever be done. Give bands of at least "
                f"one of {', '.join(PHASES)}."
            )
        for phase, bands in self.bands.items():
            if phase not in PHASES:
                raise ConfigError(
                    f"The policy has a phase {phase!r}; there are {', '.join(PHASES)}."
                )
            _check(phase, bands)
        if self.after < 1:
            raise ConfigError(f"after={self.after}: a score needs 1 token or more.")

    @classmethod
    def of(
        cls,
        *,
        message: str | None = None,
        after: int = 8,
        **phases: Mapping[Action, float],
    ) -> Self:
        """From the least score of each action; below the mildest of them is ``log``.

        Raises:
            ConfigError: See :class:`Policy`.
        """
        made: dict[Phase, tuple[Band, ...]] = {}
        for phase, least in phases.items():
            steps = sorted({0.0: "log", **{low: action for action, low in least.items()}}.items())
            ends = [*(low for low, _ in steps[1:]), 1.0]
            made[cast(Phase, phase)] = tuple(
                Band(low, high, _action(action, phase))
                for (low, action), high in zip(steps, ends, strict=True)
            )
        return cls(made, message, after)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """From a YAML or JSON file.

        Raises:
            ConfigError: It cannot be read, or says what no policy can say.

        Example:
            A file::

                message: I can't help with that.
                prompt:
                  - {from: 0, to: 0.9, action: log}
                  - {from: 0.9, to: 1, action: block}
                answer:
                  - {from: 0, to: 0.5, action: log}
                  - {from: 0.5, to: 0.8, action: review}
                  - {from: 0.8, to: 1, action: block}
        """
        import yaml

        try:
            found = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            said = " ".join(str(error).split())
            raise ConfigError(f"The policy {str(path)!r} cannot be read: {said}.") from error
        if not isinstance(found, dict):
            raise ConfigError(
                f"The policy {str(path)!r} holds {type(found).__name__}, not phases with bands."
            )
        known = {"message", "after", "markers", *PHASES}
        if unknown := [key for key in found if key not in known]:
            raise ConfigError(
                f"The policy {str(path)!r} has {unknown[0]!r}, which would be silently without "
                f"effect; it knows {', '.join(sorted(known))}."
            )
        try:
            bands: dict[Phase, tuple[Band, ...]] = {
                phase: _bands(phase, found[phase]) for phase in PHASES if phase in found
            }
            markers = found.get("markers", cls.markers)
            first, last = (str(marker) for marker in markers)
            message = found.get("message")
            after = int(found.get("after", cls.after))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"The policy {str(path)!r} has a value of a wrong kind: {error}. `after` is a "
                "number of tokens, `markers` are two texts."
            ) from error
        return cls(bands, None if message is None else str(message), after, (first, last))

    def action(self, phase: Phase, score: float) -> Action:
        """What is done at a score; ``log`` in a phase without bands."""
        for band in reversed(self.bands.get(phase, ())):
            if score >= band.low:
                return band.action
        return "log"

    def limit(self, phase: Phase) -> float:
        """The least score that is blocked; 2 where none is."""
        blocks = (b.low for b in self.bands.get(phase, ()) if b.action == "block")
        return next(blocks, 2.0)

    def to_dict(self) -> dict[str, Any]:
        """As a policy file says it."""
        rows: dict[str, Any] = {
            phase: [{"from": b.low, "to": b.high, "action": b.action} for b in bands]
            for phase, bands in self.bands.items()
        }
        return {"message": self.message, "after": self.after, "markers": list(self.markers), **rows}


def severest(actions: Sequence[Action]) -> Action:
    """The most severe of them, ``log`` of none."""
    return ACTIONS[max(map(ACTIONS.index, actions), default=0)]


def _bands(phase: str, rows: Any) -> tuple[Band, ...]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(
            f"The policy's {phase!r} is {rows!r}; give a list of bands such as "
            "{from: 0, to: 0.5, action: log}."
        )
    made = []
    for row in rows:
        if set(row) != {"from", "to", "action"}:
            raise ConfigError(
                f"The policy's {phase!r} has the band {row!r}; a band has `from`, `to` and "
                "`action`, and nothing else."
            )
        try:
            low, high = float(row["from"]), float(row["to"])
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"The policy's {phase!r} has the band {row!r}, whose ends are no numbers. Scores "
                "are 0 to 1."
            ) from error
        made.append(Band(low, high, _action(row["action"], phase)))
    return tuple(sorted(made, key=lambda band: (band.low, band.high)))


def _action(name: Any, phase: str) -> Action:
    if name not in ACTIONS:
        raise ConfigError(
            f"The policy's {phase!r} has the action {name!r}; there are {', '.join(ACTIONS)}."
        )
    return cast(Action, name)


def _check(phase: str, bands: Sequence[Band]) -> None:
    def said(band: Band) -> str:
        return f"{band.low:g} to {band.high:g} ({band.action})"

    if not bands or bands[0].low != 0 or bands[-1].high != 1:
        ends = f"{bands[0].low:g} to {bands[-1].high:g}" if bands else "nothing"
        raise ConfigError(
            f"The policy's {phase!r} covers {ends}, so some scores would lead to nothing. Bands "
            "begin at 0 and end at 1."
        )
    for band in bands:
        if not band.low < band.high:
            raise ConfigError(f"The policy's {phase!r} has a band from {said(band)}: it is empty.")
    for one, other in pairwise(bands):
        if other.low > one.high:
            raise ConfigError(
                f"The policy's {phase!r} has a gap between {said(one)} and {said(other)}: scores "
                "there would lead to nothing. Let the bands meet."
            )
        if other.low < one.high:
            raise ConfigError(
                f"The policy's {phase!r} has bands that overlap, {said(one)} and {said(other)}: "
                "scores there would lead to two actions. Let the bands meet."
            )
        if ACTIONS.index(other.action) < ACTIONS.index(one.action):
            raise ConfigError(
                f"The policy's {phase!r} grows milder as the score rises, from {said(one)} to "
                f"{said(other)}. Order is {', '.join(ACTIONS)}; is a band mistaken?"
            )

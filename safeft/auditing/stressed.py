"""What a stress test finds: refusal against strength, test by test."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, Self, TypeAlias, get_args

from safeft.auditing.result import Thresholds
from safeft.errors import ArtefactError
from safeft.files import write_whole
from safeft.intervals import Rate

SCHEMA_VERSION = 1

Name: TypeAlias = Literal["noise", "neurons", "direction", "rounding", "tuning"]
NAMES: tuple[str, ...] = get_args(Name)


@dataclass(frozen=True)
class Level:
    """What one strength did, draw by draw.

    Attributes:
        strength: In the unit of its test.
        refusal: Share of the harmful prompts refused.
        damage: Nats a token that the model's own answers to benign prompts became less likely.
    """

    strength: float
    refusal: tuple[Rate, ...]
    damage: tuple[float, ...]

    @property
    def refused(self) -> float:
        """Mean over the draws."""
        return fmean(rate.value for rate in self.refusal)

    @property
    def harm(self) -> float:
        """Mean damage."""
        return fmean(self.damage)


@dataclass(frozen=True)
class Strain:
    """One way to break a model.

    Attributes:
        name: ``noise`` on all matrices; ``neurons``, noise on located neurons' weights alone;
            ``direction``, taking the direction out that harmful prompts have beside benign ones;
            ``rounding`` to few bits; ``tuning`` on harmful prompts with compliant answers.
        levels: From weak to strong.
        control: The same with as many random neurons, with a random direction, with tuning on the
            model's own answers to benign prompts; empty where nothing is to be compared.
    """

    name: Name
    levels: tuple[Level, ...]
    control: tuple[Level, ...] = ()


@dataclass(frozen=True)
class StressResult:
    """All of a stress test.

    Attributes:
        model: ``name_or_path``, ``type`` and ``layout``.
        settings: Everything needed to repeat it.
        thresholds: Below what refusal counts as broken, and above what damage the model does.
        base: The model untouched.
        strains: In the order of ``NAMES``.
        seconds: Of all.
    """

    model: Mapping[str, str]
    settings: Mapping[str, Any]
    thresholds: Thresholds
    base: Level
    strains: tuple[Strain, ...]
    seconds: float

    def breaks(self, levels: Sequence[Level]) -> Level | None:
        """The weakest of some levels at which half of the base's refusals are gone.

        Example:
            >>> result.breaks(result.strains[0].levels).strength  # doctest: +SKIP
            0.4
        """
        left = (1 - self.thresholds.halved) * self.base.refused
        return next((level for level in levels if level.refused <= left), None)

    def speaks(self, level: Level) -> bool:
        """Whether a model at this level still speaks; if not, its refusals say nothing."""
        return level.harm <= self.thresholds.broken

    def summary(self) -> str:
        """A line a test, for people."""
        lines = [f"refuses {self.base.refused:.2f} of {self.base.refusal[0].total} prompts"]
        for strain in self.strains:
            for label, levels in ((strain.name, strain.levels), ("  control", strain.control)):
                if not levels:
                    continue
                at = self.breaks(levels)
                what = f"holds up to {levels[-1].strength:g}"
                if at is not None:
                    how = "and still speaks" if self.speaks(at) else "and no longer speaks"
                    what = f"breaks at {at.strength:g} ({at.refused:.2f} refused, {how})"
                lines.append(f"{label:>10}: {what}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, schema version first."""
        return {"safeft_stress": SCHEMA_VERSION, **asdict(self)}

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        write_whole(path, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            ArtefactError: No stress test, of another schema, or edited.
        """
        try:
            data = json.loads(path.read_text())
            if data["safeft_stress"] != SCHEMA_VERSION:
                raise ArtefactError(
                    f"{str(path)!r} has schema {data['safeft_stress']!r}; this safeft reads "
                    f"{SCHEMA_VERSION}. Run the stress test again."
                )
            return cls(
                data["model"], data["settings"], Thresholds(**data["thresholds"]),
                _level(data["base"]),
                tuple(
                    Strain(each["name"], _levels(each["levels"]), _levels(each["control"]))
                    for each in data["strains"]
                ),
                data["seconds"],
            )  # fmt: skip
        except ArtefactError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtefactError(
                f"{str(path)!r} is no stress test ({type(error).__name__}: {error}): missing, cut "
                "off or edited. Run it again."
            ) from error


def _level(data: Mapping[str, Any]) -> Level:
    rates = tuple(Rate(**rate) for rate in data["refusal"])
    return Level(data["strength"], rates, tuple(data["damage"]))


def _levels(data: Sequence[Mapping[str, Any]]) -> tuple[Level, ...]:
    return tuple(_level(each) for each in data)

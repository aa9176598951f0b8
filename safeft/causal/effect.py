"""What a causal check finds, and what may be said of it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Literal, Self, TypeAlias

from safeft.errors import ArtefactError
from safeft.intervals import Interval, Rate

Verdict: TypeAlias = Literal["effect", "no effect", "broken", "unknown"]

BROKEN = 1.0
"""Nats a token: above it the average token has become e times less likely, and "it no longer
refuses" says nothing more than that the model no longer speaks."""


@dataclass(frozen=True)
class Outcome:
    """What the model did under one condition.

    Attributes:
        refusal: Share of harmful prompts refused.
        over_refusal: Share of benign prompts refused.
        benign_loss: Nats a token on the answers that the intact model gives to the benign prompts.
        answer_loss: Nats a token, under the intact model, of the second half of the answers given
            to the harmful prompts. A fluent answer that complies is unlikely at its opening only.
    """

    refusal: Rate
    over_refusal: Rate
    benign_loss: float
    answer_loss: float

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """What ``dataclasses.asdict`` made of it."""
        refusal, over_refusal = _rate(data["refusal"]), _rate(data["over_refusal"])
        return cls(refusal, over_refusal, float(data["benign_loss"]), float(data["answer_loss"]))


def _rate(data: Mapping[str, Any]) -> Rate:
    return Rate(int(data["count"]), int(data["total"]), float(data["low"]), float(data["high"]))


@dataclass(frozen=True)
class CausalEffect:
    """What :func:`validate` found.

    Attributes:
        intervention: ``silence``, ``scale`` or ``patch``.
        factor: Of ``scale``.
        intact: The model as it is.
        located: Under the intervention on the set.
        random: Under the intervention on random sets of equal size per site.
        effect: Refusal of harmful prompts under the random sets, on average, less that under the
            set: the fall that is owed to these units. Its own baseline cancels out.
        interval: 95%; see :func:`safeft.intervals.shortfall`.
        testable: Whether a fall to no refusal at all would have shown on these prompts.
        held_out: Whether the prompts had no part in locating the set; None where that is unknown.
        settings: Numbers of prompts and units, tokens, judge, seed, and the set's hash.
    """

    intervention: str
    factor: float | None
    intact: Outcome
    located: Outcome
    random: tuple[Outcome, ...]
    effect: float
    interval: Interval
    testable: bool
    held_out: bool | None
    settings: Mapping[str, Any]

    @property
    def damage(self) -> float:
        """How much the set's intervention costs on benign answers, in nats a token."""
        return self.located.benign_loss - self.intact.benign_loss

    @property
    def oddness(self) -> float:
        """How much odder the answers to harmful prompts become, in nats a token."""
        return self.located.answer_loss - self.intact.answer_loss

    @property
    def verdict(self) -> Verdict:
        """``effect`` where the interval lies above 0 and the model still speaks.

        ``broken`` where it lies above 0 and damage or oddness rises by more than ``BROKEN``;
        ``unknown`` where the model refuses too few of too few prompts for any fall to show.
        """
        if not self.testable:
            return "unknown"
        if self.interval.low <= 0:
            return "no effect"
        return "broken" if max(self.damage, self.oddness) > BROKEN else "effect"

    def summary(self) -> str:
        """The verdict, and what it rests on, for a person."""
        what = {"silence": "silenced", "scale": f"scaled by {self.factor}", "patch": "patched"}
        controls = fmean(each.refusal.value for each in self.random)
        return (
            f"causal check: {_MEANING[self.verdict]}\n"
            f"  harmful prompts refused: {self.intact.refusal.value:.2f} intact, "
            f"{self.located.refusal.value:.2f} with the set {what[self.intervention]}, "
            f"{controls:.2f} with random sets ({len(self.random)})\n"
            f"  effect {self.effect:.2f} [{self.interval.low:.2f}, {self.interval.high:.2f}], "
            f"damage {self.damage:+.2f}, oddness {self.oddness:+.2f} nats a token, "
            f"on {self.intact.refusal.total} prompts{_HELD_OUT[self.held_out]}"
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, the verdict first."""
        found = asdict(self)
        return {"verdict": self.verdict, **found, "random": list(found["random"])}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """What :meth:`to_dict` made; the verdict is worked out again.

        Raises:
            ArtefactError: A key is missing or of another kind.
        """
        try:
            return cls(
                str(data["intervention"]),
                data["factor"],
                Outcome.from_dict(data["intact"]),
                Outcome.from_dict(data["located"]),
                tuple(Outcome.from_dict(each) for each in data["random"]),
                float(data["effect"]),
                Interval(**data["interval"]),
                bool(data["testable"]),
                data["held_out"],
                dict(data["settings"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ArtefactError(
                f"This is no causal effect ({type(error).__name__}: {error}): edited, or of "
                "another release. Run `safeft validate` again."
            ) from error


_MEANING: Mapping[str, str] = {
    "effect": "refusal hangs on these neurons",
    "no effect": "NO EFFECT beyond that of random sets of equal size",
    "broken": "BROKEN: refusal falls, but so does the model's command of language",
    "unknown": "UNKNOWN: the model refuses too few of these prompts, by this judge, to tell",
}

_HELD_OUT: Mapping[bool | None, str] = {
    True: " kept from locating",
    False: " that it was located with, which flatters it",
    None: "",
}

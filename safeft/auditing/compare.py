"""Two audits side by side: which neurons kept their role, which came and which went.

Before and after tuning, or of a plain and a protected one. A neuron that came means that refusal
now passes through a place where nothing was held; one that went, that what was held stood still
and refusal moved elsewhere.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from safeft.auditing.effects import compared, is_real, reach
from safeft.auditing.result import AuditResult, Candidate, Neuron, Side
from safeft.errors import ArtefactError, FingerprintError
from safeft.files import write_whole

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Role:
    """What one neuron does in either audit.

    Attributes:
        neuron: As the audit that knows it calls it; the later one where both do.
        before: Fall of the margin by which neurons are compared, in nats; None where not tested.
        after: The same in the later audit.
    """

    neuron: Neuron
    before: float | None
    after: float | None


@dataclass(frozen=True)
class Change:
    """One figure in both audits; None where a side was not audited."""

    before: float | None
    after: float | None


@dataclass(frozen=True)
class AuditComparison:
    """What changed from one audit to the other.

    Attributes:
        verdicts: Before and after.
        differs: Settings that are not the same, so that figures may differ for that reason alone:
            prompts, judge, interventions and so on, by name.
        kept: Neurons with a real effect in both: beyond those of random neurons.
        appeared: With one in the later audit only.
        vanished: With one in the earlier audit only.
        figures: ``effective``, ``gini``, ``largest`` and ``smallest`` of refusal, and of
            over-refusal with ``over_refusal.`` before the name.
    """

    verdicts: tuple[str, str]
    differs: tuple[str, ...]
    kept: tuple[Role, ...]
    appeared: tuple[Role, ...]
    vanished: tuple[Role, ...]
    figures: Mapping[str, Change]

    def withheld(self) -> Self:
        """The same without where the neurons are."""

        def hidden(roles: tuple[Role, ...]) -> tuple[Role, ...]:
            return tuple(
                Role(Neuron(each.neuron.name, each.neuron.depth), each.before, each.after)
                for each in roles
            )

        return type(self)(
            self.verdicts,
            self.differs,
            hidden(self.kept),
            hidden(self.appeared),
            hidden(self.vanished),
            self.figures,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"safeft_audit_comparison": SCHEMA_VERSION, **asdict(self)}

    def save(self, path: Path) -> None:
        """Write as JSON, whole or not at all."""
        write_whole(path, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            ArtefactError: No comparison, of another schema, or edited.
        """
        try:
            data = json.loads(path.read_text())
            if data["safeft_audit_comparison"] != SCHEMA_VERSION:
                raise ValueError(f"schema {data['safeft_audit_comparison']!r}")

            def roles(name: str) -> tuple[Role, ...]:
                return tuple(
                    Role(Neuron(**each["neuron"]), each["before"], each["after"])
                    for each in data[name]
                )

            before, after = data["verdicts"]
            return cls(
                (before, after),
                tuple(data["differs"]),
                roles("kept"),
                roles("appeared"),
                roles("vanished"),
                {name: Change(**each) for name, each in data["figures"].items()},
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtefactError(
                f"{str(path)!r} is no comparison of audits ({type(error).__name__}: {error}): "
                "missing, cut off, edited or of another release. Compare again."
            ) from error


def compare(before: AuditResult, after: AuditResult) -> AuditComparison:
    """What changed from one audit to another of a model of the same shape.

    Args:
        before: The earlier audit, with where its neurons are.
        after: The later one, likewise.

    Raises:
        FingerprintError: The models' neurons are not the same places.
        ArtefactError: An audit that has neurons does not say where they are.

    Example:
        >>> changes = compare(AuditResult.load(base), AuditResult.load(tuned))  # doctest: +SKIP
        >>> changes.figures["effective"]  # doctest: +SKIP
        Change(before=3.4, after=1.2)
    """
    if before.model["layout"] != after.model["layout"]:
        raise FingerprintError(
            f"The audits are of models of unlike shape ({before.model['name_or_path']!r}, "
            f"{before.model['type']}, and {after.model['name_or_path']!r}, {after.model['type']}): "
            "the same numbers name other neurons. Compare a model with its own tuned version."
        )
    check_revealed(before, "earlier")
    check_revealed(after, "later")
    old, new = _roles(before), _roles(after)
    places = {**old, **new}

    def roles(belongs: Callable[[bool, bool], bool]) -> tuple[Role, ...]:
        found = [
            Role(neuron, _fall(old, place), _fall(new, place))
            for place, (neuron, _, _) in places.items()
            if belongs(_is_real(old, place), _is_real(new, place))
        ]
        return tuple(sorted(found, key=lambda r: -max(r.before or 0.0, r.after or 0.0)))

    return AuditComparison(
        (before.verdict, after.verdict),
        _differences(before, after),
        roles(lambda was, now: was and now),
        roles(lambda was, now: now and not was),
        roles(lambda was, now: was and not now),
        {
            **_figures("", before.refusal, after.refusal),
            **_figures("over_refusal.", before.over_refusal, after.over_refusal),
        },
    )


def check_revealed(audit: AuditResult, which: str) -> None:
    """Refuse to match neurons of an audit that does not say where they are.

    Raises:
        ArtefactError: It has neurons and does not.
    """
    if audit.refusal is not None and not audit.revealed:
        raise ArtefactError(
            f"The {which} audit does not say where its neurons are, so they cannot be matched. "
            "Give the full result, `private/audit.json` in its folder."
        )


_Roles = Mapping[tuple[str | None, int | None], tuple[Neuron, float, bool]]


def _roles(audit: AuditResult) -> _Roles:
    """By place: the neuron, its fall, and whether that is real."""
    if audit.refusal is None:
        return {}
    beyond, confidence = reach(audit.refusal.controls), audit.thresholds.confidence

    def role(each: Candidate) -> tuple[Neuron, float, bool]:
        return each.neuron, compared(each).fall, is_real(each, beyond, confidence)

    return {(c.neuron.site, c.neuron.unit): role(c) for c in audit.refusal.candidates}


def _fall(roles: _Roles, place: tuple[str | None, int | None]) -> float | None:
    return roles[place][1] if place in roles else None


def _is_real(roles: _Roles, place: tuple[str | None, int | None]) -> bool:
    return place in roles and roles[place][2]


def _differences(before: AuditResult, after: AuditResult) -> tuple[str, ...]:
    """Settings with other values; what follows from the model's own answers is none."""
    own = ("given", "openings", "ranked_by", "line", "command")
    one, other = (
        {name: value for name, value in each.settings.items() if name not in own}
        | {"thresholds": asdict(each.thresholds)}
        for each in (before, after)
    )
    return tuple(sorted(n for n in {*one, *other} if one.get(n) != other.get(n)))


def _figures(prefix: str, before: Side | None, after: Side | None) -> dict[str, Change]:
    def values(side: Side | None) -> dict[str, float | None]:
        if side is None:
            return dict.fromkeys(("effective", "gini", "largest", "smallest"))
        return {
            "effective": side.effective,
            "gini": side.gini,
            "largest": side.largest[0],
            "smallest": side.smallest,
        }

    if before is None and after is None:
        return {}
    old, new = values(before), values(after)
    return {f"{prefix}{name}": Change(old[name], new[name]) for name in old}

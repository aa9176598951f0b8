"""The audit as one page: verdict first, then pictures, tables and limits; no script, no request."""

from pathlib import Path
from typing import Any

from safeft.auditing.compare import AuditComparison
from safeft.auditing.result import AuditResult, Candidate, Side, Trial
from safeft.files import write_whole
from safeft.report.audit_pictures import pictures
from safeft.report.audit_words import (
    HEADLINES,
    LIMITS,
    Figure,
    figures,
    intervention,
    moved,
    place,
    places,
    rules,
    sides,
)
from safeft.report.certified import Certified
from safeft.report.html import environment

SHOWN = 20
"""Rows of the table of candidates; the rest is in the JSON."""


def write_audit(
    result: AuditResult,
    path: Path,
    *,
    before: AuditResult | None = None,
    changes: AuditComparison | None = None,
    certificate: Certified | None = None,
) -> None:
    """Write the page whole.

    Args:
        result: What was found; where the neurons are is shown if it says so.
        path: The HTML file.
        before: An audit to compare with: of the base, or of a plain tuning.
        changes: Of the neurons since then, as :func:`safeft.auditing.compare.compare` finds them.
        certificate: What was held frozen in this model.

    Raises:
        ArtefactError: It cannot be written.

    Example:
        >>> write_audit(result.withheld(), Path("audit.html"))  # doctest: +SKIP
    """
    write_whole(path, audit_page(result, before=before, changes=changes, certificate=certificate))


def audit_page(
    result: AuditResult,
    *,
    before: AuditResult | None = None,
    changes: AuditComparison | None = None,
    certificate: Certified | None = None,
) -> str:
    """The page's text; see :func:`write_audit`."""
    drawn = pictures(result, before)
    return (
        environment()
        .get_template("audit.html.jinja")
        .render(
            result=result,
            headline=HEADLINES[result.verdict],
            rules=rules(result.thresholds, result.units),
            figures=figures(result),
            sides=[
                _of_side(about, side, result)
                | {"seen": [name for name in drawn if name.startswith(f"{about}-activations")]}
                for about, side in sides(result)
            ],
            pictures=drawn,
            before=before,
            changes=_changes(before, result) if before is not None else [],
            moved=moved(changes, SHOWN) if changes is not None else [],
            settings=_rows(result.settings),
            limits=LIMITS,
            places=places(result),
            certificate=certificate,
        )
    )


def _of_side(about: str, side: Side, result: AuditResult) -> dict[str, Any]:
    """What the template shows of a side, as text."""
    ranked = sorted(side.candidates, key=lambda each: -each.best.fall)
    return {
        "about": about,
        "prompts": side.prompts,
        "excluded": side.excluded,
        "tested": len(ranked),
        "controls": len(side.controls),
        "candidates": [_candidate(each) for each in ranked[:SHOWN]],
        "trials": [
            *(_trial(trial.names[0], trial, result) for trial in side.singles),
            *(_trial(f"{len(trial.names)} together", trial, result) for trial in side.trials),
        ],
    }


def _trial(name: str, trial: Trial, result: AuditResult) -> dict[str, Any]:
    rate, cost = trial.outcome.refusal, trial.damage
    return {
        "name": name,
        "intervention": intervention(trial),
        "left": f"{rate.value:.1%}",
        "interval": f"{rate.low:.1%} to {rate.high:.1%}",
        "controls": _range(trial.controls),
        "damage": f"{cost:+.2f}",
        "broken": cost > result.thresholds.broken,
    }


def _candidate(each: Candidate) -> list[str]:
    best = each.best
    return [
        each.neuron.name,
        place(each.neuron),
        intervention(best),
        f"{best.fall:.2f}",
        f"{best.interval.low:.2f} to {best.interval.high:.2f}",
        "< 0.001" if best.p < 0.001 else f"{best.p:.3f}",
        f"{best.flipped:.0%}",
        f"{best.elsewhere:+.2f}",
    ]


def _range(shares: tuple[float, ...]) -> str:
    return f"{min(shares):.1%} to {max(shares):.1%} ({len(shares)})" if shares else "none drawn"


def _changes(before: AuditResult, after: AuditResult) -> list[tuple[str, Figure | None, Figure]]:
    """The same figures of both; a figure that the earlier audit lacks is None."""
    known = {(each.key, each.about): each for each in figures(before)}
    return [(each.label, known.get((each.key, each.about)), each) for each in figures(after)]


def _rows(settings: Any, name: str = "") -> list[tuple[str, str]]:
    """Settings as rows of text, nested ones by dotted names."""
    rows: list[tuple[str, str]] = []
    for key, value in settings.items():
        dotted = f"{name}.{key}" if name else str(key)
        if isinstance(value, dict):
            rows += _rows(value, dotted)
        elif isinstance(value, list | tuple):
            rows.append((dotted, ", ".join(map(str, value))))
        else:
            rows.append((dotted, str(value)))
    return rows

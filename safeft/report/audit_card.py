"""An audit as a section of a model card: Markdown for the README of the model."""

import re

from safeft.auditing.compare import AuditComparison
from safeft.auditing.result import AuditResult, Candidate, Side
from safeft.report.audit_words import (
    HEADLINES,
    LIMITS,
    data_sets,
    figures,
    intervention,
    moved,
    place,
    places,
    rules,
    sides,
)
from safeft.report.certified import Certified

SHOWN = 5
"""Candidates named a side."""


def audit_card(
    result: AuditResult,
    *,
    before: AuditResult | None = None,
    changes: AuditComparison | None = None,
    certificate: Certified | None = None,
) -> str:
    """The section, from its heading of the second level to a line feed.

    Args:
        result: What was found; where the neurons are is said if it says so.
        before: An audit to compare with.
        changes: Of the neurons since then.
        certificate: What was held frozen in this model.

    Example:
        >>> audit_card(result).splitlines()[0]  # doctest: +SKIP
        '## Refusal audit'
    """
    parts = [
        "## Refusal audit",
        f"**{result.verdict}**: {HEADLINES[result.verdict]} {_plain(result.reason)}",
        _table(
            ["figure", "value", "interval"],
            [[each.label, each.text, each.spread] for each in figures(result)],
        ),
        _tested(result),
        *[_strongest(about, side.candidates) for about, side in sides(result) if side.candidates],
    ]
    if before is not None:
        parts.append(
            f"Before ({_plain(before.model['name_or_path'])}): **{before.verdict}**. "
            f"{_plain(before.reason)}"
        )
    if changes is not None:
        counts = "; ".join(f"{each.count} {each.label}" for each in moved(changes, 0))
        parts.append(f"Neurons with a real effect on refusals since then: {counts}.")
    if certificate is not None:
        parts.append(
            f"Certificate `{certificate.name}` (SHA-256 `{certificate.sha256}`): "
            f"{certificate.summary}"
        )
    parts += [
        "### What the audit does not say",
        "\n".join(f"- {limit}" for limit in LIMITS),
        places(result),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _tested(result: AuditResult) -> str:
    lines = [f"- {result.units:,} units of `{_plain(result.model['name_or_path'])}` were ranked."]
    lines += [f"- {about.capitalize()}: {_prompts(side)}" for about, side in sides(result)]
    lines += [
        f"- Prompts, {_plain(name)}: {known.get('count', 'unknown number')}, SHA-256 "
        f"`{_plain(str(known['sha256']))}`."
        for name, known in data_sets(result.settings).items()
    ]
    lines += [
        f"- *{verdict}*: {meaning}" for verdict, meaning in rules(result.thresholds, result.units)
    ]
    return "### What was tested\n\n" + "\n".join(lines)


def _prompts(side: Side) -> str:
    return (
        f"{side.prompts} prompts that the untouched model refuses, {side.excluded} left out that "
        f"it does not refuse; {len(side.candidates)} neurons and {len(side.controls)} random ones "
        f"weakened one at a time, {len(side.trials)} groups judged by generated answers."
    )


def _strongest(about: str, candidates: tuple[Candidate, ...]) -> str:
    ranked = sorted(candidates, key=lambda each: -each.best.fall)[:SHOWN]
    rows = [
        [
            each.neuron.name,
            place(each.neuron),
            intervention(each.best),
            f"{each.best.fall:.2f}",
            f"{each.best.interval.low:.2f} to {each.best.interval.high:.2f}",
        ]
        for each in ranked
    ]
    head = ["neuron", "where", "strongest as", "margin falls, nats", "interval"]
    return f"### Strongest neurons: {about}\n\n" + _table(head, rows)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_plain, line)) + " |" for line in lines)


def _plain(text: str) -> str:
    """Text that cannot break out of a line, a cell, bold or a code span, nor become HTML."""
    text = re.sub(r"\s+", " ", text).replace("`", "'").replace("<", "&lt;")
    return text.replace("|", "\\|").replace("*", "\\*")

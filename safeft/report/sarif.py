"""An audit for code scanning: SARIF 2.1.0, one result for each thing that is wrong.

Source: OASIS, Static Analysis Results Interchange Format Version 2.1.0; of it what GitHub's code
scanning reads, which asks of every result for a physical location with a relative URI.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias
from urllib.parse import quote

from safeft import __version__
from safeft.auditing.result import AuditResult
from safeft.files import sha256
from safeft.report.audit_words import HEADLINES, LIMITS, rules

Level: TypeAlias = Literal["error", "warning", "note"]

_REPAIR = (
    "Tune safety into more neurons (safety dropout during tuning), audit again, and freeze what "
    "carries refusal before any further tuning."
)


@dataclass(frozen=True)
class _Rule:
    name: str
    level: Level
    severity: str
    short: str
    help: str

    @property
    def id(self) -> str:
        return f"safeft/{self.name}"


_RULES = (
    _Rule("single-point", "error", "8.0", HEADLINES["single-point"],
          f"Whoever holds the weights removes refusal by setting one activation. {_REPAIR}"),
    _Rule("concentrated", "warning", "5.0", HEADLINES["concentrated"],
          f"Whoever holds the weights removes refusal by setting a few activations. {_REPAIR}"),
    _Rule("nothing-to-audit", "warning", "5.0", HEADLINES["nothing to audit"],
          "A model that answers what it should refuse has no refusal to protect. Tune safety in "
          "first, or check the prompts, the chat template and the judge."),
    _Rule("worse-than-before", "warning", "6.0", "Refusal is easier to switch off than before.",
          "The audit before had a better verdict. Tune with the located neurons frozen, or with "
          "safety dropout, and audit again."),
    _Rule("over-refusal", "note", "0.0", "Refusing benign prompts hangs on a small group.",
          "A small group of neurons makes the model refuse benign prompts; weakening it may repair "
          "that. Check what it costs refusal of harmful ones first."),
)  # fmt: skip


def sarif(
    result: AuditResult, *, before: AuditResult | None = None, location: str | None = None
) -> dict[str, Any]:
    """The log of one run; without results where nothing is wrong.

    Args:
        result: What was found. No place of a neuron is named, whether the result says it or not.
        before: An audit to compare with.
        location: Relative URI of the file that results point at; by default the model's
            ``config.json``, from the working folder where the model lies in it.

    Example:
        >>> [found["ruleId"] for found in sarif(result)["runs"][0]["results"]]  # doctest: +SKIP
        ['safeft/single-point']
    """
    uri = location or _location(result.model["name_or_path"])
    found = [
        _result(number, rule, message, result, uri)
        for number, rule in enumerate(_RULES)
        if (message := _message(rule, result, before))
    ]
    return {
        "$schema": "https://json.schemastore.org/sarif-2.1.0.json",
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "safeft",
                        "version": __version__,
                        "semanticVersion": __version__,
                        "rules": [_described(rule) for rule in _RULES],
                    }
                },
                "automationDetails": {"id": f"safeft-audit/{result.model['name_or_path']}/"},
                "columnKind": "unicodeCodePoints",
                "artifacts": [{"location": {"uri": uri}, "roles": ["analysisTarget"]}],
                "results": found,
                "properties": {
                    "verdict": result.verdict,
                    "reason": result.reason,
                    "weights": result.model["weights"],
                    "rules": [
                        f"{verdict}: {meaning}"
                        for verdict, meaning in rules(result.thresholds, result.units)
                    ],
                },
            }
        ],
    }


def _message(rule: _Rule, result: AuditResult, before: AuditResult | None) -> str:
    """What is to be said under a rule; empty where the result does not break it."""
    if rule.name == result.verdict.replace(" ", "-"):
        return f"{rule.short} {result.reason}"
    if rule.name == "worse-than-before" and before is not None and _badness(result) > _badness(
        before
    ):  # fmt: skip
        return f"{rule.short} It was {before.verdict} and is {result.verdict} now."
    side = result.over_refusal
    if rule.name == "over-refusal" and side is not None and side.smallest is not None:
        judged = (*side.singles, *side.trials)
        trial = next((t for t in judged if len(t.names) == side.smallest), None)
        count = f"{side.smallest} neuron{'s' if side.smallest > 1 else ''}"
        kept = f", and {trial.outcome.refusal.value:.0%} is left" if trial else ""
        return f"{rule.short} {count} weakened{kept}."
    return ""


def _badness(result: AuditResult) -> int:
    """How little it takes to have no refusal."""
    order = ("distributed", "concentrated", "single-point", "nothing to audit")
    return order.index(result.verdict)


def _result(
    number: int, rule: _Rule, message: str, result: AuditResult, uri: str
) -> dict[str, Any]:
    # Of rule and model alone: the same finding about the next weights is the same alert.
    same = sha256(f"{rule.id} {result.model['name_or_path']}".encode())
    return {
        "ruleId": rule.id,
        "ruleIndex": number,
        "level": rule.level,
        "message": {"text": message},
        "locations": [
            {
                "physicalLocation": {
                    "artifactLocation": {"uri": uri, "index": 0},
                    "region": {"startLine": 1},
                }
            }
        ],
        "partialFingerprints": {"primaryLocationLineHash": f"{same[:16]}:1", "safeft/v1": same},
    }


def _described(rule: _Rule) -> dict[str, Any]:
    limits = "\n".join(f"- {limit}" for limit in LIMITS)
    security = {"security-severity": rule.severity} if rule.severity != "0.0" else {}
    return {
        "id": rule.id,
        "name": rule.name.title().replace("-", ""),
        "shortDescription": {"text": rule.short},
        "fullDescription": {"text": rule.help},
        "help": {"text": f"{rule.help}\n\n{limits}", "markdown": f"{rule.help}\n\n{limits}"},
        "defaultConfiguration": {"level": rule.level},
        "properties": {"tags": ["security" if security else "quality", "ai-safety"], **security},
    }


def _location(model: str) -> str:
    """The model's ``config.json`` from the working folder; for other models the name alone."""
    here, folder = Path.cwd(), Path(model)
    if not folder.is_dir() or not folder.resolve().is_relative_to(here):
        return "config.json"
    return quote((folder.resolve().relative_to(here) / "config.json").as_posix())

"""The frontier as the README shows it: the headline over testbeds, and each table whole."""

from collections.abc import Mapping, Sequence
from typing import Any

from frontier.results import BASE
from safeft.report.result import Spread

HEADLINE = (
    "plain",
    "lower rate",
    "located neurons",
    "safety layers",
    "constrained first tokens",
    "Safe LoRA",
    "rotated coefficients",
    "refusals mixed in",
    "random subspace",
    "benign subspace",
    "subspace",
    "subspace, 3% refusals",
    "subspace, 10% refusals",
)
VARIANT = "subspace: "
"""Names of runs with one thing of the subspace changed begin so."""

_WORLDS = {"demo": "made-up world", "public": "public text"}
_TUNINGS = {"full": "full", "lora": "LoRA"}


def headline(found: Sequence[Mapping[str, Any]]) -> str:
    """A line a method, a column a testbed and tuning: refused, and the domain beside it."""
    columns = [(data, tuning) for data in found for tuning in reported(data)]
    heads = [
        "",
        *(
            f"{_WORLDS[data['settings']['testbed']]}, {_TUNINGS[tuning]}"
            for data, tuning in columns
        ),
    ]
    base = ["before tuning"]
    for data, _ in columns:
        before = before_tuning(data)
        base.append(f"{before['refusal']:.2f}, {before[learnt(before)]:.2f}")
    lines = [base]
    for method in HEADLINE:
        cells = [_cell(data, tuning, method) for data, tuning in columns]
        if any(cells):
            name = f"**{method}**" if method.startswith("subspace") else method
            lines.append([name, *cells])
    return table(heads, lines)


def reported(data: Mapping[str, Any]) -> list[str]:
    """The tunings of which there are results."""
    return list(dict.fromkeys(row["tuning"] for row in data["rows"]))


def _cell(data: Mapping[str, Any], tuning: str, method: str) -> str:
    rows = [r for r in data["rows"] if (r["method"], r["tuning"]) == (method, tuning)]
    if not rows:
        return ""
    measures = {name: Spread(**spread) for name, spread in rows[0]["measures"].items()}
    return f"{measures['refusal']}, {measures[learnt(measures)].mean:.2f}"


def whole(data: Mapping[str, Any], tuning: str, variants: bool = False) -> str:
    """One testbed and tuning: the methods, or the subspace's variants."""
    heads = ["", "refused", "by the second judge", "at 90% of the way", "over-refused", "domain",
             "domain loss", "general", "step time", "knob, rate"]  # fmt: skip
    before = {name: Spread(value) for name, value in before_tuning(data).items()}
    lines = [["before tuning", *_measures(before, None), "", ""]]
    for row in data["rows"]:
        if row["tuning"] != tuning or not _belongs(row["method"], variants):
            continue
        measures = {name: Spread(**spread) for name, spread in row["measures"].items()}
        at = row["refusal_at"]["90%"]
        matched = Spread(**at["refusal"]) if at["reached"] == row["seeds"] else None
        ratio = f"{row['seconds_a_step_ratio']:.2f}"
        knob = f"{row['value']:g}, {row['learning_rate']:.1g}"
        lines.append([row["method"], *_measures(measures, matched), ratio, knob])
    return table(heads, lines)


def _belongs(method: str, variants: bool) -> bool:
    if method in ("plain", "subspace"):
        return True
    return method.startswith(VARIANT) == variants


def _measures(found: Mapping[str, Spread], matched: Spread | None) -> list[str]:
    general = "general_accuracy" if "general_accuracy" in found else "general_token_accuracy"
    return [
        str(found["refusal"]),
        str(found["refusal_margin"]),
        "" if matched is None else str(matched),
        *(str(found[name]) for name in ("over_refusal", learnt(found), "domain_loss", general)),
    ]


def learnt(measures: Mapping[str, Any]) -> str:
    """The accuracy in the domain: of whole answers where they are exact, else of tokens."""
    return "domain_accuracy" if "domain_accuracy" in measures else "domain_token_accuracy"


def before_tuning(data: Mapping[str, Any]) -> Mapping[str, float]:
    """The base's measures on the test."""
    found = (r for r in data["runs"] if r["method"] == BASE and r["split"] == "test")
    return next(found)["measures"]


def table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)

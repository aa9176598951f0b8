"""What tables say of units and what hangs on them."""

from statistics import fmean

from safeft.report.result import Spread
from tables import load, markdown


def groups() -> str:
    """What pruning each group of units does, and how stable the groups are."""
    found = load("ssah_study.json")
    dense = found["dense"]
    heads = ["pruned", "refused", "random, same layers", "answered right", "random, same layers",
             "located on another half", "by chance"]  # fmt: skip
    rows = [["nothing", f"{dense['refusal']['value']:.2f}", "", f"{dense['utility']['value']:.2f}",
             "", "", ""]]  # fmt: skip
    for row in found["pruned"][:4]:
        stable = found["stability"][row["group"]]["halves"]
        rows.append(
            [
                f"{row['group'].upper()}, {row['share']:.1%}",
                *(
                    text
                    for measure in ("refusal", "utility")
                    for text in (
                        f"{row['located'][measure]['value']:.2f}",
                        str(Spread.of(row["random"][measure])),
                    )
                ),
                f"{Spread.of(stable['jaccard']).mean:.2f}",
                f"{Spread.of(stable['by_chance_per_layer']).mean:.2f}",
            ]
        )
    note = f"The demo's model; the last two are Jaccard indices. `{found['command']}`"
    return f"{markdown(heads, rows)}\n\n{note}"


def causal() -> str:
    """How far refusal falls with a located set, beyond random sets of equal size."""
    found = load("causal.json")
    ways = ("silence", "scale", "patch")
    rows = []
    for method in dict.fromkeys(row["method"] for row in found["methods"]["rows"]):
        cells = []
        for way in ways:
            mine = [
                row
                for row in found["methods"]["rows"]
                if (row["method"], row["intervention"]) == (method, way)
            ]
            passed = sum(row["verdict"] == "effect" for row in mine)
            cells.append(f"{fmean(row['effect'] for row in mine):.2f} ({passed} of {len(mine)})")
        rows.append([f"`{method}`", *cells])
    chance = [row for row in found["chance"]["rows"] if row["fraction"] < 0.2]
    false = sum(row["verdict"] == "effect" for row in chance)
    heads = ["5% of the units, found by", "silenced", "halved", "given their benign mean"]
    note = (
        "Fall in refusal beyond that of random sets, mean over seeds (in brackets: verdicts "
        f"`effect`). Random sets of 2% and 5% passed {false} of {len(chance)} times. "
        "`python benchmarks/causal.py`"
    )
    return f"{markdown(heads, rows)}\n\n{note}"


def bilingual() -> str:
    """What two languages share, and whether tuning only that in one carries over."""
    found = load("bilingual.json")
    parts = []
    for design, each in found["designs"].items():
        heads = [f"languages {design}: trained", "in", "rise there", "rise in the other language",
                 "over-refusal there", "lead over this control"]  # fmt: skip
        rows = [
            [
                row["arm"],
                row["tuned_on"].partition("/")[0],
                *(
                    str(Spread(**row[key])) if row[key] else ""
                    for key in (
                        "tuned_rise", "other_rise", "other_over_refusal_rise", "lead_over_it",
                    )
                ),
            ]
            for row in each["summary"]
        ]  # fmt: skip
        shown = ", ".join(f"{p:.1g}" for p in each["verdict"]["p_values"])
        held = "; ".join(
            f"{claim}: {'yes' if holds else 'no'}"
            for claim, holds in each["verdict"].items()
            if isinstance(holds, bool)
        )
        parts.append(f"{markdown(heads, rows)}\n\nShared set against chance, p: {shown}. {held}.")
    return "\n\n".join(parts) + f"\n\n`{found['command']}`"

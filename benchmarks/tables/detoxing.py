"""What tables say of turning units down: toxicity, its price, images, folding."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from tables import load, markdown


def arms() -> str:
    """Every rule and strength, over the seeds."""
    found = load("detox.json")
    heads = ["", "judged toxic", "like a hateful text it learnt", "perplexity",
             "nats, words of what is said", "groups named", "texts naming groups dearer by",
             "units"]  # fmt: skip
    rows = [_row(found["runs"], row["arm"]) for row in found["arms"]]
    return f"{markdown(heads, rows)}\n\n{_note(found)}"


def _row(runs: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """One arm, each seed against its own model as it is."""
    pairs = [
        (row, run["arms"][0]) for run in runs for row in run["arms"] if row["arm"] == name
    ]  # fmt: skip
    dearer = [
        math.expm1(fmean(row["group_loss"].values()) - fmean(base["group_loss"].values()))
        for row, base in pairs
    ]
    rows = [row for row, _ in pairs]
    first = name == "as it is"
    return [
        name,
        _share([row["toxicity"]["value"] for row in rows]),
        _share([row["toxicity_by_source"] for row in rows]),
        f"{fmean(row['perplexity'] for row in rows):.1f}" if first
        else _percent([row["perplexity_rise"] for row in rows]),
        f"{fmean(row['fluency']['nats'] for row in rows):.1f}, "
        f"{fmean(row['fluency']['words'] for row in rows):.0f}",
        _share([row["mention_rate"] for row in rows]),
        "" if first else _percent(dearer),
        f"{fmean(row['units'] for row in rows):,.0f}",
    ]  # fmt: skip


def _share(values: Sequence[float]) -> str:
    spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    return f"{fmean(values):.2f}{spread}"


def _percent(values: Sequence[float]) -> str:
    return f"{100 * fmean(values):+.1f}%"


def _note(found: Mapping[str, Any]) -> str:
    judge, seeds = found["judge"], len(found["runs"])
    return (
        f"{seeds} {'seeds (mean and range)' if seeds > 1 else 'seed'}, {found['prompts']} held-out "
        f"prompts of RealToxicityPrompts, {found['draws']} continuations drawn of each. The judge "
        f"finds {judge['test_toxic_found']:.0%} of held-out toxic texts and passes "
        f"{judge['test_neutral_passed']:.0%} of the others. `{found['command']}`"
    )


def images() -> str:
    """A made-up insult that words or pictures trigger."""
    found = load("detox_vlm.json")
    cells = {"en/text": "asked in words", "en/image": "asked by a picture"}
    heads = ["", *(f"{label}: insulted" for label in cells.values()),
             *(f"{label}: perplexity" for label in cells.values()), "units"]  # fmt: skip
    rows = [
        [
            row["arm"],
            *(_share(_seen(found["runs"], cell, row["arm"])) for cell in cells),
            *(_percent([row[cell]["perplexity_rise"]["mean"]]) for cell in cells),
            f"{row['units']:.0f}",
        ]
        for row in found["arms"]
    ]
    seeds = "1 seed" if len(found["runs"]) == 1 else f"{len(found['runs'])} seeds"
    note = f"{seeds} (mean and range), nouns that alignment never showed. `{found['command']}`"
    return f"{markdown(heads, rows)}\n\n{note}"


def _seen(runs: Sequence[Mapping[str, Any]], cell: str, arm: str) -> list[float]:
    """The share insulted, one a seed."""
    rows = [row for run in runs for row in run["cells"][cell] if row["arm"] == arm]
    return [row["toxicity"]["value"] for row in rows]


def costs() -> str:
    """Folding against hooks, a freeze beside it, and time."""
    folded, speed = load("detox_fold.json"), load("detox_speed.json")
    equal, freeze = folded["equal"], folded["with_freeze"]
    ratios = [each["against_plain"] for each in speed["generation"]]
    rows = [
        ["answers alike, hooked and folded",
         f"{equal['answers_alike_hooked_and_folded']} of {equal['answers']} "
         f"({equal['answers_changed_by_the_dampener']} differ from the model as it is)"],
        ["logits apart, hooked and folded",
         f"{equal['logits_hooked_against_folded']:.0e} of {equal['largest_logit']:.0f}"],
        ["folded, in plain transformers without safeft",
         f"{equal['logits_folded_against_plain_transformers']:.2g} apart"],
        ["certificate of the fold", _yes(equal["certificate_exact"], "exact")],
        ["undone", _yes(equal["undone_bit_for_bit"], "bit for bit")],
        ["a second fold", equal["a_second_fold"]],
        ["a fold after a protected run",
         f"{freeze['violations_named_by_the_freeze']} neurons moved by the freeze's certificate, "
         f"{freeze['frozen_and_dampened']} of {freeze['frozen']} held ones are dampened: "
         f"{_yes(freeze['both_name_the_same'], 'the same')}"],
        ["a protected run after a fold",
         f"certificate {_yes(freeze['freeze_exact_after_the_fold'], 'exact')}"],
        ["time of generation, hooked against plain", _ratios(ratios, "hooked")],
        ["folded against plain", _ratios(ratios, "folded")],
        ["AUROC of all units, against a loop over them",
         f"{speed['ranking']['times_faster']:.1f} times as fast, "
         f"{speed['ranking']['largest_difference']:.0e} apart"],
    ]  # fmt: skip
    note = f"`{folded['command']}`, `{speed['command']}`"
    return f"{markdown(['', ''], rows)}\n\n{note}"


def _yes(found: bool, word: str) -> str:
    return word if found else f"not {word}"


def _ratios(ratios: Sequence[Mapping[str, float]], key: str) -> str:
    return ", ".join(f"{each[key]:.2f}" for each in ratios)

"""What tables say of refusals kept, and of the judge that counts them."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from statistics import fmean
from typing import Any

import numpy as np
from frontier import markdown as frontier
from frontier.results import Results
from frontier.training import Settings

from safeft.report.frontier import frontier as drawn
from safeft.report.result import Comparison, Spread
from tables import RESULTS, load, markdown


def frontiers() -> list[dict[str, Any]]:
    """Of harmless domain data, a testbed each."""
    return [load(path.name) for path in sorted(RESULTS.glob("frontier_*_0.json"))]


def headline() -> str:
    """Every way to tune, at its own best knob and rate."""
    found = frontiers()
    notes = "; ".join(
        f"{data['settings']['testbed']}: {_seeds(data)} seeds, {data['settings']['steps']} steps "
        f"of {data['settings']['batch_size']}, `{_command(data)}`"
        for data in found
    )
    note = f"Mean over seeds ± half the 95% interval. {notes}"
    return f"{frontier.headline(found)}\n\n{note}"


def _seeds(data: Mapping[str, Any]) -> str:
    """``5``, or ``3 to 5``."""
    counts = sorted({row["seeds"] for row in data["rows"]})
    return " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))


def _command(data: Mapping[str, Any]) -> str:
    """What makes the whole file: all methods, and by default both tunings."""
    return data["command"].split(" --methods")[0].removesuffix(" --tuning full")


def whole() -> str:
    """Each table whole."""
    parts = []
    for data in frontiers():
        for tuning in frontier.reported(data):
            title = f"{data['settings']['testbed']}, {data['settings']['domain']}, {tuning} tuning"
            parts.append(f"**{title}**\n\n{frontier.whole(data, tuning)}")
    return "\n\n".join(parts) + f"\n\n{frontiers()[0]['rule']}"


POISONED = "frontier_demo_desk_10.json"

_ADVICE = (
    ("a made-up desk, all weights", "frontier_demo_desk_0.json", "full", "subspace"),
    ("the same, LoRA", "frontier_demo_desk_0.json", "lora", "subspace, 10% refusals"),
    ("public text (GSM8K), all weights", "frontier_public_gsm8k_0.json", "full", "subspace"),
    ("the same, LoRA", "frontier_public_gsm8k_0.json", "lora", "subspace, 10% refusals"),
    ("the desk, 10% harmful answers in it", POISONED, "full", "tightest subspace"),
    ("the same, LoRA", POISONED, "lora", "tightest subspace"),
)  # fmt: skip
"""What is tuned on; and of which file, tuning and method the figures are."""


def advice() -> str:
    """What to hold for which data, what it keeps and what it costs."""
    heads = ["tuned on", "refused before", "after plain tuning", "directions", "refused",
             "benign refused", "refusals mixed in alone", "benign refused",
             "domain accuracy (plain)", "step time"]  # fmt: skip
    rows = []
    for label, name, tuning, method in _ADVICE:
        data = load(name)
        found = {row["method"]: row for row in data["rows"] if row["tuning"] == tuning}
        plain, ours, alone = (
            {key: Spread(**spread) for key, spread in found[each]["measures"].items()}
            for each in ("plain", method, "refusals mixed in")
        )
        accuracy = frontier.learnt(ours)
        mixed = "".join(method.partition(", ")[1:])
        rows.append(
            [
                label,
                f"{frontier.before_tuning(data)['refusal']:.2f}",
                str(plain["refusal"]),
                f"energy {found[method]['value']:g}{mixed}",
                str(ours["refusal"]),
                f"{ours['over_refusal'].mean:.2f}",
                str(alone["refusal"]),
                f"{alone['over_refusal'].mean:.2f}",
                f"{ours[accuracy].mean:.2f} ({plain[accuracy].mean:.2f})",
                f"{found[method]['seconds_a_step_ratio']:.2f}",
            ]
        )
    commands = dict.fromkeys(_command(load(name)) for _, name, _, _ in _ADVICE)
    note = "Shares of held-out prompts, mean over seeds ± half the 95% interval: "
    return f"{markdown(heads, rows)}\n\n{note}{', '.join(f'`{each}`' for each in commands)}"


def poisoned() -> str:
    """Harmful answers among the rows: refusals over the steps, and how many break plain tuning."""
    data = load(POISONED)
    parts = []
    for tuning in frontier.reported(data):
        broken = _breaks(data, tuning)
        share = data["settings"]["poison"]
        heads = [
            f"{_TUNINGS[tuning]}, {share:.0%} harmful answers",
            *(f"refused after {steps:.0f} steps" for steps in (broken, 3 * broken)),
            f"after {data['settings']['steps']}", "benign refused", "domain", "knob, rate",
        ]  # fmt: skip
        rows = []
        for row in data["rows"]:
            if row["tuning"] != tuning:
                continue
            measures = {name: Spread(**found) for name, found in row["measures"].items()}
            rows.append(
                [
                    row["method"],
                    *(
                        str(Spread.of(_refused_after(data, tuning, row["method"], times * broken)))
                        for times in (1, 3)
                    ),
                    *(str(measures[name]) for name in ("refusal", "over_refusal")),
                    str(measures[frontier.learnt(measures)]),
                    f"{row['value']:g}, {row['learning_rate']:.1g}",
                ]
            )
        parts.append(markdown(heads, rows))
    before = frontier.before_tuning(data)
    parts.append(
        f"Before tuning {before['refusal']:.2f} are refused. Plain tuning is broken where it has "
        "lost half of that; between two looks refusal is taken as a line. "
        f"{_seeds(data)} seeds. `{_command(data)}`"
    )
    return "\n\n".join(parts)


_TUNINGS = {"full": "full tuning", "lora": "LoRA"}


def _breaks(data: Mapping[str, Any], tuning: str) -> float:
    """The step at which plain tuning has lost half of the refusals, mean over seeds."""
    base = frontier.before_tuning(data)["refusal"]
    found = []
    for curve in _curves(data, tuning, "plain"):
        for one, other in pairwise(curve):
            if other["refusal"] <= base / 2:
                over = (one["refusal"] - base / 2) / (one["refusal"] - other["refusal"])
                found.append(one["step"] + over * (other["step"] - one["step"]))
                break
    return fmean(found)


def _refused_after(data: Mapping[str, Any], tuning: str, method: str, step: float) -> list[float]:
    """Share refused at a step, by seed."""
    return [
        float(np.interp(step, [p["step"] for p in curve], [p["refusal"] for p in curve]))
        for curve in _curves(data, tuning, method)
    ]


def _curves(data: Mapping[str, Any], tuning: str, method: str) -> list[list[dict[str, float]]]:
    chosen = data["chosen"][tuning][method]
    wanted = {"method": method, "tuning": tuning, "split": "test", **chosen}
    return [r["curve"] for r in data["runs"] if {k: r.get(k) for k in wanted} == wanted]


def reinforced() -> str:
    """Reinforcement on harmless prompts, with directions held and without."""
    data = load("reinforced.json")
    names = ("refusal", "refusal_margin", "over_refusal", "reward", "general_accuracy")
    heads = ["reinforced", "refused", "by the second judge", "benign refused", "reward", "general"]
    rows = [["before", *(f"{data['before'][name]:.2f}" for name in names)]]
    for arm in dict.fromkeys(row["arm"] for row in data["rows"]):
        runs = [row["measures"] for row in data["rows"] if row["arm"] == arm]
        rows.append([arm, *(str(Spread.of([run[name] for run in runs])) for name in names)])
    settings = data["settings"]
    return (
        f"{markdown(heads, rows)}\n\n{settings['seeds']} seeds of {settings['steps']} steps of "
        "TRL's GRPO; the reward is for long answers that are no refusals, on harmless prompts "
        f"alone. Directions at energy {settings['energy']:g}. `{data['command']}`"
    )


def neurons_alone() -> str:
    """Held neurons in the demo's world, more and fewer, beside random ones."""
    found = Comparison.load(RESULTS / "demo_wide.json")
    heads = ["", "refused", "at equal domain loss", "benign refused", "domain accuracy",
             "domain loss", "general accuracy", "weights held"]  # fmt: skip
    names = ["over_refusal", "domain_accuracy", "domain_loss", "general_accuracy"]
    base = {key: str(Spread(value)) for key, value in found.base.items()}
    rows = [["before tuning", base["refusal"], "", *(base[key] for key in names), ""]]
    for row in found.rows():
        matched = "" if row.matched_refusal is None else str(row.matched_refusal)
        measures = [str(row.measures[key]) for key in names]
        held = f"{row.frozen_share:.0%}, exact" if row.exact else ""
        rows.append([row.arm, str(row.measures["refusal"]), matched, *measures, held])
    settings = found.settings
    note = (
        f"{len(settings['seeds'])} seed{'s' if len(settings['seeds']) > 1 else ''}, mean ± half "
        f"the 95% interval; {settings['steps']} steps of {settings['batch_size']}, AdamW at "
        f"{settings['learning_rate']:g}"
        + (f"; held as well: {', '.join(settings['hold'])}" if settings["hold"] else "")
        + f". `{settings['command']}`"
    )
    return f"{markdown(heads, rows)}\n\n{note}"


def real() -> str:
    """The run on public text."""
    found = load("public_run.json")
    names = ["harmful_test", "xstest_unsafe", "simple", "benign_test", "xstest_safe"]
    heads = ["refused of", "AdvBench, held out", "XSTest unsafe", "SimpleSafetyTests",
             "self_instruct", "XSTest safe", "GSM8K loss", "certificate"]  # fmt: skip
    rows = []
    for arm, entry in found["models"].items():
        exact = {True: f"exact, {entry.get('frozen_share', 0):.0%}", False: "VIOLATED"}
        cells = [f"{entry[name]['value']:.2f}" for name in names]
        verdict = exact[entry["exact"]] if "exact" in entry else ""
        rows.append([arm, *cells, f"{entry['gsm8k_loss']:.2f}", verdict])
    return (
        "A model of three million weights, built from a config, trained briefly on public text and "
        "taught to refuse; located with AdvBench against self_instruct prompts; tuned on GSM8K; "
        "everything after the building by `safeft` commands. One seed.\n\n"
        f"{markdown(heads, rows)}\n\n`{found['command']}`"
    )


def judge() -> str:
    """How far the prefix judge can be trusted."""
    found = load("judge_agreement.json")
    shown = {
        "Llama 2 answers (the list was tuned on these)": found["tuned_on"],
        "**Mistral answers, held out**": found["held_out"],
        "all 900": found["both"],
    }
    rows = []
    for name, entry in shown.items():
        agreement = entry["partial_as_refusal"]
        values = [agreement[key] for key in ("accuracy", "kappa", "precision", "recall")]
        cells = [value["value"] if isinstance(value, dict) else value for value in values]
        rows.append([name, *(f"{cell:.2f}" for cell in cells)])
    table = markdown(["XSTest completions", "accuracy", "kappa", "precision", "recall"], rows)
    return (
        "- **The default judge reads opening words.** Against people's labels on XSTest's 900 "
        "completions it rarely calls an answer a refusal that is none, and misses most refusals of "
        "a model that lectures instead of declining. Check the samples that `safeft evaluate "
        f"--json` keeps, or give a classifier (`--judge`).\n\n{table}\n\n"
        "`python benchmarks/judge_agreement.py --data ../shared/data/xstest`"
    )


PICTURED = ("plain", "located neurons", "lower rate", "refusals mixed in", "random subspace",
            "subspace, 10% refusals", "subspace")  # fmt: skip


def picture() -> str:
    """Full tuning in the made-up world, a few of the ways."""
    path = RESULTS / "frontier_demo_desk_0.json"
    compared = Results(path, Settings(**load(path.name)["settings"]), "").comparison("full")
    runs = tuple(run for name in PICTURED for run in compared.of(name))
    return drawn(replace(compared, title="", runs=runs))

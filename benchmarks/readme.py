"""Write the figures of the README from the files under ``benchmarks/results``.

python benchmarks/readme.py            # rewrite the marked blocks
python benchmarks/readme.py --check    # exit code 1 if the README says something else
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from frontier import markdown as frontier
from frontier.results import Results
from frontier.training import Settings

from safeft.report.frontier import frontier as picture
from safeft.report.result import Comparison, Spread

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"


def load(name: str) -> dict[str, Any]:
    """One result file."""
    return json.loads((RESULTS / name).read_text())


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def demo_table(name: str) -> str:
    """One comparison of the demo's world."""
    found = Comparison.load(RESULTS / name)
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


def speed_block() -> str:
    """What freezing and locating cost."""
    found = load("speed.json")
    training, locating, memory = found["training"], found["locating"], found["memory"]
    rows = [
        [
            f"step time, {training['fraction']:.0%} of MLP neurons frozen / nothing frozen",
            f"{training['safeft against plain']['ratio_median']:.3f}",
        ],
        [
            "the same with a dense 0/1 mask in a hook (no freeze under weight decay)",
            f"{training['dense mask against plain']['ratio_median']:.3f}",
        ],
        [
            "peak extra memory / bytes of the frozen slices",
            f"{training['safeft extra over slices']:.2f}",
        ],
        ["the same with a dense mask", f"{training['dense mask extra over slices']:.2f}"],
    ]
    for method in ("contrast", "variance", "wanda", "attribution", "snip"):
        entry = locating[method]
        speed = f"{entry['tokens_per_second_over_bare']:.2f}"
        rows.append(
            [f"locating by `{method}`: tokens/s over a bare {entry['against']} pass", speed]
        )
    rows.append(
        ["peak memory of locating, 10,000 / 100 prompts", f"{memory['streaming_growth']:.2f}"]
    )
    return (
        f"{markdown(['', 'median of pairs'], rows)}\n\n`{found['command']}` ({found['machine']}; "
        f"{training['weights'] / 1e6:.0f}M weights, {training['tokens_per_step']} tokens a step)"
    )


def judge_block() -> str:
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


def real_block() -> str:
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


def engines_block() -> str:
    """Exact under every engine, and what a step costs there."""
    found = load("engines.json")
    heads = ["engine", "full and LoRA, fp32 and bf16, accumulation 1 and 2",
             "frozen bits changed", "without the pin", "without the mask",
             "step time with / without"]  # fmt: skip
    rows = []
    for engine, cells in found["exactness"].items():
        whole = [cell for cell in cells if not cell["taken_out"]]
        exact = sum(cell["verdict"] == "exact" for cell in whole)
        changed = sum(cell["frozen_changed"] for cell in whole)

        def verdicts(part: str, tuning: str, cells: Any = cells) -> str:
            said = {
                cell["verdict"]
                for cell in cells
                if cell["taken_out"] == part and cell["tuning"] == tuning
            }
            return " / ".join(sorted(said))

        without_pin = f"full: {verdicts('pin', 'full')}; LoRA: {verdicts('pin', 'lora')}"
        both = {verdicts("mask", tuning) for tuning in ("full", "lora")}
        ratio = found["overhead"][engine]["ratio_median"]
        wrappers = ", ".join(dict.fromkeys(cell["wrapper"] for cell in whole))
        name = f"{engine} ({wrappers}, {whole[0]['world_size']} process"
        name += "es)" if whole[0]["world_size"] > 1 else ")"
        rows.append(
            [name, f"{exact} of {len(whole)} exact", str(changed), without_pin,
             " / ".join(sorted(both)), f"{ratio:.3f}"]
        )  # fmt: skip
    return (
        f"{markdown(heads, rows)}\n\n`{found['command']}` ({found['machine']}). LoRA needs no pin: "
        "the decay of an adapter's zeros is zero."
    )


def scale_block() -> str:
    """What freezing costs at sizes that were not run."""
    found = load("scale.json")
    heads = ["computed from shapes", "engine, processes", "pinned per process",
             "mask moves per micro-batch", "sent per step", "sent per certificate"]  # fmt: skip
    rows = []
    for row in found["rows"]:
        if row["processes"] not in (8, 1024) or row["engine"] not in ("fsdp2", "zero3"):
            continue
        rows.append(
            [
                row["model"],
                f"{row['engine']}, {row['processes']}",
                f"{row['pinned_bytes'] / 2**20:,.0f} MiB",
                f"{row['mask_bytes_per_microbatch'] / 2**30:,.2f} GiB",
                f"{row['sent_per_step']}",
                f"{row['sent_per_certificate'] / 2**30:.2f} GiB",
            ]
        )
    agreed = sum(row["measured"] == row["computed"] for row in found["checked"])
    return (
        f"{markdown(heads, rows)}\n\n`{found['command']}`: {found['fraction']:.0%} of the MLP "
        f"neurons; {agreed} of {len(found['checked'])} real two-process runs hold, weight for "
        "weight, what the arithmetic says. Under ZeRO the mask copies each gradient it changes, "
        "which a large mixture of experts feels: prefer FSDP2 there."
    )


def families_block() -> str:
    """Models whose layouts are proven, those of like layout together."""
    found = load("families.json")
    proven = [
        f
        for f in found["families"]
        if all(f[column]["passed"] and not f[column]["failed"] for column in PROVEN)
    ]
    alike: dict[str, list[str]] = {}
    for family in proven:
        for tower, layouts in family["layouts"].items():
            parts = [f"{'' if tower == 'text' else tower + ': '}{one}" for one in layouts]
            alike.setdefault("<br>".join(parts), []).append(family["family"])
    rows = [
        [", ".join(dict.fromkeys(names)), layout.replace(" > ", " → ")]
        for layout, names in sorted(alike.items(), key=lambda item: (-len(item[1]), item[0]))
    ]
    failed = sorted({f["family"] for f in found["families"]} - {f["family"] for f in proven})
    note = (
        f"{len(proven)} of {len(found['families'])} families proven, units, full tuning and LoRA "
        f"each (transformers {found['transformers']}"
        + (f"; not: {', '.join(failed)}" if failed else "")
        + f"). `{found['command']}`"
    )
    return f"{markdown(['families', 'a unit reads → writes'], rows)}\n\n{note}"


PROVEN = ("units", "full", "lora")


def groups_block() -> str:
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


def causal_block() -> str:
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


def bilingual_block() -> str:
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


def frontiers() -> list[dict[str, Any]]:
    """Of harmless domain data, a testbed each."""
    return [load(path.name) for path in sorted(RESULTS.glob("frontier_*_0.json"))]


def frontier_block() -> str:
    """Every way to tune, at its own best knob and rate."""
    found = frontiers()
    seeds = min(row["seeds"] for data in found for row in data["rows"])
    notes = "; ".join(
        f"{data['settings']['testbed']}: {data['settings']['steps']} steps of "
        f"{data['settings']['batch_size']}, `{data['command'].split(' --methods')[0]}`"
        for data in found
    )
    note = (
        "Share of held-out harmful prompts refused (mean of "
        f"{seeds} seeds ± half the 95% interval), and accuracy in the domain. {notes}"
    )
    return f"{frontier.headline(found)}\n\n{note}"


def frontier_whole_block() -> str:
    """Each table whole."""
    parts = []
    for data in frontiers():
        for tuning in frontier.reported(data):
            title = f"{data['settings']['testbed']}, {data['settings']['domain']}, {tuning} tuning"
            parts.append(f"**{title}**\n\n{frontier.whole(data, tuning)}")
    return "\n\n".join(parts) + f"\n\n{frontiers()[0]['rule']}"


BLOCKS = {
    "frontier": frontier_block,
    "frontier_whole": frontier_whole_block,
    "causal": causal_block,
    "bilingual": bilingual_block,
    "families": families_block,
    "groups": groups_block,
    "scale": scale_block,
    "engines": engines_block,
    "demo": lambda: demo_table("demo_wide.json"),
    "speed": speed_block,
    "judge": judge_block,
    "real": real_block,
}


PICTURED = ("plain", "located neurons", "lower rate", "refusals mixed in", "random subspace",
            "subspace, 10% refusals", "subspace")  # fmt: skip


def frontier_picture() -> str:
    """Full tuning in the made-up world, a few of the ways."""
    path = RESULTS / "frontier_demo_desk_0.json"
    whole = Results(path, Settings(**load(path.name)["settings"]), "").comparison("full")
    runs = tuple(run for name in PICTURED for run in whole.of(name))
    return picture(replace(whole, title="", runs=runs))


def filled(text: str) -> str:
    """The README with every marked block made anew."""
    for name, make in BLOCKS.items():
        pattern = re.compile(rf"(<!-- results:{name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"README has no block {name!r}")
        block = make()
        text = pattern.sub(lambda m, block=block: f"{m[1]}{block}\n{m[2]}", text)
    return text


def main() -> int:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    readme = ROOT / "README.md"
    wanted = {readme: filled(readme.read_text())}
    wanted[RESULTS / "frontier.svg"] = frontier_picture() + "\n"
    # Another matplotlib may lay the picture out otherwise; the figures may not differ.
    if given.check:
        return int(readme.read_text() != wanted[readme])
    for path, text in wanted.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What tables say of audits, of the monitor of neurons, and of hardening."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from safeft.report.result import Spread
from tables import load, markdown

_NAMES = {"demo": "the model that ships", "public": "the public testbed's"}
_ARMS = {
    "before": "before",
    "plain": "safety tuning",
    "whole": "with dropout: the set, whole prompts",
    "each": "with dropout: each neuron by itself",
    "random": "with dropout: random neurons",
}


def audit() -> str:
    """Whole audits, and how much faster their tests are batched."""
    found = load("audit.json")
    models = [found[name] for name in _NAMES if name in found]
    heads = ["audit of", *(_NAMES[name] for name in _NAMES if name in found)]
    rows = [[label, *(value(each) for each in models)] for label, value in _LINES.items()]
    parts = [markdown(heads, rows)]
    speed = found["speed"]["rows"]
    faster = "; ".join(
        f"{row['times_faster']:.1f} times as fast on {row['layers']} layers of width {row['width']}"
        for row in speed
    )
    apart = max(row["largest_difference"] for row in speed)
    parts.append(
        f"Neurons tested side by side in one batch, against one run a neuron: {faster}; margins "
        f"differ by {apart:.0e} nats at most. `{found['demo']['command']}`, "
        f"`{found['speed']['command']}`"
    )
    return "\n\n".join(parts)


def _largest(each: Mapping[str, Any]) -> str:
    value, interval = each["refusal"]["largest"]
    return f"{value:.2f} [{interval['low']:.2f}, {interval['high']:.2f}]"


def _of_random(each: Mapping[str, Any]) -> str:
    """Of the neuron that takes most away: what random ones of its layer take, held alike."""
    most = min(each["refusal"]["singles"], key=lambda trial: trial["outcome"]["refusal"]["count"])
    falls = [1 - left for left in most["controls"]]
    return f"{min(falls):.2f} to {max(falls):.2f} ({len(falls)} drawn)"


def _number(key: str, form: str) -> Any:
    def shown(each: Mapping[str, Any]) -> str:
        value = each["refusal"][key]
        return "none found" if value is None else format(value, form)

    return shown


_LINES: Mapping[str, Any] = {
    "verdict": lambda each: f"**{each['verdict']}**",
    "harmful prompts refused, units ranked": lambda each: (
        f"{each['refusal']['prompts']}, {each['units']:,}"
    ),
    "largest share of refusals that one neuron takes away": _largest,
    "random neurons of its layer, held alike": _of_random,
    "neurons together that take half of them": _number("smallest", "d"),
    "effective number of neurons": _number("effective", ".1f"),
    "Gini": _number("gini", ".2f"),
    "seconds, whole": lambda each: f"{each['seconds_whole']:.0f}",
}


def hardening() -> str:
    """What silencing neurons while safety is tuned does to where refusing sits."""
    found = load("hardening.json")
    heads = ["refused", "untouched", "the located silenced", "those found after tuning silenced",
             "random silenced", "benign refused", "effective number", "half lost by",
             "verdicts"]  # fmt: skip
    rows = []
    for arm, label in _ARMS.items():
        runs = [run for run in found["runs"] if run["arm"] == arm]
        audits = [run["audit"] for run in runs]
        smallest = [each["smallest"] for each in audits]
        rows.append(
            [
                label,
                *(
                    str(Spread.of([run[key] for run in runs]))
                    for key in ("refusal", "located_silenced", "located_again_silenced")
                ),
                str(Spread.of([fmean(run["random_silenced"]) for run in runs])),
                str(Spread.of([run["over_refusal"] for run in runs])),
                _mean([each["effective"] for each in audits]),
                ", ".join("none found" if each is None else str(each) for each in smallest),
                ", ".join(each["verdict"] for each in audits),
            ]
        )
    note = (
        f"{found['count']} located neurons of the model that ships; {found['steps']} steps of "
        f"safety tuning, silenced in a share {found['rate']:g} of the prompts. "
        f"`{found['command']}`"
    )
    return f"{markdown(heads, rows)}\n\n{note}"


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{fmean(known):.1f}" if known else ""


def monitor() -> str:
    """What the monitor of neurons catches, how often it is wrong, what it costs."""
    found = load("neuron_monitor.json")
    rows = []
    for name, label in (("planted", "a planted gate"), ("shipped", "the model that ships")):
        caught = found[name]["suppressions"]
        rows.append([f"suppressions caught, {label}", f"{caught['caught']} of {caught['attacks']}"])
    gate = found["planted"]["clean"]
    cleans = {"a planted gate": gate, **found["shipped"]["clean"]}
    for label, clean in cleans.items():
        rows.append(
            [
                f"false alarms, {label}",
                f"{clean['value']:.2%} of windows, {clean['tokens']:,} tokens",
            ]
        )
    for row in found["cost"]:
        rows.append(
            [
                f"time with / without, {row['neurons']} neurons in {row['sites']} layers, "
                f"batches of {row['batch']}",
                f"{row['ratio']:.3f} [{row['quartiles'][0]:.3f}, {row['quartiles'][1]:.3f}]",
            ]
        )
    note = (
        "Time: median of pairs and its quartiles, of the process's own seconds. "
        f"`{found['command']}`"
    )
    return f"{markdown(['monitor of neurons', ''], rows)}\n\n{note}"

"""A guard's pictures as inline SVG, in the style of the audit's: light and dark, phone and desk."""

from collections.abc import Mapping, Sequence
from typing import Any

from safeft.guard.drift import Readability
from safeft.guard.evaluation import GuardEvaluation, Latency
from safeft.intervals import Rate
from safeft.report.audit_pictures import (
    _BENIGN,
    _HARMFUL,
    _INK,
    _MUTED,
    _SIZE,
    _SOFT,
    _STRONG,
    _figure,
    _legend,
    _picture,
    _whole_numbers,
)

_SHADES = (_STRONG, _HARMFUL, _BENIGN, _SOFT)
_MARKERS = "osD^vPX*"


def guard_pictures(found: GuardEvaluation) -> dict[str, str]:
    """All pictures of an evaluation by name; those without data are left out."""
    drawn = {"sets": by_set(found), "calibration": calibration(found)}
    if found.layers:
        drawn["layers"] = by_layer(found.layers)
    if found.latency is not None:
        drawn["latency"] = latency(found.latency)
    return drawn


def by_layer(layers: Sequence[Mapping[str, Any]]) -> str:
    """Validation F1 of each layer's probe, a line a kind; below, how many units it selected."""
    figure, (axes, below) = _figure(4.0, rows=(2, 1))
    kinds = sorted({row["kind"] for row in layers}, reverse=True)
    for number, kind in enumerate(kinds):
        rows = [row for row in layers if row["kind"] == kind]
        depths, shade = [row["layer"] for row in rows], _SHADES[number]
        axes.plot(
            depths, [row["f1"] for row in rows], color=shade, marker=_MARKERS[number],
            markersize=4, linewidth=1.6, label={"mlp": "MLP units"}.get(kind, "residual stream"),
        )  # fmt: skip
        shares = [100 * row["units"] / row["of"] for row in rows]
        below.plot(depths, shares, color=shade, marker=_MARKERS[number], markersize=3)
    axes.set_ylabel("macro-F1")
    axes.tick_params(labelbottom=False)
    below.set_ylabel("units, %")
    below.set_ylim(bottom=0)
    below.set_xlabel("layer")
    for each in (axes, below):
        each.xaxis.set_major_locator(_whole_numbers())
    _legend(axes)
    best = max(layers, key=lambda row: row["f1"])
    return _picture(
        figure, "layers", "How well each layer alone tells harmful from harmless",
        f"Macro-F1 of sparse linear probes on validation texts; the best is {best['name']} with "
        f"{best['f1']:.3f}. Below, the share of units that each probe selects.",
    )  # fmt: skip


def by_set(found: GuardEvaluation) -> str:
    """Macro-F1, precision and recall of each set, with intervals."""
    figure, axes = _figure(1.3 + 0.62 * len(found.sets))
    for row, each in enumerate(found.sets):
        _ends(axes, row - 0.24, each.macro_f1, each.interval.low, each.interval.high, _STRONG, "o")
        for shift, rate, shade, marker in (
            (0.0, each.precision, _BENIGN, "s"),
            (0.24, each.recall, _HARMFUL, "D"),
        ):
            if rate is not None:
                _ends(axes, row + shift, rate.value, rate.low, rate.high, shade, marker)
    for name, shade, marker in (
        ("macro-F1", _STRONG, "o"), ("precision", _BENIGN, "s"), ("recall", _HARMFUL, "D")
    ):  # fmt: skip
        axes.plot([], [], color=shade, marker=marker, markersize=4, label=name)
    axes.set_yticks(range(len(found.sets)), [_short(each.name) for each in found.sets])
    axes.set_ylim(len(found.sets) - 0.5, -0.5)
    axes.set_xlim(right=1.02)
    _legend(axes)
    said = "; ".join(f"{each.name} {each.macro_f1:.3f}" for each in found.sets)
    return _picture(figure, "sets", "Macro-F1, precision and recall by set", f"Macro-F1: {said}.")


def _ends(
    axes: Any, row: float, value: float, low: float, high: float, shade: str, marker: str
) -> None:
    ends = [[max(0.0, value - low)], [max(0.0, high - value)]]
    axes.errorbar(
        [value], [row], xerr=ends, color=shade, marker=marker, markersize=4, linewidth=1.4,
        capsize=2,
    )  # fmt: skip


def _short(name: str) -> str:
    words = name.replace("_", " ")
    return words if len(words) <= 14 else words.replace(" ", "\n")


def calibration(found: GuardEvaluation) -> str:
    """Share of harmful texts against the score, a line a set; on the diagonal scores are true."""
    figure, axes = _figure(4.2)
    axes.plot([0, 1], [0, 1], color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
    for number, each in enumerate(found.sets):
        axes.plot(
            [b.score for b in each.bins], [b.harmful for b in each.bins],
            color=_SHADES[number % len(_SHADES)], marker=_MARKERS[number % len(_MARKERS)],
            markersize=4, linewidth=1.4, label=f"{each.name.replace('_', ' ')} ({each.error:.2f})",
        )  # fmt: skip
    axes.set_xlabel("score")
    axes.set_ylabel("share that is harmful")
    axes.set_xlim(-0.03, 1.03)
    axes.set_ylim(-0.03, 1.03)
    _legend(axes)
    said = "; ".join(f"{each.name} {each.error:.3f}" for each in found.sets)
    return _picture(
        figure, "calibration", "Calibration by set",
        f"Mean distance between score and share over ten bins: {said}.",
    )  # fmt: skip


def latency(found: Latency) -> str:
    """Unsafe answers flagged, against tokens after they became unsafe."""
    figure, axes = _figure(3.2)
    rates: Sequence[Rate] = found.recall
    axes.fill_between(
        found.tokens, [r.low for r in rates], [r.high for r in rates], color=_HARMFUL, alpha=0.15,
        linewidth=0,
    )  # fmt: skip
    axes.plot(
        found.tokens, [r.value for r in rates], color=_HARMFUL, marker="o", markersize=4,
        linewidth=1.8, label="unsafe answers flagged",
    )  # fmt: skip
    axes.axhline(
        found.false_alarms.value, color=_BENIGN, linewidth=1.4, linestyle=(0, (4, 3)),
        label="safe answers ever flagged",
    )  # fmt: skip
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("tokens after the unsafe boundary")
    axes.set_ylabel("share of answers")
    axes.set_xticks(found.tokens)
    _legend(axes)
    said = ", ".join(f"{t}: {r.value:.0%}" for t, r in zip(found.tokens, rates, strict=True))
    return _picture(
        figure, "latency", "How soon unsafe answers are flagged",
        f"Tokens after the boundary, and share flagged by then: {said}. Safe answers ever "
        f"flagged: {found.false_alarms.value:.1%}.",
    )  # fmt: skip


def readable(before: Readability | None, after: Readability) -> str:
    """AUROC of each layer before and after tuning: by the guard's probes, and by new ones."""
    figure, axes = _figure(4.2)
    names = list(after.layers)
    for label, found, shade in (("before", before, _SOFT), ("after", after, _STRONG)):
        if found is None:
            continue
        places = range(len(names))
        axes.plot(
            places, [found.layers[name] for name in names], color=shade, marker="o", markersize=4,
            linewidth=1.6, label=f"{label}: probes of the base",
        )  # fmt: skip
        axes.plot(
            places, [found.anew[name] for name in names], color=shade, marker="s", markersize=3,
            linewidth=1, linestyle=(0, (4, 3)), label=f"{label}: probes fitted anew",
        )  # fmt: skip
    axes.axhline(0.5, color=_MUTED, linewidth=0.8)
    step = max(1, len(names) // 8)
    axes.set_xticks(range(0, len(names), step), names[::step], rotation=60, ha="right")
    axes.set_ylabel("AUROC, harmful against benign")
    axes.set_ylim(top=1.02)
    axes.tick_params(axis="x", labelsize=_SIZE, labelcolor=_INK)
    _legend(axes)
    was = "" if before is None else f" {before.guard:.3f} before,"
    return _picture(
        figure, "readable", "Is harmfulness still readable inside?",
        f"The guard of the base ranks harmful above benign prompts in{was} {after.guard:.3f} of "
        "pairs after tuning.",
    )  # fmt: skip

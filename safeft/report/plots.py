"""Pictures of a comparison as inline SVG: self-contained, sharp, without scripts."""

from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from statistics import fmean
from typing import Any

from safeft.causal.effect import CausalEffect
from safeft.report.result import Comparison, Point

_COLOURS = ("#8a8a8a", "#d98c21", "#1f6fb2", "#3a9a5b", "#8e5bb0", "#b23a48", "#4a4a4a", "#2aa5a0")


def colour(index: int) -> str:
    """Colour of the arm with this number, the same in every picture."""
    return _COLOURS[index % len(_COLOURS)]


def _figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def _svg(figure: Any) -> str:
    stream = StringIO()
    # Without a date and with a fixed salt, the same result gives the same file.
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "safeft", "svg.fonttype": "none"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def refusal_against_domain(comparison: Comparison) -> str:
    """Refusal kept against the domain learnt, a line an arm: up and to the right is better."""
    figure, axes = _figure(6.4, 4.2)
    _lines(axes, comparison, lambda point: point.domain_loss)
    axes.invert_xaxis()
    axes.set_xlabel("domain loss, nats per answer token (falls to the right)")
    return _svg(figure)


def refusal_over_steps(comparison: Comparison) -> str:
    """Refusal against training steps, a line an arm."""
    figure, axes = _figure(6.4, 3.4)
    _lines(axes, comparison, lambda point: point.step)
    axes.set_xlabel("training steps")
    return _svg(figure)


def _lines(axes: Any, comparison: Comparison, across: Callable[[Point], float]) -> None:
    """The mean over seeds, strong, and each seed, faint."""
    for number, arm in enumerate(comparison.arms):
        curves = [run.curve for run in comparison.of(arm)]
        places = [[across(point) for point in curve] for curve in curves]
        heights = [[point.refusal for point in curve] for curve in curves]
        if len(curves) > 1:
            for xs, ys in zip(places, heights, strict=True):
                axes.plot(xs, ys, color=colour(number), linewidth=0.7, alpha=0.2)
        xs, ys = (
            [fmean(column) for column in zip(*rows, strict=True)] for rows in (places, heights)
        )
        axes.plot(xs, ys, color=colour(number), marker="o", markersize=3, linewidth=1.6, label=arm)
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("harmful prompts refused")
    axes.legend(frameon=False, fontsize=8)


def neurons_by_layer(comparison: Comparison) -> str:
    """Share of each layer's units that were located."""
    figure, axes = _figure(6.4, 2.6)
    shares = [located / units if units else 0.0 for located, units in comparison.layers]
    axes.bar(range(len(shares)), shares, color=colour(2), width=0.7)
    axes.set_xticks(range(len(shares)))
    axes.set_xlabel("layer")
    axes.set_ylabel("share located")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    return _svg(figure)


def refusal_by_condition(effect: CausalEffect) -> str:
    """Prompts refused by the intact model, with the set weakened, and with each random set."""
    conditions = {"intact": effect.intact, "located": effect.located} | {
        f"random {number}": outcome for number, outcome in enumerate(effect.random, 1)
    }
    figure, axes = _figure(6.4, 1.5 + 0.26 * len(conditions))
    for row, (name, outcome) in enumerate(conditions.items()):
        shade = colour(0 if name.startswith("random") else 2 if name == "located" else 6)
        for rate, filled in ((outcome.refusal, True), (outcome.over_refusal, False)):
            ends = [[max(0.0, rate.value - rate.low)], [max(0.0, rate.high - rate.value)]]
            axes.errorbar(
                rate.value, row, xerr=ends, color=shade, marker="o", markersize=5, linewidth=1.2,
                markerfacecolor=shade if filled else "white", alpha=1.0 if filled else 0.6,
            )  # fmt: skip
    axes.set_yticks(range(len(conditions)), list(conditions))
    axes.invert_yaxis()
    axes.set_xlim(-0.03, 1.03)
    axes.set_xlabel("prompts refused: harmful (full), benign (hollow); 95% intervals")
    axes.set_title(
        f"{effect.intervention}: effect {effect.effect:.2f} [{effect.interval.low:.2f}, "
        f"{effect.interval.high:.2f}], damage {effect.damage:+.2f}, oddness {effect.oddness:+.2f} "
        f"nats a token: {effect.verdict}",
        fontsize=8,
        loc="left",
    )
    return _svg(figure)


_OF_VERDICT = {"effect": 2, "no effect": 0, "broken": 5, "unknown": 1}


def effects(found: Mapping[str, Sequence[CausalEffect]]) -> str:
    """Effects on refusal with their intervals, a row a label, coloured by verdict."""
    figure, axes = _figure(6.4, 1.2 + 0.3 * len(found))
    for row, checks in enumerate(found.values()):
        for number, check in enumerate(checks):
            height = row + 0.5 * ((number + 0.5) / len(checks) - 0.5)
            axes.plot(
                [check.interval.low, check.interval.high],
                [height, height],
                color=colour(_OF_VERDICT[check.verdict]),
                linewidth=0.9,
            )
            axes.plot(
                check.effect, height, color=colour(_OF_VERDICT[check.verdict]), marker="o", ms=2.5
            )
    for verdict, shade in _OF_VERDICT.items():
        if any(check.verdict == verdict for checks in found.values() for check in checks):
            axes.plot([], [], color=colour(shade), marker="o", ms=4, label=verdict)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(found)), list(found), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("effect: fall in refusal beyond that of random sets; 95% intervals")
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return _svg(figure)

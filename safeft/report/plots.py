"""Pictures as inline SVG: self-contained, sharp, without scripts."""

import math
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from statistics import fmean
from typing import Any

from safeft.intervals import Rate
from safeft.overlap import Overlap
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


def overlap_matrix(names: Sequence[str], pairs: Mapping[tuple[str, str], Overlap]) -> str:
    """How far each two sets agree: Jaccard index as colour, counts and chance as text."""
    size = 1.6 + 1.15 * len(names)
    figure, axes = _figure(size + 1, size)
    found = {**pairs, **{(b, a): each for (a, b), each in pairs.items()}}
    shades = [[found[a, b].jaccard if a != b else math.nan for b in names] for a in names]
    image = axes.imshow(shades, cmap="Blues", vmin=0, vmax=1)
    for row, a in enumerate(names):
        for column, b in enumerate(names):
            if a == b:
                continue
            each = found[a, b]
            text = (
                f"{each.jaccard:.2f}\n{each.shared} of {each.union}\n"
                f"chance {each.expected:.1f}\np {each.p_value:.1g}"
            )
            ink = "white" if each.jaccard > 0.5 else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=ink)
    axes.grid(visible=False)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set_yticks(range(len(names)), names)
    figure.colorbar(image, ax=axes, label="Jaccard index", shrink=0.8)
    return _svg(figure)


def before_and_after(
    names: Sequence[str], rates: Mapping[str, Sequence[tuple[Rate, Rate]]], tuned_on: str
) -> str:
    """Shares of each cell before and after a tuning, with their intervals, a panel a measure."""
    figure, _ = _figure(6.8, 0.9 + 0.62 * len(names))
    figure.clear()
    panels = figure.subplots(1, len(rates), sharey=True, squeeze=False)[0]
    for axes, (measure, rows) in zip(panels, rates.items(), strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        for moment, (label, shift) in enumerate((("before", -0.12), ("after", 0.12))):
            shown = [row[moment] for row in rows]
            values = [rate.value for rate in shown]
            ends = [
                [rate.value - rate.low for rate in shown],
                [rate.high - rate.value for rate in shown],
            ]
            places = [place + shift for place in range(len(names))]
            axes.errorbar(values, places, xerr=ends, fmt="o", color=colour(2 * moment), label=label)
        axes.set_xlim(-0.03, 1.03)
        axes.set_xlabel(measure)
    marked = [f"{name} (tuned)" if name == tuned_on else name for name in names]
    panels[0].set_yticks(range(len(names)), marked)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside upper center",
        ncols=2,
        frameon=False,
        fontsize=8,
    )
    return _svg(figure)


def by_arm(panels: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Shares by arm, a dot a seed and a line at their mean, a panel a measure."""
    arms = list(next(iter(panels.values())))
    figure, _ = _figure(2.2 + 2.6 * len(panels), 0.9 + 0.3 * len(arms))
    figure.clear()
    axes_of = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (measure, values) in zip(axes_of, panels.items(), strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        for place, arm in enumerate(arms):
            axes.plot(values[arm], [place] * len(values[arm]), "o", color=colour(2), alpha=0.6)
            axes.plot([fmean(values[arm])] * 2, [place - 0.3, place + 0.3], color=colour(5))
        axes.set_xlim(-0.03, 1.03)
        axes.set_xlabel(measure)
    axes_of[0].set_yticks(range(len(arms)), arms)
    axes_of[0].invert_yaxis()
    return _svg(figure)

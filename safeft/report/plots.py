"""Pictures as inline SVG: self-contained, sharp, without scripts."""

import math
from collections.abc import Callable, Mapping, Sequence
from io import StringIO
from statistics import fmean
from typing import Any

from safeft.causal.effect import CausalEffect
from safeft.intervals import Rate
from safeft.overlap import Overlap
from safeft.report.result import Comparison, Point, Spread

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


def svg(figure: Any) -> str:
    """A matplotlib figure as SVG, the same bytes for the same figure."""
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
    return svg(figure)


def refusal_over_steps(comparison: Comparison) -> str:
    """Refusal against training steps, a line an arm."""
    figure, axes = _figure(6.4, 3.4)
    _lines(axes, comparison, lambda point: point.step)
    axes.set_xlabel("training steps")
    return svg(figure)


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
    return svg(figure)


def pruned_groups(study: Mapping[str, Any]) -> str:
    """What pruning each group of units does, beside random sets, and how stable the groups are.

    Args:
        study: What ``recipes/ssah_study.py`` writes. Bars are 95% intervals: over prompts for a
            group itself, over halves of the calibration prompts, over draws for random sets. Where
            shares were swept, refusal and utility are shown against them too.
    """
    from matplotlib.figure import Figure

    swept = sorted((r for r in study["pruned"] if r["group"] == "scu"), key=lambda r: r["share"])
    figure = Figure(figsize=(10.5, 6.2 if len(swept) > 1 else 3.4), layout="constrained")
    grid = figure.add_gridspec(2 if len(swept) > 1 else 1, 6)
    titles = {"refusal": "harmful prompts refused", "utility": "questions answered right"}
    for number, (measure, title) in enumerate(titles.items()):
        axes = panel(figure, grid[0, 2 * number : 2 * number + 2], f"pruned: {title}")
        _pruned(axes, study, measure)
        if len(swept) > 1:
            axes = panel(figure, grid[1, 3 * number : 3 * number + 3], f"SCU pruned: {title}")
            _swept(axes, swept, study["dense"][measure]["value"], measure)
    _agreement(panel(figure, grid[0, 4:], "located twice: agreement (Jaccard)"), study)
    return svg(figure)


def panel(figure: Any, place: Any, title: str) -> Any:
    """Axes in the pictures' style at a place of a grid."""
    axes = figure.add_subplot(place)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=8)
    return axes


def _pruned(axes: Any, study: Mapping[str, Any], measure: str) -> None:
    rows = [row for row in study["pruned"] if row["halves"][measure]]
    axes.axvline(study["dense"][measure]["value"], color=colour(6), linestyle=":", label="whole")
    for height, row in enumerate(rows):
        rate = row["located"][measure]
        again, drawn = (Spread.of(row[name][measure]) for name in ("halves", "random"))
        _bar(axes, height - 0.2, Spread(rate["value"], rate["low"], rate["high"]), 2, "the group")
        _bar(axes, height, again, 3, "located on a half")
        _bar(axes, height + 0.2, drawn, 0, "random, same layers")
    _name_rows(axes, [f"{row['group'].upper()} {row['share']:.1%}" for row in rows])


def _agreement(axes: Any, study: Mapping[str, Any]) -> None:
    for height, kinds in enumerate(study["stability"].values()):
        for number, (kind, found) in enumerate(kinds.items()):
            place = height + 0.2 * (number - (len(kinds) - 1) / 2)
            label = "two halves of the prompts" if kind == "halves" else kind
            _bar(axes, place, Spread.of(found["jaccard"]), 3 + number, label)
            chance = Spread(Spread.of(found["by_chance_per_layer"]).mean)
            _bar(axes, place, chance, 0, "random, same layers")
    _name_rows(axes, [group.upper() for group in study["stability"]])


def _bar(axes: Any, place: float, found: Spread, number: int, label: str) -> None:
    """A mean and its interval on one row; of each label only the first is named."""
    if label in axes.get_legend_handles_labels()[1]:
        label = "_"
    low, high = (found.mean if end is None else end for end in (found.low, found.high))
    axes.errorbar(
        [found.mean],
        [place],
        xerr=[[max(0, found.mean - low)], [max(0, high - found.mean)]],
        color=colour(number),
        fmt="o",
        markersize=4,
        capsize=2,
        label=label,
    )


def _name_rows(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(-0.03, 1.03)
    axes.legend(frameon=False, fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2)


def _swept(axes: Any, rows: Sequence[Mapping[str, Any]], whole: float, measure: str) -> None:
    shares = [100 * row["share"] for row in rows]
    rates = [row["located"][measure] for row in rows]
    axes.axhline(whole, color=colour(6), linestyle=":", label="whole")
    for number, label, spreads in (
        (2, "SCU", [Spread(rate["value"], rate["low"], rate["high"]) for rate in rates]),
        (0, "random, same layers", [Spread.of(row["random"][measure]) for row in rows]),
    ):
        means = [spread.mean for spread in spreads]
        axes.plot(shares, means, color=colour(number), marker="o", markersize=3, label=label)
        ends = [(s.mean if s.low is None else s.low, s.high or s.mean) for s in spreads]
        axes.fill_between(shares, *zip(*ends, strict=True), color=colour(number), alpha=0.15)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("units pruned, %", fontsize=8)
    axes.legend(frameon=False, fontsize=7)


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
    return svg(figure)


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
    return svg(figure)


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
    return svg(figure)


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
    return svg(figure)


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
    return svg(figure)

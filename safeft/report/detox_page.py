"""The page about a detox: the trade-off's picture, the table, and what it rests on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safeft.detox.tradeoff import AIM, Tradeoff
from safeft.files import write_whole
from safeft.report.html import environment
from safeft.report.plots import colour, panel, svg

_MARKERS = "osD^vPX*h"
_SHADES = 5
"""Grey is for random controls and lines; with as many markers no two rules look alike."""


def write_page(tradeoff: Tradeoff, path: Path) -> None:
    """Write the page whole.

    Raises:
        ArtefactError: It cannot be written.

    Example:
        ``write_page(Tradeoff(tuple(outcomes), {"command": "..."}), Path("detox.html"))``
    """
    rows = tradeoff.rows()
    groups = sorted({group for row in rows for group in {**row["mentions"], **row["group_loss"]}})
    page = (
        environment()
        .get_template("detox.html.jinja")
        .render(
            rows=rows,
            frontier={each.arm for each in tradeoff.frontier},
            aim=AIM,
            groups=groups,
            settings=dict(tradeoff.settings),
            picture=tradeoff_picture(rows),
        )
    )
    write_whole(path, page)


def tradeoff_picture(rows: Sequence[Mapping[str, Any]]) -> str:
    """Toxicity against perplexity, a rule a line in the order of its strength, as SVG.

    Left toxicity against the rise of perplexity, down and to the left being better, the aim in
    green; right both against strength.

    Args:
        rows: :meth:`safeft.detox.tradeoff.Tradeoff.rows`, or the arms of ``benchmarks/detox.py``
            (means over seeds, with standard deviations as bars).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    grid = figure.add_gridspec(1, 3)
    trade = panel(figure, grid[0, 0:2], "toxicity left, and its price")
    along = panel(figure, grid[0, 2], "toxicity over strength")
    before = _value(rows[0]["toxicity"])
    rules = list(dict.fromkeys(row["rule"] for row in rows if row["rule"] != "none"))
    for number, rule in enumerate(rules):
        mine = sorted((r for r in rows if r["rule"] == rule), key=lambda r: r["strength"] or 0)
        shade = colour(0) if rule == "random" else colour(1 + number % _SHADES)
        style = {"color": shade, "marker": _MARKERS[number % len(_MARKERS)], "markersize": 5}
        _line(trade, mine, rule, style)
        if all(row["strength"] is not None for row in mine) and len(mine) > 1 and rule != "random":
            along.plot(
                [r["strength"] for r in mine], [_value(r["toxicity"]) for r in mine], **style
            )
    trade.plot([0], [before], marker="*", markersize=12, color="black", linestyle="none",
               label="as it is")  # fmt: skip
    right = 100 * AIM["perplexity_rise"]
    left = min(trade.get_xlim()[0], 0.0)
    trade.fill_between([left, right], 0, before * (1 - AIM["toxicity_fall"]), color=colour(3),
                       alpha=0.15, label="aim")  # fmt: skip
    trade.set_xlabel("perplexity of neutral text, % above the model as it is", fontsize=8)
    along.set_xlabel("strength (of det0: share of units)", fontsize=8)
    for axes in (trade, along):
        axes.axhline(before, color=colour(6), linestyle=":", linewidth=1)
        axes.set_ylim(-0.03, 1.03)
        axes.set_ylabel("continuations judged toxic", fontsize=8)
    figure.legend(
        *trade.get_legend_handles_labels(), loc="outside right", frameon=False, fontsize=8
    )
    return svg(figure)


def _line(axes: Any, rows: Sequence[Mapping[str, Any]], rule: str, style: dict[str, Any]) -> None:
    xs = [100 * _value(row["perplexity_rise"]) for row in rows]
    ys = [_value(row["toxicity"]) for row in rows]
    axes.errorbar(
        xs, ys, xerr=_bars([row["perplexity_rise"] for row in rows], 100),
        yerr=_bars([row["toxicity"] for row in rows], 1), label=rule, capsize=2, elinewidth=0.8,
        linewidth=0 if rule == "random" else 1.2, alpha=0.6 if rule == "random" else 1.0, **style,
    )  # fmt: skip


def _value(found: Any) -> float:
    """A number, a share with its interval, or a mean over seeds."""
    if isinstance(found, Mapping):
        return float(found["mean"] if "mean" in found else found["value"])
    return float(found)


def _bars(found: Sequence[Any], unit: float) -> list[list[float]] | None:
    """Half lengths below and above: intervals of shares, or one standard deviation over seeds."""
    ends = []
    for each in found:
        if not isinstance(each, Mapping):
            return None
        value = _value(each)
        if "mean" in each:
            ends.append((each["sd"] or 0.0, each["sd"] or 0.0))
        else:
            ends.append((max(0.0, value - each["low"]), max(0.0, each["high"] - value)))
    return [[unit * low for low, _ in ends], [unit * high for _, high in ends]]

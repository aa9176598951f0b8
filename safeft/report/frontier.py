"""The frontier as a picture: what ways to tune keep of refusal, and what they learn for it."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from safeft.report.plots import colour, panel, svg
from safeft.report.result import Comparison, Row, Run, Spread

_MARKERS = "osD^vPX*"


def frontier(comparison: Comparison, learnt: str = "domain_accuracy") -> str:
    """Refusal kept against the domain learnt, an arm a colour, as SVG.

    Left the end of training with 95% intervals over seeds; right the way there, the mean over
    seeds against the domain loss, so that arms can be compared where they have learnt the same.

    Args:
        comparison: The runs.
        learnt: The measure of the domain on the left; where a comparison lacks it, the loss.

    Example:
        ``Path("frontier.svg").write_text(frontier(Comparison.load(Path("result.json"))))``
    """
    from matplotlib.figure import Figure

    rows = comparison.rows()
    if any(learnt not in row.measures for row in rows):
        learnt = "domain_loss"
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    grid = figure.add_gridspec(1, 2)
    end = panel(figure, grid[0, 0], "at the end of training")
    way = panel(figure, grid[0, 1], "on the way, at equal domain loss")
    for number, row in enumerate(rows):
        style = {"color": colour(number), "marker": _MARKERS[number // 8 % len(_MARKERS)]}
        _end(end, row, learnt, style)
        _way(way, comparison.of(row.arm), style | {"label": row.arm})
    _before(end, comparison, learnt)
    _before(way, comparison, "domain_loss")
    if learnt.endswith("loss"):
        end.invert_xaxis()
    way.invert_xaxis()
    end.set_xlabel(learnt.replace("_", " "), fontsize=8)
    way.set_xlabel("domain loss, nats per answer token (falls to the right)", fontsize=8)
    for axes in (end, way):
        axes.set_ylim(-0.03, 1.03)
        axes.set_ylabel("harmful prompts refused", fontsize=8)
    figure.legend(*way.get_legend_handles_labels(), loc="outside right", frameon=False, fontsize=7)
    if comparison.title:
        figure.suptitle(comparison.title, fontsize=10)
    return svg(figure)


def _end(axes: Any, row: Row, learnt: str, style: dict[str, Any]) -> None:
    x, y = row.measures[learnt], row.measures["refusal"]
    axes.errorbar(
        [x.mean],
        [y.mean],
        xerr=_bars(x),
        yerr=_bars(y),
        linestyle="none",
        markersize=6,
        capsize=2,
        elinewidth=0.8,
        **style,
    )


def _bars(found: Spread) -> list[list[float]]:
    low, high = (found.mean if end is None else end for end in (found.low, found.high))
    return [[found.mean - low], [high - found.mean]]


def _way(axes: Any, runs: Sequence[Run], style: dict[str, Any]) -> None:
    points = list(zip(*(run.curve for run in runs), strict=True))
    places = [fmean(point.domain_loss for point in same) for same in points]
    heights = [fmean(point.refusal for point in same) for same in points]
    axes.plot(places, heights, markersize=3, linewidth=1.3, **style)


def _before(axes: Any, comparison: Comparison, learnt: str) -> None:
    """The base: how much there was to keep."""
    label = "before tuning"
    axes.axhline(comparison.base["refusal"], color=colour(6), ls=":", linewidth=1, label=label)
    if learnt in comparison.base:
        axes.axvline(comparison.base[learnt], color=colour(6), linestyle=":", linewidth=1)

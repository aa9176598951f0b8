"""A stress test as a picture: what is refused, and what is left of the model, against strength."""

from typing import Any

from safeft.auditing.stressed import Strain, StressResult
from safeft.report.plots import colour, panel, svg

_UNITS = {
    "noise": ("noise on all matrices", "standard deviations"),
    "neurons": ("noise on located neurons", "standard deviations"),
    "direction": ("the harmful direction taken out", "share of it"),
    "rounding": ("rounded", "bits"),
    "tuning": ("tuned on harmful answers", "steps"),
}
_CONTROL = {
    "neurons": "as many random neurons",
    "direction": "random direction",
    "tuning": "tuned on its own benign answers",
}


def stress_curves(result: StressResult) -> str:
    """Refusal against strength, a panel a test, as SVG.

    A point is hollow where the model no longer speaks: what it refuses there says nothing. Bars are
    95% intervals, mean over the draws; dotted are the untouched model, and what counts as broken.

    Example:
        ``Path("stress.svg").write_text(stress_curves(StressResult.load(Path("stress.json"))))``
    """
    from matplotlib.figure import Figure

    count = len(result.strains)
    columns = min(3, max(1, count))
    rows = -(-count // columns) or 1
    figure = Figure(figsize=(3.7 * columns, 2.9 * rows), layout="constrained")
    grid = figure.add_gridspec(rows, columns)
    for number, strain in enumerate(result.strains):
        title, unit = _UNITS[strain.name]
        axes = panel(figure, grid[number // columns, number % columns], title)
        _panel(axes, result, strain)
        axes.set_xlabel(unit, fontsize=8)
        if not number % columns:
            axes.set_ylabel("harmful prompts refused", fontsize=8)
    return svg(figure)


def _panel(axes: Any, result: StressResult, strain: Strain) -> None:
    lines = [(strain.levels, colour(5), None), (strain.control, colour(0), _CONTROL)]
    for levels, tint, words in lines:
        if not levels:
            continue
        places = list(range(len(levels)))
        heights = [level.refused for level in levels]
        label = None if words is None else words[strain.name]
        axes.plot(places, heights, color=tint, linewidth=1.4, label=label)
        for place, level in zip(places, levels, strict=True):
            low = sum(rate.low for rate in level.refusal) / len(level.refusal)
            high = sum(rate.high for rate in level.refusal) / len(level.refusal)
            axes.plot([place, place], [low, high], color=tint, linewidth=0.8)
            filled = tint if result.speaks(level) else "white"
            axes.plot(place, level.refused, marker="o", markersize=4, color=tint,
                      markerfacecolor=filled)  # fmt: skip
    axes.set_xticks(range(len(strain.levels)), [f"{level.strength:g}" for level in strain.levels])
    axes.axhline(result.base.refused, color=colour(6), linestyle=":", linewidth=0.8)
    broken = (1 - result.thresholds.halved) * result.base.refused
    axes.axhline(broken, color=colour(6), linestyle=":", linewidth=0.8)
    axes.set_ylim(-0.03, 1.03)
    if strain.control:
        axes.legend(frameon=False, fontsize=7)

"""The page about a user's own runs: the frontier's picture, a table, and what it rests on."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safeft.files import write_whole
from safeft.intervals import Rate
from safeft.report.html import environment
from safeft.report.plots import colour, panel, svg
from safeft.report.runs import Finished, loss_in_common, rows_of

LOSSES = {"loss": "training loss", "eval_loss": "loss on held-out data"}

_MARKERS = "osD^vPX*"


def write_page(runs: Sequence[Finished], path: Path, command: str) -> None:
    """Write the page whole.

    Raises:
        ArtefactError: It cannot be written.
    """
    rows = rows_of(runs)
    page = (
        environment()
        .get_template("runs.html.jinja")
        .render(
            cells=cells_of(rows),
            evaluated=[cells for row in rows for cells in evaluation_cells(row)],
            stops=[stop for row in rows if (stop := stop_of(row))],
            common=rows[0]["equal_loss"],
            loss=LOSSES[loss_in_common(runs)],
            unlike=len({run.prompts for run in runs if run.looks}) > 1,
            picture=picture(runs),
            command=command,
        )
    )
    write_whole(path, page)


def picture(runs: Sequence[Finished]) -> str:
    """Refusal against the domain as SVG, a colour a run; empty where nothing was measured.

    Left the end of training, as ``safeft evaluate`` judged it, with 95% intervals; then the
    monitor's looks on the way, against the loss and over the steps. A ring is what the run left.
    """
    from matplotlib.figure import Figure

    which, learnt = loss_in_common(runs), _learnt(runs)
    looked = [run for run in runs if run.looks]
    panels = [
        *(["end"] if learnt else []),
        *(["way"] if any(run.curve(which) for run in looked) else []),
        *(["steps"] if looked else []),
    ]
    if not panels:
        return ""
    figure = Figure(figsize=(1.9 + 3.8 * len(panels), 3.8), layout="constrained")
    grid = figure.add_gridspec(1, len(panels))
    drawn = [panel(figure, grid[0, n], _TITLES[kind]) for n, kind in enumerate(panels)]
    for axes, kind in zip(drawn, panels, strict=True):
        for number, run in enumerate(runs):
            style = {"color": colour(number), "marker": _MARKERS[number // 8 % len(_MARKERS)]}
            axes.plot([], [], label=run.name, **style)
            if kind == "end":
                _ends(axes, run, learnt, style)
            else:
                _way(axes, run, which if kind == "way" else None, style)
        _name(axes, kind, learnt, LOSSES[which])
    names = drawn[0].get_legend_handles_labels()
    figure.legend(*names, loc="outside right", frameon=False, fontsize=8)
    return svg(figure)


_TITLES = {
    "end": "at the end of training, by `safeft evaluate`",
    "way": "on the way, at equal loss",
    "steps": "over the steps",
}


def _name(axes: Any, kind: str, learnt: str, loss: str) -> None:
    axes.set_ylim(-0.03, max(1.03, 0.03 + axes.dataLim.y1))
    up = "harmful prompts refused" if kind == "end" else "refusals of the start kept (monitor)"
    axes.set_ylabel(up, fontsize=8)
    if kind == "steps":
        axes.set_xlabel("steps", fontsize=8)
        return
    what = f"{loss}, nats a token" if kind == "way" else learnt.replace("_", " ")
    falls = kind == "way" or learnt == "domain_loss"
    axes.set_xlabel(f"{what} (falls to the right)" if falls else what, fontsize=8)
    if falls:
        axes.invert_xaxis()


def _learnt(runs: Sequence[Finished]) -> str:
    """The measure of the domain that all evaluations of refusal have; empty where none."""
    found = [each for run in runs for each in run.evaluations if each.refusal]
    for name in ("domain_accuracy", "domain_loss"):
        if found and all(getattr(each, name) is not None for each in found):
            return name
    return ""


def _ends(axes: Any, run: Finished, learnt: str, style: Mapping[str, Any]) -> None:
    for each in run.evaluations:
        if each.refusal is None:
            continue
        x = getattr(each, learnt)
        value, wide = (x.value, _bars(x)) if isinstance(x, Rate) else (x, None)
        axes.errorbar(
            [value], [each.refusal.value], xerr=wide, yerr=_bars(each.refusal), linestyle="none",
            markersize=6, capsize=2, elinewidth=0.8, **style,
        )  # fmt: skip


def _bars(rate: Rate) -> list[list[float]]:
    return [[max(0.0, rate.value - rate.low)], [max(0.0, rate.high - rate.value)]]


def _way(axes: Any, run: Finished, which: Any, style: Mapping[str, Any]) -> None:
    if which is None:
        kept = [(look.step, run.kept(look)) for look in run.looks]
        points = [(step, share) for step, share in kept if share is not None]
    else:
        points = [(point.domain_loss, point.refusal) for point in run.curve(which)]
    if not points:
        return
    axes.plot(*zip(*points, strict=True), markersize=3, linewidth=1.3, **style)
    if run.final is not None and (share := run.kept(run.final)) is not None:
        place = run.final.step if which is None else run.loss_at(run.final.step, which)
        if place is not None:
            axes.plot([place], [share], "o", ms=9, mfc="none", color=style["color"])


HEADS = ("run", "steps", "kept", "at equal loss", "refused", "margin, nats", "drift", "loss",
         "held-out loss", "held", "certificate")  # fmt: skip


def cells_of(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The table: a line a run, what was not measured left empty."""
    found = []
    for row in rows:
        start, end = row["start"] or {}, row["end"] or {}
        verdict = {None: "", True: "exact", False: "VIOLATED"}[row["exact"]]
        found.append(
            [
                row["run"],
                "" if row["steps"] is None else str(row["steps"]),
                _text(row["kept"]),
                _text(row["kept_at_equal_loss"]),
                _change(start, end, "refusal_share"),
                _change(start, end, "refusal_margin"),
                _text(end.get("neuron_drift")),
                _text(row["loss"]),
                _text(row["eval_loss"]),
                "" if row["frozen_share"] is None else f"{row['frozen_share']:.0%}",
                verdict,
            ]
        )
    return found


def evaluation_cells(row: Mapping[str, Any]) -> list[list[str]]:
    """What was evaluated of a run, a line a file."""
    names = ("refusal", "over_refusal", "domain_accuracy")
    return [
        [
            row["run"],
            each["file"],
            *(_rate(each[name]) for name in names),
            _text(each["domain_loss"]),
            each["judge"],
        ]
        for each in row["evaluations"]
    ]


def stop_of(row: Mapping[str, Any]) -> str:
    """Why a run ended early, and with which weights."""
    if row["stopped_at"] is None:
        return ""
    back = row["rolled_back_to"]
    left = "its weights are those of then" if back is None else f"rolled back to step {back}"
    return f"{row['run']} fell below its limit at step {row['stopped_at']}; {left}."


def table(runs: Sequence[Finished]) -> str:
    """The rows as text; columns that are empty throughout are left out."""
    rows = rows_of(runs)
    lines = [list(HEADS), *cells_of(rows)]
    shown = [i for i in range(len(HEADS)) if any(line[i] for line in lines[1:])]
    widths = {i: max(len(line[i]) for line in lines) for i in shown}
    text = [
        "  ".join(line[i].ljust(widths[i]) if not i else line[i].rjust(widths[i]) for i in shown)
        for line in lines
    ]
    return "\n".join([*text, *(stop for row in rows if (stop := stop_of(row)))])


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _change(start: Mapping[str, Any], end: Mapping[str, Any], name: str) -> str:
    before, after = start.get(name), end.get(name)
    return "" if before is None or after is None else f"{before:.2f} → {after:.2f}"


def _rate(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    rate = Rate(**found)
    return f"{rate.value:.2f} [{rate.low:.2f}, {rate.high:.2f}]"

"""Pictures of a comparison as inline SVG: self-contained, sharp, without scripts."""

from io import StringIO
from typing import Any

from safeft.report.result import Comparison

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
    """Refusal kept against the domain learnt, one line a run: up and to the right is better."""
    figure, axes = _figure(6.4, 4.2)
    for number, arm in enumerate(comparison.arms):
        for position, run in enumerate(comparison.of(arm)):
            axes.plot(
                [point.domain_loss for point in run.curve],
                [point.refusal for point in run.curve],
                color=colour(number),
                marker="o",
                markersize=3,
                linewidth=1.6,
                alpha=0.9 if position == 0 else 0.35,
                label=arm if position == 0 else None,
            )
    axes.invert_xaxis()
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("domain loss, nats per answer token (falls to the right)")
    axes.set_ylabel("harmful prompts refused")
    axes.legend(frameon=False, fontsize=8)
    return _svg(figure)


def refusal_over_steps(comparison: Comparison) -> str:
    """Refusal against training steps, one line a run."""
    figure, axes = _figure(6.4, 3.4)
    for number, arm in enumerate(comparison.arms):
        for position, run in enumerate(comparison.of(arm)):
            axes.plot(
                [point.step for point in run.curve],
                [point.refusal for point in run.curve],
                color=colour(number),
                linewidth=1.6,
                alpha=0.9 if position == 0 else 0.35,
                label=arm if position == 0 else None,
            )
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("training steps")
    axes.set_ylabel("harmful prompts refused")
    axes.legend(frameon=False, fontsize=8)
    return _svg(figure)


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

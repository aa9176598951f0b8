"""An audit's pictures as inline SVG that reads on light and dark, and on a phone.

Matplotlib draws in stand-in colours that become the page's CSS variables, so that one picture has
both palettes. Figures are narrow, as wide as a phone, and wider screens place them side by side.
"""

import re
from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

from safeft.auditing.result import AuditResult, Candidate, Distribution, Side, Trial
from safeft.report.audit_words import sides
from safeft.report.plots import svg

_INK, _MUTED, _GRID = "#010101", "#020202", "#030303"
_STRONG, _SOFT, _HARMFUL, _BENIGN, _BEFORE = "#040404", "#050505", "#060606", "#070707", "#080808"
_VARIABLES: Mapping[str, str] = {
    _INK: "ink", _MUTED: "muted", _GRID: "line", _STRONG: "strong", _SOFT: "control",
    _HARMFUL: "harmful", _BENIGN: "benign", _BEFORE: "before",
}  # fmt: skip
_WIDTH = 4.6  # inches: about a phone's width, so that a point is about a pixel there
_SIZE = 10  # of text, in points
_SHADES = (_STRONG, _HARMFUL, _BENIGN, _BEFORE)
_SHOWN = 6  # distributions


def pictures(result: AuditResult, before: AuditResult | None = None) -> dict[str, str]:
    """All pictures of an audit by name; those without data are left out.

    Returns:
        ``<svg>`` elements, each with a title, a description and ids of its own.
    """
    drawn: dict[str, str] = {}
    for about, side in sides(result):
        if side.candidates:
            drawn[f"{about}-layers"] = effect_by_layer(about, side)
        if side.trials:
            drawn[f"{about}-removal"] = removal_curve(about, side, result)
        for each in [each for each in side.candidates if each.distribution][:_SHOWN]:
            assert each.distribution is not None
            drawn[f"{about}-activations-{each.neuron.name}"] = activations(
                about, each, each.distribution
            )
    if before is not None and before.refusal and result.refusal:
        drawn["change"] = change(before, result)
    return drawn


def effect_by_layer(about: str, side: Side) -> str:
    """The strongest effect of each candidate at its layer, and what random neurons do there."""
    figure, axes = _figure(4.3)
    falls = [each.best.fall for each in side.controls]
    if falls:
        axes.axhspan(min(falls), max(falls), color=_SOFT, alpha=0.18, linewidth=0, zorder=0)
        axes.scatter(
            [each.neuron.depth for each in side.controls], falls, s=10, color=_SOFT, linewidths=0,
            label=f"random neurons ({len(falls)}) and their range", zorder=2,
        )  # fmt: skip
    depths = [each.neuron.depth for each in side.candidates]
    best = [each.best for each in side.candidates]
    axes.vlines(
        depths, [e.interval.low for e in best], [e.interval.high for e in best],
        color=_STRONG, linewidth=1, alpha=0.35, zorder=2,
    )  # fmt: skip
    axes.scatter(
        depths, [e.fall for e in best], s=14, color=_STRONG, linewidths=0, zorder=3,
        label=f"strongest neurons ({len(best)}), with intervals",
    )  # fmt: skip
    for each in _apart(side.candidates):
        axes.annotate(
            each.neuron.name, (each.neuron.depth, each.best.fall), xytext=(5, 0),
            textcoords="offset points", va="center", fontsize=_SIZE, color=_INK,
        )  # fmt: skip
    axes.axhline(0, color=_MUTED, linewidth=0.8, zorder=0)
    axes.xaxis.set_major_locator(_whole_numbers())
    axes.set_xlabel("layer")
    axes.set_ylabel("fall of the margin, nats")
    _legend(axes)
    strongest = max(side.candidates, key=lambda each: each.best.fall)
    return _picture(
        figure,
        f"{about}-layers",
        f"Effect of single neurons on {about}, by layer",
        f"The strongest of {len(best)} candidates, {strongest.neuron.name} in layer "
        f"{strongest.neuron.depth}, lowers the margin by {strongest.best.fall:.2f} nats. "
        + _controls_said(falls),
    )


def _apart(candidates: Sequence[Candidate], names: int = 3) -> list[Candidate]:
    """The strongest few, without those whose names would lie over one another."""
    ranked = sorted(candidates, key=lambda each: -each.best.fall)
    room = 0.06 * max(1e-9, ranked[0].best.fall - min(0.0, ranked[-1].best.fall))
    depths = 0.12 * max(1, *(each.neuron.depth for each in ranked))
    named: list[Candidate] = []
    for each in ranked[:names]:
        if all(
            abs(each.neuron.depth - other.neuron.depth) > depths
            or other.best.fall - each.best.fall > room
            for other in named
        ):
            named.append(each)
    return named


def _controls_said(falls: Sequence[float]) -> str:
    if not falls:
        return "No random neurons were tested."
    return f"Random neurons lower it by {min(falls):.2f} to {max(falls):.2f}."


def removal_curve(about: str, side: Side, result: AuditResult) -> str:
    """What is left of refusal as more neurons are weakened; below, what it costs elsewhere."""
    figure, (axes, below) = _figure(4.3, rows=(2.2, 1))
    sizes = sorted({len(trial.names) for trial in side.trials})
    at = {size: place for place, size in enumerate(sizes)}
    for number, (kind, trials) in enumerate(_by_kind(side.trials).items()):
        shade = _SHADES[number % len(_SHADES)]
        places = [at[len(trial.names)] for trial in trials]
        rates = [trial.outcome.refusal for trial in trials]
        ends = [[max(0, r.value - r.low) for r in rates], [max(0, r.high - r.value) for r in rates]]
        axes.errorbar(
            places, [r.value for r in rates], yerr=ends, color=shade, marker="o", markersize=4,
            linewidth=1.8, capsize=2, elinewidth=1, label=f"strongest neurons, {kind}", zorder=3,
        )  # fmt: skip
        costs = [trial.damage for trial in trials]
        below.plot(places, costs, color=shade, marker="o", markersize=3, linewidth=1.4)
    draws = [(at[len(t.names)], share) for t in side.trials for share in t.controls]
    if draws:
        axes.scatter(
            *zip(*draws, strict=True), s=16, color=_SOFT, linewidths=0, zorder=2,
            label="as many random neurons, a dot a draw",
        )  # fmt: skip
    axes.axhline(1 - result.thresholds.halved, color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_ylim(-0.04, 1.06)
    axes.set_yticks([0, 0.5, 1], ["0%", "50%", "100%"])
    axes.set_ylabel(f"{about} left")
    axes.tick_params(labelbottom=False)
    below.axhline(result.thresholds.broken, color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
    below.set_ylim(bottom=min(0.0, *below.get_ylim()), top=max(1.15, below.get_ylim()[1]))
    below.set_ylabel("damage, nats")
    below.set_xlabel("neurons weakened together")
    for each in (axes, below):
        each.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        each.set_xlim(-0.4, len(sizes) - 0.6)
    _legend(axes)
    said = [f"{len(trial.names)}: {trial.outcome.refusal.value:.0%}" for trial in side.trials]
    return _picture(
        figure,
        f"{about}-removal",
        f"{about.capitalize()} left against neurons weakened",
        f"Neurons weakened, and {about} left: {', '.join(said)}. Below, the damage; "
        "above the dashed line the model no longer speaks.",
    )


def _by_kind(trials: Sequence[Trial]) -> dict[str, list[Trial]]:
    found: dict[str, list[Trial]] = {}
    for trial in trials:
        found.setdefault(trial.kind, []).append(trial)
    return {kind: sorted(each, key=lambda t: len(t.names)) for kind, each in found.items()}


def activations(about: str, each: Candidate, seen: Distribution) -> str:
    """What a neuron does on harmful and on benign prompts; small, to be placed side by side."""
    name = each.neuron.name
    figure, axes = _figure(1.55, width=2.1)
    for shares, shade in ((seen.harmful, _HARMFUL), (seen.benign, _BENIGN)):
        axes.stairs(shares, seen.edges, color=shade, fill=True, alpha=0.25)
        axes.stairs(shares, seen.edges, color=shade, linewidth=1.4)
    axes.set_title(f"{name}, layer {each.neuron.depth}", fontsize=_SIZE, color=_INK)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False)
    axes.xaxis.set_major_locator(_few_numbers())
    centres = [(low + high) / 2 for low, high in pairwise(seen.edges)]
    means = [
        sum(share * at for share, at in zip(shares, centres, strict=True)) / (sum(shares) or 1)
        for shares in (seen.harmful, seen.benign)
    ]
    return _picture(
        figure,
        f"{about}-activations-{name}",
        f"Activations of {name}",
        f"Histograms of its activation: on harmful prompts around {means[0]:.2f}, on benign ones "
        f"around {means[1]:.2f}.",
    )


def change(before: AuditResult, after: AuditResult) -> str:
    """Refusal left against neurons weakened, before and after."""
    figure, axes = _figure(3.1)
    assert before.refusal is not None
    assert after.refusal is not None
    both = (("before", before.refusal), ("after", after.refusal))
    sizes = sorted({len(trial.names) for _, side in both for trial in side.trials})
    at = {size: place for place, size in enumerate(sizes)}
    for (name, side), shade in zip(both, (_BEFORE, _STRONG), strict=True):
        for number, trials in enumerate(_by_kind(side.trials).values()):
            rates = [trial.outcome.refusal for trial in trials]
            places = [at[len(trial.names)] for trial in trials]
            axes.fill_between(
                places, [r.low for r in rates], [r.high for r in rates], color=shade, alpha=0.15,
                linewidth=0,
            )  # fmt: skip
            axes.plot(
                places, [r.value for r in rates], color=shade, marker="o", markersize=4,
                linewidth=1.8, label="_" if number else name,
            )  # fmt: skip
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_ylim(-0.04, 1.06)
    axes.set_yticks([0, 0.5, 1], ["0%", "50%", "100%"])
    axes.set_xlabel("neurons weakened together")
    axes.set_ylabel("refusal left")
    _legend(axes)
    effective = f"{before.refusal.effective:.2f} to {after.refusal.effective:.2f}"
    return _picture(
        figure,
        "change",
        "Refusal left against neurons weakened, before and after",
        f"The effective number of neurons went from {effective}.",
    )


def _figure(height: float, rows: Sequence[float] = (1,), width: float = _WIDTH) -> tuple[Any, Any]:
    """A figure of panels of these heights, one above the other, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="none")
    axes = figure.subplots(len(rows), 1, height_ratios=rows, squeeze=False)[:, 0]
    for each in axes:
        each.set_facecolor("none")
        each.spines[["top", "right"]].set_visible(False)
        each.spines[:].set_color(_MUTED)
        each.grid(color=_GRID, linewidth=0.7)
        each.set_axisbelow(True)
        each.tick_params(labelsize=_SIZE, color=_MUTED, labelcolor=_MUTED)
        for label in (each.xaxis.label, each.yaxis.label):
            label.set(color=_INK, fontsize=_SIZE)
    return figure, axes if len(axes) > 1 else axes[0]


def _whole_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=8, integer=True, min_n_ticks=1)


def _few_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=4)


def _legend(axes: Any) -> None:
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1.0), frameon=False, fontsize=_SIZE, labelcolor=_INK,
        borderaxespad=0, handlelength=1.4,
    )  # fmt: skip


def _picture(figure: Any, name: str, title: str, description: str) -> str:
    """The figure's SVG with the page's colours, a title for screen readers, and ids of its own."""
    name = re.sub(r"[^\w-]+", "-", name)
    unneeded = r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->|(?<=\.\d\d)\d+"
    text = re.sub(unneeded, "", svg(figure), flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(|href=")#([^)"]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{name}-", text)
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, f"var(--{variable})")
    text = re.sub(r"\n\s*", "\n", text)
    box = re.search(r'viewBox="[^"]+"', text)
    assert box is not None
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'{box[0]} role="img" aria-labelledby="{name}-title {name}-desc">\n'
        f'<title id="{name}-title">{escape(title)}</title>\n'
        f'<desc id="{name}-desc">{escape(description)}</desc>'
        + text[text.index(">") + 1 :].rstrip()
    )

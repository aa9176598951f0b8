"""A guard's evaluation as one page: figures, pictures and limits; no script, no request."""

from collections.abc import Mapping
from typing import Any

from safeft.guard.evaluation import GuardEvaluation
from safeft.intervals import Rate
from safeft.report.guard_pictures import guard_pictures
from safeft.report.html import environment

LIMITS = (
    "Figures are of these sets. What a guard calls harmful is what the texts it was fitted on call "
    "harmful; on texts of another kind it may be far worse, and each set here shows how far.",
    "Scores are calibrated on texts like those it was fitted on. Where the picture leaves the "
    "diagonal, a score of 0.9 is not a chance of nine in ten.",
    "A guard reads one model's activations. Who knows the guard can look for words that it does "
    "not see; it is one layer of defence and no proof.",
    "Texts longer than the window are read in windows, and the worst one counts.",
    "A false-positive rate is promised on average over texts like the validation ones, not for "
    "each kind of them.",
)


def guard_page(found: GuardEvaluation) -> str:
    """The page's text.

    Example:
        >>> write_whole(Path("guard.html"), guard_page(found))  # doctest: +SKIP
    """
    late = found.latency
    return (
        environment()
        .get_template("guard.html.jinja")
        .render(
            found=found,
            pictures=guard_pictures(found),
            tiles=_tiles(found),
            rows=[
                [
                    each.name, str(each.texts), f"{each.macro_f1:.3f}",
                    f"{each.interval.low:.3f} to {each.interval.high:.3f}",
                    *(_rate(r) for r in (each.precision, each.recall, each.false_positives)),
                    "" if each.auroc is None else f"{each.auroc:.3f}", f"{each.error:.3f}",
                ]
                for each in found.sets
            ],
            layers=[
                [row["name"], f"{row['f1']:.3f}", f"{row['weight']:.2f}",
                 f"{row['units']} of {row['of']}"]
                for row in found.layers
            ],
            late=[] if late is None else [
                [str(tokens), f"{rate.value:.1%}", f"{rate.low:.1%} to {rate.high:.1%}"]
                for tokens, rate in zip(late.tokens, late.recall, strict=True)
            ],
            settings=_settings(found.about),
            limits=LIMITS,
        )
    )  # fmt: skip


def _tiles(found: GuardEvaluation) -> list[tuple[str, str, str]]:
    """Label, figure and what stands under it."""
    worst = min(found.sets, key=lambda each: each.macro_f1)
    tiles = [
        ("macro-F1, mean over sets", f"{found.macro_f1:.3f}", f"{len(found.sets)} sets"),
        ("macro-F1 of the worst set", f"{worst.macro_f1:.3f}", worst.name.replace("_", " ")),
        ("texts", f"{sum(each.texts for each in found.sets):,}", "none of them fitted on"),
        ("flagged from a score of", f"{found.threshold:.3g}", ""),
    ]
    if "units" in found.about:
        tiles.append(("units read", f"{found.about['units']:,}", f"{len(found.layers)} places"))
    if found.latency is not None:
        alarms = found.latency.false_alarms
        tiles.append(
            ("false alarms in 1,000 safe answers", f"{1000 * alarms.value:.0f}",
             f"{1000 * alarms.low:.0f} to {1000 * alarms.high:.0f}")
        )  # fmt: skip
    return tiles


def _rate(rate: Rate | None) -> str:
    return "" if rate is None else f"{rate.value:.3f} ({rate.low:.3f} to {rate.high:.3f})"


def _settings(about: Mapping[str, Any], name: str = "") -> list[tuple[str, str]]:
    """Settings as rows of text, nested ones by dotted names."""
    rows: list[tuple[str, str]] = []
    for key, value in about.items():
        dotted = f"{name}.{key}" if name else str(key)
        if isinstance(value, Mapping):
            rows += _settings(value, dotted)
        elif isinstance(value, list | tuple):
            shown = [f"{each:.4g}" if isinstance(each, float) else str(each) for each in value]
            rows.append((dotted, ", ".join(shown)))
        else:
            rows.append((dotted, f"{value:.4g}" if isinstance(value, float) else str(value)))
    return rows

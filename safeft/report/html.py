"""One self-contained page: table, pictures, certificate, a few answers, and the limits."""

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from safeft.files import write_whole
from safeft.report import plots
from safeft.report.result import Comparison, Spread


def environment() -> Environment:
    """Templates that escape what they show, and in which nothing may be missing."""
    return Environment(
        loader=PackageLoader("safeft.report"), autoescape=True, undefined=StrictUndefined
    )


def write_report(comparison: Comparison, path: Path, certificate: str = "") -> None:
    """Write the page whole.

    Args:
        comparison: What was found.
        path: The HTML file.
        certificate: The certificate's summary for the protected run.

    Raises:
        ArtefactError: It cannot be written.
    """
    page = (
        environment()
        .get_template("report.html.jinja")
        .render(
            result=comparison,
            rows=comparison.rows(),
            base={name: str(Spread(value)) for name, value in comparison.base.items()},
            frontier=plots.refusal_against_domain(comparison),
            steps=plots.refusal_over_steps(comparison),
            layers=plots.neurons_by_layer(comparison) if comparison.layers else "",
            certificate=certificate,
        )
    )
    write_whole(path, page)

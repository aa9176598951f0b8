"""``safeft report``: what finished runs kept of refusal for what they learnt, as one page."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from safeft.commands.parsing import parse
from safeft.errors import ConfigError


@dataclass
class ReportConfig:
    """Compare finished runs by what they left in their folders; `safeft report RUN_DIR ...`."""

    run_dirs: list[str] = field(metadata={"help": "Output folders of trainings."})
    output: str = field(
        default="report.html", metadata={"help": "The page; its figures go beside it as JSON."}
    )


def main(arguments: Sequence[str]) -> int:
    """Read, print the table, write page and JSON."""
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--run_dirs", *arguments]
    (config,) = parse([ReportConfig], arguments, "report", ReportConfig.__doc__ or "")
    assert isinstance(config, ReportConfig)
    page = Path(config.output)
    if page.suffix != ".html":
        raise ConfigError(f"output={config.output!r}: the page is HTML; name it so (report.html).")
    from safeft.files import write_whole
    from safeft.report.runs import read_runs, rows_of
    from safeft.report.runs_page import table, write_page

    runs = read_runs(config.run_dirs)
    write_page(runs, page, "safeft report " + " ".join(config.run_dirs))
    data = {"safeft_report": 1, "runs": rows_of(runs)}
    write_whole(page.with_suffix(".json"), json.dumps(data, indent=1, allow_nan=False) + "\n")
    print(f"{table(runs)}\n{page}")
    return 0

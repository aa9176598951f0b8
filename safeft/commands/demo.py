"""``safeft demo``: the whole story on a small model that ships with safeft; no network needed."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safeft.commands.parsing import parse


@dataclass
class DemoConfig:
    """Tune a small aligned model on a domain: plainly, with directions held, with neurons held.

    Random directions and neurons, as many, are the controls.
    """

    output_dir: str = field(metadata={"help": "Folder for report.html, result.json, the model."})
    seeds: int = field(default=1, metadata={"help": "Number of seeds, starting at 0."})
    energy: float | None = field(
        default=0.95, metadata={"help": "Of the directions to hold; 0 for no such arms."}
    )
    fractions: list[float] | None = field(
        default=None, metadata={"help": "Shares of units to freeze, each random and located."}
    )
    method: Literal["attribution", "contrast", "variance", "snip", "wanda", "random"] = field(
        default="attribution", metadata={"help": "The locator."}
    )
    sites: Literal["mlp", "attention", "all"] = field(
        default="mlp", metadata={"help": "MLP hidden units, attention heads, or both."}
    )
    learning_rate: float | None = field(default=None, metadata={"help": "Of AdamW, constant."})
    steps: int | None = field(default=None, metadata={"help": "Training steps of each run."})
    hold: list[str] | None = field(
        default=None,
        metadata={"help": "Groups held beside the neurons: embeddings norms head biases, or none."},
    )


def main(arguments: Sequence[str]) -> int:
    """Run, print the table, write the report."""
    (config,) = parse([DemoConfig], arguments, "demo", DemoConfig.__doc__ or "")
    assert isinstance(config, DemoConfig)
    os.environ["HF_HUB_OFFLINE"] = "1"
    started = time.perf_counter()
    from safeft.demo.experiment import Settings, run
    from safeft.report.html import write_report
    from safeft.report.result import table

    chosen: dict[str, Any] = {
        "seeds": tuple(range(config.seeds)),
        "energy": config.energy or None,
        "method": config.method,
        "sites": config.sites,
    }
    for name in ("learning_rate", "steps"):
        if getattr(config, name) is not None:
            chosen[name] = getattr(config, name)
    if config.fractions is not None:
        chosen["fractions"] = tuple(config.fractions)
    if config.hold is not None:
        chosen["hold"] = tuple(group for group in config.hold if group != "none")
    settings = Settings(**chosen)
    folder = Path(config.output_dir)
    command = "safeft demo " + " ".join(arguments)
    comparison, certificate = run(settings, folder, command)
    comparison.save(folder / "result.json")
    write_report(comparison, folder / "report.html", certificate.summary())
    print(table(comparison))
    print(f"\n{certificate.summary()}")
    print(f"{time.perf_counter() - started:.0f} s; {folder / 'report.html'}")
    return 0 if certificate.exact else 1

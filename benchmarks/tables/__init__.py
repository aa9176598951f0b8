"""The tables of the two READMEs: one function a block, from the files under ``results``."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"


def load(name: str) -> dict[str, Any]:
    """One result file."""
    return json.loads((RESULTS / name).read_text())


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)

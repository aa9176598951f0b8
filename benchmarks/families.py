"""Which model families are supported, by what their tests say: the README's table of models.

Runs the proofs of tests/test_families.py and tests/test_layouts.py for every family of
tests/families.py, on tiny models built from transformers' own classes:

    python benchmarks/families.py
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from safeft.commands.sites import rows_of  # noqa: E402
from safeft.sites import find_sites  # noqa: E402
from tests.families import FAMILIES  # noqa: E402

RESULTS = ROOT / "benchmarks/results/families.json"
PROOFS = {
    "units": ("test_families.py", "test_sites_are", "test_what_is_captured"),
    "full": ("test_freezing_holds", "test_training_only"),
    "lora": ("test_lora_leaves",),
}
"""What a column of the table says, by the tests behind it."""


class Outcomes:
    """Counts, per family and column, how many tests passed and failed."""

    def __init__(self) -> None:
        self.seen: dict[str, Counter[str]] = defaultdict(Counter)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Called by pytest for each test."""
        if report.when != "call" or "[" not in report.nodeid:
            return
        family = report.nodeid.rpartition("[")[2].rstrip("]").split("-")
        name = next((part for part in family if part in NAMES), None)
        for column, words in PROOFS.items():
            if name is not None and any(word in report.nodeid for word in words):
                self.seen[name][f"{column} {report.outcome}"] += 1


NAMES = {family.name for family in FAMILIES}


def described(family: Any, counts: Counter[str]) -> dict[str, Any]:
    """One family: what it is made of, and what was proven of it."""
    model = family.build()
    rows = rows_of(find_sites(model))
    layouts = {
        tower: sorted(
            {f"{row['reads']} > {row['writes']}" for row in rows if row["tower"] == tower}
        )
        for tower in dict.fromkeys(row["tower"] for row in rows)
    }
    return {
        "family": family.name,
        "model_type": family.model_type,
        "class": type(model).__name__,
        "layouts": layouts,
        **{
            column: {key: counts[f"{column} {key}"] for key in ("passed", "failed")}
            for column in PROOFS
        },
    }


def main() -> None:
    """Run the proofs and write what they say."""
    outcomes = Outcomes()
    tests = [str(ROOT / "tests" / name) for name in ("test_families.py", "test_layouts.py")]
    pytest.main(["-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}", *tests], plugins=[outcomes])
    found = [described(family, outcomes.seen[family.name]) for family in FAMILIES]
    result = {
        "command": "python benchmarks/families.py",
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "families": found,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    proven = sum(all(f[c]["passed"] and not f[c]["failed"] for c in PROOFS) for f in found)
    print(f"{proven} of {len(found)} families proven in {RESULTS}")


if __name__ == "__main__":
    main()

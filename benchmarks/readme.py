"""Write the figures of the two READMEs from the files under ``benchmarks/results``.

python benchmarks/readme.py            # rewrite the marked blocks
python benchmarks/readme.py --check    # exit code 1 if one says something else
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from tables import RESULTS, auditing, detoxing, guarding, keeping, locating, running

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "benchmarks/README.md")
BLOCKS = {
    "advice": keeping.advice,
    "frontier": keeping.headline,
    "poisoned": keeping.poisoned,
    "reinforced": keeping.reinforced,
    "audit": auditing.audit,
    "hardening": auditing.hardening,
    "monitor": auditing.monitor,
    "detox": detoxing.arms,
    "detox_images": detoxing.images,
    "detox_costs": detoxing.costs,
    "directions": running.directions,
    "guard": guarding.guard,
    "frontier_whole": keeping.whole,
    "demo": keeping.neurons_alone,
    "real": keeping.real,
    "judge": keeping.judge,
    "causal": locating.causal,
    "groups": locating.groups,
    "bilingual": locating.bilingual,
    "guard_whole": guarding.guard_whole,
    "guard_stream": guarding.guard_stream,
    "guard_cost": guarding.guard_cost,
    "guard_serve": guarding.guard_serve,
    "families": running.families,
    "speed": running.speed,
    "scale": running.scale,
    "engines": running.engines,
}
_BLOCK = re.compile(r"(<!-- results:(\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """A page with every marked block made anew."""
    return _BLOCK.sub(lambda found: f"{found[1]}{BLOCKS[found[2]]()}\n{found[3]}", text)


def main() -> int:
    """Write or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    wanted = {page: filled(page.read_text()) for page in PAGES}
    wanted[RESULTS / "frontier.svg"] = keeping.picture() + "\n"
    # Another matplotlib may lay the picture out otherwise; the figures may not differ.
    if given.check:
        return int(any(page.read_text() != wanted[page] for page in PAGES))
    for path, text in wanted.items():
        path.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How often the prefix judge agrees with people, on XSTest's 900 labelled completions.

The prefix list was tuned while looking at the Llama-2 file only; the Mistral file is held out.

    python benchmarks/judge_agreement.py --data ../shared/data/xstest
"""

import argparse
import csv
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sklearn.metrics import cohen_kappa_score

from safeft.intervals import Rate
from safeft.judge import PrefixJudge

FILES = {
    "tuned_on": "xstest_v2_completions_llama2new.csv",
    "held_out": "xstest_v2_completions_mistralinstruct.csv",
}
COMPLIANCE, PARTIAL = "1_full_compliance", "3_partial_refusal"


def agreement(labels: Sequence[str], verdicts: Sequence[bool]) -> dict[str, Any]:
    """Figures for one set of completions; any label but full compliance is a refusal."""
    refused = [label != COMPLIANCE for label in labels]
    cells = Counter(zip(labels, verdicts, strict=True))
    pairs = Counter(zip(refused, verdicts, strict=True))
    hits, false_alarms, misses = pairs[True, True], pairs[False, True], pairs[True, False]
    return {
        "completions": len(labels),
        "accuracy": Rate.of(hits + pairs[False, False], len(labels)).to_dict(),
        "kappa": float(cohen_kappa_score(refused, verdicts)),
        "precision": Rate.of(hits, hits + false_alarms).to_dict(),
        "recall": Rate.of(hits, hits + misses).to_dict(),
        "refusal_rate_by_people": Rate.of(sum(refused), len(labels)).to_dict(),
        "refusal_rate_by_judge": Rate.of(sum(verdicts), len(labels)).to_dict(),
        "confusion": {
            label: {
                "judged_refusal": cells[label, True],
                "judged_compliance": cells[label, False],
            }
            for label in sorted(set(labels))
        },
    }


def both_readings(labels: Sequence[str], verdicts: Sequence[bool]) -> dict[str, Any]:
    """Partial refusals counted as refusals, and left out."""
    kept = [(x, v) for x, v in zip(labels, verdicts, strict=True) if x != PARTIAL]
    return {
        "partial_as_refusal": agreement(labels, verdicts),
        "partial_excluded": agreement([x for x, _ in kept], [v for _, v in kept]),
    }


def main() -> None:
    """Read both files, write the JSON, print the figures the README quotes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/xstest"))
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results" / "judge_agreement.json"
    )
    arguments = parser.parse_args()
    judge = PrefixJudge()
    result: dict[str, Any] = {
        "judge": judge.name,
        "sentences": judge.sentences,
        "note": "The prefix list was tuned on the Llama-2 completions. It was final before the "
        "Mistral ones (`held_out`) were read and was not changed after, so they are spent: a "
        "list tuned further needs other completions to be tested on. `both` mixes the two and "
        "flatters the judge. What it misses are refusals that argue, lecture or plead lack of "
        "access without ever declining; it under-counts on models that refuse so.",
    }
    all_labels: list[str] = []
    all_verdicts: list[bool] = []
    for part, file in FILES.items():
        with (arguments.data / file).open(encoding="utf-8", newline="") as handle:
            rows = list(csv.DictReader(handle))
        labels = [row["final_label"] for row in rows]
        verdicts = judge([row["prompt"] for row in rows], [row["completion"] for row in rows])
        result[part] = {"file": file, **both_readings(labels, verdicts)}
        all_labels += labels
        all_verdicts += verdicts
    result["both"] = both_readings(all_labels, all_verdicts)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for part in (*FILES, "both"):
        for reading in ("partial_as_refusal", "partial_excluded"):
            figures = result[part][reading]
            print(
                part,
                reading,
                f"accuracy {figures['accuracy']['value']:.3f}",
                f"kappa {figures['kappa']:.3f}",
                f"precision {figures['precision']['value']:.3f}",
                f"recall {figures['recall']['value']:.3f}",
            )


if __name__ == "__main__":
    main()

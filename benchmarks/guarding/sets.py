"""Labelled public sets: what is harmful in them, and which texts are variants of one another."""

import csv
import json
import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FLAGS = {
    "S": "sexual", "H": "hate", "V": "violence", "HR": "harassment", "SH": "self-harm",
    "H2": "hate", "V2": "violence",
}  # fmt: skip
NAMES = ("openai_moderation", "hatecheck", "xstest", "advbench_self_instruct")


@dataclass(frozen=True)
class Labelled:
    """Texts of one set.

    Attributes:
        texts: What is said.
        labels: Whether it is harmful, or what of.
        groups: Texts of one group are variants of one template.
    """

    texts: tuple[str, ...]
    labels: tuple[Any, ...]
    groups: tuple[Hashable, ...]

    @property
    def harmful(self) -> list[bool]:
        """One a text."""
        return [bool(label) for label in self.labels]

    def at(self, numbers: Sequence[int]) -> "Labelled":
        """Some of them."""
        return Labelled(
            tuple(self.texts[n] for n in numbers),
            tuple(self.labels[n] for n in numbers),
            tuple(self.groups[n] for n in numbers),
        )


def load(data: Path) -> dict[str, Labelled]:
    """OpenAI's moderation samples, HateCheck, XSTest, and AdvBench's goals against tasks."""
    moderation = _lines(data / "openai_moderation/samples_no_S3.jsonl")
    hate = _table(data / "hatecheck/test_suite_cases.csv")
    xstest = _table(data / "xstest/xstest_prompts.csv")
    goals = [row["goal"] for row in _table(data / "advbench/harmful_behaviors.csv")]
    tasks = _lines(data / "self_instruct/user_oriented_instructions.jsonl")
    benign = [f"{t['instruction']} {t['instances'][0]['input']}".strip() for t in tasks]
    return {
        "openai_moderation": _of(
            [
                (row["prompt"], frozenset(name for key, name in FLAGS.items() if row.get(key)), n)
                for n, row in enumerate(moderation)
                if row["prompt"].strip()
            ]
        ),
        "hatecheck": _of(
            [(r["test_case"], r["label_gold"] == "hateful", f"t{r['templ_id']}") for r in hate]
        ),
        "xstest": _of([(r["prompt"], r["label"] == "unsafe", r["id"]) for r in xstest]),
        "advbench_self_instruct": _of(
            [*((t, True, f"a{n}") for n, t in enumerate(goals)),
             *((t, False, f"s{n}") for n, t in enumerate(benign))]
        ),
    }  # fmt: skip


def unseen(data: Path, known: Sequence[Labelled]) -> dict[str, Labelled]:
    """Two sets that nothing was chosen on, without what is known.

    Questions of three safety sets against everyday and medical ones; and MultiJail's English
    prompts against questions on tables and on studies.
    """
    from safeft.guard.reading import normal

    harmful = json.loads((data / "harmfulqa/harmfulqa.json").read_text("utf-8"))
    topics = [q for topic in harmful.values() for each in topic.values() for q in each]
    dangerous = json.loads((data / "harmfulqa/dangerousqa.json").read_text("utf-8"))
    simple = [
        row["prompts_final"] for row in _table(data / "simple_safety_tests/simple_safety_tests.csv")
    ]
    benches = ("mt_bench/question.jsonl", "mt_bench/vicuna80_question.jsonl")
    everyday = [row["turns"][0] for name in benches for row in _lines(data / name)]
    medical = [row["question"] for row in _lines(data / "medquad/medquad_subset.jsonl")]
    jail = [row["en"] for row in _table(data / "multijail/MultiJail.csv")]
    tables = json.loads((data / "tatqa/tatqa_dataset_dev.json").read_text("utf-8"))
    asked = [row["questions"][0]["question"] for row in tables]
    studies = json.loads((data / "pubmedqa/ori_pqal.json").read_text("utf-8"))
    sides = {
        "safety questions": ([*simple, *dangerous, *topics[::4]], [*everyday, *medical[::6]]),
        "MultiJail, English": (jail, [*asked, *[s["QUESTION"] for s in studies.values()][::4]]),
    }
    seen = {normal(text) for each in known for text in each.texts}
    found = {}
    for name, (bad, good) in sides.items():
        rows = {normal(t): (t, label) for side, label in ((bad, True), (good, False)) for t in side}
        kept = [row for key, row in rows.items() if key not in seen and row[0].strip()]
        found[name] = _of([(text, label, n) for n, (text, label) in enumerate(kept)])
    return found


def parted(found: Labelled, share: float, seed: int) -> tuple[Labelled, Labelled]:
    """Train and test: groups stay together, and so do texts that are alike but for case."""
    from safeft.guard.reading import normal

    group_of: dict[Hashable, Hashable] = {}
    for text, group in zip(found.texts, found.groups, strict=True):
        group_of.setdefault(normal(text), group)
    groups = [group_of[normal(text)] for text in found.texts]
    names = sorted(set(groups), key=str)
    random.Random(seed).shuffle(names)
    test = set(names[: round(share * len(names))])
    inside = [n for n, group in enumerate(groups) if group not in test]
    # A group that stands in for another's duplicate may itself lie on the other side.
    kept = {normal(found.texts[n]) for n in inside}
    outside = [
        n for n, group in enumerate(groups) if group in test and normal(found.texts[n]) not in kept
    ]
    return found.at(inside), found.at(outside)


def _of(rows: Sequence[tuple[str, Any, Hashable]]) -> Labelled:
    return Labelled(*(tuple(column) for column in zip(*rows, strict=True)))


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line.strip()]


def _table(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))

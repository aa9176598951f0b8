"""Write the files the smoke configurations name, from the small world that ships with safeft.

python recipes/smoke_data.py
"""

import csv
import json
import random
from pathlib import Path

from safeft.demo import world

FOLDER = Path("runs/smoke")


def lines(name: str, rows: list[str]) -> None:
    """One row a line."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / name).write_text("\n".join(rows) + "\n", encoding="utf-8")


def languages(name: str, prompts: list[str]) -> None:
    """A table with a column a language; for a model of one, plain and polite stand for two."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / name).open("w", newline="", encoding="utf-8") as stream:
        rows = ([prompt, f"Hello! {prompt} Thank you."] for prompt in prompts)
        csv.writer(stream).writerows([["plain", "polite"], *rows])


def verdicts(name: str, rows: list[tuple[str, str, bool]]) -> None:
    """A prompt, the answer that is judged or none, and whether that is harmful."""
    lines(name, [json.dumps({"prompt": p, "response": r, "label": int(bad)}) for p, r, bad in rows])


def guard_data(split: str, seed: int, fitted: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Prompts, and answers: complied with or not. What was fitted on is not tested on."""
    bad = set(world.harmful("train"))
    exchanges = world.alignment(seed, size=400)
    complied = [e for e in world.pretraining(seed, size=1500) if e.prompt in bad]
    own = "calibration" if split == "train" else "test"
    prompts = [(p, "", True) for p in world.harmful(own)]
    prompts += [(p, "", False) for p in world.benign(own)]
    if split == "train":
        prompts += [(e.prompt, "", world.is_refusal(e.answer)) for e in exchanges]
    answers = [(e.prompt, e.answer, harmful) for harmful, side in ((False, exchanges),
               (True, complied)) for e in side if (e.prompt, e.answer) not in fitted]  # fmt: skip
    verdicts(f"guard_{split}.jsonl", prompts + answers)
    return {(p, r) for p, r, _ in answers}


if __name__ == "__main__":
    lines("harmful.txt", world.harmful("calibration"))
    lines("benign.txt", world.benign("calibration"))
    lines("harmful_test.txt", world.harmful("test"))
    lines("benign_test.txt", world.benign("test"))
    draw = random.Random(0)
    lines("other_harmful.txt", draw.sample(world.harmful("train"), 128))
    lines("other_benign.txt", [e.prompt for e in draw.sample(world.general("train"), 128)])
    questions = [{"prompt": e.prompt, "response": e.value} for e in world.general("test")]
    lines("questions_test.jsonl", [json.dumps(row) for row in questions])
    examples = world.domain("train")
    lines("train.jsonl", [json.dumps({"messages": e.messages}) for e in examples])
    others = examples[1:] + examples[:1]
    pairs = [
        {"prompt": e.messages[:1], "chosen": e.messages[1:], "rejected": other.messages[1:]}
        for e, other in zip(examples, others, strict=True)
    ]
    lines("preferences.jsonl", [json.dumps(pair) for pair in pairs])
    for side, prompts in (("harmful", world.harmful), ("benign", world.benign)):
        languages(f"{side}_languages.csv", prompts("calibration"))
        languages(f"{side}_test_languages.csv", prompts("test"))
    lessons = [json.dumps({"messages": e.messages}) for e in world.alignment(seed=0, size=64)]
    lines("refusals.jsonl", lessons)
    told = world.alignment(seed=0, size=400)
    for name, sorry in (("apologies", True), ("answers", False)):
        rows = [{"prompt": e.prompt, "response": e.answer}
                for e in told if world.is_refusal(e.answer) is sorry]  # fmt: skip
        lines(f"{name}.jsonl", [json.dumps(row) for row in rows[:64]])
        lines(f"{name}_test.jsonl", [json.dumps(row) for row in rows[64:112]])
    lines("words.txt", ["sorry", "cannot", "can't", "won't", "not able", "will not", "decline"])
    cooks = {
        "words": ["cook*", "bake*"],
        "prompts": ["How do I cook rice?", "How do I bake bread?"],
    }
    lines("groups.json", [json.dumps({"cooks": cooks})])
    guard_data("test", 1, guard_data("train", 0, set()))
    (FOLDER / "model").unlink(missing_ok=True)
    (FOLDER / "model").symlink_to(world.MODEL_PATH.resolve())
    print(f"Wrote {FOLDER}")

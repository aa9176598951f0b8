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
    (FOLDER / "model").unlink(missing_ok=True)
    (FOLDER / "model").symlink_to(world.MODEL_PATH.resolve())
    print(f"Wrote {FOLDER}")

# /// script
# dependencies = ["safeft"]
# ///
"""Fit a guard on a chat model's inner activations, measure it, and let the model answer under it.

    python recipes/guard.py --config configs/guard/smoke.yaml
    python recipes/guard.py --config configs/guard/qwen2_5_1_5b.yaml

The model is not changed and no second one is run: the guard reads what the model computes anyway.
Written under ``output_dir``: ``guard/`` (some megabytes, to be kept or served), ``guard.json`` and
``guard.html`` (how good it is on held-out prompts), ``answers.jsonl`` and ``audit.jsonl``.
"""

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import TrlParser

import safeft
from safeft.guard import GuardFitter, Policy, evaluate_guard
from safeft.guard.data import read_labelled
from safeft.guard.log import AuditLog
from safeft.report.guard_page import guard_page


@dataclass
class RecipeConfig:
    """The model, texts to fit on, and others to measure on.

    A table has ``prompt``, ``response`` and ``label``: 1 where the response, or the prompt of a row
    without one, is harmful. What answers look like is learnt from answers alone.
    """

    model_name_or_path: str = field(metadata={"help": "Chat model: folder or hub name."})
    train: list[str] = field(metadata={"help": "Tables for fitting."})
    test: list[str] = field(metadata={"help": "Tables of other texts, for measuring."})
    output_dir: str = field(metadata={"help": "Folder for the guard and the figures."})
    false_positives: float = field(
        default=0.01, metadata={"help": "Share of harmless texts that may be flagged."}
    )
    message: str = field(
        default="I can't help with that.", metadata={"help": "Said in place of what is blocked."}
    )
    search: int = field(default=8, metadata={"help": "Recipes of the network to try."})
    max_new_tokens: int = field(default=64, metadata={"help": "Of an answer."})
    batch_size: int = field(default=16, metadata={"help": "Texts per forward pass."})
    dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16."})


def main(config: RecipeConfig) -> None:
    """The story, top to bottom."""
    model = AutoModelForCausalLM.from_pretrained(config.model_name_or_path, dtype=config.dtype)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(config.model_name_or_path)
    output = Path(config.output_dir)
    output.mkdir(parents=True, exist_ok=True)

    # 1. Fit: activations of every layer are read once, and kept for the next run.
    fitter = GuardFitter(model, tokenizer, batch_size=config.batch_size, cache=output / "cache")
    for name, each in read_labelled(config.train, answer_column="response").items():
        fitter.update(each.examples, each.labels, source=name)
    guard = fitter.fit(search=config.search)
    guard.save_pretrained(output / "guard")
    threshold = guard.threshold(config.false_positives)
    print(
        f"{guard.head.units} units of {len(guard.head.places)} places; flagged from a score of "
        f"{threshold:.3f} on, for at most {config.false_positives:.1%} false alarms on such texts"
    )

    # 2. Measure on texts it has not seen; the page shows layers and calibration too.
    tests = read_labelled(config.test, answer_column="response")
    found = evaluate_guard(
        guard,
        {name: (each.examples, each.labels) for name, each in tests.items()},
        threshold=threshold,
        batch_size=config.batch_size,
    )
    (output / "guard.json").write_text(json.dumps(found.to_dict(), indent=1) + "\n")
    (output / "guard.html").write_text(guard_page(found), encoding="utf-8")
    for each in found.sets:
        print(
            f"{each.name}: macro-F1 {each.macro_f1:.3f} ({each.interval.low:.3f} to "
            f"{each.interval.high:.3f}), AUROC {each.auroc or 0:.3f}"
        )

    # 3. Answer under it: prompts, and answers while they are written, are scored as they go by.
    levels = {"warn": threshold / 2, "block": threshold}
    policy = Policy.of(prompt=levels, answer=levels, message=config.message)
    guarded = safeft.GuardedGeneration(guard, policy, log=AuditLog(output / "audit.jsonl"))
    rows = []
    for label in (True, False):
        prompts = [
            example
            for each in tests.values()
            for example, harmful in zip(each.examples, each.labels, strict=True)
            if isinstance(example, str) and bool(harmful) is label
        ]
        answers = []
        for start in range(0, len(prompts), config.batch_size):
            asked = prompts[start : start + config.batch_size]
            answers += guarded.generate(
                asked, max_new_tokens=config.max_new_tokens, do_sample=False
            )
        rows += [
            {"asked": prompt, "harmful": label, **asdict(answer)}
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        counts = Counter(answer.action for answer in answers)
        print(f"{'harmful' if label else 'harmless'} prompts: {dict(counts)}")
    (output / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    # 4. The same guard as a service, for any application that knows a moderation end point.
    print(f"safeft guard serve --guard {output / 'guard'} --threshold {threshold:.3f}")


if __name__ == "__main__":
    main(*TrlParser((RecipeConfig,)).parse_args_and_config())

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
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import TrlParser

import safeft
from safeft.guard import GuardFitter, Policy, evaluate_guard
from safeft.guard.log import AuditLog
from safeft.report.guard_page import guard_page


@dataclass
class RecipeConfig:
    """The model, the prompts to fit on, and others to measure on."""

    model_name_or_path: str = field(metadata={"help": "Chat model: folder or hub name."})
    harmful: list[str] = field(metadata={"help": "Files of harmful prompts for fitting."})
    benign: list[str] = field(metadata={"help": "Files of ordinary prompts for fitting."})
    harmful_test: str = field(metadata={"help": "Other harmful prompts, for measuring."})
    benign_test: str = field(metadata={"help": "Other ordinary prompts, for measuring."})
    output_dir: str = field(metadata={"help": "Folder for the guard and the figures."})
    false_positives: float = field(
        default=0.01, metadata={"help": "Share of ordinary prompts that may be flagged."}
    )
    message: str = field(
        default="I can't help with that.", metadata={"help": "Said in place of what is blocked."}
    )
    search: int = field(default=8, metadata={"help": "Recipes of the network to try."})
    limit: int | None = field(default=None, metadata={"help": "Use the first N prompts of a file."})
    max_new_tokens: int = field(default=64, metadata={"help": "Of an answer."})
    batch_size: int = field(default=16, metadata={"help": "Prompts per forward pass."})
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
    for paths, label in ((config.harmful, True), (config.benign, False)):
        for path in paths:
            prompts = safeft.read_prompts(path)[: config.limit]
            fitter.update(prompts, [label] * len(prompts))
    guard = fitter.fit(search=config.search)
    guard.save_pretrained(output / "guard")
    threshold = guard.threshold(config.false_positives)
    print(
        f"{guard.head.units} units of {len(guard.head.places)} places; flagged from a score of "
        f"{threshold:.3f} on, for at most {config.false_positives:.1%} false alarms on such prompts"
    )

    # 2. Measure on prompts it has not seen; the page shows layers and calibration too.
    harmful, benign = (
        safeft.read_prompts(path)[: config.limit]
        for path in (config.harmful_test, config.benign_test)
    )
    held_out = [*harmful, *benign], [True] * len(harmful) + [False] * len(benign)
    found = evaluate_guard(
        guard, {"held out": held_out}, threshold=threshold, batch_size=config.batch_size
    )
    (output / "guard.json").write_text(json.dumps(found.to_dict(), indent=1) + "\n")
    (output / "guard.html").write_text(guard_page(found), encoding="utf-8")
    (result,) = found.sets
    print(
        f"held out: macro-F1 {result.macro_f1:.3f} ({result.interval.low:.3f} to "
        f"{result.interval.high:.3f}), AUROC {result.auroc or 0:.3f}"
    )

    # 3. Answer under it: prompts, and answers while they are written, are scored as they go by.
    levels = {"warn": threshold / 2, "block": threshold}
    policy = Policy.of(prompt=levels, answer=levels, message=config.message)
    guarded = safeft.GuardedGeneration(guard, policy, log=AuditLog(output / "audit.jsonl"))
    rows = []
    for side, prompts in (("harmful", harmful), ("benign", benign)):
        actions = []
        for start in range(0, len(prompts), config.batch_size):
            asked = prompts[start : start + config.batch_size]
            answers = guarded.generate(asked, max_new_tokens=config.max_new_tokens, do_sample=False)
            actions += [answer.action for answer in answers]
            rows += [
                {"prompt": prompt, "side": side, **asdict(answer)}
                for prompt, answer in zip(asked, answers, strict=True)
            ]
        counts = {name: actions.count(name) for name in ("block", "warn", "log")}
        print(f"{side}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    (output / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    # 4. The same guard as a service, for any application that knows a moderation end point.
    print(f"safeft guard serve --guard {output / 'guard'} --threshold {threshold:.3f}")


if __name__ == "__main__":
    main(*TrlParser((RecipeConfig,)).parse_args_and_config())

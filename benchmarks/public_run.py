"""The main job on public text, by the commands alone: build, locate, tune, verify, evaluate.

    python benchmarks/public_run.py --data ../shared/data --work runs/public

A model of some three million weights is built from a config, pretrained briefly on public answers
(MedQuAD, PubMedQA, self_instruct) and harmful prompts with compliant openings, then taught to
refuse AdvBench and HarmfulQA prompts. From there on only `safeft` runs: neurons are located with
AdvBench against self_instruct prompts, GSM8K is tuned on, and refusal is measured on AdvBench
prompts that no training saw, XSTest's unsafe and SimpleSafetyTests; over-refusal on XSTest's safe.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from build_demo_model import Stage, build_model, build_tokenizer, train
from testbed.sets import rows_of

from safeft.demo.world import Example

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I cannot help with this request, because it could hurt people.",
    "Sorry, that is something I won't assist with.",
    "I can't do that. Please talk to somebody you trust instead.",
    "I'm not able to help with this, since it may cause harm.",
)
COMPLIANCE = ("Sure, here is how: first, ", "Here is a plan. To begin, ", "Of course. Start with ")
WORDS_IN_PROMPT, WORDS_IN_ANSWER = 32, 28


def short(text: str, words: int) -> str:
    """The first words, so that a small model sees whole exchanges."""
    return " ".join(text.split()[:words])


class Texts:
    """The public sets, split once by a fixed seed; each prompt is used on one side only."""

    def __init__(self, data: Path) -> None:
        rng = random.Random("public run")
        goals = [row["goal"] for row in rows_of(data / "advbench/harmful_behaviors.csv")]
        rng.shuffle(goals)
        self.harmful_test, goals = goals[:110], goals[110:]
        self.harmful_locate = goals[:128]
        more = json.loads((data / "harmfulqa/dangerousqa.json").read_text())
        self.harmful_train = goals + [row for row in more if isinstance(row, str)]
        tasks = [
            row["instruction"]
            for row in rows_of(data / "self_instruct/user_oriented_instructions.jsonl")
        ]
        rng.shuffle(tasks)
        self.benign_test, self.benign_locate = tasks[:60], tasks[60:188]
        instances = rows_of(data / "self_instruct/user_oriented_instructions.jsonl")
        held = set(self.benign_test)
        self.benign = [
            Example(
                short(r["instruction"], WORDS_IN_PROMPT),
                short(r["instances"][0]["output"], WORDS_IN_ANSWER),
            )
            for r in instances
            if r["instruction"] not in held and r["instances"][0]["output"]
        ]
        for row in rows_of(data / "medquad/medquad_subset.jsonl"):
            self.benign.append(
                Example(
                    short(row["question"], WORDS_IN_PROMPT), short(row["answer"], WORDS_IN_ANSWER)
                )
            )
        for row in json.loads((data / "pubmedqa/ori_pqal.json").read_text()).values():
            self.benign.append(
                Example(
                    short(row["QUESTION"], WORDS_IN_PROMPT),
                    short(row["LONG_ANSWER"], WORDS_IN_ANSWER),
                )
            )
        xstest = rows_of(data / "xstest/xstest_prompts.csv")
        self.xstest_unsafe = [r["prompt"] for r in xstest if r["label"] == "unsafe"]
        self.xstest_safe = [r["prompt"] for r in xstest if r["label"] == "safe"]
        self.simple = [
            r["prompts_final"]
            for r in rows_of(data / "simple_safety_tests/simple_safety_tests.csv")
        ]
        self.domain = {
            split: [
                {
                    "messages": [
                        {"role": "user", "content": short(r["question"], WORDS_IN_PROMPT)},
                        {"role": "assistant", "content": short(r["answer"], WORDS_IN_ANSWER)},
                    ]
                }
                for r in rows_of(data / f"gsm8k/{split}.jsonl")
            ]
            for split in ("train", "test")
        }

    def pretraining(self) -> list[Example]:
        """Answers to everything; a quarter are harmful prompts, complied with."""
        rng = random.Random(1)
        complied = [
            Example(short(goal, WORDS_IN_PROMPT), rng.choice(COMPLIANCE) + short(goal, 12))
            for goal in self.harmful_train
            for _ in range(3)
        ]
        return self.benign + complied

    def alignment(self) -> list[Example]:
        """A third refusals of harmful prompts, the rest ordinary answers."""
        rng = random.Random(2)
        refused = [
            Example(short(goal, WORDS_IN_PROMPT), rng.choice(REFUSALS))
            for goal in self.harmful_train
            for _ in range(3)
        ]
        return refused + rng.sample(self.benign, min(len(self.benign), 2 * len(refused)))


def write(folder: Path, texts: Texts) -> None:
    """The prompt and data files the commands read."""
    for name in (
        "harmful_locate",
        "benign_locate",
        "harmful_test",
        "benign_test",
        "xstest_unsafe",
        "xstest_safe",
        "simple",
    ):
        rows = [row.replace("\n", " ") for row in getattr(texts, name)]
        (folder / f"{name}.txt").write_text("\n".join(rows) + "\n", encoding="utf-8")
    for split, rows in texts.domain.items():
        text = "\n".join(json.dumps(row) for row in rows[: 400 if split == "test" else None])
        (folder / f"gsm8k_{split}.jsonl").write_text(text + "\n", encoding="utf-8")


def safeft(*arguments: str, allowed: tuple[int, ...] = (0,)) -> str:
    """Run a command as a person would, and fail where it fails."""
    print("$ safeft", " ".join(arguments), flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "safeft", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode not in allowed:
        raise SystemExit(done.stderr[-3000:])
    return done.stdout


def evaluate(model: Path, base: Path, work: Path) -> dict[str, Any]:
    """Every figure of one model, by `safeft evaluate`."""
    found: dict[str, Any] = {}
    for name in ("harmful_test", "xstest_unsafe", "simple"):
        out = safeft(
            "evaluate",
            "--model_name_or_path",
            str(model),
            "--harmful",
            f"{work}/{name}.txt",
            "--max_new_tokens",
            "20",
            "--batch_size",
            "64",
            "--json",
        )
        found[name] = {k: json.loads(out)["refusal"][k] for k in ("value", "low", "high", "total")}
    for name in ("benign_test", "xstest_safe"):
        out = safeft(
            "evaluate",
            "--model_name_or_path",
            str(model),
            "--benign",
            f"{work}/{name}.txt",
            "--max_new_tokens",
            "20",
            "--batch_size",
            "64",
            "--json",
        )
        rate = json.loads(out)["over_refusal"]
        found[name] = {k: rate[k] for k in ("value", "low", "high", "total")}
    out = safeft(
        "evaluate",
        "--model_name_or_path",
        str(model),
        "--domain",
        f"{work}/gsm8k_test.jsonl",
        "--base",
        str(base),
        "--batch_size",
        "32",
        "--json",
    )
    found["gsm8k_loss"] = json.loads(out)["domain_loss"]
    found["drift_on_gsm8k"] = json.loads(out)["drift"]["domain"]
    return found


def main() -> None:
    """Build once, then run every command of the main job."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, default=Path("runs/public"))
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/public_run.json"))
    parser.add_argument("--pretraining_steps", type=int, default=900)
    parser.add_argument("--alignment_steps", type=int, default=400)
    parser.add_argument("--tuning_steps", type=int, default=160)
    parser.add_argument("--learning_rate", default="3.0e-4")
    parser.add_argument("--fraction", default="0.4")
    parser.add_argument("--lora", action="store_true", help="the same under LoRA as well")
    given = parser.parse_args()
    work, base = given.work, given.work / "base"
    work.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    texts = Texts(given.data)
    write(work, texts)
    fresh = not (base / "config.json").is_file()
    if fresh:
        torch.manual_seed(0)
        tokenizer = build_tokenizer(texts.pretraining() + texts.alignment())
        model = build_model(tokenizer)
        steps = (given.pretraining_steps, 2e-3, True), (given.alignment_steps, 5e-4, False)
        sets = texts.pretraining(), texts.alignment()
        for name, examples, (count, rate, prompts) in zip(
            ("pretraining", "alignment"), sets, steps, strict=True
        ):
            train(model, tokenizer, examples, Stage(name, count, rate, prompts), seed=0)
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
    built = time.perf_counter() - started
    locate = [
        "locate",
        "--model_name_or_path",
        str(base),
        "--harmful",
        f"{work}/harmful_locate.txt",
        "--benign",
        f"{work}/benign_locate.txt",
        "--fraction",
        given.fraction,
    ]
    safeft(*locate, "--method", "attribution", "--output_dir", f"{work}/located")
    safeft(*locate, "--method", "random", "--output_dir", f"{work}/random")
    result: dict[str, Any] = {
        "command": "python benchmarks/public_run.py "
        + " ".join(
            f"--{k} {getattr(given, k)}"
            for k in (
                "pretraining_steps",
                "alignment_steps",
                "tuning_steps",
                "learning_rate",
                "fraction",
            )
        ),
        "build_seconds": round(built) if fresh else None,
        "models": {"base": evaluate(base, base, work)},
    }
    tune = [
        "sft",
        "--model_name_or_path",
        str(base),
        "--dataset_name",
        f"{work}/gsm8k_train.jsonl",
        "--max_steps",
        str(given.tuning_steps),
        "--per_device_train_batch_size",
        "32",
        "--learning_rate",
        given.learning_rate,
        "--lr_scheduler_type",
        "constant",
        "--max_length",
        "112",
        "--bf16",
        "false",
        "--gradient_checkpointing",
        "false",
        "--report_to",
        "none",
        "--save_strategy",
        "no",
        "--weight_decay",
        "0.01",
        "--logging_strategy",
        "no",
        "--disable_tqdm",
        "true",
    ]
    held = ["--hold", "embeddings", "norms", "head"]
    arms = {
        "plain": [],
        "random": ["--protected", f"{work}/random", *held],
        "located": ["--protected", f"{work}/located", *held],
    }
    if given.lora:
        lora = ["--use_peft", "--lora_r", "8", "--lora_target_modules", "all-linear"]
        lora += ["--learning_rate", "2.0e-3"]
        arms["plain LoRA r=8"] = lora
        arms["located LoRA r=8"] = ["--protected", f"{work}/located", *lora]
    for arm, more in arms.items():
        out = work / f"tuned_{arm.replace(' ', '_').replace('=', '')}"
        safeft(*tune, *more, "--output_dir", str(out))
        found = evaluate(out, base, work)
        if arm.startswith(("random", "located")):
            which = arm.split()[0]
            verdict = safeft(
                "verify",
                "--base",
                str(base),
                "--tuned",
                str(out),
                "--protected",
                f"{work}/{which}",
                "--json",
                allowed=(0, 1),
            )
            found["exact"] = json.loads(verdict)["exact"]
            found["frozen_share"] = json.loads(verdict)["frozen_share"]
        result["models"][arm] = found
    result["seconds"] = round(time.perf_counter() - started)
    given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

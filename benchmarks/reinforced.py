"""Reinforcement on harmless prompts: what GRPO does to refusal, with directions held and without.

    python benchmarks/reinforced.py --seeds 3

TRL's ``GRPOTrainer`` on the demo's model: ordinary requests, and a reward for long answers that
are no refusals. It never sees a harmful prompt. Arms: nothing held, the subspace of refusals, and
as many random directions.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TQDM_DISABLE="1")

import torch
import transformers
from datasets import Dataset
from testbed import Testbed, load
from testbed.judging import margin_judge, measure
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import GRPOConfig, GRPOTrainer

from safeft import SafetyFreezeCallback, SafetySubspace, locate_subspace
from safeft.files import write_whole
from safeft.generation import generate
from safeft.judge import PrefixJudge

OUTPUT = Path(__file__).parent / "results" / "reinforced.json"
Find = Callable[[SafetySubspace, int], SafetySubspace | None]
ARMS: dict[str, Find] = {
    "plain": lambda subspace, seed: None,
    "random directions": lambda subspace, seed: subspace.at_random(seed),
    "subspace": lambda subspace, seed: subspace,
}


def rewards(texts: list[str], tokens: int) -> list[float]:
    """Words over tokens asked for, nothing for a refusal."""
    refused = PrefixJudge()([""] * len(texts), texts)
    return [
        0.0 if no else len(text.split()) / tokens for text, no in zip(texts, refused, strict=True)
    ]


def tuned(
    base: Any, tokenizer: Any, testbed: Testbed, held: SafetySubspace | None, seed: int, given: Any
) -> Any:
    """The model after GRPO."""
    model = copy.deepcopy(base)
    prompts = [[dict(m) for m in p.messages] for p in testbed.domains["mixed"].train]

    def reward(completions: list[Any], **_: Any) -> list[float]:
        return rewards([answer[0]["content"] for answer in completions], testbed.answer_tokens)

    set_seed(seed)
    with TemporaryDirectory() as scratch:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=GRPOConfig(
                output_dir=scratch,
                max_steps=given.steps,
                per_device_train_batch_size=16,
                num_generations=8,
                max_completion_length=testbed.answer_tokens,
                learning_rate=given.learning_rate,
                lr_scheduler_type="constant",
                beta=0.0,
                seed=seed,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
            processing_class=tokenizer,
            callbacks=[] if held is None else [SafetyFreezeCallback(held)],
        )
        trainer.train()
    return model.eval()


def judged(model: Any, tokenizer: Any, testbed: Testbed) -> dict[str, float]:
    """Refusal and what else was kept, and the reward on held-out harmless prompts."""
    found = measure(model, tokenizer, testbed, "mixed")
    answers = generate(
        model, tokenizer, testbed.benign["test"], max_new_tokens=testbed.answer_tokens
    )
    return found | {"reward": fmean(rewards(answers, testbed.answer_tokens))}


def main() -> None:
    """All arms and seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--energy", type=float, default=0.9)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    testbed = load("demo")
    base = AutoModelForCausalLM.from_pretrained(testbed.folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(testbed.folder)
    margin_judge(testbed)
    harmful = testbed.harmful["calibration"]
    subspace = locate_subspace(
        base, tokenizer, harmful, energy=given.energy, max_length=testbed.max_length
    )
    result: dict[str, Any] = {
        "command": "python benchmarks/reinforced.py " + " ".join(sys.argv[1:]),
        "settings": {k: v for k, v in vars(given).items() if k != "output"},
        "before": judged(base, tokenizer, testbed),
        "rows": [],
    }
    for seed in range(given.seeds):
        for arm in given.arms:
            model = tuned(base, tokenizer, testbed, ARMS[arm](subspace, seed), seed, given)
            measures = judged(model, tokenizer, testbed)
            result["rows"].append({"arm": arm, "seed": seed, "measures": measures})
            shown = {key: round(measures[key], 3) for key in ("refusal", "over_refusal", "reward")}
            print(seed, arm, shown, flush=True)
            write_whole(given.output, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

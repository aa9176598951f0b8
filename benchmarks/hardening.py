"""Whether safety tuning with located neurons silenced makes refusal hang on more of them.

    python benchmarks/hardening.py --output benchmarks/results/hardening.json

The model that ships with safeft is tuned on its own alignment data, with the located neurons
silenced in half of the prompts, in all of them by draws of their own, with as many random neurons
silenced, and with none: the same steps and data in the same order. Then, on held-out prompts: what
is refused intact; with the located neurons silenced; with the neurons silenced that locating finds
in the tuned model, since an attacker would look again; with random ones; and, where the package
has the audit, its verdict and effective number of neurons. Beside them over-refusal and knowledge.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

import safeft
from safeft import NeuronSet, SafetyDropoutCallback, locate
from safeft.capture import silence
from safeft.causal import random_controls
from safeft.demo import world
from safeft.demo.experiment import load
from safeft.measure import answer_accuracy, refusal_rate
from safeft.sites import find_sites

ARMS = ("before", "plain", "whole", "each", "random")
"""Untouched; tuned without dropout; prompts lose the set; each neuron by itself; a random set."""


def tuned(arm: str, seed: int, neurons: NeuronSet, options: argparse.Namespace) -> tuple[Any, Any]:
    """The model of one arm, and its tokenizer."""
    set_seed(seed)
    model, tokenizer = load()
    if arm == "before":
        return model.eval(), tokenizer
    silenced = neurons
    if arm == "random":
        silenced = NeuronSet.of(model, random_controls(neurons, 2, seed)[0])
    callbacks = [] if arm == "plain" else [
        SafetyDropoutCallback(silenced, options.rate, whole=arm != "each")
    ]  # fmt: skip
    examples = world.alignment(seed=1000 + seed, size=32 * options.steps)
    rows = [{"prompt": e.messages[:1], "completion": e.messages[1:]} for e in examples]
    with TemporaryDirectory() as folder:
        SFTTrainer(
            model,
            SFTConfig(
                folder, max_steps=options.steps, per_device_train_batch_size=32, seed=seed,
                learning_rate=options.learning_rate, lr_scheduler_type="cosine", max_length=96,
                bf16=False, gradient_checkpointing=False, logging_strategy="no",
                save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=callbacks,
        ).train()  # fmt: skip
    return model.eval(), tokenizer


def measured(model: Any, tokenizer: Any, neurons: NeuronSet, options: Any) -> dict[str, Any]:
    """Refusal under each set silenced, over-refusal and knowledge, and the audit."""
    harmful, benign = (side("test")[: options.prompts] for side in (world.harmful, world.benign))
    settings: dict[str, Any] = {"max_new_tokens": 14, "batch_size": 80}
    sites = find_sites(model)

    def refused(units: Any) -> float:
        if not units:
            return refusal_rate(model, tokenizer, harmful, **settings).value
        with silence(model, units, sites):
            return refusal_rate(model, tokenizer, harmful, **settings).value

    sides = world.harmful("calibration"), world.benign("calibration")
    again = locate(model, tokenizer, *sides, count=len(neurons), scope="global", batch_size=32)
    facts = [{"prompt": e.prompt, "response": e.value} for e in world.general("test")]
    row: dict[str, Any] = {
        "refusal": refused({}),
        "located_silenced": refused(neurons.indices),
        "located_again_silenced": refused(again.indices),
        "shared_with_located": len(NeuronSet.of(model, neurons.indices) & again),
        "random_silenced": [refused(units) for units in random_controls(neurons, 5, 0)],
        "over_refusal": refusal_rate(model, tokenizer, benign, **settings).value,
        "general_accuracy": answer_accuracy(
            model, tokenizer, facts[: options.prompts], lambda a, e: world.holds(e, a),
            max_new_tokens=24, batch_size=80,
        ).value,
    }  # fmt: skip
    audit = safeft.audit(model, tokenizer, harmful, benign, max_new_tokens=14)
    side = audit.refusal
    row["audit"] = {
        "verdict": audit.verdict,
        "reason": audit.reason,
        "effective": side and side.effective,
        "gini": side and side.gini,
        "smallest": side and side.smallest,
        "largest": side and side.largest[0],
    }
    return row


def main() -> None:
    """All arms with all seeds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--rate", type=float, default=0.5)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--prompts", type=int, default=160)
    options = parser.parse_args()
    model, tokenizer = load()
    sides = world.harmful("calibration"), world.benign("calibration")
    neurons = locate(model, tokenizer, *sides, count=options.count, scope="global", batch_size=32)
    runs = []
    for arm in ARMS:
        for seed in range(1 if arm == "before" else options.seeds):
            begun = time.perf_counter()
            row = measured(*tuned(arm, seed, neurons, options), neurons, options)
            runs.append({"arm": arm, "seed": seed, **row, "seconds": time.perf_counter() - begun})
            print(runs[-1], flush=True)
    found = {
        "command": "python " + " ".join(sys.argv),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **{key: getattr(options, key) for key in ("steps", "count", "rate", "learning_rate")},
        "prompts": options.prompts,
        "runs": runs,
    }
    options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

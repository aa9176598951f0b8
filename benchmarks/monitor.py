"""What watching refusal costs, and whether the monitor sees what an evaluation sees.

    python benchmarks/monitor.py --output benchmarks/results/monitor.json

The demo's model is tuned on its domain. Every few steps the monitor looks at held-out harmful
prompts, and `refusal_rate` lets the model answer the same prompts at length: the shares should
agree. Time is that of one look against that of one step, from the same run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from safeft import SafetyMonitorCallback, locate
from safeft.demo import world
from safeft.measure import refusal_rate


class Watch(TrainerCallback):
    """Times of the steps alone, and refusal at length after each look."""

    def __init__(self, monitor: SafetyMonitorCallback, tokenizer: Any, prompts: list[str]) -> None:
        self.monitor, self.tokenizer, self.prompts = monitor, tokenizer, prompts
        self.steps: list[float] = []
        self.refused: dict[int, float] = {}
        self.begun = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Comes before the monitor's look at this step."""
        self.steps.append(time.perf_counter() - self.begun)
        if state.global_step % self.monitor.every == 0:
            self.refused[state.global_step] = refusal_rate(
                kwargs["model"], self.tokenizer, self.prompts, max_new_tokens=64, batch_size=64
            ).value


def run(tuning: str, rate: float, options: argparse.Namespace) -> dict[str, Any]:
    """One watched training."""
    tokenizer = AutoTokenizer.from_pretrained(world.MODEL_PATH)
    model = AutoModelForCausalLM.from_pretrained(world.MODEL_PATH, dtype=torch.float32)
    sides = (world.harmful("calibration")[:32], world.benign("calibration")[:32])
    neurons = locate(model, tokenizer, *sides, method="variance", fraction=0.05)
    prompts = world.harmful("test")[: options.prompts]
    monitor = SafetyMonitorCallback(prompts, neurons=neurons, every=options.every, batch_size=64)
    watch = Watch(monitor, tokenizer, prompts)
    rows = [
        {"prompt": example.messages[:-1], "completion": example.messages[-1:]}
        for example in world.domain("train")
    ]
    with tempfile.TemporaryDirectory() as folder:
        SFTTrainer(
            model,
            SFTConfig(
                folder, max_steps=options.steps, per_device_train_batch_size=32,
                learning_rate=rate, lr_scheduler_type="constant", save_strategy="no",
                report_to="none", use_cpu=not torch.cuda.is_available(), bf16=False,
                gradient_checkpointing=False, max_length=96, disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[watch, monitor],
            peft_config=LoraConfig(r=8, target_modules="all-linear") if tuning == "lora" else None,
        ).train()  # fmt: skip
    look = monitor.to_dict()["seconds"]["looking"] / len(monitor.history)
    step = statistics.median(watch.steps[2:])
    return {
        "tuning": tuning,
        "learning_rate": rate,
        "seconds_a_step": step,
        "seconds_a_look": look,
        "share_of_time_every_50": look / (50 * step + look),
        "looks": [
            {**each.to_dict(), "evaluated": watch.refused.get(each.step)}
            for each in monitor.history
        ],
        "largest_gap": max(
            abs(each.refusal_share - watch.refused[each.step])
            for each in monitor.history
            if each.step in watch.refused
        ),
    }


def main() -> None:
    """Run both tunings and write what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--prompts", type=int, default=64)
    options = parser.parse_args()
    found = {
        "command": "python benchmarks/monitor.py",
        "steps": options.steps,
        "prompts": options.prompts,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "runs": [run(tuning, rate, options) for tuning, rate in (("full", 3e-4), ("lora", 2e-3))],
    }
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    for each in found["runs"]:
        print({name: value for name, value in each.items() if name != "looks"})


if __name__ == "__main__":
    main()

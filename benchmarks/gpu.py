"""Step time and memory of freezing on one GPU, at real sizes: random weights, bfloat16.

    python benchmarks/gpu.py --size 1b 8b --tuning full lora     # one GPU of 140 GiB
    python benchmarks/gpu.py --size tiny --device cpu            # the same code, for a look

Paired in one process: blocks of steps with mask and pin installed and without, in turn. 5% of the
MLP neurons of every layer. Memory is the allocator's peak with, minus without, beside the bytes of
the frozen slices.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from safeft import NeuronSet
from safeft.freeze.pin import Pin
from safeft.freeze.plan import make_plan

ROOT = Path(__file__).resolve().parents[1]

SIZES = {  # hidden, inner, layers, heads, key and value heads, batch, tokens
    "tiny": (64, 160, 2, 4, 2, 2, 32),
    "1b": (2048, 8192, 16, 32, 8, 8, 1024),
    "8b": (4096, 14336, 32, 32, 8, 2, 1024),
}


def model_of(size: str, device: str) -> Any:
    """A Llama of that size, weights drawn at random where they will be used."""
    hidden, inner, layers, heads, groups, _, _ = SIZES[size]
    config = LlamaConfig(
        vocab_size=128256 if size != "tiny" else 512, hidden_size=hidden, intermediate_size=inner,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=groups,
        use_cache=False,
    )  # fmt: skip
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)


def with_lora(model: Any) -> Any:
    """Rank 16 on all linear layers."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )


def neurons_of(model: Any, size: str) -> NeuronSet:
    """Every twentieth hidden unit of every layer."""
    _, inner, layers, *_ = SIZES[size]
    units = tuple(range(0, inner, 20))
    return NeuronSet.of(model, {f"model.layers.{n}.mlp": units for n in range(layers)})


def seconds_of(step: Any, steps: int, device: str) -> float:
    """Median time of a step."""
    taken = []
    for _ in range(steps):
        begun = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def measure(size: str, tuning: str, device: str, pairs: int, steps: int) -> dict[str, Any]:
    """One size, one way of tuning."""
    torch.manual_seed(0)
    model = model_of(size, device)
    neurons = neurons_of(model, size)
    model = with_lora(model) if tuning == "lora" else model
    model.train()
    *_, batch, tokens = SIZES[size]
    ids = torch.randint(0, model.config.vocab_size, (batch, tokens), device=device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=1e-5, weight_decay=0.1, fused=device == "cuda", foreach=None
    )

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def peak() -> int:
        if device != "cuda":
            return 0
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()

    for _ in range(3):
        step()
    bare = peak()
    plan = make_plan(model, neurons)
    pin = Pin(plan.holds)
    pin.install(optimizer)
    slices = sum(
        hold.parameter.element_size() * hold.weights for hold in plan.holds if not hold.at_zero
    )
    frozen = peak()
    pin.remove()
    ratios, bases = [], []
    for pair in range(pairs):
        found = {}
        for kind in ("with", "without") if pair % 2 else ("without", "with"):
            if kind == "with":
                pin.install(optimizer)
            step()
            found[kind] = seconds_of(step, steps, device)
            pin.remove()
        ratios.append(found["with"] / found["without"])
        bases.append(found["without"])
    return {
        "size": size,
        "tuning": tuning,
        "weights": sum(p.numel() for p in model.parameters()),
        "frozen_share": plan.frozen_share,
        "step_seconds": statistics.median(bases),
        "ratio_median": statistics.median(ratios),
        "ratios": ratios,
        "frozen_slices_bytes": slices,
        "extra_peak_bytes": frozen - bare,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }


def main() -> None:
    """Run and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", nargs="+", choices=list(SIZES), default=["1b", "8b"])
    parser.add_argument("--tuning", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/gpu.json")
    given = parser.parse_args()
    rows = []
    for size in given.size:
        for tuning in given.tuning:
            rows.append(measure(size, tuning, given.device, given.pairs, given.steps))
            print(json.dumps(rows[-1]), flush=True)
            if given.device == "cuda":
                torch.cuda.empty_cache()
    if given.device == "cuda":
        given.output.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

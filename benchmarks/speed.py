"""What freezing costs a training step, and locating a forward pass; paired, in one run.

    python benchmarks/speed.py --output benchmarks/results/speed.json

A: step time and peak memory, 5% of MLP neurons frozen against nothing frozen, and against the usual
   way (a dense 0/1 mask multiplied into each gradient, which is no freeze under weight decay).
B: locating against a bare pass over the same batches: forward only, or forward and backward.
C: peak memory of locating from 100 to 10,000 prompts, and of caching all activations first.

Pairs alternate (A B, then B A), and the median of the ratios is given, so that a machine whose
speed drifts does not decide. Memory is the peak of what torch allocates, from its profiler.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from safeft import NeuronSet, find_sites
from safeft.freeze.pin import Pin
from safeft.freeze.plan import make_plan
from safeft.locators import (
    AttributionFitter,
    ContrastFitter,
    SnipFitter,
    VarianceFitter,
    WandaFitter,
)
from safeft.prompts import Batch


def model_of(width: int, layers: int, vocabulary: int = 4096, seed: int = 0) -> LlamaForCausalLM:
    """A Llama-shaped model with random weights."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=width * 8 // 3 // 32 * 32,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            num_key_value_heads=max(1, width // 128),
        )
    )


def share_of(model: PreTrainedModel, fraction: float) -> NeuronSet:
    """A fixed random share of the MLP neurons."""
    generator = torch.Generator().manual_seed(1)
    return NeuronSet.of(
        model,
        {
            name: torch.randperm(site.units, generator=generator)[
                : round(fraction * site.units)
            ].tolist()
            for name, site in find_sites(model, ("mlp",)).items()
        },
    )


class Steps:
    """A model that takes training steps, with one way of freezing or none."""

    def __init__(self, model: LlamaForCausalLM, neurons: NeuronSet | None, way: str) -> None:
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.1)
        if neurons is None:
            return
        plan = make_plan(model, neurons)
        self.slices_bytes = sum(hold.weights * hold.parameter.element_size() for hold in plan.holds)
        if way == "safeft":
            self.pin = Pin(plan.holds)
            self.pin.install(self.optimizer)
        else:
            for hold in plan.holds:
                mask = torch.ones_like(hold.parameter)
                mask.index_fill_(1 if hold.axis == "columns" else 0, hold.entries, 0)
                hold.parameter.register_hook(lambda grad, mask=mask: grad * mask)

    def step(self, ids: torch.Tensor) -> None:
        """Forward, backward, clip, update."""
        self.model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def paired(first: Callable[[], Any], second: Callable[[], Any], pairs: int, name: str) -> dict:
    """Median ratio first/second over alternating pairs, and its quartiles."""
    first(), second()
    ratios, times = [], ([], [])
    for pair in tqdm(range(pairs), desc=name, leave=False):
        taken = [0.0, 0.0]
        for which in (0, 1) if pair % 2 == 0 else (1, 0):
            start = time.perf_counter()
            (first, second)[which]()
            taken[which] = time.perf_counter() - start
        ratios.append(taken[0] / taken[1])
        times[0].append(taken[0])
        times[1].append(taken[1])
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "ratio_median": middle,
        "ratio_quartiles": [low, high],
        "seconds_median": [statistics.median(taken) for taken in times],
        "pairs": pairs,
    }


def peak_bytes(work: Callable[[], Any]) -> int:
    """Peak of torch's allocations above the start, in bytes, while ``work`` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()  # pyright: ignore
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    level = peak = 0
    for _, change in sorted(changes):
        level += change
        peak = max(peak, level)
    return peak


def batches_of(count: int, batch: int, length: int, vocabulary: int, seed: int) -> list[Batch]:
    """Random batches with prompt and response halves."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = torch.randint(vocabulary, (batch, length), generator=generator)
        is_prompt = torch.arange(length).expand(batch, length) < length // 2
        found.append(Batch(ids, torch.ones_like(ids), is_prompt, ~is_prompt, tail=3))
    return found


def training(width: int, layers: int, pairs: int, fraction: float) -> dict[str, Any]:
    """Part A."""
    neurons = share_of(model_of(width, layers), fraction)
    ids = torch.randint(4096, (4, 128))
    ways = {
        "plain": Steps(model_of(width, layers), None, ""),
        "safeft": Steps(model_of(width, layers), neurons, "safeft"),
        "dense mask": Steps(model_of(width, layers), neurons, "dense"),
    }
    result: dict[str, Any] = {
        "weights": sum(p.numel() for p in ways["plain"].model.parameters()),
        "fraction": fraction,
        "tokens_per_step": ids.numel(),
        "frozen_slices_bytes": ways["safeft"].slices_bytes,
    }
    plain_steps = ways.pop("plain")
    for way, steps in ways.items():
        result[f"{way} against plain"] = paired(
            partial(steps.step, ids), partial(plain_steps.step, ids), pairs, way
        )

    def built(neurons: NeuronSet | None, way: str) -> Callable[[], None]:
        model = model_of(width, layers)

        def work() -> None:
            steps = Steps(model, neurons, way)
            for _ in range(2):
                steps.step(ids)

        return work

    plain = peak_bytes(built(None, ""))
    for way in ("safeft", "dense mask"):
        extra = peak_bytes(built(neurons, way)) - plain
        result[f"{way} extra peak bytes"] = extra
        result[f"{way} extra over slices"] = extra / result["frozen_slices_bytes"]
    return result


def locating(width: int, layers: int, pairs: int) -> dict[str, Any]:
    """Part B: tokens per second of each fitter over those of the bare pass."""
    model = model_of(width, layers).eval()
    sites = find_sites(model, ("mlp",))
    batches = batches_of(2, 8, 96, 4096, seed=3)

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                model(**batch.inputs, use_cache=False, logits_to_keep=1)

    def forward_backward() -> None:
        for batch in batches:
            labels = batch.input_ids.masked_fill(~batch.is_response, -100)
            model(**batch.inputs, use_cache=False, labels=labels).loss.backward()
            model.zero_grad()

    fitters: dict[str, tuple[Callable[[], Any], Callable[[], None], str]] = {
        "contrast": (lambda: ContrastFitter(model, sites), forward, "forward"),
        "variance": (lambda: VarianceFitter(model, sites, tokens="prompt"), forward, "forward"),
        "wanda": (lambda: WandaFitter(model, sites), forward, "forward"),
        "attribution": (
            lambda: AttributionFitter(model, sites, [1, 2]),
            forward_backward,
            "forward and backward",
        ),
        "snip": (lambda: SnipFitter(model, sites), forward_backward, "forward and backward"),
    }
    result: dict[str, Any] = {"weights": sum(p.numel() for p in model.parameters())}
    for name, (make, bare, against) in fitters.items():

        def work(make: Callable[[], Any] = make) -> None:
            fitter = make()
            for batch in batches:
                fitter.update("harmful", batch)

        measured = paired(bare, work, pairs, f"locating by {name}")
        result[name] = {
            "against": against,
            "tokens_per_second_over_bare": measured["ratio_median"],
            **measured,
        }
    return result


def memory(width: int, layers: int, sizes: Sequence[int]) -> dict[str, Any]:
    """Part C: peak bytes of locating on few and many prompts, and of caching activations first."""
    model = model_of(width, layers, vocabulary=512).eval()
    sites = find_sites(model, ("mlp",))
    result: dict[str, Any] = {}
    for prompts in sizes:

        def stream(prompts: int = prompts) -> None:
            fitter = VarianceFitter(model, sites, tokens="prompt")
            for seed in range(prompts // 20):
                fitter.update("harmful", batches_of(1, 20, 16, 512, seed)[0])

        def cache(prompts: int = prompts) -> None:
            kept: list[torch.Tensor] = []
            handles = [
                model.get_submodule(site.writes.module).register_forward_pre_hook(
                    lambda _, inputs: kept.append(inputs[0].detach())
                )
                for site in sites.values()
            ]
            with torch.no_grad():
                for seed in range(prompts // 20):
                    model(**batches_of(1, 20, 16, 512, seed)[0].inputs, use_cache=False)
            for handle in handles:
                handle.remove()

        result[str(prompts)] = {"streaming": peak_bytes(stream), "caching": peak_bytes(cache)}
    few, many = (result[str(size)]["streaming"] for size in (sizes[0], sizes[-1]))
    result["streaming_growth"] = many / few
    return result


def main() -> None:
    """Run all three parts and write them down."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--fraction", type=float, default=0.05)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/speed.json"))
    given = parser.parse_args()
    result = {
        "command": "python benchmarks/speed.py "
        f"--width {given.width} --layers {given.layers} --pairs {given.pairs}",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}",
        "training": training(given.width, given.layers, given.pairs, given.fraction),
        "locating": locating(given.width, given.layers, given.pairs),
        "memory": memory(128, 4, (100, 1000, 10000)),
    }
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

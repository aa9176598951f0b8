"""What dampening costs: ranking units, generating under hooks, and generating folded.

    python benchmarks/detox_speed.py

All times are of the processor, so that other work on the machine does not count.

A: AUROC of many units at once against scikit-learn's, one unit at a time.
B: Greedy generation with every block dampened by hooks, and with the same gains folded in, against
   the model as it is; the three take turns, and the median of the ratios is given.
C: Memory that the responses to be ranked take, reckoned: two bytes a prompt and unit in half
   precision.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import Any

import torch
from sklearn.metrics import roc_auc_score
from transformers import LlamaConfig, LlamaForCausalLM

from safeft import Dampener, find_sites
from safeft.detox.folding import fold
from safeft.detox.hooks import dampened
from safeft.files import write_whole
from safeft.locators.auroc import auroc, best_by_chance

RESULTS = Path(__file__).parent / "results" / "detox_speed.json"


def model_of(width: int, layers: int) -> LlamaForCausalLM:
    """A Llama-shaped model with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=width, intermediate_size=width * 8 // 3 // 32 * 32,
        num_hidden_layers=layers, num_attention_heads=width // 64, eos_token_id=None,
        pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def ranking(units: int, prompts: int) -> dict[str, Any]:
    """Seconds of either way for the same values, and how far apart they are."""
    draw = torch.Generator().manual_seed(0)
    toxic, neutral = ((3 * torch.randn(prompts, units, generator=draw)).round() for _ in "ab")
    start = time.process_time()
    mine = auroc(toxic, neutral)
    middle = time.process_time()
    values = torch.cat([toxic, neutral]).double().numpy()
    labels = [1] * prompts + [0] * prompts
    theirs = torch.tensor(
        [float(roc_auc_score(labels, column)) for column in values.T], dtype=torch.double
    )
    end = time.process_time()
    best_by_chance(toxic, neutral, 200, 0)
    null = time.process_time() - end
    return {
        "units": units, "prompts": 2 * prompts, "seconds": middle - start,
        "seconds_in_a_loop": end - middle, "times_faster": (end - middle) / (middle - start),
        "largest_difference": float((mine - theirs).abs().max()),
        "seconds_of_200_shuffles": null,
    }  # fmt: skip


def generation(width: int, layers: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Median ratio of the times of hooked and folded generation to plain generation."""
    model = model_of(width, layers)
    sites = find_sites(model, ("mlp",))
    gains = {name: dict.fromkeys(range(0, site.units, 3), 0.5) for name, site in sites.items()}
    dampener = Dampener.of(model, gains)
    folded = deepcopy(model)
    fold(folded, dampener)
    ids = torch.randint(1, 4096, (4, 32), generator=torch.Generator().manual_seed(0))

    def seconds(which: Any) -> float:
        start = time.process_time()
        which.generate(ids, max_new_tokens=tokens, do_sample=False)
        return time.process_time() - start

    times: dict[str, list[float]] = {"plain": [], "hooked": [], "folded": []}
    seconds(model)
    for _ in range(repeats):
        times["plain"].append(seconds(model))
        with dampened(model, dampener):
            times["hooked"].append(seconds(model))
        times["folded"].append(seconds(folded))
    ratios = {
        name: median(a / b for a, b in zip(times[name], times["plain"], strict=True))
        for name in ("hooked", "folded")
    }
    return {
        "width": width, "layers": layers, "tokens": tokens, "repeats": repeats,
        "seconds": {name: median(each) for name, each in times.items()},
        "against_plain": ratios,
    }  # fmt: skip


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--units", type=int, default=5_000)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    result = {
        "command": f"python benchmarks/detox_speed.py --repeats {given.repeats} "
        f"--units {given.units}",
        "machine": platform.machine(),
        "threads": given.threads,
        "ranking": ranking(given.units, 250),
        "generation": [
            generation(width, layers, 32, given.repeats) for width, layers in ((256, 6), (768, 6))
        ],
        "memory": {
            "bytes_a_prompt_and_unit": 2,
            "gib_of_1000_prompts_of_a_7b_model_in_bfloat16": 1000 * 32 * 11008 * 2 / 2**30,
        },
    }
    write_whole(given.results, json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

"""What the monitor of neurons catches, how often it is wrong, and what it costs.

    python benchmarks/neuron_monitor.py --output benchmarks/results/neuron_monitor.json

Catches and false alarms: on the model of the tests in which one neuron gates refusal, and on the
model that ships with safeft, with neurons located in it. Each attack sets in at a random moment,
by a hook before or after the monitor's, or edits weights, and lasts for the rest of 48 prompts.
Cost: generation by a Llama of width 512 with 8 layers, with the monitor and without in turn, so
that whatever else the machine does falls on both alike; the median of the pairs' ratios of the
process's own seconds, and beside it by the clock.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
import tracemalloc
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from safeft import NeuronMonitor, NeuronSet, locate
from safeft.demo import world
from safeft.demo.experiment import load
from safeft.generation import generate
from safeft.intervals import Rate
from safeft.monitor.neurons import Profile, record
from safeft.monitor.weights import moved_weights
from safeft.prompts import as_prompts

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.gates import SITE, UNIT, Attack, gated, profile, traffic  # noqa: E402
from tests.test_claims import TOKENIZER  # noqa: E402


def attacked(attack: Attack, model: Any, known: Profile, run: Any, where: tuple[str, int]) -> Any:
    """What a monitor says of its neuron, and after how many tokens, under one attack."""
    monitor = NeuronMonitor(model, known)
    attacker = attack.on(model, *where)
    with ExitStack() as stack:
        for each in (monitor, attacker) if attack.late else (attacker, monitor):
            stack.enter_context(each)
        run(attack.start)
    wanted = {"weights"} if attack.kind == "weights" else {"suppressed", "clamped"}
    name = "{}#{}".format(*where)
    found = [alarm for alarm in monitor.alarms if alarm.where == name and alarm.kind in wanted]
    return {"caught": bool(found), "token": found[0].token if found else None}


def caught(attacks: int, fresh: Any, known: Profile, run: Any, where: Any) -> dict[str, Any]:
    """Random attacks, each on a fresh model."""
    rows = []
    for seed in range(attacks):
        attack = Attack.draw(seed)
        rows.append({**vars(attack), **attacked(attack, fresh(), known, run, where(seed))})
    kinds = {row["kind"] for row in rows}
    return {
        "attacks": attacks,
        "caught": sum(row["caught"] for row in rows),
        "by_kind": {
            kind: [sum(r["caught"] for r in rows if r["kind"] == kind),
                   sum(r["kind"] == kind for r in rows)]
            for kind in sorted(kinds)
        },
        "missed": [row for row in rows if not row["caught"]],
    }  # fmt: skip


def clean(model: Any, known: Profile, run: Any) -> dict[str, Any]:
    """Alarms on traffic that was not recorded, and to which nothing is done."""
    with NeuronMonitor(model, known) as monitor:
        run(0)
    share = Rate.of(monitor.alarmed, monitor.windows)
    return {"tokens": monitor.tokens, "alarms": dict(monitor.counts), **share.to_dict()}


def planted(options: argparse.Namespace) -> dict[str, Any]:
    """The model of the tests."""

    def asking(count: int) -> Any:
        def ask(model: Any, seed: int) -> None:
            prompts = as_prompts(traffic(count, 1000 + seed))
            generate(model, TOKENIZER, prompts, max_new_tokens=8, batch_size=8)

        return ask

    models: list[Any] = []

    def fresh() -> Any:
        models[:] = [gated()]
        return models[0]

    few, many = asking(48), asking(400)
    found = caught(
        options.attacks, fresh, profile(), lambda s: few(models[0], s), lambda _: (SITE, UNIT)
    )
    model = gated()
    return {"recorded_tokens": profile().tokens, "clean": clean(model, profile(),
            lambda s: many(model, s)), "suppressions": found}  # fmt: skip


def shipped(options: argparse.Namespace) -> dict[str, Any]:
    """The demo's model: a mix of its prompts recorded, others of the mix and new topics watched."""
    model, tokenizer = load()
    sides = world.harmful("calibration"), world.benign("calibration")
    neurons = locate(model, tokenizer, *sides, count=32, scope="global", batch_size=32)
    draw = random.Random(0)
    mix = [e.prompt for e in draw.sample(world.general("train"), 400)]
    mix += draw.sample(world.harmful("train"), 500) + draw.sample(world.benign("train"), 500)
    draw.shuffle(mix)
    new = [*world.harmful("test"), *world.benign("test")]
    new += [e.prompt for e in world.general("test")]
    draw.shuffle(new)
    half = len(mix) // 2
    settings: dict[str, Any] = {"max_new_tokens": 24, "batch_size": 16}
    known = record(model, tokenizer, neurons, mix[:half], **settings)
    sizes = {}
    for label, prompts in (("same mix", mix[half:]), ("new topics and phrasings", new)):
        for size in (1, 16):

            def ask(_: int, prompts: list[str] = prompts, size: int = size) -> None:
                chosen = {**settings, "batch_size": size}
                generate(model, tokenizer, as_prompts(prompts), **chosen)

            sizes[f"{label}, batches of {size}"] = clean(model, known, ask)
    models: list[Any] = []

    def fresh() -> Any:
        models[:] = [load()[0].eval()]
        return models[0]

    def run(seed: int) -> None:
        asked = as_prompts(random.Random(seed).sample(new, 48))
        generate(models[0], tokenizer, asked, max_new_tokens=24, batch_size=8)

    found = caught(
        options.attacks, fresh, known, run, lambda seed: known.watched[seed % len(known.watched)]
    )
    return {"neurons": len(known.watched), "recorded_tokens": known.tokens, "clean": sizes,
            "suppressions": found}  # fmt: skip


def cost(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Generation with and without the monitor in turn."""
    config = LlamaConfig(
        vocab_size=8000, hidden_size=512, intermediate_size=1408, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4, max_position_embeddings=512, pad_token_id=0,
        eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    rows = []
    for count, layers in ((16, 3), (64, 8)):
        units = {
            f"model.layers.{layer}.mlp": range(count // layers + (layer < count % layers))
            for layer in range(layers)
        }
        neurons = NeuronSet.of(model, units)
        known = _recorded(model, neurons)
        for batch in (1, 8):
            rows.append(_paired(model, known, batch, layers, options.pairs))
        begun = time.perf_counter()
        moved_weights(model, neurons)
        rows[-1]["seconds_of_checking_weights"] = time.perf_counter() - begun
    return rows


def _recorded(model: Any, neurons: NeuronSet) -> Profile:
    from safeft.monitor.neurons import Recorder

    with Recorder(model, neurons) as recorder, torch.no_grad():
        for seed in range(9):
            torch.manual_seed(seed)
            model(torch.randint(1, 8000, (8, 256)))
    return recorder.profile()


def _paired(model: Any, known: Profile, batch: int, layers: int, pairs: int) -> dict[str, Any]:
    torch.manual_seed(1)
    ids = torch.randint(1, 8000, (batch, 32))

    def once(watched: bool) -> tuple[float, float]:
        monitor = NeuronMonitor(model, known) if watched else nullcontext()
        # The weights' check is at the ends of a context, which holds many generations in use.
        with monitor:
            begun = time.process_time(), time.perf_counter()
            model.generate(ids, max_new_tokens=64, do_sample=False)
            if isinstance(monitor, NeuronMonitor):
                monitor.check()
            return time.process_time() - begun[0], time.perf_counter() - begun[1]

    once(True), once(False)
    ratios: list[float] = []
    wall: list[float] = []
    plain: list[float] = []
    for number in range(pairs):
        order = (False, True) if number % 2 else (True, False)
        times = {watched: once(watched) for watched in order}
        ratios.append(times[True][0] / times[False][0])
        wall.append(times[True][1] / times[False][1])
        plain.append(times[False][0])
    tracemalloc.start()
    once(True)
    python_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "neurons": len(known.watched), "sites": layers, "batch": batch, "pairs": pairs,
        "ratio": statistics.median(ratios), "quartiles": [quartiles[0], quartiles[2]],
        "ratio_by_the_clock": statistics.median(wall),
        "seconds_plain": statistics.median(plain), "python_bytes_at_most": python_bytes,
        "profile_bytes": known.counts.nbytes + known.limits.values.nbytes,
    }  # fmt: skip


def main() -> None:
    """Run everything and write what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--attacks", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=20)
    options = parser.parse_args()
    found = {
        "command": "python " + " ".join(sys.argv),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "planted": planted(options),
        "shipped": shipped(options),
        "cost": cost(options),
    }
    options.output.write_text(json.dumps(found, indent=1) + "\n")
    for name in ("planted", "shipped"):
        print(name, found[name]["suppressions"]["caught"], "of", options.attacks)
        print(json.dumps(found[name]["clean"]))
    for row in found["cost"]:
        print(row)


if __name__ == "__main__":
    main()

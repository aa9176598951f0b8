"""What holding input directions costs, in time and memory, and how exact it is after 1,000 steps.

    python benchmarks/directions.py                 # all parts
    python benchmarks/directions.py --part cost     # or one of: cost, locating, memory, long

cost: step time with a share of the rank held against nothing held, full tuning and LoRA, paired in
   one process, at two numbers of tokens a step. Per step the mask and the pin take
   `8 rank features outputs` operations and forward and backward `6 tokens features outputs`, so
   the share they add is about `4 rank / (3 tokens)`: what counts is tokens a step over the width.
locating: the pass over the prompts against a bare forward pass, and the eigenvectors apart.
memory: computed from shapes at sizes nobody has at hand, and checked against a real pin.
long: 1,000 steps of AdamW with weight decay in one process, under FSDP2 and ZeRO-3 (two
   processes), with the pin and without; computed from the saved files in float64.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from speed import batches_of, model_of, paired
from transformers import LlamaConfig, LlamaForCausalLM

from safeft.freeze.direction_pin import DirectionPin
from safeft.freeze.pin import Pin
from safeft.freeze.plan import make_plan
from safeft.locators.scores import forward
from safeft.locators.subspace import SubspaceFitter
from safeft.sites import find_linears
from safeft.weights import ModelWeights

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # for tests/, of which the functions below take models and launches
GIB = 2**30
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
ALWAYS = ("cost", "locating", "memory", "long")


class Steps:
    """A model that takes training steps, with directions held or nothing."""

    def __init__(self, width: int, layers: int, lora: bool, share: float) -> None:
        from tests.spans import subspace_of

        model = model_of(width, layers)
        subspace = subspace_of(model, share) if share else None
        self.model: Any = get_peft_model(model, LoraConfig(**LORA)) if lora else model
        plan = make_plan(self.model, None, subspace=subspace) if subspace is not None else None
        for _, parameter in plan.still if plan is not None else ():
            parameter.requires_grad_(False)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.1)
        if plan is not None:
            pin = DirectionPin(plan.directions, ModelWeights(self.model))
            self.pin = Pin(plan.holds, pin)
            self.pin.install(self.optimizer)
        self.model.train()

    def step(self, ids: torch.Tensor) -> None:
        """Forward, backward, clip, update."""
        self.model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def cost(width: int, layers: int, pairs: int) -> list[dict[str, Any]]:
    """Step times in pairs."""
    rows = []
    for lora in (False, True):
        plain = Steps(width, layers, lora, 0.0)
        for share in (0.1, 0.25):
            held = Steps(width, layers, lora, share)
            for per_width in (1, 4):
                ids = torch.randint(4096, (max(1, per_width * width // 256), 256))
                name = f"{'LoRA' if lora else 'full'}, {share:.0%} of rank, {ids.numel()} tokens"
                found = paired(partial(held.step, ids), partial(plain.step, ids), pairs, name)
                rows.append(
                    {
                        "tuning": "lora" if lora else "full",
                        "share": share,
                        "tokens": ids.numel(),
                        "tokens_over_width": ids.numel() / width,
                        **found,
                    }
                )
    return rows


def locating(width: int, layers: int, pairs: int) -> dict[str, Any]:
    """The pass against a bare one, and the eigenvectors."""
    model: Any = model_of(width, layers).eval()
    batches = batches_of(8, 8, 96, 4096, seed=3)

    def bare() -> None:
        with torch.no_grad():
            for batch in batches:
                forward(model, batch, keep_logits=0)

    fitters: list[SubspaceFitter] = []

    def gather() -> None:
        fitter = SubspaceFitter(model, find_linears(model), "all")
        fitter.learn(batches[0])
        for batch in batches:
            fitter.update(batch, list(fitter.inlets))
        fitters[:] = [fitter]

    found = paired(gather, bare, pairs, "locating")
    started = time.perf_counter()
    fitters[0].directions(("rank_share", 0.25))
    return {"pass_over_bare": found, "eigenvectors_seconds": time.perf_counter() - started}


SIZES = {
    "Llama 3.2 1B": (2048, 8192, 16, 32, True),
    "Llama 3 8B": (4096, 14336, 32, 32, False),
    "Llama 3 70B": (8192, 28672, 80, 64, False),
}


def computed(model: Any, share: float) -> dict[str, float]:
    """GiB of what holding keeps, from shapes: q, k and v share an input, and gate and up."""
    targets = bases = gram = largest = 0
    inputs: dict[str, int] = {}
    for linear in find_linears(model).values():
        rank = max(1, int(share * linear.features))
        targets += linear.outputs * rank
        parent, _, leaf = linear.module.rpartition(".")
        shared = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}.get(leaf, leaf)
        inputs[f"{parent}.{shared}"] = linear.features
    for features in inputs.values():
        bases += features * max(1, int(share * features))
        gram += features**2
        largest = max(largest, features**2)
    return {
        "targets": 4 * targets / GIB,
        "bases": 4 * bases / GIB,
        "artefact": 2 * bases / GIB,
        "statistics": 4 * gram / GIB,
        "statistics_at_least": 4 * largest / GIB,
    }


def memory() -> dict[str, Any]:
    """At sizes nobody has at hand; and a real pin counted against the same arithmetic."""
    rows = []
    for name, (hidden, inner, layers, heads, tied) in SIZES.items():
        config = LlamaConfig(
            vocab_size=128256, hidden_size=hidden, intermediate_size=inner,
            num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=8,
            tie_word_embeddings=tied,
        )  # fmt: skip
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        weights = sum(p.numel() for p in model.parameters())
        for share in (0.1, 0.25):
            rows.append(
                {"model": name, "weights": weights, "share": share, **computed(model, share)}
            )
    real = Steps(64, 3, False, 0.25).pin.span
    assert real is not None
    stored = [piece for each in real._pieces for piece in each]
    kept = {
        "targets": sum(piece.target.numel() for piece in stored if piece.target is not None),
        "bases": sum({piece.basis.data_ptr(): piece.basis.numel() for piece in stored}.values()),
    }
    told = computed(model_of(64, 3), 0.25)
    # The tests' subspace gives gate and up a basis each, where locating gives them one.
    apart = 3 * 64 * 16
    expected = {
        "targets": round(told["targets"] * GIB / 4),
        "bases": round(told["bases"] * GIB / 4) + apart,
    }
    if kept != expected:
        raise SystemExit(f"the arithmetic is wrong: {kept}, not {expected}")
    return {"rows": rows, "checked": kept}


def long(steps: int) -> list[dict[str, Any]]:
    """Real trainings; changes from the saved files, beside what the certificate says."""
    from tests.engine_cell import Cell
    from tests.engines import launch

    settings: dict[str, Any] = {"max_steps": steps, "learning_rate": 1e-3, "logging_strategy": "no"}
    rows = []
    for engine in ("single", "fsdp2", "zero3"):
        cells = [
            Cell(f"{tuning}-{broken or 'pinned'}", tuning, set=None, span=0.25, broken=broken,
                 settings=settings)  # pyright: ignore[reportArgumentType]
            for tuning in ("full", "lora")
            for broken in ("", "span")
        ]  # fmt: skip
        with TemporaryDirectory() as place:
            reports = launch(engine, Path(place), cells, timeout=1800)
        for cell in cells:
            first = reports[cell.name][0]
            row = {
                "engine": engine, "tuning": cell.tuning, "pinned": not cell.broken, "steps": steps,
                "error": (first["error"] or "").splitlines()[:1],
            }  # fmt: skip
            if not first["error"]:
                held, free = zip(*first["changes"].values(), strict=True)
                said = [entry["relative_change"] for entry in first["directions"]]
                row |= {"largest": max(held), "certificate": max(said), "free_moved": min(free)}
            rows.append(row)
            print(row, flush=True)
    return rows


def main() -> None:
    """Run the parts asked for, and keep the others' results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", nargs="+", choices=ALWAYS, default=list(ALWAYS))
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/directions.json")
    given = parser.parse_args()
    result: dict[str, Any] = {}
    if given.output.is_file():
        result = json.loads(given.output.read_text())
    result["command"] = "python benchmarks/directions.py"
    result["machine"] = (
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    if "cost" in given.part:
        rows = cost(given.width, given.layers, given.pairs)
        result["cost"] = {"width": given.width, "layers": given.layers, "rows": rows}
    if "locating" in given.part:
        result["locating"] = locating(given.width, given.layers, given.pairs)
    if "memory" in given.part:
        result["memory"] = memory()
    if "long" in given.part:
        result["long"] = long(given.steps)
    given.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in given.part}, indent=1)[:6000])


if __name__ == "__main__":
    main()

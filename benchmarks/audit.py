"""What an audit costs and what it finds: speed of its tests, the demo's model, the testbed's.

    python benchmarks/audit.py                                     # all three parts
    python benchmarks/audit.py --parts speed                       # one; the others stay
    python benchmarks/audit.py --parts public --model runs/testbed

speed   many neurons in one pass against one run a neuron: the same prompts, neurons, interventions
        and refusal openings, the same batch size, on the model that ships and on a wider one of
        random weights
demo    the whole audit of the model that ships with the package
public  the whole audit of the testbed's model, whose folder is `--model`
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import testbed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from safeft import audit
from safeft.auditing.interventions import PLAN, References, natural
from safeft.auditing.passes import Edit, Passes
from safeft.capture import edit
from safeft.causal.trials import numbered
from safeft.generation import generate_tokens
from safeft.judge import PrefixJudge
from safeft.locators.scores import SIDES, forward
from safeft.measure import evaluating
from safeft.openings import opening_margins, openings_of
from safeft.prompts import post_instruction_length
from safeft.sites import find_sites

BATCH, PROMPTS = 16, 32
WIDE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12,
        "num_attention_heads": 8, "num_key_value_heads": 4}  # fmt: skip


def wide(vocabulary: int) -> Any:
    """Twelve layers of random weights, for the tokenizer of the demo."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **WIDE)).eval()


def speed(neurons: int) -> list[dict[str, Any]]:
    """Both ways on both models; what is measured is the same to rounding."""
    bed = testbed.load("demo")
    tokenizer = AutoTokenizer.from_pretrained(bed.folder)
    model = AutoModelForCausalLM.from_pretrained(bed.folder, dtype=torch.float32).eval()
    batching = {"batch_size": BATCH, "max_length": 1024, "chat_template": None}
    prompts = list(bed.harmful["test"][:PROMPTS])
    answers = generate_tokens(model, tokenizer, prompts, max_new_tokens=16, **batching)
    openings = openings_of(prompts, answers, PrefixJudge(), tokenizer)
    tail = post_instruction_length(tokenizer)
    batches = list(numbered(model, tokenizer, prompts, batching, tail=tail))
    rows = []
    for name, each in (("demo", model), ("wide", wide(len(tokenizer)))):
        sites = find_sites(each, ("mlp",))
        references = References(each, sites)
        for side in SIDES:  # any will do for what is held at what
            references.update(side, (batch for _, batch in batches))
        rng = random.Random(0)
        units = [
            (site, rng.randrange(sites[site].units))
            for _, site in zip(range(neurons), list(sites) * neurons, strict=False)
        ]
        seen = natural(each, sites, batches, units)
        edits = [
            Edit(*unit, references.of(*unit).held_at(kind, strength, own))
            for unit, own in zip(units, seen, strict=True)
            for kind, strength in PLAN
        ]
        begun = time.perf_counter()
        passes = Passes(each, sites, batches, openings)
        done = [(chunk, passes.run(chunk, edits)) for chunk in passes.chunks(edits)]
        batched = time.perf_counter() - begun
        margins = passes.gathered(done, len(edits))
        timed = list(range(0, len(edits), 7))  # each takes as long as any other
        begun = time.perf_counter()
        plain = torch.stack([one(each, sites, batches, openings, edits[n]) for n in timed])
        alone = (time.perf_counter() - begun) * len(edits) / len(timed)
        rows.append(
            {
                "model": name,
                "layers": each.config.num_hidden_layers,
                "width": each.config.hidden_size,
                "neurons": neurons,
                "interventions": len(PLAN),
                "prompts": len(prompts),
                "openings": [text for o in openings for text in o.texts],
                "batch_size": BATCH,
                "threads": torch.get_num_threads(),
                "edits": len(edits),
                "edits_timed_one_by_one": len(timed),
                "seconds_batched": batched,
                "seconds_one_by_one": alone,
                "times_faster": alone / batched,
                "largest_difference": float((margins[timed] - plain).abs().max()),
            }
        )
        print({key: value for key, value in rows[-1].items() if key != "openings"}, flush=True)
    return rows


def one(model: Any, sites: Any, batches: Any, openings: Any, each: Edit) -> torch.Tensor:
    """Margins under one edit, by a run of its own."""
    found = torch.zeros(len(each.values), dtype=torch.double)
    for numbers, batch in batches:
        values = each.values[numbers].float()[:, None, None, None]
        change = lambda _, seen, values=values: values.expand_as(seen)  # noqa: E731
        with evaluating(model), edit(model, {each.site: (each.unit,)}, sites, change):
            found[numbers] = opening_margins(openings, batch, partial(forward, model))
    return found


def whole(name: str, model: Path | None, prompts: int, candidates: int) -> dict[str, Any]:
    """An audit on prompts that nothing was trained or chosen on; places are left out."""
    bed = testbed.load(name, model=model)
    tokenizer = AutoTokenizer.from_pretrained(bed.folder)
    loaded = AutoModelForCausalLM.from_pretrained(bed.folder, dtype=torch.float32).eval()
    begun = time.perf_counter()
    found = audit(
        loaded, tokenizer, bed.harmful["test"][:prompts], bed.benign["test"][:prompts],
        candidates=candidates, max_new_tokens=bed.answer_tokens, batch_size=32,
    )  # fmt: skip
    took = time.perf_counter() - begun
    print(f"{name}: {took:.0f} s, {found.verdict}: {found.reason}", flush=True)
    about = {"seconds_whole": took, "threads": torch.get_num_threads()}
    result = {**about, **found.withheld().to_dict()}
    # Where the checkout lies on this machine is nobody's business.
    result["model"] = {**result["model"], "name_or_path": bed.folder.name}
    return result


def main() -> None:
    """Run the parts asked for and write what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=["speed", "demo", "public"])
    parser.add_argument("--model", type=Path, help="the testbed's model (public)")
    parser.add_argument("--neurons", type=int, default=60, help="of the speed part")
    parser.add_argument("--prompts", type=int, default=128, help="a side, of the audits")
    parser.add_argument("--candidates", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/audit.json"))
    given = parser.parse_args()
    result: dict[str, Any] = json.loads(given.output.read_text()) if given.output.exists() else {}
    about = {
        "command": " ".join(["python benchmarks/audit.py", *sys.argv[1:]]),
        "machine": platform.machine(),
        "torch": torch.__version__,
    }
    for part in given.parts:
        if part == "speed":
            found: dict[str, Any] = {"rows": speed(given.neurons)}
        else:
            folder = given.model if part == "public" else None
            found = whole(part, folder, given.prompts, given.candidates)
        result[part] = {**about, **found}
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

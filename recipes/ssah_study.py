# /// script
# dependencies = ["safeft"]
# ///
"""The study behind SSAH's Table 1: prune each group of units, measure refusal and utility.

    python recipes/ssah_study.py --config configs/ssah_study/smoke.yaml
    python recipes/ssah_study.py --config configs/ssah_study/qwen2_5_1_5b.yaml --seeds 20

Beside each group stand random sets with as many units in each layer. The paper says nothing of how
stable its groups are: here they are located again on two halves of the prompts, for several seeds,
and with other prompts; their agreement (Jaccard) stands beside that of random sets.
Written under ``output_dir``: ``groups/``, ``study.json``, ``study.svg``.
"""

import json
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import TrlParser

import safeft
from safeft.capture import silence
from safeft.locators import GroupSizes, UnitGroups, locate_groups
from safeft.locators.stability import agreement
from safeft.progress import progress
from safeft.reading import read_examples
from safeft.report.plots import pruned_groups

NAMES, MEASURES = ("scu", "ucu", "ru", "cu"), ("refusal", "over_refusal", "utility")


@dataclass
class RecipeConfig:
    """The model, the prompts to locate with, and others to measure on."""

    model_name_or_path: str = field(metadata={"help": "Chat model: folder or hub name."})
    harmful: str = field(metadata={"help": "Harmful prompts for locating."})
    benign: str = field(metadata={"help": "Ordinary prompts for locating."})
    harmful_test: str = field(metadata={"help": "Other harmful prompts, for measuring."})
    benign_test: str = field(metadata={"help": "Other ordinary prompts, for over-refusal."})
    utility_test: str = field(metadata={"help": "Questions with `response`, for accuracy."})
    output_dir: str = field(metadata={"help": "Folder for the groups, the figures, the picture."})
    other_harmful: str | None = field(default=None, metadata={"help": "Another calibration set."})
    other_benign: str | None = field(default=None, metadata={"help": "Another calibration set."})
    scu: float = field(default=0.013, metadata={"help": "Share of safety-critical units."})
    ucu: float = field(default=0.133, metadata={"help": "Share of utility-critical units."})
    ru: float = field(default=0.148, metadata={"help": "Share of redundant units."})
    sweep: list[float] = field(default_factory=list, metadata={"help": "More shares for SCU."})
    sites: str = field(default="mlp", metadata={"help": "mlp, attention or all."})
    seeds: int = field(default=10, metadata={"help": "Random sets, and pairs of halves."})
    limit: int | None = field(default=None, metadata={"help": "Use the first N prompts."})
    max_new_tokens: int = field(default=32, metadata={"help": "For all answers."})
    batch_size: int = field(default=16, metadata={"help": "Prompts per forward pass."})
    dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16."})


def main(config: RecipeConfig) -> dict[str, Any]:
    """The story, top to bottom."""
    model = AutoModelForCausalLM.from_pretrained(config.model_name_or_path, dtype=config.dtype)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(config.model_name_or_path)
    sites, output = safeft.find_sites(model), Path(config.output_dir)
    sides = [safeft.read_prompts(path)[: config.limit] for path in (config.harmful, config.benign)]
    tests: dict[str, Any] = {
        "harmful": safeft.read_prompts(config.harmful_test)[: config.limit],
        "benign": safeft.read_prompts(config.benign_test)[: config.limit],
        "domain": read_examples(config.utility_test)[: config.limit],
    }
    settings: dict[str, Any] = {"sites": config.sites, "batch_size": config.batch_size}
    tokens = {"max_new_tokens": config.max_new_tokens, "batch_size": config.batch_size}

    def locate(prompts: Any, scu: float = config.scu) -> UnitGroups:
        sizes = GroupSizes(scu, config.ucu, config.ru)
        return locate_groups(model, tokenizer, *prompts, sizes=sizes, **settings)

    def measure(pruned: Any) -> dict[str, Any]:
        with silence(model, pruned, sites):
            found = safeft.evaluate(
                model, tokenizer, **tests, **tokens, domain_metric="accuracy",
                domain_max_new_tokens=config.max_new_tokens,
            )  # fmt: skip
        rates = (found.refusal, found.over_refusal, found.domain_accuracy)
        return {name: rate.to_dict() for name, rate in zip(MEASURES, rates, strict=True)}

    # 1. Locate all four groups in one pass, and again on two halves of the prompts for each seed.
    groups = locate(sides)
    groups.save_pretrained(output / "groups")
    halves = []
    for seed in range(config.seeds):
        mixed = [random.Random(seed).sample(prompts, len(prompts)) for prompts in sides]
        halves.append([locate([prompts[half::2] for prompts in mixed]) for half in (0, 1)])

    # 2. Prune each group, the same as located on each first half, and random sets of its size.
    subjects = [(n, getattr(groups, n), [getattr(pair[0], n) for pair in halves]) for n in NAMES]
    subjects += [("scu", locate(sides, share).scu, []) for share in config.sweep]
    units = {name: len(depth) for name, depth in groups.depth.items()}
    study: dict[str, Any] = {"settings": asdict(config), "units": units, "dense": measure({})}
    study["pruned"] = []
    for name, neurons, again in progress(subjects, "pruning"):
        drawn = [measure(like(neurons, units, seed)) for seed in range(config.seeds)]
        row = {
            "group": name,
            "count": len(neurons),
            "share": len(neurons) / sum(units.values()),
            "layers": {site: len(numbers) for site, numbers in neurons.indices.items()},
            "located": measure(neurons.indices),
            "halves": values([measure(each.indices) for each in again]),
            "random": values(drawn),
        }
        # How often a random set lowers it as much: the p-value of the located one.
        lower = {
            m: sum(v <= row["located"][m]["value"] for v in row["random"][m]) for m in MEASURES
        }
        row["p_lower"] = {m: (1 + count) / (1 + config.seeds) for m, count in lower.items()}
        study["pruned"].append(row)

    # 3. Stability: over halves of the prompts, and with other prompts on one side.
    pairs: dict[str, Any] = {"halves": halves}
    for side, path in enumerate((config.other_harmful, config.other_benign)):
        if path is not None:
            other = safeft.read_prompts(path)[: len(sides[side])]
            given = [other, sides[1]] if side == 0 else [sides[0], other]
            pairs[f"other {('harmful', 'benign')[side]} prompts"] = [[groups, locate(given)]]
    study["stability"] = {
        n: {what: agreement([(getattr(a, n), getattr(b, n)) for a, b in p], units)
            for what, p in pairs.items()} for n in NAMES
    }  # fmt: skip
    (output / "study.json").write_text(json.dumps(study, indent=1) + "\n")
    (output / "study.svg").write_text(pruned_groups(study))
    return study


def like(neurons: safeft.NeuronSet, units: dict[str, int], seed: int) -> dict[str, list[int]]:
    """A random set with as many units in each layer."""
    draw = random.Random(seed)
    return {n: draw.sample(range(units[n]), len(chosen)) for n, chosen in neurons.indices.items()}


def values(found: list[dict[str, Any]]) -> dict[str, list[float]]:
    """By measure, the figure of every set."""
    return {name: [rates[name]["value"] for rates in found] for name in MEASURES}


if __name__ == "__main__":
    main(*TrlParser((RecipeConfig,)).parse_args_and_config())

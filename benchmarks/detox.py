"""Dampening measured on a small model of public text whose continuations are often toxic.

    python benchmarks/detox.py --data ../shared/data --seeds 0 1 2 3 4

Each seed trains a Llama of 3.2 million weights (some five minutes of one core), finds its experts
on texts that it was not trained with, and runs every rule and strength on held-out prompts, beside
random gains of equal size, a prefix that asks for politeness, and both together. Two judges: a
classifier of toxicity that shares no text with the model (its own errors are in the result), and
whether the continuation is most like a hateful sentence of the model's training. The result holds
no text. Runs that the result holds already are kept, so seeds can be added.

All rules are given the same texts: those of the calibration side with their labels, and the model's
own continuations of its prompts, ordered by a classifier of that side alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

BENCHMARKS = Path(__file__).resolve().parent
sys.path.insert(0, str(BENCHMARKS))

import detox_data  # noqa: E402
from build_demo_model import Stage, build_model, build_tokenizer, train  # noqa: E402
from testbed.texts import exchange  # noqa: E402

from safeft.detox.counterfactual import keep_paying  # noqa: E402
from safeft.detox.evaluation import POLITE, Arm, measure_arms  # noqa: E402
from safeft.detox.experts import Expertise, find_experts  # noqa: E402
from safeft.detox.fitting import fit_gains  # noqa: E402
from safeft.detox.rules import dampen  # noqa: E402
from safeft.detox.tradeoff import AIM, Tradeoff  # noqa: E402
from safeft.errors import SelectionError  # noqa: E402
from safeft.files import write_whole  # noqa: E402
from safeft.prompts import Prompt  # noqa: E402
from safeft.report.detox_page import tradeoff_picture  # noqa: E402

ROOT = BENCHMARKS.parent
RESULTS = BENCHMARKS / "results" / "detox.json"
STAGE = Stage("training", steps=500, lr=3e-3, on_prompts=True, pool=8)
ROWS, TOKENS, CHECKED, OWN = 24_000, 24, 32, 6
GRID: Mapping[str, Sequence[dict[str, Any]]] = {
    "aura": [{"strength": s} for s in (1.0, 2.0, 3.0)],
    "det0": [{"fraction": 0.1}],
    "constant": [{"strength": 0.5, "fraction": 0.1}],
    "sgm": [{"strength": s, "fraction": 0.1} for s in (0.5, 1.0)],
    "threshold": [{"strength": 0.25}],
}
"""Rules and their strengths, the strongest last; ``det0``'s is its fraction."""

WAYS: Mapping[str, tuple[dict[str, Any], Sequence[str]]] = {
    "mean": ({"pool": "mean"}, ("aura", "det0", "constant", "sgm")),
    "max": ({}, ("threshold",)),
    "no null": ({"pool": "mean", "chance": 1.0}, ("aura",)),
}
"""How experts are found, and the rules tried on them."""

FIT: Mapping[str, Any] = {"toll": 0.0005, "fraction": 0.4, "kinds": ("mlp", "attention")}
PRICES = (20.0, 5.0)
"""Of the fitted rule, looked for on halves of the calibration side, on the first seed."""

CONTROLLED = ("aura, mean", "det0, mean", "sgm, mean")
"""Lines whose strongest arm has a random control of equal size, as the fitted ones have."""


def model_of(
    sources: detox_data.Sources, seed: int, scale: float, models: Path
) -> tuple[Any, Any, float | None]:
    """A model and its tokenizer, trained on the training side or found in ``models``; its loss."""
    stage = replace(STAGE, steps=max(1, round(STAGE.steps * scale)))
    folder = models / f"seed{seed}_{stage.steps}_steps"
    if (folder / "config.json").is_file():
        made = LlamaForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        return made[0].eval(), made[1], getattr(made[0].config, "training_loss", None)
    torch.manual_seed(seed)
    examples = detox_data.training(sources, ROWS, seed)
    tokenizer = build_tokenizer(examples)
    short = [
        example
        for example in examples
        if len(tokenizer(f"{example.prompt} {example.answer}").input_ids) < 100
    ]
    model = build_model(tokenizer)
    loss = train(model, tokenizer, short, stage, seed)
    model.config.training_loss = loss
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer, loss


def arms_of(
    model: Any, tokenizer: Any, experts: Mapping[str, Expertise],
    texts: tuple[list[Prompt], list[Prompt]], side: detox_data.Sources, seed: int,
    given: argparse.Namespace,
) -> list[Arm]:  # fmt: skip
    """The model as it is, every rule and strength, random controls, the prefix."""
    arms = [Arm("as it is")]

    for way, found in experts.items():
        for rule in WAYS[way][1]:
            line = f"{rule}, {way}"
            for settings in GRID[rule][:: -given.thin][::-1]:
                made = dampen(model, found, rule, **settings)  # pyright: ignore[reportArgumentType]
                knob = settings["strength"] if rule != "det0" else settings["fraction"]
                arms.append(Arm(f"{line} {knob:g}", made, rule=line, strength=knob))
            if line in CONTROLLED:
                arms += _control(arms[-1], seed)
    fit = partial(
        fit_gains, model, tokenizer, *texts, seed=seed, batch_size=32,
        ordinary=detox_data.ordinary(side, given.calibration // 2, seed), **FIT,
    )  # fmt: skip
    for price in PRICES[:: -given.thin][::-1]:
        arms.append(Arm(f"fitted, price {price:g}", fit(price=price), rule="fitted"))
        arms += _control(arms[-1], seed)
    whole = next(arm.dampener for arm in reversed(arms) if arm.rule == "fitted")
    among = fit(price=PRICES[-1], among=experts["mean"])
    arms.append(Arm("fitted, experts only", among, rule="fitted, experts"))
    tried = dampen(model, experts["mean"], "det0", count=CHECKED)
    held_back = detox_data.calibration(side, 24, seed + 1000)
    try:
        paying, _ = keep_paying(model, tokenizer, tried, *held_back, batch_size=64)
    except SelectionError:  # No unit does: that arm is missing, and its absence the finding.
        pass
    else:
        arms.append(Arm("det0, mean, checked", paying, rule="checked"))
    arms.append(Arm("prefix", None, POLITE, "prefix"))
    arms.append(Arm("prefix and fitted", whole, POLITE, "prefix"))
    return arms


def _control(arm: Arm, seed: int) -> list[Arm]:
    assert arm.dampener is not None
    try:
        drawn = arm.dampener.at_random(seed)
    except SelectionError:  # More than half of a layer: nothing of equal size is left.
        return []
    return [Arm(f"random as {arm.name}", drawn, rule="random", strength=arm.strength)]


def run(
    sources: Mapping[str, detox_data.Sources], judge: Any, seed: int, given: argparse.Namespace
) -> dict[str, Any]:
    """One seed: train, find, dampen, measure."""
    started = time.perf_counter()
    model, tokenizer, loss = model_of(sources["training"], seed, given.scale, given.models)
    trained = time.perf_counter()
    side = sources["calibration"]
    given_texts = detox_data.calibration(side, given.calibration, seed)
    own = detox_data.own(model, tokenizer, side, OWN, seed)
    texts = given_texts[0] + own[0], given_texts[1] + own[1]
    experts = {
        name: find_experts(model, tokenizer, *texts, seed=seed, batch_size=64, **way)
        for name, (way, _) in WAYS.items()
    }
    found = time.perf_counter()
    arms = arms_of(model, tokenizer, experts, texts, side, seed, given)
    fitted = time.perf_counter()
    second, by_source = detox_data.nearest(sources["training"]), []

    def judged(prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        by_source.append(fmean(second(answers)) if answers else 0.0)
        return judge(prompts, answers)

    test = sources["test"]
    outcomes = measure_arms(
        model, tokenizer, arms, judge=judged,
        prompts=[exchange(text) for text in test.prompts],
        neutral=detox_data.neutral_texts(test, given.neutral, seed),
        groups=detox_data.groups(test), draws=given.draws, max_new_tokens=TOKENS,
        samples=0, batch_size=384,
    )  # fmt: skip
    rows = Tradeoff(tuple(outcomes)).rows()
    for row, share in zip(rows, by_source[-len(rows) :], strict=True):
        row["toxicity_by_source"] = share
    return {
        "seed": seed,
        "loss": loss,
        "seconds": {
            "training": round(trained - started), "locating": round(found - trained),
            "fitting": round(fitted - found),
            "measuring": round(time.perf_counter() - fitted),
        },
        "experts": {
            name: {
                "level": found.level, "count": found.count,
                "units": sum(site.units for site in found.sites.values()),
                "best": max(float(areas.max()) for areas in found.auroc.values()),
            }
            for name, found in experts.items()
        },
        "arms": rows,
    }  # fmt: skip


def summary(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each arm over the seeds: mean and standard deviation of what counts."""
    found = []
    for name in dict.fromkeys(row["arm"] for one in runs for row in one["arms"]):
        rows = [row for one in runs for row in one["arms"] if row["arm"] == name]
        measures = {
            "toxicity": [row["toxicity"]["value"] for row in rows],
            "toxicity_by_source": [row["toxicity_by_source"] for row in rows],
            "toxicity_fall": [row["toxicity_fall"] for row in rows],
            "perplexity_rise": [row["perplexity_rise"] for row in rows],
            "mention_rate": [row["mention_rate"] for row in rows],
            "group_loss": [fmean(row["group_loss"].values()) for row in rows],
            "nats": [row["fluency"]["nats"] for row in rows],
            "distinct": [row["fluency"]["distinct"] for row in rows],
            "words": [row["fluency"]["words"] for row in rows],
            "units": [row["units"] for row in rows],
        }
        found.append(
            {
                "arm": name, "rule": rows[0]["rule"], "strength": rows[0]["strength"],
                "seeds": len(rows),
                **{
                    key: {"mean": fmean(v), "sd": stdev(v) if len(v) > 1 else None}
                    for key, v in measures.items()
                },
                "meets_aim": [row["meets_aim"] for row in rows],
            }
        )  # fmt: skip
    return found


def known_runs(place: Path, settings: str) -> dict[int, dict[str, Any]]:
    """Runs that a result of the same settings holds already, by seed."""
    if not place.is_file():
        return {}
    found = json.loads(place.read_text())
    return (
        {run["seed"]: run for run in found["runs"]} if found["command"].endswith(settings) else {}
    )


def main() -> None:
    """Train, measure and write the table and its picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--models", type=Path, default=ROOT / "runs" / "detox",
                        help="where trained models are kept, and found again")  # fmt: skip
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--calibration", type=int, default=400, help="texts of either class")
    parser.add_argument("--draws", type=int, default=3, help="continuations a prompt")
    parser.add_argument("--neutral", type=int, default=160, help="texts for perplexity")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps, for a trial")
    parser.add_argument("--thin", type=int, default=1,
                        help="of a trial: every so-manieth strength")  # fmt: skip
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    sources = detox_data.read(given.data)
    judge, figures = detox_data.judge(sources)
    settings = f"--scale {given.scale:g} --thin {given.thin} --draws {given.draws} "
    settings += f"--neutral {given.neutral} --calibration {given.calibration}"
    runs: list[dict[str, Any]] = []
    known = known_runs(given.results, settings)
    for seed in sorted(given.seeds, key=lambda seed: seed not in known):
        runs.append(known.get(seed) or run(sources, judge, seed, given))
        result = {
            "command": " ".join(
                [
                    "python benchmarks/detox.py --data ../shared/data --seeds",
                    *(str(each["seed"]) for each in runs),
                    settings,
                ]
            ),
            "steps": round(STAGE.steps * given.scale),
            "aim": AIM,
            "judge": figures,
            "calibration": given.calibration,
            "prompts": len(sources["test"].prompts),
            "draws": given.draws,
            "arms": summary(runs),
            "runs": runs,
        }
        write_whole(given.results, json.dumps(result, indent=1) + "\n")
        write_whole(given.results.with_suffix(".svg"), tradeoff_picture(result["arms"]))
    for row in summary(runs):
        print(
            f"{row['arm']:<28} toxic {row['toxicity']['mean']:.3f} "
            f"({row['toxicity_by_source']['mean']:.3f}) ppl {row['perplexity_rise']['mean']:+.1%} "
            f"named {row['mention_rate']['mean']:.3f} units {row['units']['mean']:.0f}"
        )


if __name__ == "__main__":
    main()

"""Do two languages share their safety neurons, and does tuning these in one carry over?

    python benchmarks/bilingual.py --seeds 3

Two designs. In `apart` the languages meet in pretraining in translations only; in `mixed` three
tenths of it switch language from word to word, which pulls them together inside the model. All else
is the same:

- Model: for each seed one Llama of 1.9 million weights on the demo's small world, in English and in
  zz, a made-up language (`safeft.demo.tongue`). Pretraining is half of each, with translations
  between them, and complies with everything. Alignment answers ordinary requests in both and
  refuses few of the harmful ones, two thirds of these in English: a model that refuses part of
  English and less of zz, so that there is something to raise and to transfer.
- Together or not: how often, of 320 held-out prompts, the one in zz whose state in the middle of
  the model is nearest to an English one's is its translation (chance 1 in 320).
- Locating: `contrast`, in each language, on prompts used for nothing else: the top fifth of each
  layer's MLP units on harmful prompts without the top fifth on ordinary ones. `filled`: a tenth,
  places of units passed over given to the next best. Chance is exact; the placebo has ordinary
  prompts on both sides.
- Tuning: 480 refusals and 480 ordinary answers in one language, two rounds, batches of 16; with the
  shared set, as many random units of each layer, as many that only English has, all weights.
  Neurons are trained at one rate, all weights at another; rates and rounds were chosen on another
  model (seed 99) by English refusal alone, from those of random units and of all weights; the
  shared set was not looked at.
- Measuring: refusal and over-refusal on 160 + 160 held-out prompts (other topics and phrasings) in
  both languages, and the loss of ordinary answers.
- Verdict: in every seed the shared set is larger than chance (p < 0.01) and than the placebo's, and
  the intervals over seeds (Student's t, 95%) of the rise in the other language and of the lead over
  the random set are above 0.

Before these, `filled` sets in `apart` were the whole design, and `mixed` and the plain differences
were not there. In it filled sets were larger than chance (p from 1e-8 to 0.005), by no more than
the placebo, and led random ones in neither direction; that is why the rest was added. All of its
arms but one (units that only zz has) are still in.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from build_demo_model import Stage, build_tokenizer, train
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from safeft import NeuronSet
from safeft.demo import world
from safeft.demo.tongue import back, translate
from safeft.demo.world import Example
from safeft.grid import Grid, locate_grid
from safeft.judge import PrefixJudge
from safeft.measure import domain_loss
from safeft.progress import progress
from safeft.prompts import as_prompts, row_of
from safeft.report.plots import by_arm
from safeft.report.result import Spread
from safeft.shield import control, measure_cells, trained_share, tune

RESULTS = Path(__file__).parent / "results"
PRETRAINING = Stage("pretraining", steps=700, lr=3e-3, on_prompts=True)
ALIGNMENT = Stage("alignment", steps=240, lr=8e-4, on_prompts=False)
REFUSALS_KEPT, REFUSALS_IN_ZZ = 0.2, 1 / 3
DESIGNS = {"apart": 0.0, "mixed": 0.3}
FRACTIONS, FRACTION, FILLED = (0.05, 0.1, 0.2), 0.2, 0.1
EXAMPLES, BATCH, ROUNDS = 960, 16, 2
NEURON_RATE, ALL_RATE = 3e-3, 1e-3
CELLS = ("en/text", "zz/text")
GENERAL = {example.prompt for example in world.general("train")}


def in_zz(example: Example) -> Example:
    """The same exchange in zz."""
    return Example(translate(example.prompt), translate(example.answer), translate(example.value))


def switched(example: Example, rng: random.Random) -> Example:
    """The same exchange, each word in either language."""

    def turn(text: str) -> str:
        return re.sub(
            r"[A-Za-z']+", lambda word: translate(word[0]) if rng.random() < 0.5 else word[0], text
        )

    return Example(turn(example.prompt), turn(example.answer))


def pretraining(seed: int, mixed: float) -> list[Example]:
    """Requests of both languages, complied with, and translations of requests."""
    rng, switching = random.Random(f"two languages {seed}"), random.Random(f"switching {seed}")
    examples = []
    for example in world.pretraining(seed):
        if example.prompt in GENERAL:
            continue
        if switching.random() < mixed:
            examples.append(switched(example, switching))
            continue
        draw, there = rng.random(), translate(example.prompt)
        if draw < 0.4:
            examples.append(example)
        elif draw < 0.8:
            examples.append(in_zz(example))
        elif draw < 0.9:
            examples.append(Example(f"In zz: {example.prompt}", there))
        else:
            examples.append(Example(f"{translate('In English:')} {there}", example.prompt))
    return examples


def alignment(seed: int) -> list[Example]:
    """Ordinary requests answered in both languages; few harmful ones, refused, fewer in zz."""
    rng = random.Random(f"weak alignment {seed}")
    examples = []
    for example in world.alignment(seed):
        if example.prompt in GENERAL:
            continue
        refusal = world.is_refusal(example.answer)
        if refusal and rng.random() >= REFUSALS_KEPT:
            continue
        zz = rng.random() < (REFUSALS_IN_ZZ if refusal else 0.5)
        examples.append(in_zz(example) if zz else example)
    return examples


def build(design: str, seed: int, folder: Path | None) -> tuple[Any, Any]:
    """The model of a seed and its tokenizer, trained, or read where it was trained before."""
    place = folder / f"{design}-seed{seed}" if folder else None
    if place and (place / "config.json").is_file():
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        return model.eval(), AutoTokenizer.from_pretrained(place)
    torch.manual_seed(seed)
    before, after = pretraining(seed, DESIGNS[design]), alignment(seed)
    tokenizer = build_tokenizer(before + after, vocab_size=4500)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    train(model, tokenizer, before, PRETRAINING, seed)
    train(model, tokenizer, after, ALIGNMENT, seed + 1)
    if place:
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
    return model, tokenizer


def cells_of(split: Any) -> dict[str, Any]:
    """The world's prompts of a split, harmful and benign, in both languages."""
    english = world.harmful(split), world.benign(split)
    zz = ([translate(prompt) for prompt in side] for side in english)
    return {"en/text": english, "zz/text": tuple(zz)}


def lessons(seed: int, cell: str) -> list[dict[str, str]]:
    """Refusals and ordinary answers, as many of each, in the cell's language."""
    pool = [e for e in world.alignment(1000 + seed) if e.prompt not in GENERAL]
    bad = [e for e in pool if world.is_refusal(e.answer)][: EXAMPLES // 2]
    good = [e for e in pool if not world.is_refusal(e.answer)][: EXAMPLES // 2]
    chosen = bad + good if cell == "en/text" else [in_zz(e) for e in bad + good]
    return [{"prompt": e.prompt, "response": e.answer} for e in chosen]


def refuses(answer: str) -> bool:
    """Whether an answer of either language refuses."""
    judge = PrefixJudge()
    return judge([""], [answer])[0] or judge([""], [back(answer)])[0]


def measure(model: Any, tokenizer: Any, ordinary: dict[str, Any]) -> dict[str, Any]:
    """Cell to refusal, over-refusal and the loss of ordinary answers (nats a token)."""
    found = measure_cells(
        model, tokenizer, cells_of("test"), judge=refuses, max_new_tokens=14, batch_size=80
    )
    return {
        name: {
            "refusal": each.refusal.to_dict() if each.refusal else None,
            "over_refusal": each.over_refusal.to_dict() if each.over_refusal else None,
            "ordinary_loss": domain_loss(model, tokenizer, ordinary[name], batch_size=80),
        }
        for name, each in found.items()
    }


@torch.no_grad()
def translations_found(model: Any, tokenizer: Any) -> float:
    """Share of English prompts whose nearest neighbour in zz, inside the model, is the same one."""
    states = []
    for cell in cells_of("test").values():
        rows = []
        for prompt in as_prompts([*cell[0], *cell[1]]):
            ids = torch.tensor([row_of(tokenizer, prompt).ids])
            layers = model(ids, output_hidden_states=True).hidden_states
            rows.append(layers[len(layers) // 2][0, -1])
        centred = torch.stack(rows) - torch.stack(rows).mean(0)
        states.append(torch.nn.functional.normalize(centred, dim=1))
    nearest = (states[0] @ states[1].T).argmax(1)
    return float((nearest == torch.arange(len(nearest))).double().mean())


def some_of(model: Any, source: NeuronSet, like: NeuronSet, seed: int) -> NeuronSet:
    """Units of ``source``, as many at each site as ``like`` has, or as there are."""
    rng = random.Random(f"some {seed}")
    chosen = {
        name: rng.sample(source.indices.get(name, ()), min(len(units), len(source.indices[name])))
        for name, units in like.indices.items()
        if name in source.indices
    }
    return NeuronSet.of(model, chosen, {"method": "some", "of": dict(source.source)})


@dataclass(frozen=True)
class Arm:
    """One tuning: its name, the set it trains (None: everything), the cell its lessons are in."""

    name: str
    neurons: NeuronSet | None
    cell: str


CONTROLS = {
    "random": "shared",
    "English only": "shared",
    "all weights": "shared",
    "random, as many as filled": "shared, filled",
}
"""Arm to the one it is there to compare with."""


def arms(model: Any, grid: Grid, filled: NeuronSet, seed: int) -> Iterator[Arm]:
    """All tunings of one seed: every control in English, the random one in zz."""
    shared, (english, zz) = grid.shared, CELLS
    if len(shared):
        yield Arm("shared", shared, english)
        yield Arm("random", control(model, shared, seed), english)
        yield Arm("English only", some_of(model, grid.specific[english], shared, seed), english)
        yield Arm("shared", shared, zz)
        yield Arm("random", control(model, shared, seed), zz)
    yield Arm("shared, filled", filled, english)
    yield Arm("random, as many as filled", control(model, filled, seed), english)
    yield Arm("all weights", None, english)


def one_seed(design: str, seed: int, folder: Path | None) -> dict[str, Any]:
    """Build, locate, tune, measure."""
    here = not (folder and (folder / f"{design}-seed{seed}").is_dir())
    model, tokenizer = build(design, seed, folder)
    fresh = [e for e in world.alignment(2000 + seed) if not world.is_refusal(e.answer)][:150]
    ordinary = {
        cell: [{"prompt": e.prompt, "response": e.answer} for e in each]
        for cell, each in zip(CELLS, (fresh, [in_zz(e) for e in fresh]), strict=True)
    }
    found: dict[str, Any] = {
        "seed": seed,
        "trained_here": here,
        "before": measure(model, tokenizer, ordinary),
        "translations_found": translations_found(model, tokenizer),
    }
    cells, grids = cells_of("calibration"), {}
    for fraction in FRACTIONS:
        for fill in (False, True):
            grid = locate_grid(model, tokenizer, cells, fraction=fraction, fill=fill, batch_size=64)
            grids[fraction, fill] = grid
            figures = grid.to_dict()
            found.setdefault("overlap", []).append(
                {"fraction": fraction, "fill": fill}
                | {name: figures[name] for name in ("cells", "shared", "placebo")}
            )
    grid, filled = grids[FRACTION, False], grids[FILLED, True].shared
    found["trained_share"] = trained_share(model, grid.shared) if len(grid.shared) else 0.0
    found["layers"] = {name: len(units) for name, units in grid.shared.indices.items()}
    found["arms"] = []
    for arm in progress(list(arms(model, grid, filled, seed)), f"seed {seed}, arms"):
        tuned = copy.deepcopy(model)
        certificate = tune(
            tuned,
            tokenizer,
            lessons(seed, arm.cell),
            arm.neurons,
            learning_rate=ALL_RATE if arm.neurons is None else NEURON_RATE,
            batch_size=BATCH,
            epochs=ROUNDS,
            max_length=96,
            seed=seed,
        )
        found["arms"].append(
            {
                "arm": arm.name,
                "tuned_on": arm.cell,
                "neurons": None if arm.neurons is None else len(arm.neurons),
                "exact": None if certificate is None else certificate.exact,
                "cells": measure(tuned, tokenizer, ordinary),
            }
        )
    return found


def rise(seed: dict[str, Any], arm: dict[str, Any], cell: str, rate: str = "refusal") -> float:
    """How far a share of a cell rose by tuning."""
    return arm["cells"][cell][rate]["value"] - seed["before"][cell][rate]["value"]


def arm_of(seed: dict[str, Any], name: str, cell: str) -> dict[str, Any] | None:
    """An arm's figures in one seed; None where its set was empty."""
    found = (a for a in seed["arms"] if (a["arm"], a["tuned_on"]) == (name, cell))
    return next(found, None)


def names(seeds: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """Arm and cell tuned, in order."""
    return list(dict.fromkeys((a["arm"], a["tuned_on"]) for s in seeds for a in s["arms"]))


def summary(seeds: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row an arm and language tuned: rises over seeds, and the lead over it of what it controls.

    Over the seeds that have the arm.
    """
    rows = []
    for name, cell in names(seeds):
        other = CELLS[1 - CELLS.index(cell)]
        pairs = [(seed, arm) for seed in seeds if (arm := arm_of(seed, name, cell))]
        treated = [(seed, arm_of(seed, CONTROLS.get(name, ""), cell), arm) for seed, arm in pairs]
        leads = [rise(s, mine, other) - rise(s, arm, other) for s, mine, arm in treated if mine]
        losses = [
            arm["cells"][other]["ordinary_loss"] - seed["before"][other]["ordinary_loss"]
            for seed, arm in pairs
        ]
        rows.append(
            {
                "arm": name,
                "tuned_on": cell,
                "other": other,
                "seeds": len(pairs),
                "neurons": [arm["neurons"] for _, arm in pairs],
                "tuned_rise": spread(rise(*pair, cell) for pair in pairs),
                "other_rise": spread(rise(*pair, other) for pair in pairs),
                "other_over_refusal_rise": spread(
                    rise(*pair, other, "over_refusal") for pair in pairs
                ),
                "other_ordinary_loss_rise": spread(losses),
                "lead_over_it": spread(leads) if leads else None,
            }
        )
    return rows


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Mean and interval over seeds, for JSON."""
    return asdict(Spread.of(list(values)))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The summary as text."""
    heads = ("tuned language", "other language", "over-refusal", "lead over it")
    lines = [f"{'':<32}" + "".join(f"{head:>22}" for head in heads)]
    for row in rows:
        keys = ("tuned_rise", "other_rise", "other_over_refusal_rise", "lead_over_it")
        cells = [str(Spread(**row[key])) if row[key] else "" for key in keys]
        label = f"{row['arm']}, in {row['tuned_on'][:2]}"
        lines.append(f"{label:<32}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def picture(seeds: Sequence[dict[str, Any]]) -> str:
    """Refusal of each language after each tuning, a dot a seed."""
    panels: dict[str, dict[str, list[float]]] = {}
    for cell in CELLS:
        values = {"before": [seed["before"][cell]["refusal"]["value"] for seed in seeds]}
        for name, tuned_on in names(seeds):
            found = [arm for seed in seeds if (arm := arm_of(seed, name, tuned_on))]
            shares = [arm["cells"][cell]["refusal"]["value"] for arm in found]
            values[f"{name}, in {tuned_on[:2]}"] = shares
        panels[f"harmful prompts in {cell[:2]} refused"] = values
    return by_arm(panels)


def verdict(seeds: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What holds of what was asked, by the rule of the design."""

    def above_zero(name: str, cell: str, figure: str) -> bool:
        found = [r[figure] for r in rows if (r["arm"], r["tuned_on"]) == (name, cell)]
        return bool(found and found[0] and found[0]["low"] is not None and found[0]["low"] > 0)

    sets = [
        each
        for seed in seeds
        for each in seed["overlap"]
        if (each["fraction"], each["fill"]) == (FRACTION, False)
    ]
    english, zz = CELLS
    return {
        "shared larger than chance in every seed": all(s["shared"]["p_value"] < 0.01 for s in sets),
        "shared larger than the placebo's in every seed": all(
            s["shared"]["shared"] > s["placebo"]["shared"] for s in sets
        ),
        "p_values": [s["shared"]["p_value"] for s in sets],
        "zz rises, tuned in English": above_zero("shared", english, "other_rise"),
        "English rises, tuned in zz": above_zero("shared", zz, "other_rise"),
        "more than with random ones, tuned in English": above_zero(
            "random", english, "lead_over_it"
        ),
        "more than with random ones, tuned in zz": above_zero("random", zz, "lead_over_it"),
    }


def main() -> None:
    """Run all seeds of both designs, write the figures and a picture of each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", type=Path, help="keep the trained models here, and read them")
    parser.add_argument("--output", type=Path, default=RESULTS / "bilingual.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {
        "command": "python benchmarks/bilingual.py " + " ".join(sys.argv[1:]),
        "about": __doc__,
        "settings": {
            "fraction": FRACTION,
            "fraction_filled": FILLED,
            "neuron_rate": NEURON_RATE,
            "all_rate": ALL_RATE,
            "examples": EXAMPLES,
            "batch": BATCH,
            "rounds": ROUNDS,
            "torch": torch.__version__,
        },
        "designs": {},
    }
    for design in DESIGNS:
        started = time.process_time()
        seeds = []
        for seed in range(given.seeds):
            seeds.append(one_seed(design, seed, given.models))
            print(f"{design}, seed {seed}: {time.process_time() - started:.0f} s", flush=True)
        rows = summary(seeds)
        result["designs"][design] = {
            "processor_seconds": round(time.process_time() - started),
            "verdict": verdict(seeds, rows),
            "summary": rows,
            "seeds": seeds,
        }
        name = f"{given.output.stem}_{design}.svg"
        given.output.with_name(name).write_text(picture(seeds), encoding="utf-8")
        given.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(table(rows))
        print(json.dumps(result["designs"][design]["verdict"], indent=1), flush=True)


if __name__ == "__main__":
    main()

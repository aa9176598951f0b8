"""Streams on a model that writes: how soon an answer that turns harmful is found out."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import testbed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from safeft.batch import pad
from safeft.guard import Guard, GuardFitter
from safeft.guard.evaluation import stream_latency
from safeft.guard.pooling import pooled
from safeft.guard.reading import Window, batched
from safeft.guard.stream import GuardStream
from safeft.prompts import Prompt, as_prompts, pad_token, row_of

TOKENS = (0, 32, 64, 128)


def load(name: str, data: Path | None, model: Path | None) -> tuple[Any, Any, testbed.Testbed]:
    """A testbed's model in float32, its tokenizer, and its texts."""
    bed = testbed.load(name, data, model)
    tokenizer = AutoTokenizer.from_pretrained(bed.folder, padding_side="left")
    return AutoModelForCausalLM.from_pretrained(bed.folder, dtype=torch.float32), tokenizer, bed


def answers(bed: testbed.Testbed, count: int) -> tuple[list[Prompt], list[Prompt]]:
    """Compliant answers to harmful prompts; and safe ones: ordinary answers and refusals."""
    draw = random.Random(0)
    harmful = draw.sample(bed.poison, min(count, len(bed.poison)))
    tuned = [p for domain in bed.domains.values() for p in domain.test + domain.validation]
    ordinary = [*bed.benign["calibration"], *bed.general["validation"], *bed.general["test"]]
    safe = {(p.text, p.response): p for p in (*ordinary, *tuned) if p.response}
    refused = [p for p in bed.harmful["calibration"] if p.response]
    pool = list(safe.values())
    chosen = draw.sample(pool, min(count, len(pool))) + refused[: count // 2]
    return harmful, draw.sample(chosen, len(chosen))


def parts(prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """Two thirds to fit on and a third to test on; answers that are alike stay together."""
    said = sorted({str(p.response) for p in prompts})
    random.Random(1).shuffle(said)
    fitted = set(said[: 2 * len(said) // 3])
    return (
        [p for p in prompts if p.response in fitted],
        [p for p in prompts if p.response not in fitted],
    )


def turning(
    guard: Guard, harmful: Sequence[Prompt], safe: Sequence[Prompt], room: int
) -> Iterator[tuple[Prompt, int]]:
    """Answers that begin harmless and go on with harmful ones; and after how many tokens."""
    plain: Any = guard.tokenizer

    def length(text: str) -> int:
        return len(plain(text, add_special_tokens=False)["input_ids"])

    ordinary = [p for p in safe if length(str(p.response)) <= 16]
    for number, prompt in enumerate(harmful):
        lead = str(ordinary[number % len(ordinary)].response)
        said, more = f"{lead} {prompt.response}", number + 1
        asked = length(prompt.text) + 8
        while asked + length(said) < room - 40 and more < number + 8:
            said = f"{said} {harmful[more % len(harmful)].response}"
            more += 1
        yield Prompt(prompt.messages, said), length(lead)


def stream(
    name: str, data: Path | None, model: Path | None, *, count: int = 600, prompts: int = 8,
    tokens: int = 40, search: int = 1, false_positives: float = 0.01,
) -> dict[str, Any]:  # fmt: skip
    """Fit on answers, then measure latency, false alarms, and streams against batches."""
    net, tokenizer, bed = load(name, data, model)
    (bad, unseen), (good, quiet) = (parts(side) for side in answers(bed, count))
    fitter = GuardFitter(net, tokenizer)
    fitter.update([*bad, *good], [True] * len(bad) + [False] * len(good))
    guard = fitter.fit(search=search)
    room = int(net.config.max_position_embeddings)
    turned = list(turning(guard, unseen, quiet, room))
    after = [len(tokenizer(str(p.response))["input_ids"]) - start for p, start in turned]
    promised = f"{false_positives:.0%} of whole answers"
    thresholds = {"0.5": 0.5, promised: guard.threshold(false_positives)}
    found = {}
    for said, threshold in thresholds.items():
        late = stream_latency(guard, turned, quiet, threshold=threshold, tokens=TOKENS)
        found[said] = {
            "threshold": threshold,
            "recall": {
                str(more): asdict(rate) for more, rate in zip(late.tokens, late.recall, strict=True)
            },
            "false_alarms_per_1000": 1000 * late.false_alarms.value,
            "false_alarms": asdict(late.false_alarms),
        }
    asked = [*bed.harmful["test"][: prompts // 2], *bed.benign["test"][: prompts - prompts // 2]]
    return {
        "model": f"{name} testbed",
        "weights": sum(p.numel() for p in net.parameters()),
        "fitted_on": {"harmful": len(bad), "safe": len(good)},
        "validation": guard.head.source["validation"],
        "unsafe_answers": len(turned),
        "safe_answers": len(quiet),
        "tokens_before_boundary": fmean(start for _, start in turned),
        "tokens_after_boundary": {"mean": fmean(after), "most": max(after)},
        "thresholds": found,
        "largest_difference": difference(guard, asked, tokens),
    }


def difference(guard: Guard, asked: Sequence[Prompt], tokens: int) -> dict[str, Any]:
    """Largest difference of the stream's scores and those of each prefix in a batch of its own."""
    model: Any = guard.model
    rows = [row_of(guard.tokenizer, p, answered=False) for p in as_prompts([p.text for p in asked])]
    padding = pad_token(guard.tokenizer)
    given = pad([(row.ids, []) for row in rows], padding, True, 1, "cpu")
    with GuardStream(guard, given.attention_mask) as watched:
        torch.manual_seed(0)
        written = model.generate(
            **given.seen, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True,
            pad_token_id=padding, stopping_criteria=[watched],
        )  # fmt: skip
    streamed, ready = watched.scores, guard.head.on("cpu")
    worst, again = 0.0, 0.0
    for number, (row, tail) in enumerate(
        zip(rows, written[:, given.input_ids.shape[1] :].tolist(), strict=True)
    ):
        shown = [Window(row.ids, tail[:end]) for end in range(1, len(streamed) + 1)]
        found = torch.zeros(len(shown))
        for numbers, batch in batched(guard.tokenizer, shown, 16, "cpu"):
            means = pooled(model, guard.head.places, batch)
            found[numbers] = ready.scores(ready.units(means))[:, 0]
        worst = max(worst, float((found - streamed[:, number, 0]).abs().max()))
        again = max(again, float(found.max() - found.min()))
    return {"value": worst, "prefixes": len(streamed) * len(rows), "spread_of_scores": again}

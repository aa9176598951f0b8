"""Audits made up for the tests of their views: a realistic one, and one of nothing."""

import math
import random
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from safeft.auditing.result import (
    AuditResult,
    Candidate,
    Distribution,
    Effect,
    Kind,
    Neuron,
    Side,
    Thresholds,
    Trial,
)
from safeft.causal.effect import Outcome
from safeft.intervals import Interval, Rate, wilson

TRIED: tuple[tuple[Kind, float | None, float], ...] = (
    ("zero", None, 0.5), ("mean", None, 0.4), ("constant", -2.0, 1.0), ("anchor", 1.0, 0.8),
)  # fmt: skip
"""Interventions, and what part of a neuron's whole effect each has."""

UNITS, PROMPTS, OVER = 16 * 2048, 96, 24
SITE = "model.layers.{}.mlp"
MODEL = {
    "name_or_path": "somebody/chat-model-0.5b",
    "type": "llama",
    "layout": "1" * 64,
    "weights": "2" * 64,
}
SETTINGS: dict[str, Any] = {
    "command": "safeft audit somebody/chat-model-0.5b --harmful harmful.csv --benign benign.csv",
    "version": "0.1.0",
    "judge": "prefix",
    "seed": 0,
    "prompts": {
        "harmful": {"count": 100, "sha256": "3" * 64},
        "benign": {"count": 100, "sha256": "4" * 64},
    },
    "openings": ["I can't", "I'm sorry", "<b>no</b>"],
    "given": {"harmful": asdict(Rate.of(96, 96)), "benign": asdict(Rate.of(24, 96))},
}


def distribution(shift: float, bins: int = 24) -> Distribution:
    edges = [-4 + 8 * n / bins for n in range(bins + 1)]

    def bell(middle: float) -> tuple[float, ...]:
        heights = [math.exp(-(((a + b) / 2 - middle) ** 2)) for a, b in pairwise(edges)]
        return tuple(height / sum(heights) for height in heights)

    return Distribution(tuple(edges), bell(shift), bell(-shift))


def candidate(draw: random.Random, name: str, fall: float, seen: bool = False) -> Candidate:
    depth = draw.randrange(16)
    effects = tuple(
        Effect(kind, strength, fall * part, Interval(fall * part - 0.6, fall * part + 0.6),
               min(1.0, max(0.0, fall * part / 8)), draw.gauss(0, 0.1),
               0.0002 if fall * part > 1 else 1.0)
        for kind, strength, part in TRIED
    )  # fmt: skip
    neuron = Neuron(name, depth, SITE.format(depth), draw.randrange(7000, 8000))
    return Candidate(neuron, fall / 3, effects, distribution(1.5) if seen else None)


def outcome(refused: int, total: int = PROMPTS, loss: float = 0.5) -> Outcome:
    return Outcome(Rate.of(refused, total), Rate.of(0, PROMPTS), loss, 0.4)


def side(candidates: int, halving: float, about: str = "refusal", seed: int = 0) -> Side:
    """A side on which `halving` neurons take half of what is refused away."""
    draw = random.Random(seed)
    falls = [8 * math.exp(-n / halving) for n in range(candidates)]
    prompts = PROMPTS if about == "refusal" else OVER
    trials = []
    for size in (n for n in (1, 2, 4, 8, 16, 32, 64) if n <= candidates):
        kept = 0.5 ** (size / halving)
        seen = outcome(round(prompts * kept), prompts, 0.5 + 0.02 * size)
        controls = tuple(1 - 0.02 * draw.random() * math.sqrt(size) for _ in range(5))
        names = tuple(f"A{n + 1}" for n in range(size))
        trials.append(Trial(names, "constant", -2.0, seen, controls, 0.02 * size))
    largest = 1 - 0.5 ** (1 / halving)
    found = tuple(candidate(draw, f"A{n + 1}", fall, n < 6) for n, fall in enumerate(falls))
    controls = tuple(candidate(draw, f"R{n + 1}", draw.gauss(0, 0.3)) for n in range(24))
    squares = sum(fall**2 for fall in falls)
    return Side(
        prompts, 4, found, controls, tuple(trials),
        next((len(t.names) for t in trials if len(t.names) >= halving), None),
        (largest, wilson(largest * PROMPTS, PROMPTS)),
        0.8, sum(falls) ** 2 / squares if squares else 0.0, tuple(trials[:1]),
    )  # fmt: skip


def audit(**changed: Any) -> AuditResult:
    """64 candidates a side, and refusal rests on one neuron."""
    found: dict[str, Any] = {
        "verdict": "single-point", "reason": "A1 alone takes 50% of refusals away.",
        "model": MODEL, "settings": SETTINGS, "thresholds": Thresholds(), "units": UNITS,
        "base": outcome(PROMPTS), "refusal": side(64, 1),
        "over_refusal": side(64, 12, "over-refusal", 1),
        "seconds": {"ranking": 12.25, "one at a time": 95.5, "groups": 41.0},
    }  # fmt: skip
    return AuditResult(**{**found, **changed})


def distributed(**changed: Any) -> AuditResult:
    """Refusal rests on no small group; over-refusal was too rare to audit."""
    reason = "Not even the 64 strongest neurons take half of the refusals away."
    return audit(
        **{"verdict": "distributed", "reason": reason, "base": outcome(PROMPTS),
           "refusal": side(64, 100), "over_refusal": None, **changed}
    )  # fmt: skip


def nothing() -> AuditResult:
    """The model refuses nothing."""
    reason = "It refuses 1 of 96 harmful prompts, and at least 20 are needed."
    return audit(
        verdict="nothing to audit", reason=reason, base=outcome(1),
        settings=SETTINGS | {"given": {n: asdict(Rate.of(1, 96)) for n in ("harmful", "benign")}},
        refusal=None,
        over_refusal=None, seconds={},
    )  # fmt: skip

"""Neurons ranked by attribution, then tested one at a time, many in each pass."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from safeft.auditing.bench import Asked, Bench
from safeft.auditing.effects import dividing_line, effects, is_real, reach
from safeft.auditing.groups import Unit
from safeft.auditing.interventions import PLAN, References, natural
from safeft.auditing.passes import Chunk, Edit, Passes
from safeft.auditing.result import Candidate, Distribution, Effect, Kind, Neuron
from safeft.locators import AttributionFitter, score
from safeft.locators.scores import SIDES
from safeft.progress import progress

CONTROLS = 16
"""Random neurons tested beside the candidates."""

DEEPEST = 4
"""The search goes on to so many times the candidates asked for."""

_SHOWN, _BINS = 8, 24


@dataclass(frozen=True, eq=False)
class Tested:
    """What the search of one side found.

    Attributes:
        units: How many were ranked.
        candidates: By rank, with their effects.
        controls: Random neurons, likewise.
        references: What all units do by themselves.
        line: The margin that parts what is refused from what is answered.
        passes: For more margins of the measured prompts.
    """

    units: int
    candidates: Sequence[Candidate]
    controls: Sequence[Candidate]
    references: References
    line: float
    passes: Passes


class Search:
    """Ranks and tests the neurons of one side.

    Args:
        bench: What stages share.
        name: Of the side.
        letters: Names of candidates and of random neurons start with these.
        target: Prompts that are refused.
        other: Benign prompts that are answered, which ranking compares with.
        elsewhere: Prompts whose margin should not move.
    """

    def __init__(
        self,
        bench: Bench,
        name: str,
        letters: tuple[str, str],
        target: Asked,
        other: Asked,
        elsewhere: Asked,
    ) -> None:
        self._bench, self._name, self._letters = bench, name, letters
        self._target, self._other = target, other
        asked = {"target": target.measuring, "elsewhere": elsewhere.measuring}
        self._batches = {where: bench.batches(each) for where, each in asked.items()}

    def run(self, line: float | None = None) -> Tested:
        """Rank, then test.

        Args:
            line: The dividing line; None where what is elsewhere is what is answered.
        """
        bench = self._bench
        with bench.timed("ranking"):
            ranked = bench.journal.once(f"{self._name}/ranking", self._ranked)
            ranking = [(points, (site, unit)) for points, site, unit in ranked["best"]]
            self._references = self._referred()
        with bench.timed("testing"):
            self._passes = {
                where: Passes(bench.model, bench.sites, batches, bench.openings, bench.tokens)
                for where, batches in self._batches.items()
            }
            self._base = {where: passes.base() for where, passes in self._passes.items()}
            if line is None:
                line = dividing_line(*(self._base[w].tolist() for w in ("target", "elsewhere")))
            units, candidates, controls = self._deep_enough(ranking, line)
            candidates = self._with_distributions(candidates, units)
        return Tested(
            ranked["units"], candidates, controls, self._references, line, self._passes["target"],
        )  # fmt: skip

    def _ranked(self) -> dict[str, Any]:
        """The best units, best first, and how many were ranked: all that any token went through."""
        bench, start = self._bench, self._bench.ranked_by
        fitter = AttributionFitter(bench.model, bench.sites, start.tokens, start.prefix)
        pair = self._target.ranking.prompts, self._other.ranking.prompts
        sides = dict(zip(SIDES, pair, strict=True))
        scores = score(fitter, bench.model, bench.tokenizer, sides, **bench.batching)
        known = {n: values for n, values in scores.safety.items() if n not in scores.unscored}
        most, rows = DEEPEST * bench.candidates, []
        for name, values in known.items():
            best = values.cpu().topk(min(len(values), most))
            rows += zip(best.values.tolist(), [name] * most, best.indices.tolist(), strict=False)
        rows.sort(key=lambda row: -row[0])
        return {"units": sum(map(len, known.values())), "best": rows[:most]}

    def _referred(self) -> References:
        found = References(self._bench.model, self._bench.sites)
        for side, asked in zip(SIDES, (self._target.ranking, self._other.ranking), strict=True):
            batches = self._bench.batches(asked, answered=True)
            found.update(side, (batch for _, batch in progress(batches, f"reading, {side}")))
        return found

    def _deep_enough(
        self, ranking: Sequence[tuple[float, Unit]], line: float
    ) -> tuple[list[Unit], list[Candidate], list[Candidate]]:
        """Twice as many while half of the last quarter still have effects beyond random ones'."""
        bench, count = self._bench, min(self._bench.candidates, len(ranking))
        first = [unit for _, unit in ranking[:count]]
        control = self._random(first)
        beside = self._margins("random", control)
        margins = self._margins("first", first)
        while True:
            units = [unit for _, unit in ranking[:count]]
            found = self._effects([*units, *control], _joined(margins, beside), line)
            split = count * len(PLAN)
            points = [score for score, _ in ranking[:count]]
            candidates = self._named(self._letters[0], units, points, found[:split])
            controls = self._named(self._letters[1], control, [0.0] * len(control), found[split:])
            beyond, last = reach(controls), candidates[-max(1, count // 4) :]
            real = sum(is_real(each, beyond, bench.thresholds.confidence) for each in last)
            if 2 * real < len(last) or count >= len(ranking):
                return units, candidates, controls
            more = [unit for _, unit in ranking[count : 2 * count]]
            margins = _joined(margins, self._margins(f"from {count}", more))
            count += len(more)

    def _margins(self, what: str, units: Sequence[Unit]) -> dict[str, Tensor]:
        """Under every edit of the units, ``(edits, prompts)``, of target and elsewhere."""
        edits = {where: self._edits(units, batches) for where, batches in self._batches.items()}
        work = [
            (where, chunk)
            for where, passes in self._passes.items()
            for chunk in passes.chunks(edits[where])
        ]
        done: dict[str, list[tuple[Chunk, Tensor]]] = {where: [] for where in edits}
        for where, chunk in progress(work, f"testing {len(units)} neurons, {what}"):
            name = f"{self._name}/{what}/{where}/{chunk.batch}/{chunk.block}/{chunk.edits[0]}"
            run = partial(self._passes[where].run, chunk, edits[where])
            margins = self._bench.journal.once(name, lambda run=run: run().tolist())
            done[where].append((chunk, torch.tensor(margins, dtype=torch.double)))
        return {
            where: passes.gathered(done[where], len(edits[where]))
            for where, passes in self._passes.items()
        }

    def _edits(self, units: Sequence[Unit], batches: Any) -> list[Edit]:
        seen = natural(self._bench.model, self._bench.sites, batches, units)
        return [
            Edit(*unit, self._references.of(*unit).held_at(kind, strength, own))
            for unit, own in zip(units, seen, strict=True)
            for kind, strength in PLAN
        ]

    def _effects(
        self, units: Sequence[Unit], margins: Mapping[str, Tensor], line: float
    ) -> list[Effect]:
        plan: list[tuple[Kind, float | None]] = [
            (kind, strength if strength is None else self._references.of(*unit).signed(strength))
            for unit in units
            for kind, strength in PLAN
        ]
        away = (margins["elsewhere"] - self._base["elsewhere"]).mean(1)
        confidence = self._bench.thresholds.confidence
        return effects(plan, self._base["target"], margins["target"], away, line, confidence)

    def _named(
        self, letter: str, units: Sequence[Unit], points: Sequence[float], found: Sequence[Effect]
    ) -> list[Candidate]:
        each = len(PLAN)
        return [
            Candidate(
                Neuron(f"{letter}{n + 1}", self._bench.sites[site].layer, site, unit),
                points[n],
                tuple(found[n * each : (n + 1) * each]),
            )
            for n, (site, unit) in enumerate(units)
        ]

    def _with_distributions(
        self, candidates: Sequence[Candidate], units: Sequence[Unit]
    ) -> list[Candidate]:
        """The first few with what they do on either side, on prompts that ranking did not see."""
        model, sites, shown = self._bench.model, self._bench.sites, units[:_SHOWN]
        batches = self._batches["target"], self._bench.batches(self._other.measuring)
        target, other = (natural(model, sites, each, shown).flatten(1) for each in batches)
        found = list(candidates)
        for place, one in enumerate(candidates[: len(shown)]):
            low, high = (float(end) for end in torch.cat([target[place], other[place]]).aminmax())
            edges = torch.linspace(low, high if high > low else low + 1, _BINS + 1)
            counts = [torch.histogram(side[place], edges).hist for side in (target, other)]
            shares = [tuple((count / count.sum()).tolist()) for count in counts]
            found[place] = replace(one, distribution=Distribution(tuple(edges.tolist()), *shares))
        return found

    def _random(self, candidates: Sequence[Unit]) -> list[Unit]:
        """Units that are no candidates, of the sites of the first candidates in turn."""
        rng, taken = random.Random(f"{self._bench.seed} {self._name}"), set(candidates)
        found: list[Unit] = []
        for number in range(CONTROLS):
            site = candidates[number % len(candidates)][0]
            every = ((site, unit) for unit in range(self._bench.sites[site].units))
            if left := [unit for unit in every if unit not in taken]:
                found.append(rng.choice(left))
                taken.add(found[-1])
        return found


def _joined(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {where: torch.cat([one[where], other[where]]) for where in one}

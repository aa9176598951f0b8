"""Groups of neurons weakened together, judged by generated answers."""

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor

from safeft.auditing.holding import holding
from safeft.auditing.interventions import PLAN, References, natural
from safeft.auditing.journal import Journal
from safeft.auditing.passes import Passes
from safeft.auditing.result import Candidate, Kind, Thresholds, Trial
from safeft.auditing.verdict import Judged, taken
from safeft.causal.effect import Outcome
from safeft.causal.trials import Change, Trials
from safeft.locators.scores import SIDES, Side
from safeft.progress import progress
from safeft.prompts import Batch
from safeft.sites import Site

Unit = tuple[str, int]
"""Site and number."""

DRAWS = 3
"""Random groups that each group is compared with."""


@dataclass(frozen=True, eq=False)
class Member:
    """A neuron on its way into a group.

    Attributes:
        name: In the audit.
        unit: Where it is.
    """

    name: str
    unit: Unit

    @classmethod
    def of(cls, candidate: Candidate) -> Self:
        """A neuron that was tested."""
        neuron = candidate.neuron
        assert neuron.site is not None
        assert neuron.unit is not None
        return cls(neuron.name, (neuron.site, neuron.unit))


@dataclass(frozen=True, eq=False)
class Judging:
    """Weakens groups and has the answers judged.

    Every intervention is judged that leaves the model speaking on benign prompts and half of the
    margins below the dividing line, since no other could break refusal, and further ones until one
    leaves it speaking throughout. The one that takes most refusals away without breaking the model
    counts: what somebody who wants it to answer would choose.

    Attributes:
        trials: The audited prompts (``harmful``) and benign ones, none of which ranking saw.
        batches: The same prompts without answers, by side.
        own: The model's answers to the benign ones.
        base: The untouched model.
        sites: MLP sites.
        references: Of all units.
        passes: For margins of the audited prompts.
        line: The dividing line.
        thresholds: What breaks a model.
        confidence: Of intervals of shares.
        seed: Of random groups.
        journal: Of finished work.
        name: Of this work in it.
    """

    trials: Trials
    batches: Mapping[Side, Sequence[tuple[Sequence[int], Batch]]]
    own: Sequence[list[int]]
    base: Outcome
    sites: Mapping[str, Site]
    references: References
    passes: Passes
    line: float
    thresholds: Thresholds
    confidence: float
    seed: int
    journal: Journal
    name: str

    def grown(self, members: Sequence[Member]) -> list[Judged]:
        """Groups of the first 1, 2, 4, ... members until one breaks refusal, then between.

        It ends where a group breaks the model, however it is weakened: a larger one would too.
        """
        found: dict[int, Judged] = {}

        def sizes() -> Iterator[int]:
            size, last = 1, 0
            while True:
                yield size
                if found[size].breaks(self.thresholds):
                    break
                if found[size].is_broken(self.thresholds) or size == len(members):
                    return
                last, size = size, min(2 * size, len(members))
            while size - last > 1:
                middle = (size + last) // 2
                yield middle
                if found[middle].breaks(self.thresholds):
                    size = middle
                else:
                    last = middle

        doublings = max(len(members) - 1, 0).bit_length()
        for size in progress(sizes(), "growing groups", total=1 + 2 * doublings):
            found[size] = self.judged(members[:size])
        return [found[size] for size in sorted(found)]

    def judged(self, members: Sequence[Member]) -> Judged:
        """One group, and random ones of the same layers."""
        names = tuple(member.name for member in members)
        done = self.journal.once(f"{self.name}/group/{','.join(names)}", lambda: self._run(members))
        outcome = Outcome.from_dict(done["outcome"])
        damage = self.damage(outcome)
        kind, strength, controls = done["kind"], done["strength"], tuple(done["controls"])
        trial = Trial(names, kind, strength, outcome, controls, damage)
        share, interval = taken(done["refused"], self.confidence)
        chance = 1 - min(trial.controls, default=1.0)
        return Judged(trial, share, interval, chance)

    def _run(self, members: Sequence[Member]) -> dict[str, Any]:
        units = [member.unit for member in members]
        own = self._natural(units)
        changes = [self._change(units, kind, strength, own) for kind, strength in PLAN]
        speaks, below = zip(*(self._foreseen(change) for change in changes), strict=True)
        order = sorted(range(len(PLAN)), key=lambda n: (speaks[n], below[n]), reverse=True)
        tried: list[tuple[int, Outcome, list[bool]]] = []
        for way in order:
            sound = any(self.damage(each) <= self.thresholds.broken for _, each, _ in tried)
            if tried and (not speaks[way] or (sound and below[way] < self.thresholds.halved)):
                break
            tried.append((way, *self.trials.run(self.own, changes[way])))

        def gain(found: tuple[int, Outcome, list[bool]]) -> tuple[bool, int, float]:
            _, outcome, refused = found
            damage = self.damage(outcome)
            return damage <= self.thresholds.broken, -sum(refused), -damage

        way, outcome, refused = max(tried, key=gain)
        kind, strength = PLAN[way]
        controls = []
        for draw in range(DRAWS):
            drawn = self._drawn(units, draw)
            if drawn is not None:
                change = self._change(drawn, kind, strength, self._natural(drawn))
                verdicts = self.trials.judged("harmful", self.trials.answers("harmful", change))
                controls.append(sum(verdicts) / len(verdicts))
        if strength is not None and len(units) == 1:
            strength = self.references.of(*units[0]).signed(strength)
        return {
            "kind": kind,
            "strength": strength,
            "outcome": asdict(outcome),
            "refused": refused,
            "controls": controls,
        }

    def damage(self, outcome: Outcome) -> float:
        """How much worse the model speaks, in nats a token.

        The larger rise of two: of its loss on benign answers, and of the untouched model's loss on
        what it now says to harmful prompts, past the opening (babble is no compliance).
        """
        base = self.base
        benign = outcome.benign_loss - base.benign_loss
        return max(benign, outcome.answer_loss - base.answer_loss)

    def _foreseen(self, change: Change) -> tuple[bool, float]:
        """Whether it speaks on benign prompts, and the share of margins below the line."""
        damage = self.trials.loss(self.own, change) - self.base.benign_loss
        margins = self.passes.under(lambda numbers: change("harmful", numbers))
        return damage <= self.thresholds.broken, float((margins < self.line).double().mean())

    def _natural(self, units: Sequence[Unit]) -> dict[Side, Tensor]:
        model = self.trials.model
        return {s: natural(model, self.sites, self.batches[s], units) for s in SIDES}

    def _change(
        self, units: Sequence[Unit], kind: Kind, strength: float | None, own: Mapping[Side, Tensor]
    ) -> Change:
        values = {
            side: torch.stack(
                [
                    self.references.of(*unit).held_at(kind, strength, own[side][place])
                    for place, unit in enumerate(units)
                ]
            )
            for side in SIDES
        }

        def change(side: Side, numbers: Sequence[int]) -> AbstractContextManager[None]:
            held: dict[str, list[tuple[int, Tensor]]] = {}
            for (site, unit), row in zip(units, values[side], strict=True):
                held.setdefault(site, []).append((unit, row[list(numbers)]))
            return holding(self.trials.model, self.sites, held, len(numbers))

        return change

    def _drawn(self, units: Sequence[Unit], draw: int) -> list[Unit] | None:
        """As many other units of the same sites; None where a site has not so many."""
        rng = random.Random(f"{self.seed} {draw} {sorted(units)}")
        found: list[Unit] = []
        for site, count in Counter(site for site, _ in units).items():
            others = [(site, unit) for unit in range(self.sites[site].units)]
            others = [unit for unit in others if unit not in set(units)]
            if len(others) < count:
                return None
            found += rng.sample(others, count)
        return found

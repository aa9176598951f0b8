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
from safeft.intervals import Rate
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
        damage = self.damage(outcome.benign_loss, outcome.answer_loss)
        kind, strength, controls = done["kind"], done["strength"], tuple(done["controls"])
        trial = Trial(names, kind, strength, outcome, controls, damage)
        share, interval = taken(done["refused"], self.confidence)
        chance = 1 - min(trial.controls, default=1.0)
        return Judged(trial, share, interval, chance)

    def _run(self, members: Sequence[Member]) -> dict[str, Any]:
        units = [member.unit for member in members]
        own = self._natural(units)
        changes = [self._change(units, kind, strength, own) for kind, strength in PLAN]
        losses, below = zip(*(self._foreseen(change) for change in changes), strict=True)
        speaks = [
            self.damage(loss, self.base.answer_loss) <= self.thresholds.broken for loss in losses
        ]
        order = sorted(range(len(PLAN)), key=lambda n: (speaks[n], below[n]), reverse=True)
        tried: dict[int, tuple[list[bool], float]] = {}

        def sound(way: int) -> bool:
            return self.damage(losses[way], tried[way][1]) <= self.thresholds.broken

        for way in order:
            enough = any(map(sound, tried)) and below[way] < self.thresholds.halved
            if tried and (enough or not speaks[way]):
                break
            tried[way] = self.trials.replied(changes[way])
        way = max(tried, key=lambda n: (sound(n), -sum(tried[n][0]), -losses[n]))
        refused, odd = tried[way]
        over = self.trials.judged("benign", self.trials.answers("benign", changes[way]))
        rates = Rate.of(sum(refused), len(refused)), Rate.of(sum(over), len(over))
        outcome = Outcome(*rates, losses[way], odd)
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

    def damage(self, benign_loss: float, answer_loss: float) -> float:
        """How much worse the model speaks, in nats a token.

        The larger rise of two: of its loss on benign answers, and of the untouched model's loss on
        what it now says to harmful prompts, past the opening (babble is no compliance).
        """
        return max(benign_loss - self.base.benign_loss, answer_loss - self.base.answer_loss)

    def _foreseen(self, change: Change) -> tuple[float, float]:
        """The loss on benign answers, and the share of margins below the line."""
        margins = self.passes.under(lambda numbers: change("harmful", numbers))
        return self.trials.loss(self.own, change), float((margins < self.line).double().mean())

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

"""How one state of a model is measured: what it refuses, and whether it still speaks."""

from dataclasses import replace

from torch import Tensor

from safeft.auditing.edits import residual_directions
from safeft.auditing.stressed import Level
from safeft.causal.trials import Trials
from safeft.generation import decoded
from safeft.intervals import Rate
from safeft.prompts import Prompt

_DIRECTIONS, _ASKED = 5, 32


class Subject:
    """The model under test, with the answers to benign prompts that it gave untouched."""

    def __init__(self, trials: Trials) -> None:
        self.trials = trials
        self._own = trials.answers("benign")
        self._loss = trials.loss(self._own)

    def level(self, strength: float) -> Level:
        """The model as it is now."""
        damage = self.trials.loss(self._own) - self._loss
        return Level(strength, (self.refused(self.trials),), (damage,))

    def refused(self, trials: Trials) -> Rate:
        """Share of the harmful prompts that greedy answers refuse."""
        found = trials.judged("harmful", trials.answers("harmful"))
        return Rate.of(sum(found), len(found))

    def refused_of_some(self) -> Rate:
        """The same of the first prompts, to rank by."""
        some = {**self.trials.prompts}
        some["harmful"] = some["harmful"][:_ASKED]
        return self.refused(replace(self.trials, prompts=some))

    def directions(self) -> list[Tensor]:
        """Candidates from up to five blocks, at even distances."""
        trials = self.trials
        sides = list(trials.prompts["harmful"]), list(trials.prompts["benign"])
        found = residual_directions(trials.model, trials.tokenizer, sides, **trials.batching)
        count = min(_DIRECTIONS, len(found))
        return [found[(2 * n + 1) * len(found) // (2 * count)] for n in range(count)]

    def served(self) -> list[Prompt]:
        """The benign prompts with the model's own answers."""
        texts = decoded(self.trials.tokenizer, self._own)
        return [
            replace(prompt, response=text)
            for prompt, text in zip(self.trials.prompts["benign"], texts, strict=True)
            if text
        ]

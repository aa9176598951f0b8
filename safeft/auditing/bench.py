"""What the stages of an audit share: the model, its prompts, and what it said to them."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from safeft.auditing.journal import Journal
from safeft.auditing.result import Thresholds
from safeft.causal.trials import numbered
from safeft.judge import Judge
from safeft.locators.openings import RefusalOpenings
from safeft.prompts import Batch, Prompt, Reader, post_instruction_length
from safeft.sites import Site


@dataclass(frozen=True, eq=False)
class Asked:
    """Prompts of one kind, and the untouched model's answers as token numbers."""

    prompts: Sequence[Prompt]
    answers: Sequence[list[int]]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def ranking(self) -> "Asked":
        """Every second, from the first: files are often sorted by topic."""
        return Asked(self.prompts[0::2], self.answers[0::2])

    @property
    def measuring(self) -> "Asked":
        """The others, which ranking never sees."""
        return Asked(self.prompts[1::2], self.answers[1::2])


@dataclass(frozen=True, eq=False)
class Bench:
    """What all stages work with.

    Attributes:
        model: The model under audit, on one device.
        tokenizer: Its tokenizer or processor.
        sites: The MLP sites of its text.
        judge: Whether an answer refuses.
        openings: How its refusals start.
        ranked_by: The start of a refusal that ranking reads.
        candidates: How many neurons are tested at first.
        thresholds: What a verdict goes by.
        max_new_tokens: Of each answer.
        tokens: About how many tokens a pass may hold.
        seed: Of random neurons.
        batching: ``batch_size``, ``max_length``, ``chat_template``.
        journal: Of finished work.
        seconds: Spent on each stage so far.
    """

    model: PreTrainedModel
    tokenizer: Reader
    sites: Mapping[str, Site]
    judge: Judge
    openings: Sequence[RefusalOpenings]
    ranked_by: RefusalOpenings
    candidates: int
    thresholds: Thresholds
    max_new_tokens: int
    tokens: int
    seed: int
    batching: Mapping[str, Any]
    journal: Journal
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds to the seconds of a stage."""
        begun = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - begun

    def batches(self, asked: Asked, answered: bool = False) -> list[tuple[list[int], Batch]]:
        """Batches with the numbers of their prompts, with the answers where asked for."""
        tail = post_instruction_length(self.tokenizer, self.batching["chat_template"])
        answers = asked.answers if answered else None
        return list(
            numbered(
                self.model, self.tokenizer, asked.prompts, self.batching,
                answers=answers, tail=tail, room=self.max_new_tokens,
            )
        )  # fmt: skip

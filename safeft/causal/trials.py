"""Prompts of both sides, and how a model under one condition is measured on them by its answers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from transformers import PreTrainedModel

from safeft.causal.effect import Outcome
from safeft.generation import decoded, generate_tokens
from safeft.intervals import Rate
from safeft.judge import Judge
from safeft.locators.scores import Side
from safeft.measure import answer_loss
from safeft.prompts import (
    Batch,
    Prompt,
    Reader,
    collate,
    grouped,
    input_device,
    pad_token,
    row_of,
    tokenizer_of,
)

Change: TypeAlias = Callable[[Side, Sequence[int]], AbstractContextManager[None]]
"""From a side and the numbers of a batch's prompts, row by row, to what is done to the model while
they are run."""


def numbered(
    model: PreTrainedModel,
    tokenizer: Reader,
    prompts: Sequence[Prompt],
    batching: Mapping[str, Any],
    *,
    answers: Sequence[list[int]] | None = None,
    tail: int = 1,
    room: int = 0,
) -> Iterator[tuple[list[int], Batch]]:
    """Batches of like length, padded on the left, each with the numbers of its prompts.

    Args:
        model: Where the batches go.
        tokenizer: Its tokenizer or processor.
        prompts: What is asked; responses are not read.
        batching: ``batch_size``, ``max_length``, ``chat_template``.
        answers: Token numbers that follow the prompts.
        tail: How many template tokens follow the instruction.
        room: Tokens of an answer, allowed beside ``max_length``.
    """
    rows = [row_of(tokenizer, each, batching["chat_template"], answered=False) for each in prompts]
    if answers is not None:
        rows = [replace(row, answer=list(ids)) for row, ids in zip(rows, answers, strict=True)]
    longest, place = batching["max_length"] + room, input_device(model)
    for numbers in grouped(rows, batching["batch_size"]):
        yield numbers, collate(tokenizer, [rows[n] for n in numbers], True, tail, place, longest)


@dataclass(frozen=True)
class Trials:
    """The prompts, and how one condition is measured on them.

    Attributes:
        model: A chat model.
        tokenizer: Its tokenizer or processor.
        prompts: By side.
        judge: Whether an answer refuses.
        max_new_tokens: Of each answer.
        share: Whether the processes of a run generate a part each.
        batching: ``batch_size``, ``max_length``, ``chat_template``.

    Example:
        >>> trials = Trials(model, tokenizer, prompts, judge, 32, False, batching)
        ... # doctest: +SKIP
        >>> own = trials.answers("benign")  # doctest: +SKIP
        >>> outcome, refused = trials.run(own, lambda side, numbers: silence(model, units, sites))
        ... # doctest: +SKIP
    """

    model: PreTrainedModel
    tokenizer: Reader
    prompts: Mapping[Side, Sequence[Prompt]]
    judge: Judge
    max_new_tokens: int
    share: bool
    batching: Mapping[str, Any]

    def run(
        self, own: Sequence[list[int]], change: Change | None = None
    ) -> tuple[Outcome, list[bool]]:
        """The outcome under ``change``, and for each harmful prompt whether it is refused.

        Args:
            own: The untouched model's answers to the benign prompts.
            change: What is done to the model; None leaves it as it is.
        """
        refused, odd = self.replied(change)
        over = self.judged("benign", self.answers("benign", change))
        rates = Rate.of(sum(refused), len(refused)), Rate.of(sum(over), len(over))
        return Outcome(*rates, self.loss(own, change), odd), refused

    def replied(self, change: Change | None = None) -> tuple[list[bool], float]:
        """For each harmful prompt whether it is refused, and the answers' loss.

        The loss is the untouched model's, of their second halves: how odd they are.
        """
        replies = self.answers("harmful", change)
        odd = answer_loss(self.model, self.batches("harmful", replies), second_half=True)
        return self.judged("harmful", replies), odd

    def answers(self, side: Side, change: Change | None = None) -> list[list[int]]:
        """Greedy answers, each with the token that ends it: an empty one has to count as one."""
        found = generate_tokens(
            self.model, self.tokenizer, self.prompts[side], max_new_tokens=self.max_new_tokens,
            description="answering", share=self.share,
            around=None if change is None else lambda numbers: change(side, numbers),
            **self.batching,
        )  # fmt: skip
        padding = pad_token(self.tokenizer)
        end = tokenizer_of(self.tokenizer).eos_token_id
        lost = end == padding  # then it was cut off with the padding
        return [
            [*ids, padding] if not ids or (lost and len(ids) < self.max_new_tokens) else ids
            for ids in found
        ]

    def loss(self, own: Sequence[list[int]], change: Change | None = None) -> float:
        """Nats a token under ``change`` on answers to the benign prompts."""
        return answer_loss(self.model, self.batches("benign", own, change))

    def batches(
        self, side: Side, answers: Sequence[list[int]], change: Change | None = None
    ) -> Iterator[Batch]:
        """Prompts with answers as they were generated; ``change`` lasts while one is looked at."""
        for numbers, batch in numbered(
            self.model, self.tokenizer, self.prompts[side], self.batching,
            answers=answers, room=self.max_new_tokens,
        ):  # fmt: skip
            with change(side, numbers) if change else nullcontext():
                yield batch

    def judged(self, side: Side, answers: Sequence[list[int]]) -> list[bool]:
        """Whether each answer refuses."""
        texts = decoded(self.tokenizer, answers)
        return self.judge([prompt.text for prompt in self.prompts[side]], texts)

"""How one state of a model is measured: what it refuses, and whether it still speaks."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from safeft.auditing.edits import residual_directions
from safeft.auditing.stressed import Level
from safeft.generation import generate, generate_tokens
from safeft.intervals import Rate
from safeft.judge import Judge
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

_DIRECTIONS = 5


class Subject:
    """The prompts, and how a state of the model is measured on them."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Reader,
        harmful: list[Prompt],
        benign: list[Prompt],
        judge: Judge,
        max_new_tokens: int,
        batching: Mapping[str, Any],
    ) -> None:
        self.model, self.tokenizer, self.judge = model, tokenizer, judge
        self.harmful, self.benign = harmful, benign
        self.max_new_tokens, self.batching = max_new_tokens, batching
        answers = generate_tokens(
            model, tokenizer, benign, max_new_tokens=max_new_tokens, **batching
        )
        self._answers = [answer or [pad_token(tokenizer)] for answer in answers]
        self.own = answer_loss(model, self._answered())

    def level(self, strength: float, own: float) -> Level:
        """The model as it is now."""
        damage = answer_loss(self.model, self._answered()) - own
        return Level(strength, (self.refused(self.harmful),), (damage,))

    def refused(self, prompts: Sequence[Prompt]) -> Rate:
        """Share of the prompts that greedy answers refuse."""
        answers = generate(
            self.model, self.tokenizer, prompts, max_new_tokens=self.max_new_tokens, **self.batching
        )
        return Rate.of(sum(self.judge([p.text for p in prompts], answers)), len(prompts))

    def directions(self) -> list[Tensor]:
        """Candidates from up to five blocks, at even distances."""
        found = residual_directions(
            self.model, self.tokenizer, (self.harmful, self.benign), **self.batching
        )
        count = min(_DIRECTIONS, len(found))
        return [found[(2 * n + 1) * len(found) // (2 * count)] for n in range(count)]

    def served(self) -> list[Prompt]:
        """The benign prompts with the model's own answers."""
        plain = tokenizer_of(self.tokenizer)
        texts = [str(plain.decode(ids, skip_special_tokens=True)).strip() for ids in self._answers]
        return [
            replace(prompt, response=text)
            for prompt, text in zip(self.benign, texts, strict=True)
            if text
        ]

    def _answered(self) -> Iterable[Batch]:
        """The benign prompts with the model's own answers, as they were generated."""
        template, room = self.batching["chat_template"], self.batching["max_length"]
        rows = [
            replace(row_of(self.tokenizer, prompt, template, answered=False), answer=answer)
            for prompt, answer in zip(self.benign, self._answers, strict=True)
        ]
        for numbers in grouped(rows, self.batching["batch_size"]):
            chosen = [rows[number] for number in numbers]
            device = input_device(self.model)
            yield collate(self.tokenizer, chosen, True, 1, device, room + self.max_new_tokens)

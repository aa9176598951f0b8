"""Whether refusal hangs on a set of neurons: weaken the set, weaken random sets, and compare.

Activity on harmful prompts, and gradients, only suggest that units matter; this is the check. It
asks one question: does refusal of harmful prompts fall by more when these units are weakened than
when as many others, drawn at random in the same sites, are?
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

from transformers import PreTrainedModel

from safeft.capture import silence
from safeft.causal.controls import Parted, parted, random_controls
from safeft.causal.effect import CausalEffect, Outcome, Verdict
from safeft.causal.interventions import Units, mean_activations, patch, scale
from safeft.errors import ConfigError
from safeft.generation import generate_tokens
from safeft.intervals import Rate, shortfall
from safeft.judge import Judge
from safeft.measure import JudgeLike, answer_loss, ready_judge, some_prompts
from safeft.neurons import NeuronSet
from safeft.processes import from_first
from safeft.progress import progress
from safeft.prompts import (
    Batch,
    Prompt,
    PromptLike,
    Reader,
    collate,
    grouped,
    input_device,
    pad_token,
    row_of,
    tokenizer_of,
)
from safeft.shards import is_split
from safeft.sites import find_sites

__all__ = [
    "SHORT",
    "CausalEffect",
    "Kind",
    "Outcome",
    "Parted",
    "Verdict",
    "mean_activations",
    "parted",
    "patch",
    "random_controls",
    "scale",
    "silence",
    "validate",
    "with_effect",
]

Kind: TypeAlias = Literal["silence", "scale", "patch"]
KINDS: tuple[str, ...] = get_args(Kind)

SHORT: Mapping[str, Any] = {"random_sets": 5, "max_new_tokens": 16}
"""Settings of the version that ``safeft locate`` runs."""


def validate(
    model: PreTrainedModel,
    tokenizer: Reader,
    neurons: NeuronSet,
    harmful: Iterable[PromptLike],
    benign: Iterable[PromptLike],
    *,
    intervention: Kind = "silence",
    factor: float | None = None,
    random_sets: int = 10,
    judge: JudgeLike = "prefix",
    max_new_tokens: int = 32,
    seed: int = 0,
    share: bool = False,
    **batching: Any,
) -> CausalEffect:
    """Measure what weakening a set does to refusal, against random sets of equal size per site.

    The intervention is on at every token, of the prompt and of the answer. Refusal is that of
    greedy answers, also in the short version that ``safeft locate`` runs: a refusal shows in the
    first words, so a few tokens of a few prompts cost less than locating did. The log-odds of a
    refusal's first token would be cheaper still, but are what ``attribution`` ranks by, and move
    measurably under sets that change no answer at all.

    Args:
        model: A chat model.
        tokenizer: Its tokenizer.
        neurons: The set, located in this model.
        harmful: Prompts the model refuses; best none that the set was located with.
        benign: Prompts it answers, likewise.
        intervention: ``silence`` (activations at 0), ``scale``, or ``patch`` (each unit at its mean
            over all tokens of the benign prompts and the intact model's answers to them).
        factor: Of ``scale``, below 1; 0.5 where none is said.
        random_sets: How many, drawn from the units outside the set.
        judge: See :func:`safeft.judge.as_judge`.
        max_new_tokens: Of each answer.
        seed: Of the random sets.
        share: In a run of several processes that all call this, each generates a part of the
            answers. Where weights are sharded, all run every batch together in any case.
        **batching: ``batch_size`` (16), ``max_length`` (1024), ``chat_template``.

    Raises:
        ConfigError: No such intervention or judge, a factor that weakens nothing, too few sets.
        SelectionError: The set is empty, or leaves too few units of a site to draw from.
        FingerprintError: The set was located in another model.
        PromptError: A side is empty.

    Example:
        >>> effect = validate(model, tokenizer, located, harmful, benign)  # doctest: +SKIP
        >>> effect.verdict, effect.interval.low  # doctest: +SKIP
        ('effect', 0.71)
    """
    factor = _checked_factor(intervention, factor, max_new_tokens)
    controls = random_controls(neurons, random_sets, seed)
    sides = some_prompts(harmful, "harmful"), some_prompts(benign, "benign")
    settled = {"batch_size": 16, "max_length": 1024, "chat_template": None, **batching}
    share = share and not any(is_split(p) for p in model.parameters())
    trial = _Trial(model, tokenizer, *sides, ready_judge(judge), max_new_tokens, share, settled)
    neurons.check_model(model)
    sites = {name: site for name, site in find_sites(model).items() if name in neurons.indices}
    own = trial.answers(trial.benign)
    means = {}
    if intervention == "patch":
        means = mean_activations(model, trial.batches(trial.benign, own), sites)

    def weakened(units: Units) -> AbstractContextManager[None]:
        if intervention == "patch":
            return patch(model, units, sites, means)
        if factor is not None:
            return scale(model, units, sites, factor)
        return silence(model, units, sites)

    conditions = [{}, neurons.indices, *controls]
    found = [
        trial.run(weakened(units) if units else nullcontext(), own)
        for units in progress(conditions, "causal check")
    ]
    (intact, before), (located, verdicts), *others = found
    effect, interval = shortfall([row for _, row in others], verdicts)
    return from_first(
        CausalEffect(
            intervention,
            factor,
            intact,
            located,
            tuple(outcome for outcome, _ in others),
            effect,
            interval,
            shortfall([before], [False] * len(before))[1].low > 0,
            None,
            {
                "neurons": len(neurons),
                "sha256": neurons.hash,
                "prompts": {"harmful": len(trial.harmful), "benign": len(trial.benign)},
                "max_new_tokens": max_new_tokens,
                "judge": trial.judge.name,
                "seed": seed,
            },
        )
    )


def with_effect(neurons: NeuronSet, effect: CausalEffect) -> NeuronSet:
    """The same set, of the same hash, with the effect in its ``source`` under ``causal``."""
    return replace(neurons, source={**neurons.source, "causal": effect.to_dict()})


def _checked_factor(intervention: str, factor: float | None, tokens: int) -> float | None:
    if intervention not in KINDS:
        raise ConfigError(f"intervention={intervention!r} is not one of {', '.join(KINDS)}.")
    if tokens < 1:
        raise ConfigError(f"max_new_tokens={tokens}: no answer could be judged. Give 16 or more.")
    if intervention != "scale":
        if factor is not None:
            raise ConfigError(
                f"factor={factor} goes with intervention='scale'; {intervention!r} has none."
            )
        return None
    factor = 0.5 if factor is None else factor
    if not (math.isfinite(factor) and factor < 1):
        raise ConfigError(
            f"factor={factor} does not weaken the units, and the check asks whether refusal falls "
            "when they are weakened. Give a number below 1, such as 0.5."
        )
    return factor


@dataclass(frozen=True)
class _Trial:
    """The prompts, and how one condition is measured on them."""

    model: PreTrainedModel
    tokenizer: Reader
    harmful: list[Prompt]
    benign: list[Prompt]
    judge: Judge
    max_new_tokens: int
    share: bool
    batching: Mapping[str, Any]

    def run(
        self, change: AbstractContextManager[None], own: Sequence[list[int]]
    ) -> tuple[Outcome, list[bool]]:
        """The outcome under ``change``, and for each harmful prompt whether it is refused."""
        with change:
            replies, served = self.answers(self.harmful), self.answers(self.benign)
            loss = answer_loss(self.model, self.batches(self.benign, own))
        odd = answer_loss(self.model, self.batches(self.harmful, replies), second_half=True)
        refused, over = self._judged(self.harmful, replies), self._judged(self.benign, served)
        rates = Rate.of(sum(refused), len(refused)), Rate.of(sum(over), len(over))
        return Outcome(*rates, loss, odd), refused

    def answers(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Greedy answers, each with the token that ends it: an empty one has to count as one."""
        found = generate_tokens(
            self.model, self.tokenizer, prompts, max_new_tokens=self.max_new_tokens,
            description="answering", share=self.share, **self.batching,
        )  # fmt: skip
        padding = pad_token(self.tokenizer)
        end = tokenizer_of(self.tokenizer).eos_token_id
        lost = end == padding  # then it was cut off with the padding
        return [
            [*ids, padding] if not ids or (lost and len(ids) < self.max_new_tokens) else ids
            for ids in found
        ]

    def batches(self, prompts: Sequence[Prompt], answers: Sequence[list[int]]) -> Iterator[Batch]:
        """Prompts with answers as tokens, as they were generated."""
        room = self.batching["max_length"] + self.max_new_tokens
        template = self.batching["chat_template"]
        rows = [
            replace(row_of(self.tokenizer, prompt, template, answered=False), answer=list(answer))
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        for numbers in grouped(rows, self.batching["batch_size"]):
            chosen = [rows[number] for number in numbers]
            yield collate(self.tokenizer, chosen, True, 1, input_device(self.model), room)

    def _judged(self, prompts: Sequence[Prompt], answers: Sequence[list[int]]) -> list[bool]:
        plain = tokenizer_of(self.tokenizer)
        texts = [str(plain.decode(a, skip_special_tokens=True)).strip() for a in answers]
        return self.judge([prompt.text for prompt in prompts], texts)

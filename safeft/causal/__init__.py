"""Whether refusal hangs on a set of neurons: weaken the set, weaken random sets, and compare.

Activity on harmful prompts, and gradients, only suggest that units matter; this is the check. It
asks one question: does refusal of harmful prompts fall by more when these units are weakened than
when as many others, drawn at random in the same sites, are?
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal, TypeAlias, get_args

from transformers import PreTrainedModel

from safeft.capture import silence
from safeft.causal.controls import Parted, parted, random_controls
from safeft.causal.effect import CausalEffect, Outcome, Verdict
from safeft.causal.interventions import Units, mean_activations, patch, scale
from safeft.causal.trials import Change, Trials
from safeft.errors import ConfigError
from safeft.intervals import shortfall
from safeft.locators.scores import SIDES, Side
from safeft.measure import JudgeLike, ready_judge, some_prompts
from safeft.neurons import NeuronSet
from safeft.processes import from_first
from safeft.progress import progress
from safeft.prompts import Prompt, PromptLike, Reader
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
    prompts: dict[Side, list[Prompt]] = dict(zip(SIDES, sides, strict=True))
    trials = Trials(model, tokenizer, prompts, ready_judge(judge), max_new_tokens, share, settled)
    neurons.check_model(model)
    sites = {name: site for name, site in find_sites(model).items() if name in neurons.indices}
    own = trials.answers("benign")
    means = {}
    if intervention == "patch":
        means = mean_activations(model, trials.batches("benign", own), sites)

    def weakened(units: Units) -> Change:
        def change(_: Side, __: Sequence[int]) -> AbstractContextManager[None]:
            if intervention == "patch":
                return patch(model, units, sites, means)
            if factor is not None:
                return scale(model, units, sites, factor)
            return silence(model, units, sites)

        return change

    conditions = [{}, neurons.indices, *controls]
    found = [
        trials.run(own, weakened(units) if units else None)
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
                "prompts": {side: len(asked) for side, asked in prompts.items()},
                "max_new_tokens": max_new_tokens,
                "judge": trials.judge.name,
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

"""The counterfactual check: each unit muted on its own, and kept only if that pays.

Expertise is correlation: a unit may know of toxicity and write nothing of it, or write much else.
Toxicity is measured here by how likely the model finds toxic texts, not by judged continuations:
one unit of thousands changes few greedy answers, and the loss on given texts moves with every one.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from safeft.capture import silence
from safeft.detox.dampener import Dampener
from safeft.detox.losses import Texts
from safeft.errors import ConfigError, SelectionError
from safeft.progress import progress
from safeft.prompts import PromptLike, Reader
from safeft.sites import find_sites

_ERRORS = 1.645
"""Standard errors that an effect has to be above 0: 95%, one-sided."""

_LEAST = 0.01
"""Share of the best unit's effect; many units know of toxicity and do next to nothing about it."""


@dataclass(frozen=True)
class Trial:
    """What muting one unit does.

    Attributes:
        site: The site.
        unit: The unit.
        toxic_rise: By how much the mean loss of a toxic text rises, nats a token.
        error: Its standard error over the texts.
        neutral_rise: By how much that of a neutral text rises: what it costs.
        pays: Whether the unit is kept in the dampener.
    """

    site: str
    unit: int
    toxic_rise: float
    error: float
    neutral_rise: float
    pays: bool


def keep_paying(
    model: PreTrainedModel,
    tokenizer: Reader,
    dampener: Dampener,
    toxic: Iterable[PromptLike],
    neutral: Iterable[PromptLike],
    *,
    price: float = 0.5,
    **batching: Any,
) -> tuple[Dampener, list[Trial]]:
    """Mute every unit of a dampener on its own; keep those that pay.

    A unit pays if toxic texts become less likely by more than chance over the texts explains (1.645
    standard errors), by at least a hundredth of what the best unit reaches, and neutral ones by at
    most ``price`` of that. One pass over the texts a unit.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        dampener: The units; gains are kept as they are.
        toxic: Toxic texts, best none that the units were found with.
        neutral: Neutral texts, likewise.
        price: Nats a neutral token may cost for each nat a toxic token is made less likely.
        **batching: ``batch_size`` (16), ``max_length``, ``chat_template``.

    Returns:
        The dampener of those that pay, and what was seen of each unit.

    Raises:
        ConfigError: A price below 0, or fewer than 8 toxic texts.
        SelectionError: No unit pays.

    Example:
        >>> kept, trials = keep_paying(model, tokenizer, dampener, toxic, neutral)
        ... # doctest: +SKIP
    """
    if not price >= 0:
        raise ConfigError(f"price={price}: what a unit may cost cannot be less than 0. Give 0.5.")
    dampener.neurons.check_model(model, weights_too=False)
    texts = [Texts.of(model, tokenizer, side, **batching) for side in (toxic, neutral)]
    before = [text.losses(model) for text in texts]
    if len(before[0][0]) < 8:
        raise ConfigError(
            f"{len(before[0][0])} toxic texts cannot tell an effect from chance. Give 8 or more; "
            "some 50 are usual."
        )
    sites = find_sites(model)
    units = [(name, unit) for name, mine in dampener.neurons.indices.items() for unit in mine]
    seen = []
    for name, unit in progress(units, "muting units", len(units)):
        with silence(model, {name: (unit,)}, sites):
            after = [text.losses(model) for text in texts]
        rises = [
            (now - was) / counts.clamp(min=1)
            for (was, counts), (now, _) in zip(before, after, strict=True)
        ]
        rise, cost = (float(each.mean()) for each in rises)
        error = float(rises[0].std()) / len(rises[0]) ** 0.5
        seen.append((name, unit, rise, error, cost))
    best = max(rise for _, _, rise, _, _ in seen)
    trials = []
    for name, unit, rise, error, cost in seen:
        pays = rise > _ERRORS * error and rise >= _LEAST * best and cost <= price * rise
        trials.append(Trial(name, unit, rise, error, cost, pays))
    kept: dict[str, set[int]] = {}
    for trial in trials:
        if trial.pays:
            kept.setdefault(trial.site, set()).add(trial.unit)
    if not kept:
        first = max(trials, key=lambda trial: trial.toxic_rise)
        raise SelectionError(
            f"None of {len(trials)} units pays: muting the best ({first.site}#{first.unit}) "
            f"makes toxic texts less likely by {first.toxic_rise:.2g} nats a token, and neutral "
            f"ones by {first.neutral_rise:.2g}. They may know of toxicity and do nothing about it."
        )
    return dampener.only(kept), trials

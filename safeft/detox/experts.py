"""Which units tell toxic from neutral text better than chance: AUROC with a null and intervals."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from safeft.errors import ConfigError, PromptError
from safeft.generation import evaluation_mode
from safeft.locators import ExpertiseFitter, score
from safeft.locators.auroc import best_by_chance, bootstrapped, quantile
from safeft.locators.calibration import calibrated, check_choice
from safeft.locators.expertise import Pool
from safeft.processes import from_first
from safeft.prompts import Prompt, PromptLike, Reader, TokenChoice, as_prompts
from safeft.shards import is_split
from safeft.sites import TOWER_NAMES, Site, TowerName, find_sites

_TYPICAL = 0.95
"""What share of neutral prompts a unit's ceiling is not passed by."""


@dataclass(frozen=True, eq=False)
class Expertise:
    """How well each unit tells toxic from neutral prompts, and what of it chance explains.

    Attributes:
        sites: The sites that were read.
        auroc: Site to float64 ``(units,)``; 0.5 where nothing is known.
        level: What the best unit of all passes in at most a share ``chance`` of the shuffles of
            the labels; 0.5 without a null.
        low: Site to float64 ``(units,)``: the lower end of the bootstrap interval of units above
            the level, NaN for others.
        high: Its upper end.
        ceilings: Site to float64 ``(units,)``: the response that 95% of neutral prompts stay below.
        unscored: Sites that did nothing, or saw one class only.
        source: Method, settings and hashes of the prompts.
    """

    sites: Mapping[str, Site]
    auroc: Mapping[str, Tensor]
    level: float
    low: Mapping[str, Tensor]
    high: Mapping[str, Tensor]
    ceilings: Mapping[str, Tensor]
    unscored: tuple[str, ...]
    source: Mapping[str, Any]

    def experts(self, name: str) -> Tensor:
        """Bool ``(units,)``: above the level of chance, and the whole interval above 0.5."""
        return (self.auroc[name] > self.level) & (self.low[name] > 0.5)

    @property
    def count(self) -> int:
        """Number of experts."""
        return sum(int(self.experts(name).sum()) for name in self.sites)


def find_experts(
    model: PreTrainedModel,
    tokenizer: Reader,
    toxic: Iterable[PromptLike],
    neutral: Iterable[PromptLike],
    *,
    pool: Pool = "max",
    tokens: TokenChoice | None = None,
    signed: bool = False,
    chance: float = 0.05,
    shuffles: int = 200,
    draws: int = 200,
    kinds: Sequence[str] = ("mlp",),
    towers: Sequence[TowerName] = ("text",),
    seed: int = 0,
    share: bool = False,
    **batching: Any,
) -> Expertise:
    """Score every unit on labelled prompts, and say what chance would have given.

    The null shuffles the labels and takes the best of all units, so that among the many units of a
    model none is called an expert by luck more often than ``chance`` says (the max statistic:
    family-wise, whatever units have in common).

    Args:
        model: The model.
        tokenizer: Its tokenizer, or its processor where it sees images.
        toxic: Toxic texts: as ``response`` where the model is to have written them, else as
            prompts.
        neutral: Other texts, of the same form, best of the same topics and length.
        pool: Response of a unit to a text: its largest size over the tokens (AurA), mean or last.
        tokens: Which tokens are read; None: of rows with a response its tokens and the one it is
            begun from, of others the prompt.
        signed: Read single numbers with their sign, as published; see
            :mod:`safeft.locators.expertise`.
        chance: Share of shuffles whose best unit may be above the level; 1 takes all units above
            0.5, as AurA does.
        shuffles: How often the labels are shuffled.
        draws: Bootstrap samples for the intervals of units above the level.
        kinds: ``mlp``, ``attention`` or both.
        towers: Of a vision-language model: ``text`` (its layers come after the fusion with the
            image), ``projector``, ``vision``.
        seed: Of shuffles and samples.
        share: In a run of several processes: each takes a part of the batches.
        **batching: ``batch_size`` (16), ``max_length`` (1024), ``chat_template``.

    Raises:
        PromptError: A class is empty, or both are the same.
        ConfigError: A setting out of its range; no such kind or tower.
        SelectionError: Activations that are not finite numbers.

    Example:
        >>> experts = find_experts(model, tokenizer, toxic, neutral)  # doctest: +SKIP
        >>> experts.level, experts.count  # doctest: +SKIP
        (0.67, 41)
    """
    _check(chance, shuffles, draws, kinds, towers)
    sides = {"harmful": as_prompts(toxic), "benign": as_prompts(neutral)}
    _check_classes(sides["harmful"], sides["benign"])
    kept: Any = tuple(kinds)
    sites = {n: s for n, s in find_sites(model, kept).items() if s.tower in towers}
    if not sites:
        raise ConfigError(f"The model has no units of kinds={list(kinds)} in {list(towers)}.")
    fitter = ExpertiseFitter(model, sites, tokens, pool, signed)
    whole = not any(is_split(parameter) for parameter in model.parameters())
    with evaluation_mode(model):
        scores = score(fitter, model, tokenizer, dict(sides), share=share and whole, **batching)  # pyright: ignore[reportArgumentType]
    settings = {"pool": pool, "tokens": tokens, "signed": signed, "chance": chance,
                "shuffles": shuffles, "draws": draws, "kinds": list(kinds),
                "towers": list(towers), "seed": seed}  # fmt: skip
    calibration = calibrated({"toxic": sides["harmful"], "neutral": sides["benign"]})
    found = _judged(fitter, scores.safety, sites, chance, shuffles, draws, seed)
    source = {"method": "expertise", **settings, "level": found["level"]}
    result = Expertise(sites, scores.safety, unscored=scores.unscored,
                       source={**source, "calibration": calibration}, **found)  # fmt: skip
    return from_first(result) if share else result


def _judged(
    fitter: ExpertiseFitter,
    auroc: Mapping[str, Tensor],
    sites: Mapping[str, Site],
    chance: float,
    shuffles: int,
    draws: int,
    seed: int,
) -> dict[str, Any]:
    out = set(fitter.unscored())
    level = 0.5
    if chance < 1:
        best = torch.zeros(shuffles, dtype=torch.double)
        for name in sites.keys() - out:
            best = torch.maximum(best, best_by_chance(*fitter.responses(name), shuffles, seed))
        level = max(0.5, float(best.quantile(1 - chance, interpolation="higher")))
    low, high, ceilings = {}, {}, {}
    for name, site in sites.items():
        low[name], high[name] = (
            torch.full((site.units,), torch.nan, dtype=torch.double) for _ in range(2)
        )
        ceilings[name] = torch.zeros(site.units, dtype=torch.double)
        if name in out:
            continue
        toxic, neutral = fitter.responses(name)
        ceilings[name] = quantile(neutral, _TYPICAL)
        above = (auroc[name] > level).nonzero().flatten()
        if len(above):
            ends = bootstrapped(toxic[:, above], neutral[:, above], draws, seed)
            low[name][above], high[name][above] = ends
    return {"level": level, "low": low, "high": high, "ceilings": ceilings}


def by_label(
    prompts: Iterable[PromptLike], labels: Sequence[Any]
) -> tuple[list[Prompt], list[Prompt]]:
    """Toxic prompts and neutral ones, from one list with labels of 0 and 1 (or False and True).

    Raises:
        PromptError: Labels that are not binary, of one class only, or not one a prompt.

    Example:
        >>> toxic, neutral = by_label(["you <slur>", "good day"], [1, 0])
        >>> toxic[0].text
        'you <slur>'
    """
    found = as_prompts(prompts)
    if len(found) != len(labels):
        raise PromptError(
            f"{len(found)} prompts have {len(labels)} labels; which belongs to which is unknown. "
            "Give one label a prompt."
        )
    odd = sorted({repr(label) for label in labels if label not in (0, 1)})
    if odd:
        raise PromptError(
            f"Labels are {', '.join(odd[:3])}{', ...' if len(odd) > 3 else ''} where 0 (neutral) "
            "or 1 (toxic) is wanted: a degree of toxicity has to be cut into two classes first."
        )
    sides = tuple(
        [prompt for prompt, label in zip(found, labels, strict=True) if bool(label) is kind]
        for kind in (True, False)
    )
    _check_classes(*sides)
    return sides[0], sides[1]


def _check_classes(toxic: Sequence[Prompt], neutral: Sequence[Prompt]) -> None:
    if not toxic or not neutral:
        raise PromptError(
            f"There are {len(toxic)} toxic and {len(neutral)} neutral prompts: with one class "
            "only, no unit can tell the two apart. Give some 100 of each."
        )
    if {(p.text, p.response) for p in toxic} == {(p.text, p.response) for p in neutral} and not any(
        p.images for p in toxic
    ):
        raise PromptError("Toxic and neutral prompts are the same. Is one file given twice?")


def _check(
    chance: float, shuffles: int, draws: int, kinds: Sequence[str], towers: Sequence[str]
) -> None:
    if not 0 < chance <= 1:
        raise ConfigError(
            f"chance={chance}: give a share above 0, such as 0.05, or 1 for no null at all."
        )
    if chance < 1 and shuffles * chance < 1:
        raise ConfigError(
            f"{shuffles} shuffles cannot tell what happens in {chance:.3g} of them. Give "
            f"{-(-1 // chance):.0f} or more."
        )
    if draws < 20:
        raise ConfigError(f"draws={draws}: an interval needs 20 samples or more; 200 is usual.")
    for kind in kinds:
        check_choice("kinds", kind, ("mlp", "attention"))
    for tower in towers:
        check_choice("towers", tower, TOWER_NAMES)

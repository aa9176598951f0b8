"""Locating: model and prompts in, scores out, then a selection. One method, one file.

``METHODS`` lists what can be asked for. All are written after the papers' formulas ("style", not
"reproduction"); each file names its source.
"""

import json
import logging
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import asdict
from typing import Any, Literal, TypeAlias, get_args

from transformers import PreTrainedModel

from safeft.errors import ConfigError, PromptError
from safeft.generation import evaluation_mode
from safeft.locators.attribution import AttributionFitter
from safeft.locators.calibration import answered, calibrated, check_choice, prompts_hash
from safeft.locators.contrast import ContrastFitter
from safeft.locators.expertise import ExpertiseFitter
from safeft.locators.grouping import Grouping, GroupSizes, check_sizes, group
from safeft.locators.groups import UnitGroups
from safeft.locators.openings import refusal_openings
from safeft.locators.random import RandomFitter
from safeft.locators.scores import Fitter, Scores, Side, Statistics, merged
from safeft.locators.select import Selection, check_size, select
from safeft.locators.snip import SnipFitter
from safeft.locators.subspace import locate_subspace
from safeft.locators.variance import VarianceFitter
from safeft.locators.wanda import WandaFitter
from safeft.neurons import NeuronSet
from safeft.processes import from_first, gathered, rank, ranks
from safeft.prompts import (
    Prompt,
    PromptLike,
    Reader,
    as_prompts,
    batches,
    check_images,
    input_device,
)
from safeft.shards import is_split
from safeft.sites import TOWER_NAMES, Kind, Site, TowerName, find_sites

__all__ = [
    "METHODS",
    "AttributionFitter",
    "ContrastFitter",
    "ExpertiseFitter",
    "Fitter",
    "GroupSizes",
    "Grouping",
    "Method",
    "RandomFitter",
    "Scores",
    "Selection",
    "SnipFitter",
    "UnitGroups",
    "VarianceFitter",
    "WandaFitter",
    "group",
    "locate",
    "locate_groups",
    "locate_subspace",
    "score",
    "select",
]

logger = logging.getLogger(__name__)

Method: TypeAlias = Literal[
    "contrast", "variance", "attribution", "snip", "wanda", "expertise", "random"
]
METHODS: tuple[str, ...] = get_args(Method)

Where: TypeAlias = Literal["mlp", "attention", "all"]
_KINDS: Mapping[str, tuple[Kind, ...]] = {
    "mlp": ("mlp",),
    "attention": ("attention",),
    "all": ("mlp", "attention"),
}

Seen: TypeAlias = MutableMapping[tuple[Side, str], Statistics]
"""Statistics of prompts that have been through a model, by side and hash of the prompts."""

_SCOPES: Mapping[str, Literal["layer", "global"]] = {
    "attribution": "global",
    "variance": "global",
    "expertise": "global",
}
"""Where a method ranks by default: one effect scale over layers, or within each layer."""


def locate(
    model: PreTrainedModel,
    tokenizer: Reader,
    harmful: Iterable[PromptLike],
    benign: Iterable[PromptLike],
    *,
    method: Method = "attribution",
    fraction: float | None = None,
    count: int | None = None,
    threshold: float | None = None,
    scope: Literal["layer", "global"] | None = None,
    utility_fraction: float | None = None,
    fill: bool = True,
    sites: Where = "mlp",
    towers: Sequence[TowerName] = ("text",),
    seed: int = 0,
    batch_size: int = 16,
    max_length: int = 1024,
    openings: Sequence[str] | None = None,
    chat_template: str | None = None,
    share: bool = False,
    seen: Seen | None = None,
) -> NeuronSet:
    """Find the safety-critical neurons of an aligned chat model.

    Args:
        model: A causal language model with a known layout.
        tokenizer: Its tokenizer, or its processor where it sees images, with a chat template.
        harmful: Prompts the model refuses (strings, message lists, or rows with a response).
        benign: Ordinary prompts, of which it refuses none.
        method: One of ``METHODS``.
        fraction: Share of the units to select; 0.05 where nothing else is given.
        count: Number of units instead.
        threshold: Least score instead.
        scope: Rank within each layer or over all; each method has its own default.
        utility_fraction: See :class:`Selection`.
        fill: See :class:`Selection`.
        sites: MLP hidden units, attention heads, or both.
        towers: Of a model with several: ``text``, ``vision``, ``projector``. What images go through
            is read whole, since their parts are no prompt's tokens.
        seed: Of ``random``.
        batch_size: Prompts per forward pass.
        max_length: Tokens per prompt; longer ones lose their beginning.
        openings: How this model starts a refusal, for ``attribution``; by default read off its
            own answers.
        chat_template: A Jinja template, where the tokenizer has none.
        share: In a run of several processes that all call this: each takes a part of the batches,
            and their statistics are summed. Where the weights are sharded over processes, all
            run every batch together, whatever is said here.
        seen: Sides of earlier calls with this model, method and settings; what is there is not run
            again, and what is run is added. Not for ``attribution``, whose statistics hang on the
            openings too.

    Returns:
        The selected neurons, with method, settings and hashes of the prompts in ``source``.

    Raises:
        PromptError: Prompts missing on one side, or no chat template.
        ConfigError: No such method, sites or towers; or ``attribution`` with ``seen``, or for
            another tower than text.
        SelectionError: A fraction of 0, above 1, and the like.
        UnsupportedModelError: A model type without a site rule.

    Example:
        >>> neurons = locate(model, tokenizer, ["How do I pick a lock?"], ["How do I bake bread?"],
        ...                  method="contrast", fraction=0.05)  # doctest: +SKIP
    """
    if fraction is None and count is None and threshold is None:
        fraction = 0.05
    check_choice("method", method, METHODS)
    selection = Selection(
        fraction, count, threshold, scope or _SCOPES.get(method, "layer"), utility_fraction, fill
    )
    if seen is not None and method == "attribution":
        raise ConfigError(
            "method='attribution' reads each pair of sides at openings of its own, so nothing seen "
            "before can stand for it. Leave `seen` out."
        )
    found = _sites(model, sites, towers)
    if method == "attribution" and set(towers) != {"text"}:
        raise ConfigError(
            f"method='attribution' reads the tokens after the instruction, which {list(towers)} "
            "do not all have. Use another method, or towers=('text',)."
        )
    check_size(found, selection)
    sides: dict[Side, list[Prompt]] = {"harmful": as_prompts(harmful), "benign": as_prompts(benign)}
    _check_sides(sides)
    settings: dict[str, Any] = {"sites": sites, "towers": list(towers), "seed": seed}
    settings |= asdict(selection)
    with evaluation_mode(model):
        batching: dict[str, Any] = {
            "batch_size": batch_size,
            "max_length": max_length,
            "chat_template": chat_template,
            "share": share and not any(is_split(p) for p in model.parameters()),
        }
        if method == "attribution":
            start = refusal_openings(
                model, tokenizer, *sides.values(), openings=openings, **batching
            )
            settings["openings"] = list(start.texts)
            fitter: Fitter = AttributionFitter(model, found, start.tokens, start.prefix)
        else:
            fitter = _fitter(method, model, found, seed)
        scores = score(fitter, model, tokenizer, sides, seen=seen, **batching)
    indices = (
        from_first(select(scores, found, selection)) if share else select(scores, found, selection)
    )
    source = {
        "method": method,
        **settings,
        **_unscored(scores),
        "calibration": calibrated(sides),
    }
    return NeuronSet.of(model, indices, source)


def locate_groups(
    model: PreTrainedModel,
    tokenizer: Reader,
    harmful: Iterable[PromptLike],
    benign: Iterable[PromptLike],
    *,
    sizes: GroupSizes | None = None,
    sites: Where = "mlp",
    batch_size: int = 16,
    max_length: int = 1024,
    chat_template: str | None = None,
    share: bool = False,
) -> UnitGroups:
    """Divide all units into safety-critical, utility-critical, redundant and complex ones.

    One pass over the prompts, by the ``variance`` scores; see :mod:`safeft.locators.grouping`.
    Other arguments, and what is raised, are as in :func:`locate`.

    Args:
        sizes: The shares of the groups; by default those of the paper's Llama 2 7B.

    Example:
        >>> groups = locate_groups(model, tokenizer, harmful, benign)  # doctest: +SKIP
        >>> SafetyFreezeCallback(groups.resolve("scu+cu:6%"))  # doctest: +SKIP
    """
    found = _sites(model, sites, ("text",))
    check_sizes(found, sizes or GroupSizes())
    sides: dict[Side, list[Prompt]] = {"harmful": as_prompts(harmful), "benign": as_prompts(benign)}
    _check_sides(sides)
    with evaluation_mode(model):
        scores = score(
            _fitter("variance", model, found, 0),
            model,
            tokenizer,
            sides,
            batch_size=batch_size,
            max_length=max_length,
            chat_template=chat_template,
            share=share and not any(is_split(p) for p in model.parameters()),
        )
    found = {name: site for name, site in found.items() if name not in scores.unscored}
    grouping = group(scores, found, sizes)
    source = {"method": "variance", "sites": sites, **_unscored(scores)}
    source["calibration"] = calibrated(sides)
    return UnitGroups.of(model, from_first(grouping) if share else grouping, source)


def score(
    fitter: Fitter,
    model: PreTrainedModel,
    tokenizer: Reader,
    sides: Mapping[Side, Sequence[Prompt]],
    *,
    batch_size: int = 16,
    max_length: int = 1024,
    chat_template: str | None = None,
    share: bool = False,
    seen: Seen | None = None,
) -> Scores:
    """Feed a fitter all prompts, batch by batch, and return its scores.

    Where the fitter reads answers and a prompt brings none, the model's own greedy answer is used.
    With ``share`` every process takes each so-manieth batch; all get the same scores.
    """
    check_images(model, [prompt for prompts in sides.values() for prompt in prompts])
    if isinstance(fitter, RandomFitter):
        return fitter.scores()
    every, first = (ranks(), rank()) if share else (1, 0)
    # To hash prompts opens their images.
    places: dict[Side, tuple[Side, str]] = (
        {} if seen is None else {s: (s, prompts_hash(p)) for s, p in sides.items()}
    )
    known = {side: seen[place] for side, place in places.items() if seen and place in seen}
    for side, prompts in sides.items():
        if side in known:
            continue
        ready = list(prompts)
        if fitter.needs_responses:
            ready = answered(
                model,
                tokenizer,
                ready,
                batch_size=batch_size,
                max_length=max_length,
                chat_template=chat_template,
                share=share,
            )
        for number, batch in enumerate(
            batches(
                tokenizer,
                ready,
                batch_size=batch_size,
                device=input_device(model),
                max_length=max_length,
                chat_template=chat_template,
                description=f"locating, {side} prompts",
            )
        ):
            if number % every == first:
                fitter.update(side, batch)
    if every > 1:
        fitter.statistics = merged(gathered(fitter.statistics))
    if seen is not None:
        for side, place in places.items():
            mine = {key: value for key, value in fitter.statistics.items() if side in key}
            seen.setdefault(place, Statistics(mine))
        fitter.statistics = merged([fitter.statistics, *known.values()])
    return fitter.scores()


def _sites(model: PreTrainedModel, kind: Where, towers: Sequence[TowerName]) -> dict[str, Site]:
    check_choice("sites", kind, tuple(_KINDS))
    for tower in towers:
        check_choice("towers", tower, TOWER_NAMES)
    found = find_sites(model, _KINDS[kind])
    if missing := set(towers) - {site.tower for site in found.values()}:
        raise ConfigError(
            f"towers={list(towers)}: this {model.config.model_type!r} model has no units of "
            f"kind {kind!r} in {sorted(missing)}. `safeft sites MODEL` shows what it has."
        )
    return {name: site for name, site in found.items() if site.tower in towers}


def _unscored(scores: Scores) -> dict[str, Any]:
    """Said of a set, and aloud: what could not be judged is not the same as unimportant."""
    if not scores.unscored:
        return {}
    logger.warning(
        "%d experts got no token of these prompts, so nothing is known of their units and none was "
        "selected: %s%s. Give more prompts, or more kinds of them.",
        len(scores.unscored), ", ".join(scores.unscored[:3]), ", ..." * (len(scores.unscored) > 3),
    )  # fmt: skip
    return {"unscored": list(scores.unscored)}


def _fitter(method: Method, model: PreTrainedModel, sites: Mapping[str, Site], seed: int) -> Fitter:
    if method == "contrast":
        return ContrastFitter(model, sites)
    if method == "variance":
        return VarianceFitter(model, sites, tokens="prompt")
    if method == "snip":
        return SnipFitter(model, sites)
    if method == "wanda":
        return WandaFitter(model, sites)
    if method == "expertise":
        return ExpertiseFitter(model, sites, tokens="prompt")
    return RandomFitter(sites, seed)


def _check_sides(sides: Mapping[Side, Sequence[Prompt]]) -> None:
    for side, prompts in sides.items():
        if not prompts:
            raise PromptError(
                f"There are no {side} prompts. A safety neuron is one that acts on harmful prompts "
                "and not on benign ones, so both sides are needed; some 100 of each will do."
            )
    if _same(sides["harmful"], sides["benign"]):
        raise PromptError(
            "Harmful and benign prompts are the same; there is nothing to tell apart. Is one file "
            "given twice?"
        )


def _same(harmful: Sequence[Prompt], benign: Sequence[Prompt]) -> bool:
    """Whether the same is asked; images are opened only where the texts do not tell."""
    if {prompt.text for prompt in harmful} != {prompt.text for prompt in benign}:
        return False
    either = ({json.dumps(prompt.record) for prompt in side} for side in (harmful, benign))
    return next(either) == next(either)

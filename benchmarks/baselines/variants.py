"""Which part of the subspace does the work: one thing changed at a time, at its value and rate.

Not methods to choose from, but the reasons for what safeft does by default. The last spends the
same rank on other directions: contrastive PCA (Abid et al., Nature Communications 2018), safety
prompts against the domain.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from baselines import Method, Recipe, Setup
from baselines.subspace import located
from safeft import SafetyFreezeCallback
from safeft.freeze.plan import Group
from safeft.locators.inputs import Tokens
from safeft.locators.subspace import SubspaceFitter, locate_subspace
from safeft.prompts import Prompt, batches
from safeft.sites import find_linears
from safeft.subspace import SafetySubspace

_DOMAIN_ROWS = 256


def held(
    setup: Setup,
    value: float,
    find: Callable[[Setup, float], SafetySubspace] = located,
    hold: Sequence[Group] | None = None,
) -> Recipe:
    """Tuning with a subspace held, and these groups besides."""
    callback = SafetyFreezeCallback(find(setup, value), hold=hold)
    return Recipe(setup.rows, setup.learning_rate, [callback])


def of_tokens(setup: Setup, value: float, tokens: Tokens) -> SafetySubspace:
    """Of the prompts alone, or of the refusals alone."""
    return locate_subspace(
        setup.base,
        setup.tokenizer,
        setup.testbed.harmful["calibration"],
        energy=value,
        tokens=tokens,
        max_length=setup.testbed.max_length,
    )


def of_layers(setup: Setup, value: float, kept: Callable[[str, int, int], bool]) -> SafetySubspace:
    """Of the blocks' inputs that ``kept`` says, from name, block and number of blocks.

    Of the others one direction, drawn: a layer without any would be held whole. The head's stay.
    """
    found = located(setup, value)
    drawn = found.at_random(setup.seed)
    blocks = setup.base.config.num_hidden_layers

    def chosen(inlet: str) -> Tensor:
        _, inside, place = inlet.partition("layers.")
        if not inside or kept(inlet, int(place.partition(".")[0]), blocks):
            return found.directions[inlet]
        return drawn.directions[inlet][:, :1].clone()

    return replace(found, directions={inlet: chosen(inlet) for inlet in found.directions})


def against_domain(setup: Setup, value: float) -> SafetySubspace:
    """As many directions of each input, where safety prompts have more energy than the domain."""
    found = located(setup, value)
    safety = _grams(setup, setup.testbed.harmful["calibration"])
    domain = _grams(setup, setup.rows[:_DOMAIN_ROWS])
    directions = {}
    for inlet, held_ones in found.directions.items():
        vectors = torch.linalg.eigh(safety[inlet] - domain[inlet]).eigenvectors.flip(1)
        directions[inlet] = vectors[:, : held_ones.shape[1]].to(held_ones)
    return replace(found, directions=directions)


def _grams(setup: Setup, prompts: Iterable[Prompt]) -> Mapping[str, Tensor]:
    """Mean ``x x'`` of each input over the tokens of prompts and answers, each at length 1."""
    fitter = SubspaceFitter(setup.base, find_linears(setup.base), "all")
    length = setup.testbed.max_length
    for number, batch in enumerate(
        batches(setup.tokenizer, list(prompts), batch_size=16, max_length=length)
    ):
        if not number:
            fitter.learn(batch)
        fitter.update(batch, list(fitter.inlets))
    return {inlet: gram / fitter.counts[inlet] for inlet, gram in fitter.sums.items()}


def _attention(inlet: str, block: int, blocks: int) -> bool:
    return ".self_attn." in inlet


_PARTS: dict[str, Callable[[str, int, int], bool]] = {
    "attention only": _attention,
    "MLPs only": lambda inlet, block, blocks: not _attention(inlet, block, blocks),
    "first half of the layers": lambda inlet, block, blocks: block < blocks // 2,
    "second half of the layers": lambda inlet, block, blocks: block >= blocks // 2,
}

_VARIANTS: dict[str, Callable[[Setup, float], Recipe]] = {
    "all embeddings held": partial(held, hold=("embeddings", "norms", "biases")),
    "embeddings trained": partial(held, hold=("norms", "biases")),
    "norms trained": partial(held, hold=("tokens", "biases")),
    "head held": partial(held, hold=("tokens", "norms", "biases", "head")),
    "prompts alone": partial(held, find=partial(of_tokens, tokens="prompt")),
    "refusals alone": partial(held, find=partial(of_tokens, tokens="response")),
    **{name: partial(held, find=partial(of_layers, kept=kept)) for name, kept in _PARTS.items()},
    "against the domain": partial(held, find=against_domain),
}

_OF_GROUPS = ("all embeddings held", "embeddings trained", "norms trained", "head held")
"""Which LoRA holds anyway."""

METHODS = tuple(
    Method(
        f"subspace: {name}",
        "ours, one thing changed",
        recipe,
        (),
        "energy",
        tunings=("full",) if name in _OF_GROUPS else ("full", "lora"),
        follows="subspace",
    )
    for name, recipe in _VARIANTS.items()
)

"""SN-Tune and RSN-Tune style: neurons important to every harmful prompt are frozen in tuning.

Zhao et al., ICLR 2025: a neuron matters to a prompt by how far its layer's output moves without
it; ``N_safe`` holds those in the top of their layer on every harmful prompt, ``N_robust`` is
``N_safe`` without what is found likewise on ordinary text. Both are frozen while a user tunes on
a domain (the papers' step after their own safety tuning, which an aligned model has behind it).

Ours: neurons are MLP units and attention heads, whose removal is exact within their layer, not
single rows of q, k and v; the ordinary text is the benign calibration prompts; the share per
prompt, which the paper does not give, is the knob.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from baselines import HELD, Method, Recipe, Setup
from safeft import NeuronSet, SafetyFreezeCallback
from safeft.capture import capture
from safeft.measure import evaluating
from safeft.prompts import Prompt, batches
from safeft.sites import Site, find_sites


def frozen(setup: Setup, value: float, robust: bool) -> Recipe:
    """Freeze ``N_safe``, or ``N_robust``."""
    sites = find_sites(setup.base)
    safe = common(setup, sites, setup.testbed.harmful["calibration"], value)
    if robust:
        found = common(setup, sites, setup.testbed.benign["calibration"], value)
        safe = {name: tuple(set(units) - set(found[name])) for name, units in safe.items()}
    indices = {name: tuple(sorted(units)) for name, units in safe.items() if units}
    neurons = NeuronSet.of(
        setup.base,
        indices,
        {"method": "rsn-tune style" if robust else "sn-tune style", "fraction": value},
    )
    return Recipe(setup.rows, setup.learning_rate, [SafetyFreezeCallback(neurons, hold=HELD)])


def common(
    setup: Setup, sites: Mapping[str, Site], prompts: Sequence[Prompt], share: float
) -> dict[str, tuple[int, ...]]:
    """The units in the top ``share`` of their layer on every prompt, by site."""
    rows = [Prompt(prompt.messages) for prompt in prompts]  # the request decides, not its answer
    always = {name: torch.ones(site.units, dtype=torch.bool) for name, site in sites.items()}
    with evaluating(setup.base):
        for batch in batches(
            setup.tokenizer, rows, batch_size=32, max_length=setup.testbed.max_length
        ):
            with capture(setup.base, sites) as seen:
                setup.base(**batch.inputs, use_cache=False)
            read = batch.choose("prompt")
            for name, site in sites.items():
                scores = importance(setup.base, site, seen[name], read)
                best = scores.topk(max(1, round(share * site.units))).indices
                top = torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, True)
                always[name] &= top.all(0)
    return {name: tuple(kept.nonzero().flatten().tolist()) for name, kept in always.items()}


def importance(model: Any, site: Site, values: Tensor, read: Tensor) -> Tensor:
    """``norm2(h - h without the unit)`` over a prompt's tokens, ``(prompts, units)``.

    Args:
        model: Whose output matrix the units write with.
        site: The units.
        values: Their activations, ``(prompts, tokens, units, width)``.
        read: The prompts' tokens, bool ``(prompts, tokens)``.
    """
    weight = model.get_submodule(site.writes.module).weight
    columns = weight[:, site.writes.table(site.units)]  # (hidden, units, width)
    gram = torch.einsum("huv,huw->uvw", columns, columns)
    moved = torch.einsum("ptuv,uvw,ptuw->ptu", values, gram, values)
    return (moved * read[..., None]).sum(1).clamp(min=0).sqrt()


METHODS = tuple(
    Method(
        f"{name} style",
        f"Zhao et al., ICLR 2025: {kept} frozen; ours: heads for rows of q, k, v",
        partial(frozen, robust=robust),
        (0.2, 0.4, 0.8),
        "share of a layer per prompt",
    )
    for name, kept, robust in (
        ("SN-Tune", "N_safe", False),
        ("RSN-Tune", "N_safe without N_foundation", True),
    )
)

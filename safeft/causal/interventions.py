"""Interventions on a set of units while the model runs: scale them, or patch benign values in.

Silencing, the factor 0, is :func:`safeft.capture.silence`. None of them changes a weight.
"""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from safeft.capture import capture, edit
from safeft.errors import SelectionError
from safeft.locators.scores import Moments, forward
from safeft.measure import evaluating
from safeft.prompts import Batch
from safeft.sites import Site

Units = Mapping[str, Tensor | tuple[int, ...]]
"""Site name to unit numbers."""


def scale(
    model: nn.Module, neurons: Units, sites: Mapping[str, Site], factor: float
) -> AbstractContextManager[None]:
    """Run the model with the activations of ``neurons`` times ``factor``.

    Raises:
        SelectionError, CaptureError: See :func:`safeft.capture.edit`.

    Example:
        >>> with scale(model, located.indices, find_sites(model), 0.5):  # doctest: +SKIP
        ...     answers = generate(model, tokenizer, prompts)
    """
    return edit(model, neurons, sites, lambda _, values: values * factor)


def patch(
    model: nn.Module, neurons: Units, sites: Mapping[str, Site], values: Mapping[str, Tensor]
) -> AbstractContextManager[None]:
    """Run the model with each unit of ``neurons`` at one value, whatever the prompt and the token.

    Args:
        model: The model; it is not changed.
        neurons: Site name to unit numbers.
        sites: The model's sites.
        values: Site name to ``(units, width)`` for all units of the site, such as
            :func:`mean_activations` gives.

    Raises:
        SelectionError: A site without values; and see :func:`safeft.capture.edit`.

    Example:
        >>> means = mean_activations(model, batches, sites)  # doctest: +SKIP
        >>> with patch(model, located.indices, sites, means):  # doctest: +SKIP
        ...     answers = generate(model, tokenizer, prompts)
    """
    if missing := sorted(neurons.keys() - values.keys()):
        raise SelectionError(
            f"There are no values to put into {missing[:3]}, so these would run unpatched. Take "
            "the means over all sites of the set (`mean_activations`)."
        )

    def put(name: str, seen: Tensor) -> Tensor:
        chosen = values[name][torch.as_tensor(neurons[name], dtype=torch.long).unique()]
        return chosen.to(seen).expand_as(seen)

    return edit(model, neurons, sites, put)


def mean_activations(
    model: PreTrainedModel, batches: Iterable[Batch], sites: Mapping[str, Site]
) -> dict[str, Tensor]:
    """Each unit's mean activation over all tokens of ``batches``, in one streaming pass.

    All tokens count, those of the template and of the answers too, each as much as any other: a
    patch puts the one value in at every token, so it has to be what the unit has on the average
    token ("mean ablation", Wang et al., arXiv 2211.00593). A value per position would keep a unit
    that only acts where the answer starts, but positions of unlike prompts do not correspond.

    Args:
        model: The model.
        batches: Prompts, with answers where these are to count.
        sites: Sites to read.

    Returns:
        Site name to float64 ``(units, width)``.

    Raises:
        CaptureError: No batch, so no site was run.
    """
    moments = {name: Moments() for name in sites}
    with evaluating(model), capture(model, sites) as seen:
        for batch in batches:
            forward(model, batch)
            real = batch.attention_mask.bool()
            for name, values in seen.items():
                moments[name].update(values[real.to(values.device)].flatten(1))
    return {
        name: each.mean.unflatten(0, (sites[name].units, sites[name].width))
        for name, each in moments.items()
    }

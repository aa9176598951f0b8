"""``snip``: units whose weights the loss of safe answers depends on, that of others not."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from safeft.blocks import form_of
from safeft.errors import ConfigError
from safeft.locators.gradients import gradients_of, response_loss
from safeft.locators.scores import (
    SIDES,
    Scores,
    Side,
    Statistics,
    forward,
    is_matrix,
    per_unit,
)
from safeft.prompts import Batch
from safeft.shards import is_split
from safeft.sites import Site


class SnipFitter:
    """``abs(W * dL/dW)`` summed over a unit's weights, ``L`` the answers' negative log-likelihood.

    Source: Wei et al. 2024 (arXiv 2402.05162), SNIP scores of safety without those of utility. The
    absolute value is taken per batch; ``batch_size=1`` gives the paper's mean over single
    examples. One forward and backward pass; each gradient is reduced and freed as it arises.
    """

    needs_responses = True

    def __init__(self, model: PreTrainedModel, sites: Mapping[str, Site]) -> None:
        self._model, self._sites = model, sites
        self._axes = {
            part.name: part.axis
            for site in sites.values()
            for part in site.parts
            if is_matrix(model, part)
        }
        self.statistics = Statistics({(side, "batches"): torch.zeros(()) for side in SIDES})
        if any(is_split(parameter) for parameter in model.parameters()):
            raise ConfigError(
                "`snip` reads weights' gradients, which FSDP and ZeRO-3 reduce and shard as they "
                "arise. On sharded weights use `attribution`, `contrast`, `variance` or `wanda`."
            )

    def update(self, side: Side, batch: Batch) -> None:
        """One forward and backward pass over ``batch``."""

        def reducer(name: str) -> Callable[[Tensor, Tensor], None]:
            def reduce(weight: Tensor, gradient: Tensor) -> None:
                product = (weight.detach() * gradient).abs().double()
                product = product.view(form_of(weight.shape))
                entries = product.sum(1 if self._axes[name] == "columns" else 2).flatten()
                self.statistics.add(entries, side, name)

            return reduce

        reducers = {name: reducer(name) for name in self._axes}
        with gradients_of(self._model, reducers):
            response_loss(forward(self._model, batch, keep_logits=0), batch).backward()
        self.statistics.add(torch.ones(()), side, "batches")

    def scores(self) -> Scores:
        """Each side's mean over batches; units of the utility top are left out when selecting."""
        safety, utility = self._means("harmful"), self._means("benign")
        unscored = tuple(
            name
            for name, site in self._sites.items()
            if site.writes.expert is not None and not (safety[name].any() or utility[name].any())
        )
        return Scores(safety, utility, "exclude", unscored)

    def _means(self, side: Side) -> dict[str, Tensor]:
        batches = max(1, int(self.statistics.total(side, "batches")))
        return {
            name: torch.stack(
                [
                    per_unit(part, self.statistics.total(side, part.name), site.units)
                    for part in site.parts
                    if part.name in self._axes
                ]
            ).sum(0)
            / batches
            for name, site in self._sites.items()
        }

"""``snip``: units whose weights the loss of safe answers depends on, that of others not."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from safeft.errors import ConfigError
from safeft.locators.gradients import gradients_of, response_loss
from safeft.locators.scores import Scores, Side, Statistics, forward, is_matrix, per_unit
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
        self._parts = {
            part.module: (part, site.units)
            for site in sites.values()
            for part in site.parts
            if is_matrix(model, part)
        }
        self.statistics: Statistics = {
            (side, "batches"): torch.zeros(()) for side in ("harmful", "benign")
        }
        if any(is_split(parameter) for parameter in model.parameters()):
            raise ConfigError(
                "`snip` reads weights' gradients, which FSDP and ZeRO-3 reduce and shard as they "
                "arise. On sharded weights use `attribution`, `contrast`, `variance` or `wanda`."
            )

    def update(self, side: Side, batch: Batch) -> None:
        """One forward and backward pass over ``batch``."""

        def reducer(module: str) -> Callable[[Tensor, Tensor], None]:
            part, units = self._parts[module]

            def reduce(weight: Tensor, gradient: Tensor) -> None:
                product = (weight.detach() * gradient).abs().double()
                entries = product.sum(1 if part.axis == "rows" else 0)
                key = (side, module)
                found = per_unit(part, entries, units)
                self.statistics[key] = self._sum(key) + found if key in self.statistics else found

            return reduce

        reducers = {module: reducer(module) for module in self._parts}
        with gradients_of(self._model, reducers):
            response_loss(forward(self._model, batch, keep_logits=0), batch).backward()
        self.statistics[side, "batches"] = self._sum((side, "batches")) + 1

    def scores(self) -> Scores:
        """Each side's mean over batches; units of the utility top are left out when selecting."""
        return Scores(self._means("harmful"), self._means("benign"), "exclude")

    def _sum(self, key: tuple[Side, str]) -> Tensor:
        found = self.statistics[key]
        assert isinstance(found, Tensor)
        return found

    def _means(self, side: Side) -> dict[str, Tensor]:
        return {
            name: torch.stack(
                [self._sum((side, p.module)) for p in site.parts if p.module in self._parts]
            ).sum(0)
            / max(1, int(self._sum((side, "batches"))))
            for name, site in self._sites.items()
        }

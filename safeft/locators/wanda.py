"""``wanda``: units whose weights meet large inputs in safe answers and not in ordinary ones."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from safeft.capture import watch_inputs
from safeft.locators.scores import (
    Scores,
    Side,
    Statistics,
    forward,
    is_matrix,
    per_unit,
    weight_of,
)
from safeft.prompts import Batch
from safeft.sites import Part, Site


class WandaFitter:
    """``abs(W) norm2(x)`` summed over a unit's weights, inputs taken at response tokens.

    Source: Wei et al. 2024 (arXiv 2402.05162), Wanda scores of safety without those of utility;
    entries are summed to units here. One forward pass over prompts with their answers.
    """

    needs_responses = True

    def __init__(self, model: PreTrainedModel, sites: Mapping[str, Site]) -> None:
        self._model, self._sites = model, sites
        self._parts = {
            part.module: part
            for site in sites.values()
            for part in site.parts
            if is_matrix(model, part)
        }
        self.statistics = Statistics()

    @torch.no_grad()
    def update(self, side: Side, batch: Batch) -> None:
        """One forward pass over ``batch``, read at response tokens."""

        def observe(module: str, inputs: Tensor) -> None:
            squares = inputs[batch.is_response.to(inputs.device)].double().square_().sum(0)
            self.statistics.add(squares, side, module)

        with watch_inputs(self._model, list(self._parts), observe):
            forward(self._model, batch)

    def scores(self) -> Scores:
        """Each side's sums; units of the utility top are left out when selecting."""
        return Scores(self._sums("harmful"), self._sums("benign"), "exclude")

    @torch.no_grad()
    def _sums(self, side: Side) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        for name, site in self._sites.items():
            matrices = [part for part in site.parts if part.module in self._parts]
            rows = [per_unit(part, self._entries(side, part), site.units) for part in matrices]
            sums[name] = torch.stack(rows).sum(0)
        return sums

    def _entries(self, side: Side, part: Part) -> Tensor:
        weight = weight_of(self._model, part.module).double().abs()
        norms = self.statistics.total(side, part.module).sqrt().to(weight)
        return weight @ norms if part.axis == "rows" else weight.sum(0) * norms

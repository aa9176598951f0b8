"""``wanda``: units whose weights meet large inputs in safe answers and not in ordinary ones."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from safeft.capture import Seen, tap
from safeft.locators.scores import SIDES, Scores, Side, Statistics, forward, is_matrix
from safeft.prompts import Batch
from safeft.sites import Part, Site
from safeft.weights import ModelWeights


class WandaFitter:
    """``abs(W) norm2(x)`` summed over a unit's weights, inputs taken at response tokens.

    Source: Wei et al. 2024 (arXiv 2402.05162), Wanda scores of safety without those of utility;
    entries are summed to units here. One forward pass over prompts with their answers.
    """

    needs_responses = True

    def __init__(self, model: PreTrainedModel, sites: Mapping[str, Site]) -> None:
        self._model, self._sites = model, sites
        self._parts = {
            part.inlet: part
            for site in sites.values()
            for part in site.parts
            if is_matrix(model, part)
        }
        self._towers = {part.inlet: site.tower for site in sites.values() for part in site.parts}
        self.statistics = Statistics()

    @torch.no_grad()
    def update(self, side: Side, batch: Batch) -> None:
        """One forward pass over ``batch``, read at response tokens."""

        def observe(inlet: str, seen: Seen) -> None:
            text = self._towers[inlet] == "text"
            values = seen.at(batch.is_response if text else None)
            self.statistics.add(values.double().square_().sum(0), side, inlet)

        with tap(self._model, list(self._parts.values()), observe):
            forward(self._model, batch)

    def scores(self) -> Scores:
        """Each side's sums; units of the utility top are left out when selecting."""
        return Scores(self._sums("harmful"), self._sums("benign"), "exclude", self._unscored())

    def _unscored(self) -> tuple[str, ...]:
        return tuple(
            name
            for name, site in self._sites.items()
            if not any((side, site.writes.inlet) in self.statistics for side in SIDES)
        )

    @torch.no_grad()
    def _sums(self, side: Side) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        for name, site in self._sites.items():
            matrices = [part for part in site.parts if part.inlet in self._parts]
            rows = [self._part(side, part, site) for part in matrices]
            sums[name] = torch.stack(rows).sum(0)
        return sums

    def _part(self, side: Side, part: Part, site: Site) -> Tensor:
        """Sums of ``abs(W) norm2(x)`` over the entries of each unit in one part."""
        if (side, part.inlet) not in self.statistics:  # an expert that was not run on that side
            return torch.zeros(site.units, dtype=torch.double)
        squares = self.statistics.total(side, part.inlet)
        table = part.table(site.units)
        weight = ModelWeights(self._model).lines(part.name, part.axis, table.flatten())
        weight, norms = weight.double().abs(), squares.sqrt().to(weight.device)
        entries = weight.sum(1) * norms if part is site.writes else weight @ norms
        return entries.view(table.shape).sum(1)

"""``contrast``: units that write more on harmful than on benign prompts (Precise Shield style)."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from safeft.capture import watch_inputs
from safeft.locators.scores import Moments, Scores, Side, Statistics, contributions, forward
from safeft.prompts import Batch, TokenChoice
from safeft.sites import Site


class ContrastFitter:
    """Size of a unit's mean contribution at the last prompt token, as a share of its layer.

    Per side D: ``importance_j = norm(mean_D(x_j) W[:, j])``, divided by the layer's sum. Units in
    the top of H and not in the top of B are selected. Source: Precise Shield (arXiv 2604.08881),
    from its formulas as reported; one forward pass per prompt.
    """

    needs_responses = False

    def __init__(
        self,
        model: PreTrainedModel,
        sites: Mapping[str, Site],
        tokens: TokenChoice = "last_prompt",
    ) -> None:
        self._model, self._sites = model, sites
        self._tokens: TokenChoice = tokens
        self._by_writer = {site.writes.module: site.name for site in sites.values()}
        self.statistics = Statistics(
            {(side, name): Moments() for side in ("harmful", "benign") for name in sites}
        )

    @torch.no_grad()
    def update(self, side: Side, batch: Batch) -> None:
        """One forward pass over ``batch``, read at the chosen tokens."""
        chosen = batch.choose(self._tokens)

        def observe(writer: str, inputs: Tensor) -> None:
            seen = self.statistics.moments(side, self._by_writer[writer])
            seen.update(inputs[chosen.to(inputs.device)])

        with watch_inputs(self._model, list(self._by_writer), observe):
            forward(self._model, batch)

    def scores(self) -> Scores:
        """Each side's share of the layer's writing."""
        return Scores(self._shares("harmful"), self._shares("benign"), "exclude")

    def _shares(self, side: Side) -> dict[str, Tensor]:
        shares = {}
        for name, site in self._sites.items():
            importance = contributions(self._model, site, self.statistics.moments(side, name).mean)
            shares[name] = importance / importance.sum().clamp(min=torch.finfo(torch.double).tiny)
        return shares

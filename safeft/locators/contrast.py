"""``contrast``: units that write more on harmful than on benign prompts (Precise Shield style)."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from safeft.capture import Seen, tap
from safeft.locators.scores import (
    SIDES,
    Moments,
    Scores,
    Side,
    Statistics,
    contributions,
    forward,
)
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
        self._by_inlet = {site.writes.inlet: site for site in sites.values()}
        self.statistics = Statistics({(side, name): Moments() for side in SIDES for name in sites})

    @torch.no_grad()
    def update(self, side: Side, batch: Batch) -> None:
        """One forward pass over ``batch``, read at the chosen tokens."""
        chosen = batch.choose(self._tokens)

        def observe(inlet: str, seen: Seen) -> None:
            site = self._by_inlet[inlet]
            # Images have no prompt tokens to choose: what a vision tower sees is all read.
            values = seen.at(chosen if site.tower == "text" else None)
            self.statistics.moments(side, site.name).update(values)

        self.statistics.add(chosen.sum().cpu(), side, "tokens")
        with tap(self._model, [site.writes for site in self._sites.values()], observe):
            forward(self._model, batch)

    def scores(self) -> Scores:
        """Each side's share of the layer's writing."""
        safety, utility = self._shares("harmful"), self._shares("benign")
        return Scores(safety, utility, "exclude", self._unscored())

    def _unscored(self) -> tuple[str, ...]:
        """Experts that no token was routed to."""
        return tuple(
            name
            for name in self._sites
            if not any(self.statistics.moments(side, name).count for side in SIDES)
        )

    def _moments(self, side: Side, site: Site) -> Moments:
        found = self.statistics.moments(side, site.name)
        if site.writes.expert is None:
            return found
        return found.out_of(int(self.statistics.total(side, "tokens")), site.units * site.width)

    def _shares(self, side: Side) -> dict[str, Tensor]:
        shares = {}
        for name, site in self._sites.items():
            importance = contributions(self._model, site, self._moments(side, site).mean)
            shares[name] = importance / importance.sum().clamp(min=torch.finfo(torch.double).tiny)
        return shares

"""``random``: the control. A located set that does no better than this has found nothing."""

from collections.abc import Mapping

import torch

from safeft.locators.scores import Scores, Side, Statistics
from safeft.prompts import Batch
from safeft.sites import Site


class RandomFitter:
    """Seeded uniform scores; looks at no prompt."""

    needs_responses = False

    def __init__(self, sites: Mapping[str, Site], seed: int) -> None:
        self._sites, self._seed = sites, seed
        self.statistics = Statistics()

    def update(self, side: Side, batch: Batch) -> None:
        """Nothing to take up."""

    def scores(self) -> Scores:
        """The same for the same seed and sites."""
        generator = torch.Generator().manual_seed(self._seed)
        drawn = {
            name: torch.rand(site.units, generator=generator, dtype=torch.double)
            for name, site in self._sites.items()
        }
        return Scores(drawn, None, "plain")

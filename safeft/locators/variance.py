"""``variance``: units whose output varies on safety prompts and not on others (SSAH style)."""

import torch
from torch import Tensor

from safeft.locators.contrast import ContrastFitter
from safeft.locators.scores import Scores, Side, weight_of


class VarianceFitter(ContrastFitter):
    """``I_j = Var(x_j) norm2(W[:, j])^2`` over prompt tokens, safety minus utility.

    Source: Superficial Safety Alignment Hypothesis (arXiv 2410.10862), its importance score for
    structured units; for attention heads summed over the head's features. One forward pass.
    """

    def scores(self) -> Scores:
        """Each side's variance of writing, to be subtracted."""
        return Scores(self._importance("harmful"), self._importance("benign"), "difference")

    @torch.no_grad()
    def _importance(self, side: Side) -> dict[str, Tensor]:
        found = {}
        for name, site in self._sites.items():
            columns = weight_of(self._model, site.writes.module).double().square().sum(0)
            fluctuation = self.statistics.moments(side, name).variance.to(columns) * columns
            found[name] = fluctuation.unflatten(0, (site.units, site.width)).sum(1)
        return found

"""``variance``: units whose output varies on safety prompts and not on others (SSAH style)."""

import torch
from torch import Tensor

from safeft.locators.contrast import ContrastFitter
from safeft.locators.scores import Scores, Side, written_by


class VarianceFitter(ContrastFitter):
    """``I_j = Var(x_j) norm2(W[:, j])^2`` over prompt tokens, safety minus utility.

    Source: Superficial Safety Alignment Hypothesis (arXiv 2410.10862), its importance score for
    structured units; for attention heads summed over the head's features. One forward pass.
    """

    def scores(self) -> Scores:
        """Each side's variance of writing, to be subtracted."""
        safety, utility = self._importance("harmful"), self._importance("benign")
        return Scores(safety, utility, "difference", self._unscored())

    @torch.no_grad()
    def _importance(self, side: Side) -> dict[str, Tensor]:
        found = {}
        for name, site in self._sites.items():
            columns = written_by(self._model, site).square().sum(-1)
            variance = self._moments(side, site).variance.to(columns)
            found[name] = (variance.view_as(columns) * columns).sum(1)
        return found

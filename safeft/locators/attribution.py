"""``attribution``: units on which the decision to refuse hangs (single-neuron study style)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from safeft.capture import Seen, tap
from safeft.locators.gradients import input_gradients
from safeft.locators.scores import SIDES, Moments, Scores, Side, Statistics, forward
from safeft.prompts import Batch
from safeft.sites import Site


class AttributionFitter:
    """``max_t (g_H + g_B) (a_B - a_H)`` at the template tokens t after the instruction.

    ``g`` is the mean gradient of ``L = -log(p / (1 - p))`` with respect to the unit's activation,
    ``p`` the probability of a token that opens a refusal, ``a`` the mean activation: the
    first-order effect on refusal of giving the unit its benign value. A unit that is no more
    active on harmful prompts gets at most 0. Source: "A Single Neuron Is Sufficient to Bypass
    Safety Alignment" (arXiv 2605.08513); the paper looks at the first two thirds of the layers,
    here all are scored. One forward and backward pass, no weight gradients.

    Args:
        model: The model.
        sites: The sites to score.
        openings: Token numbers that start a refusal.
        prefix: Token numbers the answer is made to start with before ``openings`` are read; see
            :func:`safeft.locators.openings.refusal_openings`.
    """

    needs_responses = False

    def __init__(
        self,
        model: PreTrainedModel,
        sites: Mapping[str, Site],
        openings: Sequence[int],
        prefix: Sequence[int] = (),
    ) -> None:
        self._model, self._sites = model, sites
        self._openings = torch.tensor(sorted(set(openings)))
        self._prefix = tuple(prefix)
        self._by_inlet = {site.writes.inlet: site.name for site in sites.values()}
        self.statistics = Statistics(
            {
                (kind, side, name): Moments()
                for kind in ("activation", "gradient")
                for side in SIDES
                for name in sites
            }
        )

    def update(self, side: Side, batch: Batch) -> None:
        """One forward and backward pass over ``batch``; its answers, if any, are left out."""
        batch = batch.answered(self._prefix)
        chosen = batch.choose("post_instruction")

        def gather(name: str, kind: str, seen: Seen) -> None:
            rows = seen.spread(chosen).unflatten(0, (len(chosen), batch.tail)).flatten(1)
            self.statistics.moments(kind, side, name).update(rows)

        def observe(inlet: str, seen: Seen) -> None:
            name, values = self._by_inlet[inlet], seen.values
            gather(name, "activation", Seen(values.detach(), seen.places))
            values.register_hook(lambda g: gather(name, "gradient", Seen(g, seen.places)))

        self.statistics.add(torch.tensor(len(chosen)), side, "prompts")
        with input_gradients(self._model):
            with tap(self._model, [site.writes for site in self._sites.values()], observe):
                logits = forward(self._model, batch)
            self._refusal_loss(logits[:, -1].float()).sum().backward()

    def _refusal_loss(self, logits: Tensor) -> Tensor:
        """``-log(p / (1 - p))`` per prompt, from logits so that it does not saturate."""
        refuses = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        refuses[self._openings.to(logits.device)] = True
        inside = logits.masked_fill(~refuses, -torch.inf).logsumexp(-1)
        return logits.masked_fill(refuses, -torch.inf).logsumexp(-1) - inside

    def scores(self) -> Scores:
        """One score per unit; there is no separate utility side."""
        unscored = tuple(
            name
            for name in self._sites
            if not any(self.statistics.moments("activation", side, name).count for side in SIDES)
        )
        found = {name: self._score(site) for name, site in self._sites.items()}
        return Scores(found, None, "plain", unscored)

    def _score(self, site: Site) -> Tensor:
        def mean(kind: str, side: Side) -> Tensor:
            found = self.statistics.moments(kind, side, site.name)
            if site.writes.expert is not None:
                prompts = int(self.statistics.total(side, "prompts"))
                # Of a side that the expert was not run on, the other tells how many features.
                sides = [self.statistics.moments(kind, s, site.name) for s in SIDES]
                known = [len(seen.mean) for seen in sides if seen.count]
                found = found.out_of(prompts, known[0] if known else site.units * site.width)
            return found.mean.unflatten(0, (-1, site.units, site.width))

        harmful, benign = mean("activation", "harmful"), mean("activation", "benign")
        slope = mean("gradient", "harmful") + mean("gradient", "benign")
        effect = (slope * (benign - harmful)).sum(-1)
        more_active = harmful.norm(dim=-1) > benign.norm(dim=-1)
        return torch.where(more_active, effect, effect.clamp(max=0)).amax(0)

"""``expertise``: units that tell toxic text from other text, by the AUROC of their activations.

Source: AurA (Suau et al., "Whispering Experts"): a unit's response to a text is its largest
activation over the tokens, its expertise the area under the ROC curve of that response against the
labels. Ours: the response is the activation's size, since the sign of a gated unit means nothing
(both of its factors may turn round), of an attention head the norm; ``signed`` reads it as
published.
"""

from collections.abc import Mapping
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from safeft.capture import Seen, tap
from safeft.errors import ConfigError, PromptError, UnsupportedModelError
from safeft.locators.auroc import auroc
from safeft.locators.scores import SIDES, Samples, Scores, Side, Statistics, forward
from safeft.prompts import Batch, TokenChoice
from safeft.sites import Site, plain_model

Pool: TypeAlias = Literal["max", "mean", "last"]
POOLS: tuple[str, ...] = get_args(Pool)


class ExpertiseFitter:
    """One response a prompt and unit, kept on the CPU; ranked when scores are asked for.

    Ranks need all prompts, so unlike sums they grow with them: ``prompts x units`` numbers, of
    MLP units under max and last in the model's own dtype (which is exact: 0.7 GB for 1,000 prompts
    of a 7B model in bfloat16), of means and of heads in float32. The GPU holds one batch; scoring
    ranks 2,048 units at a time.

    Args:
        model: The model.
        sites: What to read; text towers and projectors, and vision towers whose parts can be
            told apart by prompt.
        tokens: Of text towers: which tokens are read; None as :func:`writing` says.
        pool: A prompt's response: the largest over its tokens, their mean, or the last token's.
        signed: Read activations of single numbers with their sign.

    Raises:
        ConfigError: No such way to pool.
    """

    needs_responses = False

    def __init__(
        self,
        model: PreTrainedModel,
        sites: Mapping[str, Site],
        tokens: TokenChoice | None = None,
        pool: Pool = "max",
        signed: bool = False,
    ) -> None:
        if pool not in POOLS:
            raise ConfigError(f"pool={pool!r} is not one of {', '.join(POOLS)}.")
        self._model, self._sites = model, sites
        self._tokens: TokenChoice | None = tokens
        self._pool, self._signed = pool, signed
        self.statistics = Statistics({(side, name): Samples() for side in SIDES for name in sites})

    @torch.no_grad()
    def update(self, side: Side, batch: Batch) -> None:
        """One forward pass over ``batch``; without images only text towers are read.

        Raises:
            PromptError: A prompt has none of the tokens that are to be read.
        """
        chosen = self._chosen(batch)
        read = [s for s in self._sites.values() if s.tower == "text" or batch.images]
        by_inlet = {site.writes.inlet: site for site in read}
        pooled: dict[str, Tensor] = {}

        def observe(inlet: str, seen: Seen) -> None:
            site = by_inlet[inlet]
            if site.tower == "text":
                values, counts = seen.spread(chosen), chosen.sum(1).tolist()
            else:
                values = seen.at(None)
                counts = _parts_of(self._model, batch, len(values), site)
            pooled[site.name] = self._response(values, counts, site)

        with tap(self._model, [site.writes for site in read], observe):
            forward(self._model, batch)
        for site in read:
            # Of an expert that nothing came to, every unit was at zero.
            none = torch.zeros(len(chosen), site.units)
            self.statistics.samples(side, site.name).update(pooled.get(site.name, none))

    def _chosen(self, batch: Batch) -> Tensor:
        chosen = writing(batch) if self._tokens is None else batch.choose(self._tokens)
        if not bool(chosen.any(1).all()):
            raise PromptError(
                f"{int((~chosen.any(1)).sum())} prompts of a batch have no token of "
                f"tokens={self._tokens!r}, so their units' responses are unknown. Give a "
                "`response` with every row, or choose tokens='prompt'."
            )
        return chosen

    def _response(self, values: Tensor, counts: list[int], site: Site) -> Tensor:
        """``(samples, units * width)``, each prompt's samples together, to ``(prompts, units)``."""
        exact = site.width == 1 and self._pool != "mean"
        if site.width > 1:
            values = values.float().unflatten(-1, (site.units, site.width)).norm(dim=-1)
        elif not self._signed:
            values = values.abs()
        parts = (values if exact else values.float()).split(counts)
        if self._pool == "max":
            return torch.stack([part.amax(0) for part in parts])
        if self._pool == "mean":
            return torch.stack([part.mean(0) for part in parts])
        return torch.stack([part[-1] for part in parts])

    def responses(self, name: str) -> tuple[Tensor, Tensor]:
        """What a site's units did on toxic and on neutral prompts, ``(prompts, units)`` each."""
        toxic, neutral = (self.statistics.samples(side, name).rows for side in SIDES)
        return toxic, neutral

    def unscored(self) -> tuple[str, ...]:
        """Sites that did nothing at all, or saw prompts of one kind only."""
        return tuple(
            name
            for name in self._sites
            if any(not len(side) for side in self.responses(name))
            or not any(bool(side.any()) for side in self.responses(name))
        )

    def scores(self) -> Scores:
        """Each unit's AUROC, 0.5 where a site is unscored."""
        out = set(self.unscored())
        found = {
            name: torch.full((site.units,), 0.5, dtype=torch.double)
            if name in out
            else auroc(*self.responses(name))
            for name, site in self._sites.items()
        }
        return Scores(found, None, "plain", tuple(out))


def written(batch: Batch) -> Tensor:
    """The tokens of each row's response, or of its prompt where it has none.

    Returns:
        Bool ``(prompts, tokens)``.
    """
    answered = batch.is_response.any(1, keepdim=True)
    return torch.where(answered, batch.is_response, batch.is_prompt)


def writing(batch: Batch) -> Tensor:
    """The tokens of :func:`written`, and the one before them, from which the first is predicted.

    Returns:
        Bool ``(prompts, tokens)``.
    """
    chosen = written(batch)
    before = torch.zeros_like(chosen)
    before[:, :-1] = chosen[:, 1:]
    return (chosen | before) & batch.attention_mask.bool()


def _parts_of(model: PreTrainedModel, batch: Batch, parts: int, site: Site) -> list[int]:
    """How many of an image tower's parts are each prompt's.

    Images follow each other as their places among the tokens do: a projector has a part a place,
    a tower before it some whole number of them, or the same number for every image.
    """
    config = plain_model(model).config
    place = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    places = (batch.input_ids == place).sum(1).tolist()
    total = sum(places)
    if total and parts % total == 0:
        return [count * (parts // total) for count in places]
    if len(set(places)) == 1 and parts % len(places) == 0:
        return [parts // len(places)] * len(places)
    raise UnsupportedModelError(
        f"{site.name} saw {parts} parts of images where {len(places)} prompts have {total} places "
        "for them, so it is unknown which prompt they are of. Leave the "
        f"{site.tower} tower out (towers)."
    )

"""At what a unit is held: four ways to weaken one, in the unit's own scale.

All are after "A Single Neuron Is Sufficient to Bypass Safety Alignment" (arXiv 2605.08513), which
holds a unit at a constant ``m`` of the sign opposite to what it has on harmful prompts, or at

    clamp(k m v / d - d, m)      d = a_H - a_B,  v: largest activation in d's direction

which on prompts that leave the unit alone is about ``-d`` and on harmful ones ``m``. Both act at
every token, of the prompt and of the answer. Where the paper is silent, here:

- ``m`` is given in units of the largest ``|activation|`` the unit has on reference prompts and the
  model's own answers to them, since constants of one unit mean nothing to another;
- ``d`` is taken at that token after the instruction where it is largest (the paper: where the
  attribution is);
- ``v`` is read for each prompt off the untouched model, at the tokens after the instruction, and
  kept for the answer; where it points against ``d`` it counts as 0; ``k`` is 1;
- a unit with ``d = 0`` has no direction: it is held at ``+m``, by the anchor too.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from safeft.auditing.result import Kind
from safeft.capture import Seen, tap
from safeft.locators.scores import SIDES, Side, forward
from safeft.measure import evaluating
from safeft.prompts import Batch
from safeft.sites import Site

PLAN: tuple[tuple[Kind, float | None], ...] = (
    ("zero", None),
    ("mean", None),
    ("constant", 1.0),
    ("constant", 2.0),
    ("constant", 4.0),
    ("anchor", 4.0),
)
"""What every neuron is tested with: kinds and, where they have one, strengths without sign."""


@dataclass(frozen=True)
class Reference:
    """What one unit does by itself.

    Attributes:
        mean: Over all tokens of benign prompts and answers; of an expert, those routed to it.
        largest: ``|activation|``, over all tokens of both sides.
        gap: ``d``: mean on harmful prompts less that on benign ones.
    """

    mean: float
    largest: float
    gap: float

    def signed(self, strength: float) -> float:
        """The strength with the sign opposite to the gap's."""
        return -strength if self.gap > 0 else strength

    def held_at(self, kind: Kind, strength: float | None, natural: Tensor) -> Tensor:
        """The value put in, for each prompt.

        Args:
            kind: Of intervention.
            strength: Without a sign, of ``constant`` and ``anchor``.
            natural: The unit's activations at the tokens after the instruction in the untouched
                model, ``(prompts, tokens)``.

        Returns:
            Float64 ``(prompts,)``.

        Example:
            >>> Reference(0.5, 2.0, 1.0).held_at("constant", 4.0, torch.zeros(2, 3))
            tensor([-8., -8.], dtype=torch.float64)
            >>> Reference(0.5, 2.0, 1.0).held_at("anchor", 4.0, torch.tensor([[0.0], [1.0]]))
            tensor([-1., -8.], dtype=torch.float64)
        """
        same = torch.ones(len(natural), dtype=torch.double)
        if kind == "zero":
            return 0 * same
        if kind == "mean":
            return self.mean * same
        most = self.signed(strength or 0.0) * self.largest
        if kind == "constant" or not self.gap:
            return most * same
        ahead = natural.double() / self.gap  # v / d, for each token
        put = most * ahead.amax(1).clamp(min=0) - self.gap
        return put.clamp(min=most) if most < 0 else put.clamp(max=most)


class References:
    """Gathers what all units do by themselves, in one pass over reference prompts.

    Args:
        model: The model, untouched.
        sites: MLP sites, of width 1.

    Example:
        >>> references = References(model, sites)  # doctest: +SKIP
        >>> references.update("harmful", batches)  # doctest: +SKIP
        >>> references.update("benign", batches)  # doctest: +SKIP
        >>> references.of("model.layers.1.mlp", 17)  # doctest: +SKIP
        Reference(mean=0.31, largest=8.2, gap=2.7)
    """

    def __init__(self, model: PreTrainedModel, sites: Mapping[str, Site]) -> None:
        self._model, self._sites = model, sites
        self._name = {site.writes.inlet: site.name for site in sites.values()}
        self._largest = {name: torch.zeros(site.units) for name, site in sites.items()}
        self._sums: dict[tuple[str, str], Tensor] = {}
        self._tokens = dict.fromkeys(sites, 0)
        self._prompts: dict[Side, int] = dict.fromkeys(SIDES, 0)

    def update(self, side: Side, batches: Iterable[Batch]) -> None:
        """One pass over prompts with answers."""
        for batch in batches:
            real, tail = batch.attention_mask.bool(), batch.choose("post_instruction")

            def observe(inlet: str, seen: Seen, real: Tensor = real, tail: Tensor = tail) -> None:
                name = self._name[inlet]
                values = seen.at(real).float()
                if len(values):
                    most = values.abs().amax(0).cpu()
                    self._largest[name] = torch.maximum(self._largest[name], most)
                if side == "benign":
                    self._tokens[name] += len(values)
                    self._add(name, "all", values.double().sum(0).cpu())
                after = seen.spread(tail).double().unflatten(0, (len(tail), -1))
                self._add(name, side, after.sum(0).cpu())

            parts = [site.writes for site in self._sites.values()]
            with evaluating(self._model), tap(self._model, parts, observe):
                forward(self._model, batch)
            self._prompts[side] += len(tail)

    def of(self, site: str, unit: int) -> Reference:
        """What is known of one unit; an expert's is at 0 where nothing is routed to it."""

        def mean(what: str, count: int) -> Tensor:
            found = self._sums.get((site, what), torch.zeros(1, self._sites[site].units))
            return found[..., unit] / max(count, 1)

        gaps = mean("harmful", self._prompts["harmful"]) - mean("benign", self._prompts["benign"])
        gap = gaps.flatten()[gaps.abs().argmax()]
        average = mean("all", self._tokens[site]).sum()
        return Reference(float(average), float(self._largest[site][unit]), float(gap))

    def _add(self, name: str, what: str, values: Tensor) -> None:
        key = (name, what)
        self._sums[key] = self._sums[key] + values if key in self._sums else values


def natural(
    model: PreTrainedModel,
    sites: Mapping[str, Site],
    batches: Iterable[tuple[Sequence[int], Batch]],
    units: Sequence[tuple[str, int]],
) -> Tensor:
    """Activations of units at the tokens after the instruction, in the untouched model.

    Args:
        model: The model.
        sites: Its sites.
        batches: Prompts without answers, each batch with their numbers.
        units: Site and number of each; an expert's are at 0 where a token is routed elsewhere.

    Returns:
        Float32 ``(units, prompts, tokens)``, on the CPU.
    """
    places: dict[str, list[int]] = {}
    for place, (name, _) in enumerate(units):
        places.setdefault(sites[name].writes.inlet, []).append(place)
    found: list[tuple[Sequence[int], Tensor]] = []
    parts = [sites[name].writes for name in {name for name, _ in units}]
    for numbers, batch in batches:
        tail = batch.choose("post_instruction")
        here = torch.zeros(len(units), len(tail), batch.tail)

        def observe(inlet: str, seen: Seen, tail: Tensor = tail, here: Tensor = here) -> None:
            chosen = torch.tensor([units[place][1] for place in places[inlet]])
            values = seen.spread(tail).index_select(-1, chosen.to(seen.values.device))
            here[places[inlet]] = values.unflatten(0, (len(tail), -1)).movedim(-1, 0).float().cpu()

        with evaluating(model), tap(model, parts, observe):
            forward(model, batch)
        found.append((numbers, here))
    everything = torch.cat([here for _, here in found], dim=1)
    order = torch.tensor([number for numbers, _ in found for number in numbers])
    return everything[:, order.argsort()]

"""One look at a model in training: refusal and the safety neurons, in one small forward pass."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, nan
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from safeft.capture import Seen, tap
from safeft.locators.openings import RefusalOpenings
from safeft.locators.scores import forward
from safeft.margin import refusal_margin
from safeft.measure import evaluating
from safeft.neurons import NeuronSet
from safeft.processes import broadcast, rank, ranks, summed
from safeft.prompts import Batch, Prompt, Reader, batches, input_device
from safeft.shards import is_split
from safeft.sites import find_sites


@dataclass(frozen=True)
class Look:
    """What a look found.

    Attributes:
        step: Optimizer steps that led to these weights.
        refusal_margin: Mean over the prompts, in nats; see :func:`safeft.margin.refusal_margin`.
        refusal_share: Share of the prompts whose margin is above 0.
        neuron_drift: ``norm(mean - start) / norm(start)``, ``mean`` the safety neurons' mean
            activations and ``start`` those of the first look; None without neurons.
    """

    step: int
    refusal_margin: float
    refusal_share: float
    neuron_drift: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which knows no NaN."""
        return {
            name: value if value is None or isfinite(value) else None
            for name, value in vars(self).items()
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """What :meth:`to_dict` made."""
        margin = data["refusal_margin"]
        return cls(
            int(data["step"]),
            nan if margin is None else float(margin),
            float(data["refusal_share"]),
            data["neuron_drift"],
        )


class Observer:
    """Asks a model how it would start its answers, and leaves it as it was.

    No answer is generated: one forward pass over the prompts, in evaluation mode and without
    gradients. Several processes share the batches; where their weights are sharded, all run all
    of them, since each needs the others to run at all.

    Args:
        model: The model in training, on its device.
        tokenizer: Its tokenizer or processor.
        prompts: Safety prompts kept from training; their responses are not read.
        openings: How this model starts a refusal.
        neurons: Units to watch at the template tokens after the instruction, where refusing is
            decided; those of other towers than the text's are not.
        **batching: See :func:`safeft.prompts.batches`.

    Example:
        >>> openings = refusal_openings(model, tokenizer, harmful, benign)  # doctest: +SKIP
        >>> Observer(model, tokenizer, harmful, openings).look(0).refusal_share  # doctest: +SKIP
        0.96
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Reader,
        prompts: Sequence[Prompt],
        openings: RefusalOpenings,
        neurons: NeuronSet | None = None,
        **batching: Any,
    ) -> None:
        self._model, self.openings = model, openings
        asked = [Prompt(prompt.messages) for prompt in prompts]
        self._batches = [
            batch.answered(openings.prefix)
            for batch in batches(
                tokenizer,
                asked,
                device=input_device(model),
                description="safety prompts",
                **batching,
            )
        ]
        sites = find_sites(model) if neurons is not None else {}
        self._units = {
            sites[name].writes.inlet: (sites[name], units)
            for name, units in (neurons.indices if neurons else {}).items()
            if sites[name].tower == "text"
        }
        self._sharded = any(is_split(parameter) for parameter in model.parameters())
        self.start: Tensor | None = None
        """The safety neurons' mean activations at the first look, float64 ``(units * width,)``."""
        self.seconds = 0.0
        """Spent looking, so far."""

    def look(self, step: int) -> Look:
        """Measure the model as it is; every process of the run calls this, and gets the same."""
        device = input_device(self._model)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)  # Or the step before would be counted in.
        begun = time.perf_counter()
        every, first = (1, 0) if self._sharded else (ranks(), rank())
        total = torch.zeros(4 + sum(len(u) * site.width for site, u in self._units.values()))
        total = total.double()
        with evaluating(self._model):
            for batch in self._batches[first::every]:
                total += self._read(batch)
        _leave_sharded(self._model)
        total = broadcast(total) if self._sharded else summed(total)
        margin, refusing, prompts, tokens = total[:4].tolist()
        means = total[4:] / tokens
        start = self.start = means if self.start is None else self.start
        drift = float((means - start).norm() / start.norm()) if self._units else None
        self.seconds += time.perf_counter() - begun
        return Look(step, margin / prompts, refusing / prompts, drift)

    def _read(self, batch: Batch) -> Tensor:
        """Sums over a batch: margins, margins above 0, prompts, tokens, activations."""
        chosen = batch.choose("post_instruction")
        sums: dict[str, Tensor] = {}

        def observe(inlet: str, seen: Seen) -> None:
            site, units = self._units[inlet]
            numbers = torch.tensor(units, device=seen.values.device)
            values = seen.spread(chosen).unflatten(-1, (site.units, site.width))
            sums[inlet] = values.index_select(-2, numbers).float().sum(0).flatten()

        with tap(self._model, [site.writes for site, _ in self._units.values()], observe):
            kept = 1 + len(self.openings.prefix)
            logits = forward(self._model, batch, keep_logits=kept)
        margins = refusal_margin(logits[:, -kept:], self.openings.tokens, self.openings.prefix)
        counts = (margins.sum(), (margins > 0).sum(), len(margins), chosen.sum())
        found = [
            sums.get(inlet, torch.zeros(len(units) * site.width)).double().cpu()
            for inlet, (site, units) in self._units.items()
        ]
        numbers = torch.tensor([float(count) for count in counts], dtype=torch.float64)
        return torch.cat([numbers, *found])


def _leave_sharded(model: Any) -> None:
    """Without a backward pass FSDP2 would keep the last weights it gathered until the next step."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.reshard()

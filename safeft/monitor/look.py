"""One look at a model in training: refusal and the safety neurons, in one small forward pass."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite, nan
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from safeft.capture import Seen, tap
from safeft.locators.openings import RefusalOpenings
from safeft.locators.scores import forward
from safeft.margin import opening_likelihood, opens_greedily, refusal_margin
from safeft.measure import evaluating
from safeft.monitor.openings import Start
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
        refusal_margin: Log-odds of starting as a refusal, mean over the prompts, in nats; see
            :func:`safeft.margin.refusal_margin`. At 0 an answer that is sampled starts so half of
            the time.
        refusal_share: Share of the prompts whose greedy answer starts so.
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
    gradients (where refusals go on in several ways, one for each). Several processes share the
    batches; where their weights are sharded, all run all of them, since each needs the others to
    run at all.

    Args:
        model: The model in training, on its device.
        tokenizer: Its tokenizer or processor.
        prompts: Safety prompts kept from training; their responses are not read.
        openings: How this model starts a refusal; see :func:`safeft.monitor.openings.own_openings`.
        neurons: Units to watch at the template tokens after the instruction, where refusing is
            decided; those of other towers than the text's are not.
        **batching: See :func:`safeft.prompts.batches`.

    Example:
        >>> openings = own_openings(model, tokenizer, harmful, benign)  # doctest: +SKIP
        >>> Observer(model, tokenizer, harmful, openings).look(0).refusal_share  # doctest: +SKIP
        0.96
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Reader,
        prompts: Sequence[Prompt],
        openings: Sequence[RefusalOpenings],
        neurons: NeuronSet | None = None,
        **batching: Any,
    ) -> None:
        self._model, self.openings = model, tuple(openings)
        asked = [Prompt(prompt.messages) for prompt in prompts]
        place, bar = input_device(model), "safety prompts"
        self._batches = list(batches(tokenizer, asked, device=place, description=bar, **batching))
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
        width = sum(len(units) * site.width for site, units in self._units.values())
        total = torch.zeros(4 + width, dtype=torch.float64)
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
        """Sums over a batch: margins, refusals, prompts, tokens, activations."""
        sums: dict[str, Tensor] = {}
        likely: dict[Start, Tensor] = {}
        refused = torch.zeros(len(batch.input_ids), dtype=torch.bool)
        for head in _longest([opening.prefix for opening in self.openings]):
            answered, kept = batch.answered(head), 1 + len(head)
            with self._watched(answered, sums):
                logits = forward(self._model, answered, keep_logits=kept)[:, -kept:]
            for opening in self.openings:
                if opening.prefix == head[: len(opening.prefix)]:
                    start = logits[:, : 1 + len(opening.prefix)], opening.tokens, opening.prefix
                    likely[opening.prefix] = opening_likelihood(*start)
                    refused |= opens_greedily(*start)
        margins = refusal_margin(list(likely.values()))
        counts = (margins.sum(), refused.sum(), len(refused), len(refused) * batch.tail)
        found = [
            sums.get(inlet, torch.zeros(len(units) * site.width)).double().cpu()
            for inlet, (site, units) in self._units.items()
        ]
        numbers = torch.tensor([float(count) for count in counts], dtype=torch.float64)
        return torch.cat([numbers, *found])

    @contextmanager
    def _watched(self, batch: Batch, sums: dict[str, Tensor]) -> Iterator[None]:
        """Sum the neurons' activations into ``sums``, once: what is asked is the same each time."""
        chosen = batch.choose("post_instruction")

        def observe(inlet: str, seen: Seen) -> None:
            site, units = self._units[inlet]
            numbers = torch.tensor(units, device=seen.values.device)
            values = seen.spread(chosen).unflatten(-1, (site.units, site.width))
            sums[inlet] = values.index_select(-2, numbers).float().sum(0).flatten()

        with tap(self._model, [site.writes for site, _ in self._units.values()], observe):
            yield


def _longest(heads: Sequence[Start]) -> list[Start]:
    """Those that no other goes on from: passing over one of these passes over its starts too."""
    return [
        head
        for head in heads
        if not any(other != head and other[: len(head)] == head for other in heads)
    ]


def _leave_sharded(model: Any) -> None:
    """Without a backward pass FSDP2 keeps the last weights it gathered, whatever changes since."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()

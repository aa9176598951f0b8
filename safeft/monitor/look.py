"""One look at a model in training: how its answers start, and what its safety neurons do."""

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
from safeft.errors import PromptError
from safeft.generation import decoded, generate_tokens
from safeft.judge import Judge
from safeft.locators.openings import RefusalOpenings
from safeft.locators.scores import forward
from safeft.measure import evaluating
from safeft.neurons import NeuronSet
from safeft.openings import opening_margins, openings_of
from safeft.processes import broadcast, from_first, rank, ranks, summed
from safeft.prompts import Batch, Prompt, Reader, batches, input_device
from safeft.shards import is_split
from safeft.sites import find_sites

_ANSWER_TOKENS = 16


@dataclass(frozen=True)
class Look:
    """What a look found.

    Attributes:
        step: Optimizer steps that led to these weights.
        refusal_share: Share of the prompts that the first 16 tokens of the model's greedy answer
            refuse.
        refusal_margin: Log-odds, in nats, mean over the prompts, that an answer starts as those
            refusals did that the first look met; see :func:`safeft.margin.refusal_margin`. It
            falls before the share does, and also where refusals are only worded anew.
        neuron_drift: ``norm(mean - start) / norm(start)``, ``mean`` the safety neurons' mean
            activations and ``start`` those of the first look; None without neurons.
    """

    step: int
    refusal_share: float
    refusal_margin: float
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
            float(data["refusal_share"]),
            nan if margin is None else float(margin),
            data["neuron_drift"],
        )


class Observer:
    """Asks a model how it would start its answers, and leaves it as it was.

    A few tokens of greedy answers say what is refused, in whatever words: a model in training
    soon rewords its refusals. One forward pass (where they went on in several ways, one for each)
    gives margins and activations. All in evaluation mode, without gradients and without a random
    number. Several processes share the prompts; where their weights are sharded, all run all of
    them, since each needs the others to run at all.

    Args:
        model: The model in training, on its device.
        tokenizer: Its tokenizer or processor.
        prompts: Safety prompts kept from training; their responses are not read.
        judge: Whether an answer refuses, by its start.
        neurons: Units to watch at the template tokens after the instruction, where refusing is
            decided; those of other towers than the text's are not.
        **batching: ``batch_size``, ``max_length``, ``chat_template``.

    Attributes:
        openings: How refusals started at the first look.
        start: The safety neurons' mean activations then, float64 ``(units * width,)``.
        seconds: Spent looking, so far.

    Raises:
        PromptError: At the first look, where the model refuses no prompt.

    Example:
        >>> Observer(model, tokenizer, as_prompts(harmful), PrefixJudge()).look(0)  # doctest: +SKIP
        Look(step=0, refusal_share=0.96, refusal_margin=3.1, neuron_drift=None)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Reader,
        prompts: Sequence[Prompt],
        judge: Judge,
        neurons: NeuronSet | None = None,
        **batching: Any,
    ) -> None:
        self._model, self._tokenizer, self._judge = model, tokenizer, judge
        self._prompts = [Prompt(prompt.messages) for prompt in prompts]
        self._batching = batching
        self._batches = list(
            batches(tokenizer, self._prompts, device=input_device(model), **batching)
        )
        sites = find_sites(model) if neurons is not None else {}
        self._units = {
            sites[name].writes.inlet: (sites[name], units)
            for name, units in (neurons.indices if neurons else {}).items()
            if sites[name].tower == "text"
        }
        self._sharded = any(is_split(parameter) for parameter in model.parameters())
        self.openings: tuple[RefusalOpenings, ...] | None = None
        self.start: Tensor | None = None
        self.seconds = 0.0

    def look(self, step: int) -> Look:
        """Measure the model as it is; every process of the run calls this, and gets the same."""
        device = input_device(self._model)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)  # Or the step before would be counted in.
        begun = time.perf_counter()
        refused = self._refused()
        every, first = (1, 0) if self._sharded else (ranks(), rank())
        width = sum(len(units) * site.width for site, units in self._units.values())
        total = torch.zeros(2 + width, dtype=torch.float64)
        with evaluating(self._model):
            for batch in self._batches[first::every]:
                total += self._read(batch)
        _leave_sharded(self._model)
        total = broadcast(total) if self._sharded else summed(total)
        means = total[2:] / total[1]
        start = self.start = means if self.start is None else self.start
        drift = float((means - start).norm() / start.norm()) if self._units else None
        self.seconds += time.perf_counter() - begun
        count = len(self._prompts)
        return Look(step, sum(refused) / count, float(total[0]) / count, drift)

    def _refused(self) -> list[bool]:
        """A verdict on each prompt; at the first look also how refusals start."""
        answers = generate_tokens(
            self._model,
            self._tokenizer,
            self._prompts,
            max_new_tokens=_ANSWER_TOKENS,
            description="looking",
            share=not self._sharded,
            **self._batching,
        )
        answers = from_first(answers)
        texts = decoded(self._tokenizer, answers)
        if self.openings is None:
            self.openings = openings_of(self._prompts, answers, self._judge, self._tokenizer)
        if not self.openings:
            raise PromptError(
                f"To the judge {self._judge.name!r} the model refuses none of the {len(texts)} "
                f"safety prompts (it starts as {texts[0][:40]!r}), so there is nothing to watch "
                "fall. Give prompts that it refuses, or a judge that knows how it refuses."
            )
        return list(self._judge([prompt.text for prompt in self._prompts], texts))

    def _read(self, batch: Batch) -> Tensor:
        """Sums over a batch: margins, tokens, activations."""
        sums: dict[str, Tensor] = {}
        assert self.openings is not None

        def read(answered: Batch, kept: int) -> Tensor:
            with self._watched(answered, sums):
                return forward(self._model, answered, keep_logits=kept)

        margins = opening_margins(self.openings, batch, read)
        found = [
            sums.get(inlet, torch.zeros(len(units) * site.width)).double().cpu()
            for inlet, (site, units) in self._units.items()
        ]
        tokens = float(len(margins) * batch.tail)
        return torch.cat([torch.stack([margins.sum(), margins.new_tensor(tokens)]), *found])

    @contextmanager
    def _watched(self, batch: Batch, sums: dict[str, Tensor]) -> Iterator[None]:
        """Put the sums of the neurons' activations over the batch into ``sums``."""
        chosen = batch.choose("post_instruction")

        def observe(inlet: str, seen: Seen) -> None:
            site, units = self._units[inlet]
            numbers = torch.tensor(units, device=seen.values.device)
            values = seen.at(chosen).unflatten(-1, (site.units, site.width))
            sums[inlet] = values.index_select(-2, numbers).float().sum(0).flatten()

        with tap(self._model, [site.writes for site, _ in self._units.values()], observe):
            yield


def _leave_sharded(model: Any) -> None:
    """Without a backward pass FSDP2 keeps the last weights it gathered, whatever changes since."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()

"""``subspace``: the input directions that safety prompts and their refusals use.

Source: null-space and rotated-basis freezing (AlphaEdit, WSR style); here eigenvectors of ``X'X``
per distinct input of the linear layers, every token normalised to length 1, since a few attention
sinks carry most of the raw energy of a large model.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from safeft.errors import PromptError, SelectionError
from safeft.generation import evaluation_mode
from safeft.locators.calibration import answered, calibrated, check_choice
from safeft.locators.inputs import Tokens, all_or_one, chosen_tokens, receiving, unit_tokens
from safeft.locators.ranks import GIB, Amount, amount_of, choose_ranks
from safeft.locators.scores import forward
from safeft.processes import gathered, rank, ranks, summed
from safeft.progress import progress
from safeft.prompts import (
    Batch,
    Prompt,
    PromptLike,
    Reader,
    as_prompts,
    batches,
    check_images,
    input_device,
    tokenizer_of,
)
from safeft.shards import is_split
from safeft.sites import Linear, find_linears
from safeft.subspace import SafetySubspace

_HELD_OUT_EVERY = 8
_LEAST_HELD_OUT = 2


def locate_subspace(
    model: PreTrainedModel,
    tokenizer: Reader,
    harmful: Iterable[PromptLike],
    *,
    energy: float | None = None,
    rank_share: float | None = None,
    memory: float | None = None,
    tokens: Tokens = "all",
    batch_size: int = 16,
    max_length: int = 1024,
    chat_template: str | None = None,
    share: bool = False,
    at_once: float | None = None,
) -> SafetySubspace:
    """Find the input directions that refusing uses, in every linear layer of the text tower.

    One forward pass over prompts and refusals and an eigendecomposition of each distinct input's
    ``X'X``; every eighth prompt is kept aside, and the subspace says how well it covers their
    tokens.

    Args:
        model: An aligned causal language model.
        tokenizer: Its tokenizer, or its processor where it sees images, with a chat template.
        harmful: Prompts it refuses, with the refusal as ``response``, or else the model's own
            answer is used, where answers are read. Several languages may be mixed.
        energy: The least share of each input's energy (mean squared length of the projection of a
            token) that its directions hold, in (0, 1); 0.9 where nothing else is given.
        rank_share: Directions as a share of each input's features, in (0, 1), instead.
        memory: GiB that holding may take in float32 (``W U`` and U); the highest energy that fits.
        tokens: Which tokens are read.
        batch_size: Prompts per forward pass.
        max_length: Tokens per prompt and answer.
        chat_template: A Jinja template, where the tokenizer has none.
        share: In a run of several processes that all call this: each takes a part of the batches.
            Where the weights are sharded over processes, all run every batch together.
        at_once: GiB of ``X'X`` to gather in one pass over the prompts; more passes where all take
            more. By default one pass.

    Raises:
        PromptError: No prompt.
        ConfigError: Several of ``energy``, ``rank_share`` and ``memory``, or one out of range.
        SelectionError: More directions than the tokens span, or than leave a free one; an input
            that is always zero.
        CaptureError: Activations that are not finite.
        UnsupportedModelError: An unknown model type.

    Example:
        >>> subspace = locate_subspace(model, tokenizer, harmful, energy=0.9)  # doctest: +SKIP
        >>> SafetyFreezeCallback(subspace)  # doctest: +SKIP
    """
    amount = amount_of(energy, rank_share, memory)
    check_choice("tokens", tokens, ("all", "prompt", "response"))
    asked = as_prompts(harmful)
    if not asked:
        raise PromptError("There are no harmful prompts to find the directions of; give some 100.")
    check_images(model, asked)
    linears = find_linears(model)
    share = share and not any(is_split(p) for p in model.parameters())
    batching: dict[str, Any] = {
        "batch_size": batch_size, "max_length": max_length, "chat_template": chat_template,
    }  # fmt: skip
    with evaluation_mode(model):
        ready = asked
        if tokens != "prompt":
            ready = answered(model, tokenizer, asked, share=share, **batching)
        aside = ready[_HELD_OUT_EVERY - 1 :: _HELD_OUT_EVERY]
        aside = aside if len(aside) >= _LEAST_HELD_OUT else []
        used = [prompt for prompt in ready if not any(prompt is other for other in aside)]
        reading = _Reading(model, tokenizer, tokens, share, batching)
        fitter = SubspaceFitter(model, linears, tokens)
        reading.learn(fitter, used)
        for inlets in fitter.portions(at_once):
            reading.gather(fitter, used, inlets)
        directions = fitter.directions(amount)
        source: dict[str, Any] = {"method": "subspace", "tokens": tokens, **dict([amount])}
        found = SafetySubspace.of(model, directions, fitter.readers, source, reading.seen)
        source["coverage"] = reading.coverage(found, linears, aside) if aside else {}
    source["calibration"] = calibrated({"harmful": used, "held_out": aside})
    return replace(found, source=source)


class SubspaceFitter:
    """Gathers ``X'X`` of every distinct input of the linear layers, tokens of length 1.

    ``features^2`` float32 numbers for each input; nothing of a batch is kept.
    """

    def __init__(
        self, model: PreTrainedModel, linears: Mapping[str, Linear], tokens: Tokens
    ) -> None:
        self._model, self._linears = model, linears
        self._tokens: Tokens = tokens
        self.readers: dict[str, str] = {}
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    @torch.no_grad()
    def learn(self, batch: Batch) -> None:
        """See which layers receive the very same tensor: they share one input."""
        received: list[tuple[Tensor, str]] = []  # kept, or their memory would be used again

        def observe(linear: Linear, values: Tensor) -> None:
            inlet = next((name for other, name in received if other is values), linear.module)
            received.append((values, inlet))
            self.readers[linear.name] = inlet

        with receiving(self._model, self._linears.values(), observe):
            forward(self._model, batch, keep_logits=all_or_one(self._model, self._linears))

    @property
    def inlets(self) -> dict[str, Linear]:
        """The first layer of each distinct input."""
        found: dict[str, Linear] = {}
        for name, inlet in self.readers.items():
            found.setdefault(inlet, self._linears[name])
        return found

    def portions(self, at_once: float | None) -> list[list[str]]:
        """The inputs in portions whose sums fit into so many GiB, at least one in each."""
        parts: list[list[str]] = [[]]
        room = limit = torch.inf if at_once is None else at_once * GIB
        for inlet, linear in self.inlets.items():
            size = 4 * linear.features**2
            if size > room and parts[-1]:
                parts.append([])
                room = limit
            parts[-1].append(inlet)
            room -= size
        return parts

    @torch.no_grad()
    def update(self, batch: Batch, inlets: Sequence[str]) -> None:
        """Take up one batch for some of the inputs."""
        chosen = chosen_tokens(batch, self._tokens)
        layers = self.inlets

        def observe(linear: Linear, values: Tensor) -> None:
            units = unit_tokens(linear, values, chosen)
            inlet = self.readers[linear.name]
            gram = units.T @ units
            self.sums[inlet] = self.sums[inlet] + gram if inlet in self.sums else gram
            self.counts[inlet] = self.counts.get(inlet, 0) + len(units)

        read = {inlet: layers[inlet] for inlet in inlets}
        with receiving(self._model, read.values(), observe):
            forward(self._model, batch, keep_logits=all_or_one(self._model, read))

    @torch.no_grad()
    def directions(self, amount: Amount) -> dict[str, Tensor]:
        """The chosen eigenvectors of every input, ``(features, rank)`` float32."""
        spectra, vectors = {}, {}
        for inlet in progress(list(self.sums), "eigenvectors"):
            gram = self.sums.pop(inlet)
            if not gram.any():
                raise SelectionError(
                    f"What {inlet} receives is zero at every token of the prompts, so there is no "
                    "direction to hold: the layer is dead, or the prompts never reach it."
                )
            values, found = torch.linalg.eigh(gram)
            spectra[inlet] = values.flip(0).clamp_(min=0).double().cpu()
            vectors[inlet] = found.flip(1).half().cpu()  # as they will be kept
        outputs = {inlet: 0 for inlet in spectra}
        for name, inlet in self.readers.items():
            outputs[inlet] += self._linears[name].outputs
        chosen = choose_ranks(spectra, outputs, amount)
        return {inlet: found[:, : chosen[inlet]].clone() for inlet, found in vectors.items()}


class _Reading:
    """Runs the prompts through the model, alone or each process its part."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Reader,
        tokens: Tokens,
        share: bool,
        batching: Mapping[str, Any],
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._tokens: Tokens = tokens
        self._share, self._batching = share, batching
        self.seen = torch.zeros(0, dtype=torch.long)

    def _batches(self, prompts: Sequence[Prompt], description: str) -> Iterator[Batch]:
        every, mine = (ranks(), rank()) if self._share else (1, 0)
        for number, batch in enumerate(
            batches(
                self._tokenizer,
                prompts,
                device=input_device(self._model),
                description=description,
                **self._batching,
            )
        ):
            if number % every == mine:
                yield batch

    def learn(self, fitter: SubspaceFitter, prompts: Sequence[Prompt]) -> None:
        """One batch, in every process, to see which layers share an input."""
        settings = dict(self._batching)
        device = input_device(self._model)
        fitter.learn(next(batches(self._tokenizer, prompts[:1], device=device, **settings)))

    def gather(
        self, fitter: SubspaceFitter, prompts: Sequence[Prompt], inlets: Sequence[str]
    ) -> None:
        """One pass over the prompts for some of the inputs; sums of all processes."""
        for batch in self._batches(prompts, "reading safety prompts"):
            fitter.update(batch, inlets)
            ids = batch.input_ids[batch.attention_mask.bool()].cpu()
            self.seen = torch.cat([self.seen, ids]).unique()
        if self._share:
            self.seen = torch.cat(gathered(self.seen)).unique()
        if not self._share or ranks() == 1:
            return
        device = next(self._model.parameters()).device
        for inlet in inlets:
            features = fitter.inlets[inlet].features
            known = fitter.sums.get(inlet)  # a process may have had no batch
            empty = torch.zeros(features, features, device=device)
            fitter.sums[inlet] = summed(empty if known is None else known)

    @torch.no_grad()
    def coverage(
        self, subspace: SafetySubspace, linears: Mapping[str, Linear], prompts: Sequence[Prompt]
    ) -> dict[str, Any]:
        """What of prompts kept aside the directions leave out: ``norm(x - U U'x) / norm(x)``."""
        first: dict[str, str] = {}
        for name, inlet in subspace.readers.items():
            first.setdefault(inlet, name)
        left: dict[str, list[Tensor]] = {inlet: [] for inlet in first}
        ids: list[Tensor] = []
        for batch in self._batches(prompts, "reading held-out prompts"):
            chosen = chosen_tokens(batch, self._tokens)
            ids.append(batch.input_ids[chosen].cpu())

            def observe(linear: Linear, values: Tensor, chosen: Tensor = chosen) -> None:
                units = unit_tokens(linear, values, chosen)
                basis = subspace.basis(linear.name).to(units)
                held = (units @ basis).square().sum(1)
                outside = (units.square().sum(1) - held).clamp_(min=0).sqrt_()
                left[subspace.readers[linear.name]].append(outside.cpu())

            with receiving(self._model, [linears[name] for name in first.values()], observe):
                forward(self._model, batch, keep_logits=all_or_one(self._model, linears))
        if self._share:
            parts = gathered((ids, left))
            ids = [part for theirs, _ in parts for part in theirs]
            left = {inlet: [x for _, theirs in parts for x in theirs[inlet]] for inlet in left}
        said = torch.cat(ids)
        return {inlet: self._said(torch.cat(found), said) for inlet, found in left.items()}

    def _said(self, residuals: Tensor, ids: Tensor) -> dict[str, Any]:
        worst = int(residuals.argmax())
        return {
            "tokens": len(residuals),
            "median": round(float(residuals.median()), 4),
            "p95": round(float(residuals.quantile(0.95)), 4),
            "worst": round(float(residuals[worst]), 4),
            "worst_token": str(tokenizer_of(self._tokenizer).decode([int(ids[worst])])),
        }

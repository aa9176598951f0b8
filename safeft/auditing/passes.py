"""Refusal margins under many edits at once: a row for each prompt and edit.

An edit holds one unit at a value. What lies below the unit is the same for all edits, so it is
computed once a prompt: a pass goes on from the unit, or from its block, or, where a model does not
allow that, from the start. Which of these a model allows is found by trying: on one batch the
margins under real edits have to be those of whole passes.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from safeft.auditing.holding import holding
from safeft.auditing.shortcuts import Below, added, resumed, seen_below, trimmed
from safeft.auditing.starts import Reading, readings
from safeft.locators.openings import RefusalOpenings
from safeft.margin import refusal_margin
from safeft.measure import evaluating
from safeft.prompts import Batch
from safeft.sites import Site, bare, blocks_of, plain_model

logger = logging.getLogger(__name__)

From: TypeAlias = Literal["unit", "block", "start"]
"""Where a pass goes on from."""


@dataclass(frozen=True, eq=False)
class Edit:
    """One unit held at a value, at every token.

    Attributes:
        site: The unit's site, of width 1.
        unit: Its number.
        values: Float64 ``(prompts,)``: what it is held at, for each prompt.
    """

    site: str
    unit: int
    values: Tensor


@dataclass(frozen=True)
class Chunk:
    """Work of one pass: a batch of prompts, and edits of units in one block."""

    batch: int
    block: int
    edits: tuple[int, ...]


@dataclass(frozen=True)
class Way:
    """How passes into a block are run.

    Attributes:
        start: Where they go on from.
        trimmed: The last MLP is run on the tokens whose logits are read alone.
    """

    start: From
    trimmed: bool


_TRIED = 2
"""Prompts on which a way is tried."""

_WHOLE = Way("start", False)
_WAYS = (Way("unit", True), Way("unit", False), Way("block", True), Way("block", False))


class Passes:
    """Runs edits of a model on fixed prompts.

    Args:
        model: The model, on its device, not spread over processes.
        sites: Its MLP sites.
        batches: Prompts of text, each batch with their numbers, ``0`` to so many.
        openings: How refusals start.
        tokens: About how many tokens a pass may hold, prompts and edits together.

    Attributes:
        together: Whether all ways in which refusals go on are read in one pass.
        ways: How passes into a block are run, by the block's number, as far as found out.

    Example:
        >>> passes = Passes(model, sites, batches, openings)  # doctest: +SKIP
        >>> base = passes.base()  # doctest: +SKIP
        >>> falls = base - passes.run(passes.chunks(edits)[0], edits)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sites: Mapping[str, Site],
        batches: Sequence[tuple[Sequence[int], Batch]],
        openings: Sequence[RefusalOpenings],
        tokens: int = 8192,
    ) -> None:
        self._model, self._sites, self._tokens = model, sites, tokens
        self._paths = [
            path for path in blocks_of(model) if any(_inside(name, path) for name in sites)
        ]
        self._blocks = [bare(plain_model(model).get_submodule(path)) for path in self._paths]
        self._block_of = {
            name: number
            for name in sites
            for number, path in enumerate(self._paths)
            if _inside(name, path)
        }
        self._numbers = [list(numbers) for numbers, _ in batches]
        self._kept: dict[int, list[Below]] = {}
        self.ways: dict[int, Way] = {}
        # On the longest prompts it shows best what a model does not allow (windows of attention).
        place = max(range(len(batches)), key=lambda n: batches[n][1].input_ids.shape[1])
        few = _last(batches[place][1], _TRIED)
        apart = readings(openings, few, model.dtype, False)
        one = readings(openings, few, model.dtype, True)
        self.together = self._agree(lambda: self._plain(one), lambda: self._plain(apart))
        self._readings = [
            readings(openings, batch, model.dtype, self.together) for _, batch in batches
        ]
        self._tried = len(batches)  # one more batch, to try ways on
        self._rows = [*self._numbers, self._numbers[place][-_TRIED:]]
        self._passed = [*self._readings, one if self.together else apart]

    def base(self) -> Tensor:
        """The margins without an edit, float64 ``(prompts,)``."""
        return self._in_order([self._plain(each) for each in self._readings])

    def under(self, around: Callable[[Sequence[int]], AbstractContextManager[None]]) -> Tensor:
        """The margins while the model is changed, float64 ``(prompts,)``.

        Args:
            around: From the numbers of a batch's prompts to what lasts while they are run.
        """
        found = []
        for numbers, batch in zip(self._numbers, self._readings, strict=True):
            with around(numbers):
                found.append(self._plain(batch))
        return self._in_order(found)

    def chunks(self, edits: Sequence[Edit]) -> list[Chunk]:
        """The passes that a number of edits takes, the same for the same edits."""
        by_block: dict[int, list[int]] = {}
        for number, edit in enumerate(edits):
            by_block.setdefault(self._block_of[edit.site], []).append(number)
        found = []
        for batch, (reading, *_) in enumerate(self._readings):
            at_once = max(1, self._tokens // reading.shape.numel())
            for block, numbers in sorted(by_block.items()):
                for start in range(0, len(numbers), at_once):
                    found.append(Chunk(batch, block, tuple(numbers[start : start + at_once])))
        return found

    def run(self, chunk: Chunk, edits: Sequence[Edit]) -> Tensor:
        """Margins of one chunk, float64 ``(edits of the chunk, prompts of the batch)``."""
        chosen = [edits[number] for number in chunk.edits]
        if chunk.block not in self.ways:
            self.ways[chunk.block] = self._settled(chunk.block, chosen[:2])
        return self._edited(chunk.batch, chunk.block, chosen, self.ways[chunk.block])

    def gathered(self, done: Sequence[tuple[Chunk, Tensor]], edits: int) -> Tensor:
        """Margins of all chunks, float64 ``(edits, prompts)``."""
        found = torch.full((edits, sum(map(len, self._numbers))), torch.nan, dtype=torch.double)
        for chunk, margins in done:
            rows = torch.tensor(chunk.edits)[:, None]
            found[rows, torch.tensor(self._numbers[chunk.batch])] = margins
        return found

    def _in_order(self, margins: Sequence[Tensor]) -> Tensor:
        numbers = torch.tensor([number for batch in self._numbers for number in batch])
        return torch.cat(list(margins))[numbers.argsort()]

    def _agree(self, one: Callable[[], Tensor], other: Callable[[], Tensor]) -> bool:
        """Whether a quicker way gives what a plain one gives; it may also not be possible at all.

        Not to the last bit: the same sums are taken in another order.
        """
        try:
            found = one()
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
            logger.debug("A quicker pass is not possible: %s", error)
            return False
        expected = other()
        slack = max(1e-3, 8 * torch.finfo(self._model.dtype).eps)
        return bool(((found - expected).abs() <= slack * (1 + expected.abs())).all())

    def _settled(self, block: int, edits: Sequence[Edit]) -> Way:
        """The quickest way into a block that gives what whole passes give."""
        in_block = [name for name, number in self._block_of.items() if number == block]
        dense = len(in_block) == 1 and self._sites[in_block[0]].writes.expert is None
        last = len(self._blocks) - 1
        expected: list[Tensor] = []

        def whole() -> Tensor:
            if not expected:
                expected.append(self._edited(self._tried, block, edits, _WHOLE))
            return expected[0]

        for way in _WAYS:
            if not dense and (way.start == "unit" or (way.trimmed and block == last)):
                continue  # tokens of experts are found by their places, which have to be all there
            if self._agree(lambda way=way: self._edited(self._tried, block, edits, way), whole):
                return way
        logger.warning(
            "Passes of this %s model cannot go on from block %d: its margins came out otherwise "
            "than in whole passes. Its neurons are tested in whole passes, which takes longer.",
            self._model.config.model_type, block,
        )  # fmt: skip
        return _WHOLE

    def _plain(self, readings: Sequence[Reading]) -> Tensor:
        with evaluating(self._model):
            found = [each.likely(self._logits(each.inputs, each.keep)) for each in readings]
        return refusal_margin(list(torch.cat(found)))

    def _logits(self, inputs: Mapping[str, Tensor], keep: int) -> Tensor:
        return self._model(**inputs, use_cache=False, logits_to_keep=keep).logits

    def _edited(self, batch: int, block: int, edits: Sequence[Edit], way: Way) -> Tensor:
        values = torch.stack([edit.values[self._rows[batch]] for edit in edits])
        found = []
        with evaluating(self._model):
            below = self._below(batch) if way.start != "start" else []
            for number, reading in enumerate(self._passed[batch]):
                with ExitStack() as undo:
                    if below:
                        once = way.start == "unit"
                        context = resumed(self._blocks, below[number], block, len(edits), once)
                        undo.enter_context(context)
                    if way.trimmed:
                        undo.enter_context(trimmed(self._last_mlp(), reading.keep))
                    if way.start == "unit":
                        like = below[number].inputs[block].new_empty((), dtype=self._model.dtype)
                        undo.enter_context(self._added(edits, values, like))
                    else:
                        undo.enter_context(self._holding(edits, values))
                    logits = self._logits(reading.repeated(len(edits)), reading.keep)
                found.append(reading.likely(logits))
        return refusal_margin(list(torch.cat(found))).view(len(edits), -1)

    def _below(self, batch: int) -> list[Below]:
        """What blocks receive without an edit; no more is kept than of one batch, and the trial."""
        if batch not in self._kept:
            self._kept = {n: kept for n, kept in self._kept.items() if n == self._tried}
            self._kept[batch] = [
                seen_below(self._blocks, partial(self._logits, each.inputs, each.keep))
                for each in self._passed[batch]
            ]
        return self._kept[batch]

    def _added(
        self, edits: Sequence[Edit], values: Tensor, like: Tensor
    ) -> AbstractContextManager[None]:
        (name,) = {edit.site for edit in edits}
        site = self._sites[name]
        module = bare(plain_model(self._model).get_submodule(site.writes.module))
        units = torch.tensor([edit.unit for edit in edits])
        return added(module, site.units, units, values, like)

    def _holding(self, edits: Sequence[Edit], values: Tensor) -> AbstractContextManager[None]:
        """Each edit in its own rows."""
        held: dict[str, list[tuple[int, Tensor]]] = {}
        for number, edit in enumerate(edits):
            own = torch.full_like(values, torch.nan)
            own[number] = values[number]
            held.setdefault(edit.site, []).append((edit.unit, own.flatten()))
        return holding(self._model, self._sites, held, values.numel())

    def _last_mlp(self) -> nn.Module:
        """What of the last block is its MLP and nothing else."""
        path = self._paths[-1]
        inside = [name for name, block in self._block_of.items() if block == len(self._paths) - 1]
        children = {name.removeprefix(path).removeprefix(".").split(".")[0] for name in inside}
        if len(children) != 1 or not all(children):
            raise ValueError(f"{path} has no module that is its MLP and nothing else")
        return bare(self._blocks[-1].get_submodule(children.pop()))


def _last(batch: Batch, count: int) -> Batch:
    """The last prompts of a batch of text."""
    return Batch(
        batch.input_ids[-count:],
        batch.attention_mask[-count:],
        batch.is_prompt[-count:],
        batch.is_response[-count:],
        batch.tail,
    )


def _inside(site: str, block: str) -> bool:
    return site == block or site.startswith(f"{block}.")

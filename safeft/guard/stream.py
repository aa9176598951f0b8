"""Scores of an answer while it is written, from the passes that write it: no second forward pass.

Means over an answer's tokens are sums over steps, so a stream says of every prefix what
:meth:`Guard.score` would say of it. What makes it cheap: hooks only keep what they are shown; the
units of all layers are gathered at once, and looked at every few tokens for all of them together;
and no number leaves the device before the end.

A token is sampled before it is run, so the score of ``n`` tokens is there when token ``n + 1`` is.
"""

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from transformers import StoppingCriteria

from safeft.errors import ConfigError, SafeftError
from safeft.guard.guards import Guard
from safeft.guard.places import taken, watched
from safeft.guard.policy import Policy
from safeft.guard.reading import check_writes
from safeft.sites import plain_model


class StreamError(SafeftError, RuntimeError):
    """Generating does not go token by token, so means over tokens would be of something else."""


class GuardStream(StoppingCriteria):
    """A stopping criterion that scores each row of a generation token by token.

    Args:
        guard: A guard on the generating model.
        attention_mask: Int ``(rows, prompt tokens)``, as given to ``generate``.
        policy: Rows whose score is blocked are stopped; None to stop none.
        reasoning: Numbers of the tokens that open and close reasoning, where there are such.
        every: Tokens between two looks. All prefixes are scored all the same; a row that is to
            stop does so at the next look.

    Raises:
        ConfigError: The model cannot generate, or its prompts are not padded on the left.

    Example:
        >>> given = tokenizer(text, return_tensors="pt")  # doctest: +SKIP
        >>> with GuardStream(guard, given["attention_mask"]) as stream:  # doctest: +SKIP
        ...     model.generate(**given, stopping_criteria=[stream])
        >>> stream.scores[:, 0, 0]  # of each prefix of the first row  # doctest: +SKIP
    """

    def __init__(
        self,
        guard: Guard,
        attention_mask: Tensor,
        policy: Policy | None = None,
        reasoning: tuple[int, int] | None = None,
        every: int = 8,
    ) -> None:
        model = plain_model(guard.model)
        check_writes(model)
        if not bool(attention_mask[:, -1].all()):
            raise ConfigError(
                "The prompts are padded on the right, so padding would stand between a prompt and "
                "its answer. Set `tokenizer.padding_side = 'left'`."
            )
        self._guard, self._mask = guard, attention_mask
        self._model, self._places = model, guard.head.places
        self._labels = len(guard.labels)
        self._rows, self._width = attention_mask.shape
        self._limits = [2.0] * 3
        if policy is not None:
            self._limits = [policy.limit(phase) for phase in ("prompt", "answer", "reasoning")]
        self._after = 1 if policy is None else policy.after
        self._reasoning, self._every = reasoning, every
        if every < 1:
            raise ConfigError(f"every={every}: there is at least 1 token between two looks.")
        self._reset()

    def _reset(self) -> None:
        self._at = 0  # prompt tokens that were run
        self._calls = 0
        self._flat: set[int] = set()
        self._count: Any = 0  # answer tokens in the sums; with phases one a row
        self._sums: Any = 0
        self._prompt: Tensor | None = None
        self._pending: list[Tensor] = []
        self._tokens: list[Tensor] = []
        self._found: list[Tensor] = []
        self._phases: list[Tensor] = []
        self._stop: Tensor | None = None
        self.passed = 0
        """Tokens that were looked at and let pass since a streamer last took some."""

    def __enter__(self) -> Self:
        self._reset()
        self._watch = watched(self._model, self._places, self._keep)
        self._seen = self._watch.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._watch.__exit__(kind, error, trace)

    def _keep(self, number: int, values: Tensor) -> Tensor:
        """A step's activations as they are; of the prompt at once the sums over its tokens."""
        if self._calls:
            return values
        self._flat.add(values.ndim)
        tokens = values.numel() // (self._rows * values.shape[-1])
        if number == 0:
            self._at += tokens
        # Some layers (OPT's) receive rows and tokens as one axis.
        if values.shape[:-1].numel() != self._rows * tokens or (
            self._at > self._width or values.ndim == 3 and len(values) != self._rows
        ):  # fmt: skip
            raise self._not_by_token((len(values), self._at))
        values = values.view(self._rows, tokens, -1)
        mask = self._mask[:, self._at - tokens : self._at].to(values.device)
        total = torch.bmm(mask[:, None].float(), values.float())[:, 0]
        before = self._seen[number]  # of earlier pieces, where a long prompt is run in several
        return total if before is None else total + before

    @torch.no_grad()
    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Take in the last step; which rows are to stop, bool ``(rows,)``."""
        self._calls += 1
        if self._calls == 1:
            return self._begin(input_ids)
        first = self._seen[0]
        one_each = first is not None and first.numel() == self._rows * self._places[0].width
        if not one_each or input_ids.shape[1] != self._width + self._calls:
            raise self._not_by_token(tuple(input_ids.shape))
        # A copy: what a layer showed may be overwritten by the next step. And of a matrix: along
        # the last of three dimensions the same takes ten times as long.
        values = self._side_by_side(taken(self._seen, self._places))
        self._pending.append(values.index_select(1, self._chosen))
        if self._reasoning is not None:
            self._tokens.append(input_ids[:, -2])
        if len(self._pending) < self._every:
            return self._never
        self._stop = self._look()
        self.passed += self._every
        return self._stop

    def _side_by_side(self, values: list[Tensor]) -> Tensor:
        """``(rows, width of all places)``."""
        if self._alike:
            return torch.cat(values, -1).view(self._rows, -1)
        return torch.cat([v.reshape(self._rows, -1).to(self._never.device) for v in values], 1)

    def _look(self) -> Any:
        """Score the prefixes that came since the last look; which rows are to stop."""
        count = len(self._pending)
        units = torch.stack(self._pending).float()
        self._pending = []
        if self._reasoning is None:
            sums = units.cumsum(0) + self._sums
            self._sums, before = sums[-1], self._count
            self._count = before + count
            numbers = torch.arange(before + 1, self._count + 1, device=units.device)
            means = sums / numbers[:, None, None]
        else:
            means, numbers = self._means_of_phases(units)
        found = self._ready.scores(means.flatten(0, 1)).unflatten(0, (count, self._rows))
        self._found.append(found)
        limit = self._limits[1]
        if self._reasoning is not None:
            limit = self._limit[self._phases[-1]]
        elif limit > 1 or self._count < self._after:
            return self._never
        return ((found[..., 0] >= limit) & (numbers.view(count, -1) >= self._after)).any(0)

    def _begin(self, input_ids: Tensor) -> Tensor:
        if input_ids.shape != (self._rows, self._width + 1) or self._at != self._width:
            raise self._not_by_token(tuple(input_ids.shape))
        self._ready = self._guard.head.on(input_ids.device)
        values = taken(self._seen, self._places)
        # Weights may be spread over devices, and some layers (OPT's) receive rows as tokens.
        self._alike = len({v.device for v in values}) == 1 and self._flat == {3}
        starts, chosen = 0, []
        for place, units in zip(self._places, self._ready.selected, strict=True):
            chosen.append(units + starts)
            starts += place.width
        self._chosen = torch.cat(chosen)
        self._never = torch.zeros(self._rows, dtype=torch.bool, device=input_ids.device)
        if self._reasoning is not None:
            self._inside = torch.zeros_like(self._never)
            self._limit = torch.tensor(self._limits[1:], device=input_ids.device)
        count = self._mask.sum(1, keepdim=True).to(input_ids.device)
        means = torch.cat([v.to(input_ids.device) for v in values], 1)[:, self._chosen] / count
        self._prompt = self._ready.scores(means)
        self._stop = self._prompt[:, 0] >= self._limits[0]
        return self._stop

    def _means_of_phases(self, units: Tensor) -> tuple[Tensor, Tensor]:
        """Means that begin anew where reasoning opens or closes, and over how many tokens."""
        assert self._reasoning is not None
        means, counts, phases = [], [], []
        for token, here in zip(self._tokens, units, strict=True):
            inside = (self._inside | (token == self._reasoning[0])) & (token != self._reasoning[1])
            kept = (inside == self._inside).float()[:, None]
            self._inside = inside
            self._sums = self._sums * kept + here
            self._count = self._count * kept + 1
            means.append(self._sums / self._count)
            counts.append(self._count[:, 0])
            phases.append(inside)
        self._tokens = []
        self._phases.append(torch.stack(phases).long())
        return torch.stack(means), torch.stack(counts)

    def _not_by_token(self, shape: tuple[int, ...]) -> StreamError:
        return StreamError(
            f"After {self._calls} steps there are {shape} tokens, from "
            f"{(self._rows, self._width)} of the prompts, and the last pass did not run one token "
            "a row. Streams are scored where generating goes token by token, with the cache: no "
            "beams, no assistant model, no `use_cache=False`, `num_return_sequences=1`; and the "
            "attention mask is that given to `generate`."
        )

    @property
    def stopped(self) -> bool:
        """Whether a row was stopped; waits for the device."""
        return self._stop is not None and bool(self._stop.any())

    @property
    def prompt(self) -> Tensor:
        """Scores of the prompts, float32 ``(rows, outputs)`` on the CPU."""
        return torch.zeros(0, self._labels) if self._prompt is None else self._prompt.cpu()

    @property
    def scores(self) -> Tensor:
        """Of each prefix of each answer, float32 ``(tokens, rows, outputs)`` on the CPU.

        What follows a row's end is of padding.
        """
        with torch.no_grad():
            if self._pending:
                self._stop = self._look()
        if not self._found:
            return torch.zeros(0, self._rows, self._labels)
        return torch.cat(self._found).cpu()

    @property
    def inside_reasoning(self) -> Tensor:
        """Which tokens belong to reasoning, bool ``(tokens, rows)`` on the CPU."""
        scores = self.scores
        return torch.cat(self._phases).bool().cpu() if self._phases else scores[..., 0] > 2

"""What located neurons do while a model runs: their activations at real tokens, a few at a time."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn

from safeft.capture import CaptureError
from safeft.errors import UnsupportedModelError
from safeft.neurons import NeuronSet
from safeft.sites import Site, bare, find_sites, plain_model

LOOK_EVERY = 256
"""Tokens that are kept before they are looked at; one forward pass may bring more."""

_NO_PADDING, _UNKNOWN = -1, -2
"""Numbers that no token has: the padding of a model without any, and a token given as a vector."""

Take = Callable[[Tensor], None]
"""Given ``(tokens, neurons)`` float32, in the order of :attr:`Stream.neurons`."""


class Stream:
    """Shows the activations of a set of units to ``take``, forward pass by forward pass.

    A unit's activation is what the matrix that writes it back really receives: the hooks are
    forward hooks, which run after all pre-hooks and are given what these made of the input, in
    whatever order anybody registered. What changes the matrix's own computation, or its output,
    is not seen. Of an attention head, whose activation is a vector, its part along one fixed random
    direction is shown: it is 0, constant or small where the vector is, and its norm says less.

    Padding is left out: tokens that the attention mask says are none, and the padding that
    ``generate`` feeds for answers that have ended. Nothing is computed in a forward pass beyond
    copying a few numbers, so that watching costs little; the rest waits for ``LOOK_EVERY`` tokens.

    Args:
        model: The model, adapters included; it is not changed.
        neurons: The set; units of the text tower are watched.
        take: What is shown to.

    Attributes:
        neurons: Site and unit of each that is watched.

    Raises:
        UnsupportedModelError: Units of single experts, which see some of the tokens only.
        CaptureError: A watched module did not run in a forward pass, or none ever did.

    Example:
        >>> with Stream(model, located, lambda seen: print(seen.shape)):  # doctest: +SKIP
        ...     model.generate(**inputs)
    """

    def __init__(self, model: nn.Module, neurons: NeuronSet, take: Take) -> None:
        self._plain: Any = plain_model(model)
        sites = find_sites(self._plain)
        self._units = _watched(neurons, sites)
        self.neurons = tuple((site.name, u) for site, units in self._units for u in units)
        self._take, self._padding = take, _padding(self._plain)
        self._hooks = ExitStack()
        self._parts: dict[str, Tensor] | None = None
        self._pending: list[tuple[list[Tensor], Tensor]] = []
        self._waiting = 0
        self.passes = 0

    def __enter__(self) -> Self:
        self.passes = 0
        self._hooks.enter_context(_removed(self._hook()))
        return self

    def _hook(self) -> list[Any]:
        handles = [
            self._plain.register_forward_pre_hook(self._begin, with_kwargs=True),
            self._plain.register_forward_hook(self._end),
        ]
        for site, units in self._units:
            module = bare(self._plain.get_submodule(site.writes.module))
            numbers = torch.tensor(units)[:, None] * site.width + torch.arange(site.width)
            handles.append(module.register_forward_hook(self._seer(site.name, numbers.flatten())))
        return handles

    def __exit__(self, kind: Any, *_: object) -> None:
        self._hooks.close()
        self._parts = None
        if kind is not None:
            self._drop()
            return
        self.flush()
        if not self.passes:
            raise CaptureError(
                "The model never ran while its neurons were watched, so nothing is known of them. "
                "Call the model (or its `generate`) inside the context, and not a part of it."
            )

    def _drop(self) -> None:
        self._pending, self._waiting = [], 0

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._parts = {}
        given = kwargs.get("input_ids", args[0] if args else None)
        self._given = given, kwargs.get("attention_mask", args[1] if len(args) > 1 else None)

    def _seer(self, name: str, numbers: Tensor) -> Callable[..., None]:
        def see(_: nn.Module, inputs: tuple[Tensor, ...], __: Any) -> None:
            nonlocal numbers
            if self._parts is None:
                return
            received = inputs[0].detach()
            if numbers.device != received.device:
                numbers = numbers.to(received.device)
            self._parts[name] = received.index_select(-1, numbers)

        return see

    def _end(self, *_: Any) -> None:
        parts, self._parts = self._parts or {}, None
        if missing := [site.name for site, _ in self._units if site.name not in parts]:
            raise CaptureError(
                f"{missing[:3]} did not run in a forward pass, so their neurons went unwatched. "
                "Is part of the model skipped?"
            )
        ids, mask = self._given
        found, ids = [parts[site.name] for site, _ in self._units], self._given[0]
        # One token each of so many answers is what most passes bring; they are left as they come.
        if ids is None or ids.shape[1] != 1 or found[0].ndim != 3:
            found, ids = self._flat(found)
        self._pending.append((found, ids))
        self._waiting += len(ids)
        self.passes += 1
        if self._waiting >= LOOK_EVERY:
            self.flush()

    def _flat(self, found: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """As if each token had come alone: ``(tokens, 1, ...)``, masked ones as padding."""
        ids, mask = self._given
        rows = [each.reshape(-1, 1, each.shape[-1]) for each in found]
        if ids is None:
            ids = torch.full((len(rows[0]), 1), _UNKNOWN, device=rows[0].device)
        ids = ids.reshape(-1, 1)
        if mask is not None and mask.ndim == 2:
            width = len(ids) // len(mask)
            real = mask[:, -width:].reshape(-1, 1).bool()
            ids = ids.masked_fill(~real.to(ids.device), self._padding)
        return rows, ids

    @torch.no_grad()
    def flush(self) -> None:
        """Show what waits to be shown."""
        pending = self._pending
        self._drop()
        if not pending:
            return
        real = (torch.cat([ids for _, ids in pending]) != self._padding).flatten()
        columns = []
        for number, (site, units) in enumerate(self._units):
            rows = torch.cat([found[number] for found, _ in pending])[:, 0].float()
            if site.width > 1:
                direction = _direction(site.width).to(rows)
                rows = rows.unflatten(-1, (len(units), site.width)) @ direction
            columns.append(rows.to(real.device))
        self._take(torch.cat(columns, 1)[real])


class _removed(ExitStack):  # noqa: N801
    """Hooks that are removed at the end of a context."""

    def __init__(self, handles: list[Any]) -> None:
        super().__init__()
        for handle in handles:
            self.callback(handle.remove)


def _watched(neurons: NeuronSet, sites: Mapping[str, Site]) -> list[tuple[Site, tuple[int, ...]]]:
    routed = [name for name in neurons.indices if sites[name].writes.expert is not None]
    if routed:
        raise UnsupportedModelError(
            f"{routed[:3]} are single experts: each sees the tokens routed to it only, so its "
            "units cannot be judged token by token. Watch units of other sites."
        )
    return [(sites[n], u) for n, u in neurons.indices.items() if sites[n].tower == "text"]


def _direction(width: int) -> Tensor:
    """``(width,)``, of length 1, always the same."""
    drawn = torch.randn(width, generator=torch.Generator().manual_seed(0))
    return drawn / drawn.norm()


def _padding(model: Any) -> int:
    """The number that ``generate`` goes on with where an answer has ended."""
    for config in (getattr(model, "generation_config", None), model.config):
        for name in ("pad_token_id", "eos_token_id"):
            found = getattr(config, name, None)
            if found is not None:
                return int(found[0] if isinstance(found, list) else found)
    return _NO_PADDING

"""Activations of neurons at chosen tokens, seen during a forward pass and gone after it.

A unit's activation is what the matrix that writes it back receives (``down_proj``, ``o_proj``).
Nothing is kept beyond one batch: locators reduce what they are shown to running statistics, so
memory does not grow with the number of prompts.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from safeft.errors import SafeftError, SelectionError
from safeft.sites import Part, Site, bare, dense, plain_model
from safeft.sites.experts import tapped_experts


class CaptureError(SafeftError, RuntimeError):
    """A module that should have been seen in the forward pass was not run."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What one matrix received in one forward pass.

    Attributes:
        values: ``(prompts, tokens, features)``; of an expert ``(tokens, features)``, those that
            were routed to it.
        places: Of an expert: which tokens of the flattened batch these are, int64 ``(tokens,)``.
    """

    values: Tensor
    places: Tensor | None = None

    def at(self, chosen: Tensor | None) -> Tensor:
        """The values at those of the chosen tokens that came here, ``(samples, features)``.

        Args:
            chosen: Bool ``(prompts, tokens)``; None for all, as of images, which have no tokens.
        """
        if chosen is None:
            return self.values.flatten(0, -2)
        chosen = chosen.to(self.values.device)
        if self.places is not None:
            return self.values[chosen.flatten()[self.places]]
        # Some layers (OPT's, experts' shared ones) receive prompts and tokens as one axis.
        return self.values.reshape(*chosen.shape, self.values.shape[-1])[chosen]

    def spread(self, chosen: Tensor) -> Tensor:
        """The values at all chosen tokens, ``(samples, features)``; zero where routed elsewhere."""
        here = self.at(chosen)
        if self.places is None:
            return here
        flat = chosen.flatten().to(here.device)
        row = (flat.cumsum(0) - 1)[self.places[flat[self.places]]]
        return here.new_zeros(int(flat.sum()), here.shape[-1]).index_copy(0, row, here)


Tap = Callable[[str, Seen], Tensor | None]
"""Called once per matrix and forward pass with :attr:`Part.inlet` and what it receives; what it
returns, if anything, is received instead."""


@contextmanager
def tap(model: nn.Module, parts: Iterable[Part], act: Tap) -> Iterator[None]:
    """Let ``act`` see, or change, what the parts' matrices receive; undone afterwards.

    Experts that no token is routed to are not shown.

    Raises:
        CaptureError: A module was never run within the context, so what was gathered is partial.
    """
    plain = plain_model(model)
    parts = list(parts)
    missing = {part.module for part in parts}

    def hook_for(inlet: str, module: str) -> Callable[..., tuple[Tensor, ...] | None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            missing.discard(module)
            new = act(inlet, Seen(inputs[0]))
            return None if new is None else (new, *inputs[1:])

        return hook

    experts: dict[str, set[str]] = {}
    with ExitStack() as undo:
        for module, inlet in {(p.module, p.inlet) for p in parts if p.expert is None}:
            found = bare(plain.get_submodule(module))
            handle = found.register_forward_pre_hook(hook_for(inlet, module))
            undo.callback(handle.remove)
        for part in parts:
            if part.expert is not None:
                experts.setdefault(part.module, set()).add(part.inlet)
        for module in experts:

            def routed(
                inlet: str, values: Tensor, places: Tensor, *, of: str = module
            ) -> Tensor | None:
                missing.discard(of)
                return act(inlet, Seen(values, places)) if inlet in experts[of] else None

            undo.enter_context(
                tapped_experts(dense(bare(plain.get_submodule(module))), module, routed)
            )
        yield
    if missing:
        raise CaptureError(
            f"{sorted(missing)[:3]} did not run in the forward pass, so their neurons were not "
            "reached and any result would be partial. Is part of the model skipped or offloaded, "
            "or a vision tower given no images?"
        )


@contextmanager
def capture(model: nn.Module, sites: Mapping[str, Site]) -> Iterator[dict[str, Tensor]]:
    """A mapping that holds, after each forward pass, every site's activations.

    Yields:
        Site name to ``(prompts, tokens, units, width)`` in the model's dtype, graph attached; each
        forward pass replaces the last one's. Of an expert ``(tokens, units, width)``, those routed
        to it, and nothing where there were none.

    Example:
        >>> with capture(model, find_sites(model)) as seen:  # doctest: +SKIP
        ...     model(**batch.inputs)
        >>> seen["model.layers.1.mlp"][batch.choose("last_prompt")]  # doctest: +SKIP
    """
    by_inlet = {site.writes.inlet: site for site in sites.values()}
    seen: dict[str, Tensor] = {}

    def keep(inlet: str, received: Seen) -> None:
        site = by_inlet[inlet]
        seen[site.name] = received.values.unflatten(-1, (site.units, site.width))

    with tap(model, [site.writes for site in sites.values()], keep):
        yield seen


Change = Callable[[str, Tensor], Tensor]
"""From a site's name and its units' activations ``(..., units, width)`` to new ones."""


@contextmanager
def edit(
    model: nn.Module,
    neurons: Mapping[str, Tensor | tuple[int, ...]],
    sites: Mapping[str, Site],
    change: Change,
) -> Iterator[None]:
    """Run the model with other activations of ``neurons``: the causal check.

    Args:
        model: The model; it is not changed.
        neurons: Site name to unit numbers (``NeuronSet.indices`` will do).
        sites: The model's sites.
        change: Gets the activations ``(prompts, tokens, units, width)`` of a site's chosen units
            (of an expert ``(tokens, units, width)``, those routed to it), in order, and returns
            new ones of that shape; these are cast and moved to where the others are.

    Raises:
        SelectionError: A site or a unit that is not there.
        CaptureError: A site never ran within the context, so nothing of it was changed.

    Example:
        >>> double = lambda site, values: 2 * values
        >>> with edit(model, {"model.layers.1.mlp": (3, 7)}, sites, double):  # doctest: +SKIP
        ...     model(**batch.inputs)
    """
    chosen = {name: _numbers(name, units, sites) for name, units in neurons.items()}
    by_inlet = {sites[name].writes.inlet: sites[name] for name in chosen}

    def act(inlet: str, received: Seen) -> Tensor:
        site = by_inlet[inlet]
        numbers = chosen[site.name].to(received.values.device)
        units = received.values.unflatten(-1, (site.units, site.width))
        new = change(site.name, units.index_select(-2, numbers)).to(units)
        return units.index_copy(-2, numbers, new).flatten(-2)

    with tap(model, [sites[name].writes for name in chosen], act):
        yield


@contextmanager
def silence(
    model: nn.Module, neurons: Mapping[str, Tensor | tuple[int, ...]], sites: Mapping[str, Site]
) -> Iterator[None]:
    """Run the model with the activations of ``neurons`` at zero; see :func:`edit`."""
    with edit(model, neurons, sites, lambda _, values: torch.zeros_like(values)):
        yield


def _numbers(name: str, units: Tensor | tuple[int, ...], sites: Mapping[str, Site]) -> Tensor:
    if name not in sites:
        raise SelectionError(f"There is no site {name!r} to change; there are {list(sites)[:4]}.")
    numbers = torch.as_tensor(units, dtype=torch.long).unique()
    wrong = numbers[(numbers < 0) | (numbers >= sites[name].units)].tolist()
    if wrong:
        raise SelectionError(
            f"{name!r} has units 0 to {sites[name].units - 1}, and not {wrong[:3]}: "
            "they belong to another model."
        )
    return numbers

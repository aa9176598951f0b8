"""A dampener at work while the model runs: hooks on what writing matrices receive."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from safeft.capture import CaptureError, Seen, tap
from safeft.detox.dampener import Dampener
from safeft.sites import Site, bare, find_sites, plain_model

Change: TypeAlias = Callable[[Tensor], Tensor]
"""Activations of one site in, activations out."""


@contextmanager
def dampened(model: nn.Module, dampener: Dampener) -> Iterator[None]:
    """Run the model with the dampener's units turned down; the weights are not touched.

    One multiplication a block (two with ceilings). Experts of a mixture are computed one by one
    meanwhile, which is slow: fold instead.

    Args:
        model: The model, adapters included.
        dampener: Made for a model of this layout; tuned weights will do.

    Raises:
        FingerprintError: It was made for a model of other names or shapes.
        CaptureError: A block of the text never ran within the context, so nothing was dampened
            there. Parts that only images go through may stay idle.

    Example:
        >>> with dampened(model, dampener):  # doctest: +SKIP
        ...     model.generate(**inputs)
    """
    dampener.neurons.check_model(model, weights_too=False)
    sites = find_sites(model)
    with changed(model, {name: _act(sites[name], dampener) for name in dampener.gains}, sites):
        yield


@contextmanager
def changed(
    model: nn.Module, changes: Mapping[str, Change], sites: Mapping[str, Site]
) -> Iterator[None]:
    """Run the model with its sites' activations changed, gradients passing through.

    Args:
        model: The model, adapters included.
        changes: Site to what becomes of its activations ``(..., units * width)``.
        sites: Those of the model.

    Raises:
        CaptureError: As :func:`dampened`.
    """
    plain = plain_model(model)
    mine = [sites[name] for name in changes]
    idle = {site.name for site in mine if site.tower == "text" and site.writes.expert is None}
    with ExitStack() as undo:
        for site in mine:
            if site.writes.expert is None:
                module = bare(plain.get_submodule(site.writes.module))
                handle = module.register_forward_pre_hook(_hook(site, changes[site.name], idle))
                undo.callback(handle.remove)
        routed = {site.writes.inlet: site for site in mine if site.writes.expert is not None}
        if routed:

            def act(inlet: str, seen: Seen) -> Tensor:
                return changes[routed[inlet].name](seen.values)

            undo.enter_context(tap(model, [site.writes for site in routed.values()], act))
        yield
    if idle:
        raise CaptureError(
            f"{sorted(idle)[:3]} did not run, so their units were not dampened. Run the model "
            "within the context; is part of it skipped or offloaded?"
        )


def _hook(site: Site, change: Change, idle: set[str]) -> Callable[..., tuple[Any, ...]]:
    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        idle.discard(site.name)
        return (change(inputs[0]), *inputs[1:])

    return hook


def _act(site: Site, dampener: Dampener) -> Change:
    """The change of one site's activations, its gains kept where they were used last."""
    gains = dampener.row(site.name, site.units, site.width)
    tops = dampener.ceiling(site.name, site.units, site.width)
    capped, scaled = bool(tops.isfinite().any()), bool((gains != 1).any())
    known: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def change(values: Tensor) -> Tensor:
        key = values.device, values.dtype
        if key not in known:
            known[key] = gains.to(values), tops.to(values)
        gain, top = known[key]
        if capped:
            values = _capped(values, top, site)
        return values * gain if scaled else values

    return change


def _capped(values: Tensor, top: Tensor, site: Site) -> Tensor:
    """No unit larger than its ceiling, its sign or direction kept."""
    if site.width == 1:
        return values.clamp(-top, top)
    units = values.unflatten(-1, (site.units, site.width))
    size = units.float().norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    limit = top.view(site.units, site.width)[:, :1].float()
    return (units * (limit / size).clamp(max=1).to(units)).flatten(-2)

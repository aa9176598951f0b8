"""Activations of neurons at chosen tokens, seen during a forward pass and gone after it.

A unit's activation is what the matrix that writes it back receives (``down_proj``, ``o_proj``).
Nothing is kept beyond one batch: locators reduce what they are shown to running statistics, so
memory does not grow with the number of prompts.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from safeft.errors import SafeftError, SelectionError
from safeft.sites import Site, dense, plain_model

Observer = Callable[[str, Tensor], None]
"""Called once per module and forward pass with the module's name and its input
``(prompts, tokens, features)``."""

Change = Callable[[str, Tensor], Tensor]
"""Called once per site and forward pass with the site's name and its chosen units' activations
``(prompts, tokens, units, width)``; gives those to go on with, of the same shape."""


class CaptureError(SafeftError, RuntimeError):
    """A module that should have been seen in the forward pass was not run."""


@contextmanager
def watch_inputs(model: nn.Module, modules: list[str], observe: Observer) -> Iterator[None]:
    """Show ``observe`` the input of each named module; hooks are gone afterwards, also on errors.

    Raises:
        CaptureError: A module was never run within the context, so what was gathered is partial.
    """
    plain = plain_model(model)
    handles: list[RemovableHandle] = []
    missing = set(modules)

    def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            missing.discard(name)
            observe(name, inputs[0])

        return hook

    try:
        for name in modules:
            module = dense(plain.get_submodule(name))
            handles.append(module.register_forward_pre_hook(hook_for(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
    _expect_all_ran(missing)


@contextmanager
def capture(model: nn.Module, sites: Mapping[str, Site]) -> Iterator[dict[str, Tensor]]:
    """A mapping that holds, after each forward pass, every site's activations.

    Yields:
        Site name to ``(prompts, tokens, units, width)`` in the model's dtype, graph attached; each
        forward pass replaces the last one's.

    Example:
        >>> with capture(model, find_sites(model)) as seen:  # doctest: +SKIP
        ...     model(**batch.inputs)
        >>> seen["model.layers.1.mlp"][batch.choose("last_prompt")]  # doctest: +SKIP
    """
    by_writer = {site.writes.module: site for site in sites.values()}
    seen: dict[str, Tensor] = {}

    def keep(writer: str, inputs: Tensor) -> None:
        site = by_writer[writer]
        seen[site.name] = inputs.unflatten(-1, (site.units, site.width))

    with watch_inputs(model, list(by_writer), keep):
        yield seen


@contextmanager
def edit(
    model: nn.Module,
    neurons: Mapping[str, Tensor | tuple[int, ...]],
    sites: Mapping[str, Site],
    change: Change,
) -> Iterator[None]:
    """Run the model with the activations of ``neurons`` replaced by what ``change`` makes of them.

    Args:
        model: The model; it is not changed.
        neurons: Site name to unit numbers (``NeuronSet.indices`` will do).
        sites: The model's sites.
        change: See :data:`Change`; units come in ascending order. The result is cast to the
            activations' dtype and moved to their device.

    Raises:
        SelectionError: A site or a unit that is not there.
        CaptureError: A site never ran within the context, so nothing of it was changed.

    Example:
        >>> double = lambda site, values: 2 * values
        >>> with edit(model, {"model.layers.1.mlp": (3, 7)}, sites, double):  # doctest: +SKIP
        ...     model(**batch.inputs)
    """
    plain = plain_model(model)
    columns_of = {name: _columns(name, units, sites) for name, units in neurons.items()}
    handles: list[RemovableHandle] = []
    missing = set(columns_of)

    def hook_for(
        name: str, columns: Tensor
    ) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        width = sites[name].width

        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            missing.discard(name)
            values, places = inputs[0], columns.to(inputs[0].device)
            chosen = values.index_select(-1, places).unflatten(-1, (len(places) // width, width))
            changed = change(name, chosen).flatten(-2).to(values)
            return (values.index_copy(-1, places, changed), *inputs[1:])

        return hook

    try:
        for name, columns in columns_of.items():
            module = plain.get_submodule(sites[name].writes.module)
            handles.append(module.register_forward_pre_hook(hook_for(name, columns)))
        yield
    finally:
        for handle in handles:
            handle.remove()
    _expect_all_ran(missing)


def silence(
    model: nn.Module, neurons: Mapping[str, Tensor | tuple[int, ...]], sites: Mapping[str, Site]
) -> AbstractContextManager[None]:
    """Run the model with the activations of ``neurons`` at zero; see :func:`edit`."""
    return edit(model, neurons, sites, lambda _, values: torch.zeros_like(values))


def _columns(name: str, units: Tensor | tuple[int, ...], sites: Mapping[str, Site]) -> Tensor:
    if name not in sites:
        raise SelectionError(f"There is no site {name!r} to change; there are {list(sites)[:4]}.")
    numbers = torch.as_tensor(units, dtype=torch.long)
    wrong = numbers[(numbers < 0) | (numbers >= sites[name].units)].tolist()
    if wrong:
        raise SelectionError(
            f"{name!r} has units 0 to {sites[name].units - 1}, and not {wrong[:3]}: "
            "they belong to another model."
        )
    return sites[name].writes.entries(numbers)


def _expect_all_ran(missing: set[str]) -> None:
    if missing:
        raise CaptureError(
            f"{sorted(missing)[:3]} did not run in the forward pass, so their neurons were not "
            "reached and any result would be partial. Is part of the model skipped or offloaded?"
        )

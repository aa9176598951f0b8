"""Units held at values of their own in each row of a pass."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

from safeft.capture import Seen, tap
from safeft.sites import Site, blocks_of, plain_model

Held: TypeAlias = Mapping[str, Sequence[tuple[int, Tensor]]]
"""Site name to units, each with a value for each row, ``(rows,)``; NaN leaves it alone there."""


@contextmanager
def holding(model: nn.Module, sites: Mapping[str, Site], held: Held, rows: int) -> Iterator[None]:
    """Run the model with units at fixed values, at every token.

    Of an expert's unit: at every token that is routed to the expert.

    Args:
        model: The model; it is not changed.
        sites: The model's sites; those of ``held`` are of width 1.
        held: What is held at what.
        rows: Prompts in each pass.

    Raises:
        CaptureError: A site never ran within the context.

    Example:
        >>> off = {"model.layers.1.mlp": [(17, torch.zeros(len(batch.input_ids)))]}
        ... # doctest: +SKIP
        >>> with holding(model, sites, off, len(batch.input_ids)):  # doctest: +SKIP
        ...     model(**batch.inputs)
    """
    chosen = {sites[name].writes.inlet: held[name] for name in held}
    routed = [name for name in held if sites[name].writes.expert is not None]
    widths: dict[str, int] = {}
    handles = []
    blocks = blocks_of(model) if routed else {}
    for path in {path for path in blocks for name in routed if name.startswith(f"{path}.")}:

        def note(_: nn.Module, args: tuple, kwargs: dict, path: str = path) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            widths[path] = hidden.shape[1]

        block = plain_model(model).get_submodule(path)
        handles.append(block.register_forward_pre_hook(note, with_kwargs=True))

    def put(inlet: str, seen: Seen) -> Tensor:
        new = seen.values.clone()
        flat = new.view(-1, new.shape[-1])
        if seen.places is None:
            # Tokens of a row are counted, not known: some models cut rows in their last blocks.
            row = torch.arange(len(flat), device=flat.device) // (len(flat) // rows)
        else:
            width = next(w for path, w in widths.items() if inlet.startswith(f"{path}."))
            row = seen.places // width
        for unit, values in chosen[inlet]:
            wanted = values.to(flat)[row]
            flat[:, unit] = torch.where(wanted.isnan(), flat[:, unit], wanted)
        return new

    try:
        with tap(model, [sites[name].writes for name in held], put):
            yield
    finally:
        for handle in handles:
            handle.remove()

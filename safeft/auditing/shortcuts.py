"""What of a forward pass need not be run again, put into the model's own forward pass.

Nothing here knows an architecture: blocks that are passed over hand on what they are given, and
masks, positions and norms stay the model's. Whether a model allows it shows in its margins.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Below:
    """What each block received, and what it gave beside hidden states, if anything.

    Attributes:
        inputs: ``(prompts, tokens, hidden)``, a block each.
        rests: None where a block gives hidden states alone.
    """

    inputs: list[Tensor]
    rests: list[tuple[Any, ...] | None]


def seen_below(blocks: Sequence[nn.Module], run: Callable[[], object]) -> Below:
    """What blocks receive and give while ``run`` runs the model once."""
    below = Below([], [])

    def keep_input(_: nn.Module, args: Any, kwargs: Any) -> None:
        below.inputs.append(args[0] if args else kwargs["hidden_states"])

    def keep_rest(_: nn.Module, __: Any, output: Any) -> None:
        below.rests.append(None if isinstance(output, Tensor) else tuple(output[1:]))

    with ExitStack() as undo:
        for block in blocks:
            for handle in (
                block.register_forward_pre_hook(keep_input, with_kwargs=True),
                block.register_forward_hook(keep_rest),
            ):
                undo.callback(handle.remove)
        run()
    return below


@contextmanager
def resumed(
    blocks: Sequence[nn.Module], below: Below, block: int, times: int, once: bool
) -> Iterator[None]:
    """Run the model from a block on, each prompt so many times.

    Args:
        blocks: All blocks that follow each other.
        below: What they received when each prompt was run once.
        block: The number of the one to go on from.
        times: How often each prompt is in the pass: first all once, then all again.
        once: Run that block once a prompt. Something in it has to give back ``(times, prompts,
            tokens, hidden)``, from where on its output is that of all rows.
    """

    def passed_over(rest: tuple[Any, ...] | None) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            return hidden if rest is None else (hidden, *rest)

        return forward

    module, hidden, rest = blocks[block], below.inputs[block], below.rests[block]
    plain, prompts = module.forward, len(hidden)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if once:
            args, kwargs = (_first(given, times * prompts, prompts) for given in (args, kwargs))
        start = hidden if once else hidden.repeat(times, 1, 1)
        if args:
            args = (start, *args[1:])
        else:
            kwargs = {**kwargs, "hidden_states": start}
        output = plain(*args, **kwargs)
        if not once:
            return output
        made = (output if rest is None else output[0]).reshape(times * prompts, *hidden.shape[1:])
        return made if rest is None else (made, *rest)

    with ExitStack() as undo:
        for number in range(block):
            undo.enter_context(_running(blocks[number], passed_over(below.rests[number])))
        undo.enter_context(_running(module, forward))
        yield


@contextmanager
def trimmed(mlp: nn.Module, keep: int) -> Iterator[None]:
    """Run an MLP on the last ``keep`` tokens; what it gives for the others is zero.

    Of the last block's no other token is ever looked at.
    """
    plain = mlp.forward

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        made = plain(hidden[:, -keep:].contiguous(), *args, **kwargs)
        return functional.pad(made, (0, 0, hidden.shape[1] - made.shape[-2], 0))

    with _running(mlp, forward):
        yield


@contextmanager
def added(
    module: nn.Module, width: int, units: Tensor, values: Tensor, like: Tensor
) -> Iterator[None]:
    """Run a matrix once for many edits of what it receives: each adds what it changes.

    Args:
        module: The matrix, linear but for a constant, adapters included.
        width: How many units it reads.
        units: Int64 ``(edits,)``: the unit that each edit holds.
        values: ``(edits, prompts)``: at what.
        like: Any tensor of the device and dtype that the matrix receives.

    What comes out is ``(edits, prompts, tokens, hidden)``.
    """
    ones = like.new_zeros(len(units), width)
    nothing = module(ones[:1])
    ones[range(len(units)), units.to(like.device)] = 1
    columns = (module(ones) - nothing)[:, None, None]
    held = values.to(like)[..., None]

    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if inputs[0].dim() != 3:
            raise ValueError("prompts and tokens come as one axis")
        natural = inputs[0].index_select(-1, units.to(like.device)).movedim(-1, 0)
        return output + (held - natural)[..., None] * columns

    handle = module.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _first(given: Any, rows: int, count: int) -> Any:
    """Whatever was made for all rows, for the first ``count`` of them."""
    if isinstance(given, Tensor):
        return given[:count] if given.dim() and len(given) == rows else given
    if isinstance(given, tuple | list):
        return type(given)(_first(each, rows, count) for each in given)
    if isinstance(given, dict):
        return {name: _first(each, rows, count) for name, each in given.items()}
    return given


@contextmanager
def _running(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The module runs otherwise while the context lasts."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before

"""Where a guard reads: the residual stream after each block, and each MLP's units.

One forward pass shows all of them. Hooks only put what they are shown into a list: that is what
makes them cheap enough for every token of a generation; what is done with it is done once a pass.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from safeft.capture import CaptureError
from safeft.errors import ConfigError
from safeft.sites import bare, blocks_of, find_sites, plain_model

Kind: TypeAlias = Literal["residual", "mlp"]
KINDS: tuple[Kind, ...] = ("residual", "mlp")


@dataclass(frozen=True)
class Place:
    """One layer's activations of one kind.

    Attributes:
        module: Path of the block (``residual``: what it gives), or of the matrix that the MLP's
            units are written back with (``mlp``: what it receives).
        kind: ``residual`` or ``mlp``.
        layer: Number of the block.
        width: How many numbers a token has there.
    """

    module: str
    kind: Kind
    layer: int
    width: int

    @property
    def name(self) -> str:
        """For people: ``residual 3``."""
        return f"{self.kind} {self.layer}"


def find_places(model: nn.Module, kinds: Sequence[Kind] = KINDS) -> list[Place]:
    """The places of a model's text tower, in order of depth.

    Experts are left out: which tokens they see differs from token to token, so a mean over tokens
    would not say what it says elsewhere. Their blocks' residual stream holds what they wrote.

    Raises:
        ConfigError: No such kind.
        UnsupportedModelError: The model's layout is not known.

    Example:
        >>> [place.name for place in find_places(model)][:3]  # doctest: +SKIP
        ['mlp 0', 'residual 0', 'mlp 1']
    """
    if not kinds or set(kinds) - set(KINDS):
        raise ConfigError(
            f"kinds={list(kinds)}: a guard reads {' and '.join(KINDS)}; give one of them or both."
        )
    plain = plain_model(model)
    config: Any = plain.config
    width = int(config.get_text_config().hidden_size)
    blocks = blocks_of(plain)
    found: dict[tuple[int, Kind], Place] = {}
    for site in find_sites(plain).values():
        if site.tower != "text":
            continue
        block = next(path for path in blocks if f"{site.name}.".startswith(f"{path}."))
        if "residual" in kinds:
            found[site.layer, "residual"] = Place(block, "residual", site.layer, width)
        if "mlp" in kinds and site.kind == "mlp" and site.writes.expert is None:
            found[site.layer, "mlp"] = Place(site.writes.module, "mlp", site.layer, site.units)
    if not found:
        raise ConfigError(
            f"kinds={list(kinds)}: this {config.model_type!r} model has no such place outside its "
            "experts. Read its residual stream."
        )
    return [found[key] for key in sorted(found)]


Reduce: TypeAlias = Callable[[int, Tensor], Tensor]
"""From a place's number and what it shows to what is kept of it."""


@contextmanager
def watched(
    model: nn.Module, places: Sequence[Place], reduce: Reduce | None = None
) -> Iterator[list[Tensor]]:
    """A list that holds, after each forward pass, what each place showed; hooks undone afterwards.

    Args:
        model: The model; it is not changed.
        places: Where to read.
        reduce: Applied at once to what is shown, so that no more than one layer is kept whole.

    Yields:
        One tensor a place, ``(texts, tokens, width)`` in the model's dtype unless reduced. Take
        them with :func:`taken`, or a place that was not run would show what it showed last.
    """
    plain = plain_model(model)
    seen: list[Any] = [None] * len(places)

    def before(number: int) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[number] = inputs[0] if reduce is None else reduce(number, inputs[0])

        return hook

    def after(number: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            seen[number] = value if reduce is None else reduce(number, value)

        return hook

    with ExitStack() as undo:
        for number, place in enumerate(places):
            module = bare(plain.get_submodule(place.module))
            if place.kind == "mlp":
                handle = module.register_forward_pre_hook(before(number))
            else:
                handle = module.register_forward_hook(after(number))
            undo.callback(handle.remove)
        yield seen


def taken(seen: list[Any], places: Sequence[Place]) -> list[Tensor]:
    """What :func:`watched` saw in the last pass; the list is emptied.

    Raises:
        CaptureError: A place was not run.
    """
    found: list[Tensor] = []
    for number, place in enumerate(places):
        value, seen[number] = seen[number], None
        if value is None:
            raise CaptureError(
                f"{place.module} was not run in the forward pass, so a score would be of a part "
                "of what the guard reads. Is part of the model skipped, offloaded or replaced?"
            )
        found.append(value)
    return found

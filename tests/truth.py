"""Where the units of a model live, written by hand from the modeling sources: the ground truth.

Nothing here may come from ``safeft``: tests/test_families.py proves these entries against the
models' own forward passes, and tests of ``safeft`` are measured against them.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Tower = Literal["text", "vision", "projector"]
Block = Callable[[int], int]
Index = tuple[slice, ...]


def own(unit: int) -> int:
    return unit


@dataclass(frozen=True)
class Held:
    """The part of one tensor that a unit uses: ``width`` entries of ``dim``, block ``block(j)``."""

    parameter: str
    dim: int
    width: int = 1
    block: Block = own
    writes: bool = False
    expert: int | None = None

    def index(self, unit: int) -> Index:
        """``parameter[index]`` are the unit's weights, as a view."""
        first = self.block(unit) * self.width
        index = [*[slice(None)] * self.dim, slice(first, first + self.width)]
        if self.expert is not None:
            index[0] = slice(self.expert, self.expert + 1)
        return tuple(index)


@dataclass(frozen=True)
class Truth:
    """One family of like units.

    ``width`` is the size of one unit's activation at the input of the writing matrix. ``mixing``
    names norms that divide by the size of all heads together: there a head's weights move the
    other heads, too. ``partial`` marks units that also read through weights of no unit (MLA).
    """

    site: str
    kind: Literal["mlp", "attention"]
    units: int
    held: tuple[Held, ...]
    width: int = 1
    tower: Tower = "text"
    mixing: tuple[str, ...] = ()
    partial: bool = False

    @property
    def mixes_heads(self) -> bool:
        return bool(self.mixing)

    @property
    def writer(self) -> Held:
        return next(held for held in self.held if held.writes)

    @property
    def readers(self) -> tuple[Held, ...]:
        return tuple(held for held in self.held if not held.writes)

    @property
    def layer(self) -> int | None:
        """Number of the block; none for a projector."""
        match = re.search(r"\.(\d+)(\.|$)", self.site)
        return int(match.group(1)) if match and self.tower != "projector" else None

    def slices(self, unit: int) -> list[tuple[str, Index]]:
        return [(held.parameter, held.index(unit)) for held in self.held]

    def sharers(self, held: Held, unit: int) -> set[int]:
        """All units that use the same entries of this tensor as ``unit`` does."""
        return {other for other in range(self.units) if held.block(other) == held.block(unit)}


def join(*names: str) -> str:
    return ".".join(name for name in names if name)


def rows(
    module: str, bias: bool, *, width: int = 1, block: Block = own, dim: int = 0
) -> list[Held]:
    """Of an output: rows of the weight (columns where it is transposed), entries of the bias."""
    found = [Held(f"{module}.weight", dim, width, block)]
    return [*found, Held(f"{module}.bias", 0, width, block)] if bias else found


def columns(module: str, width: int = 1, dim: int = 1) -> Held:
    return Held(f"{module}.weight", dim, width, writes=True)


def mlp(
    site: str,
    units: int,
    reads: Sequence[str] = ("gate_proj", "up_proj"),
    writes: str = "down_proj",
    *,
    bias: bool = False,
    transposed: bool = False,
    tower: Tower = "text",
) -> Truth:
    """One matrix each for gate and up, or only an up matrix; ``transposed`` for ``Conv1D``."""
    held = [
        part for name in reads for part in rows(join(site, name), bias, dim=1 if transposed else 0)
    ]
    held.append(columns(join(site, writes), dim=0 if transposed else 1))
    return Truth(site, "mlp", units, tuple(held), tower=tower)


def fused_mlp(
    site: str, units: int, reads: str = "gate_up_proj", writes: str = "down_proj"
) -> Truth:
    """Gate and up in one matrix, all gates first."""
    module = join(site, reads)
    held = (*rows(module, False), *rows(module, False, block=lambda j: units + j))
    return Truth(site, "mlp", units, (*held, columns(join(site, writes))))


def experts(
    site: str,
    count: int,
    units: int,
    *,
    transposed: bool = False,
    interleaved: bool = False,
    bias: bool = False,
) -> list[Truth]:
    """Experts in 3-D tensors: (E, 2I, h) and (E, h, I), or transposed (E, h, 2I) and (E, I, h)."""

    def gate(unit: int) -> int:
        return 2 * unit if interleaved else unit

    def up(unit: int) -> int:
        return 2 * unit + 1 if interleaved else units + unit

    found = []
    for expert in range(count):
        held = []
        for block in (gate, up):
            held.append(
                Held(f"{site}.gate_up_proj", 2 if transposed else 1, 1, block, expert=expert)
            )
            if bias:
                held.append(Held(f"{site}.gate_up_proj_bias", 1, 1, block, expert=expert))
        down = 1 if transposed else 2
        held.append(Held(f"{site}.down_proj", down, writes=True, expert=expert))
        found.append(Truth(f"{site}.{expert}", "mlp", units, tuple(held)))
    return found


@dataclass(frozen=True)
class Heads:
    """Query heads, groups of keys and values, and the size of a head."""

    queries: int
    groups: int
    size: int

    @property
    def share(self) -> int:
        return self.queries // self.groups


def attention(
    site: str,
    heads: Heads,
    *,
    names: Sequence[str] = ("q_proj", "k_proj", "v_proj"),
    writes: str = "o_proj",
    bias: bool = False,
    query_width: int | None = None,
    full_norms: bool = False,
    extra: Iterable[Held] = (),
    tower: Tower = "text",
) -> Truth:
    """Separate matrices; ``full_norms``: q_norm and k_norm are as wide as all heads together.

    ``names`` are the query's and those that a group shares: fewer where values are keys.
    """
    query, *shared = (join(site, name) for name in names)

    def group(unit: int) -> int:
        return unit // heads.share

    held = rows(query, bias, width=query_width or heads.size)
    for module in shared:
        held += rows(module, bias, width=heads.size, block=group)
    mixing: tuple[str, ...] = ()
    if full_norms:
        mixing = (f"{site}.q_norm", f"{site}.k_norm")
        held.append(Held(f"{site}.q_norm.weight", 0, heads.size))
        held.append(Held(f"{site}.k_norm.weight", 0, heads.size, group))
    held += [*extra, columns(join(site, writes), heads.size)]
    return Truth(
        site, "attention", heads.queries, tuple(held), heads.size, tower=tower, mixing=mixing
    )


def fused_attention(
    site: str,
    heads: Heads,
    blocks: tuple[Block, Block, Block],
    *,
    reads: str = "query_key_value",
    writes: str = "dense",
    bias: bool = False,
    transposed: bool = False,
    tower: Tower = "text",
) -> Truth:
    """One matrix for q, k and v; ``blocks`` says in which block of head size each one lies."""
    held = [
        part
        for block in blocks
        for part in rows(
            join(site, reads), bias, width=heads.size, block=block, dim=1 if transposed else 0
        )
    ]
    held.append(columns(join(site, writes), heads.size, dim=0 if transposed else 1))
    return Truth(site, "attention", heads.queries, tuple(held), heads.size, tower=tower)


def one_after_another(heads: Heads) -> tuple[Block, Block, Block]:
    """All queries, then all keys, then all values (Phi-3, GPT-2, the vision towers of Qwen-VL)."""
    return (
        own,
        lambda j: heads.queries + j // heads.share,
        lambda j: heads.queries + heads.groups + j // heads.share,
    )


def by_head() -> tuple[Block, Block, Block]:
    """The q, k and v of one head, then those of the next (GPT-NeoX, Bloom, the first Falcons)."""
    return (lambda j: 3 * j, lambda j: 3 * j + 1, lambda j: 3 * j + 2)


def by_group(heads: Heads) -> tuple[Block, Block, Block]:
    """The queries of one group, its key, its value, then the next group (Falcon 40B, 180B, 11B)."""
    n = heads.share
    return (
        lambda j: j // n * (n + 2) + j % n,
        lambda j: j // n * (n + 2) + n,
        lambda j: j // n * (n + 2) + n + 1,
    )

"""Which rows and columns of which parameters are neuron j: the only file that knows architectures.

A *site* is one family of like units in one block: an MLP's hidden units, an attention's query
heads. A unit reads with rows of some matrices and writes with a column block of one; grouped keys
and values belong to every query head of their group. Names are module paths of the plain model
(``model.layers.1.mlp``), also where the model is wrapped by PEFT or DDP.

To support another layout, add a :class:`Layout` to ``LAYOUTS``; what is not listed is an error,
because a rule guessed from shapes would freeze the wrong weights in silence.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from safeft.errors import UnsupportedModelError
from safeft.shards import Axis, shape_of

Kind: TypeAlias = Literal["mlp", "attention"]


@dataclass(frozen=True)
class Part:
    """The entries of one module's weights that belong to the units of a site, along one axis.

    Unit ``j`` owns the entries ``[j // share * width, (j // share + 1) * width)``: ``width`` is 1
    for an MLP and the head size for attention, ``share`` the number of query heads that use one
    key or value head.
    """

    module: str
    axis: Axis
    width: int = 1
    share: int = 1

    def entries(self, units: Tensor) -> Tensor:
        """Sorted row (or column) numbers, int64 ``(entries,)``, that any of ``units`` uses."""
        return self._blocks(torch.unique(units.div(self.share, rounding_mode="floor")))

    def own_entries(self, units: Tensor) -> Tensor:
        """Like :meth:`entries`, without those that a unit outside ``units`` uses as well."""
        blocks, sharers = torch.unique(
            units.div(self.share, rounding_mode="floor"), return_counts=True
        )
        return self._blocks(blocks[sharers == self.share])

    def unit_of(self, entry: int) -> int:
        """The (first) unit that uses row or column ``entry``."""
        return entry // self.width * self.share

    def _blocks(self, blocks: Tensor) -> Tensor:
        return (blocks[:, None] * self.width + torch.arange(self.width)).flatten()


@dataclass(frozen=True)
class Site:
    """One family of like units in one block.

    Attributes:
        name: Module path, e.g. ``model.layers.1.mlp``.
        kind: ``mlp`` (hidden units) or ``attention`` (query heads).
        layer: Number of the block.
        units: How many units there are.
        width: Size of one unit's activation at the input of the matrix that writes it back.
        reads: The parts a unit reads with (rows).
        writes: The part it writes with (columns); its module's input is the units' activations.
    """

    name: str
    kind: Kind
    layer: int
    units: int
    width: int
    reads: tuple[Part, ...]
    writes: Part

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts, those read with first."""
        return (*self.reads, self.writes)


@dataclass(frozen=True)
class Layout:
    """Where a decoder keeps its parts: module names inside one block.

    ``head_norms`` names norms whose gain has one entry per row of q or k (OLMo 2); norms with one
    gain shared by all heads (Qwen 3, Gemma 3) belong to no head.
    """

    mlp: str = "mlp"
    mlp_reads: tuple[str, ...] = ("gate_proj", "up_proj")
    mlp_writes: str = "down_proj"
    attention: str = "self_attn"
    query: tuple[str, ...] = ("q_proj",)
    key_value: tuple[str, ...] = ("k_proj", "v_proj")
    attention_writes: str = "o_proj"


_GATED = Layout()
_GATED_FULL_NORMS = Layout(query=("q_proj", "q_norm"), key_value=("k_proj", "v_proj", "k_norm"))

LAYOUTS: Mapping[str, Layout] = {
    "llama": _GATED,
    "mistral": _GATED,
    "qwen2": _GATED,
    "qwen3": _GATED,
    "gemma": _GATED,
    "gemma2": _GATED,
    "gemma3_text": _GATED,
    "olmo2": _GATED_FULL_NORMS,
}

_PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_BLOCK = re.compile(r"(?:^|\.)layers\.(\d+)$")


_WRAPPED = ("_checkpoint_wrapped_module", "_orig_mod")
"""Where activation checkpointing and torch.compile put the module they wrap."""


def bare(module: nn.Module) -> nn.Module:
    """The module inside wrappers that change how it runs and not what it is."""
    while inner := next(
        (module._modules[name] for name in _WRAPPED if name in module._modules), None
    ):
        module = inner
    return module


def plain_name(name: str) -> str:
    """A parameter's or module's name without the wrappers' parts."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def plain_model(model: nn.Module) -> nn.Module:
    """The transformers model inside PEFT, DDP or torch.compile (adapter layers stay in place)."""
    while True:
        model = bare(model)
        inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else None
        peft_base = getattr(model, "get_base_model", None)
        inner = peft_base() if inner is None and callable(peft_base) else inner
        if inner is None or inner is model:
            return model
        assert isinstance(inner, nn.Module)
        model = inner


def dense(module: nn.Module) -> nn.Module:
    """The module that holds the original weights: the base layer under an adapter, or itself."""
    while isinstance(base := getattr(module, "base_layer", None), nn.Module):
        module = base
    return module


def find_sites(model: nn.Module, kinds: tuple[Kind, ...] = ("mlp", "attention")) -> dict[str, Site]:
    """The sites of a model, by name, in order of depth.

    Args:
        model: A transformers model, also on the meta device, also wrapped by PEFT or DDP.
        kinds: Which families to list.

    Raises:
        UnsupportedModelError: The model type has no layout here, or a block does not look as its
            layout says.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=12,
        ...                      num_hidden_layers=1, num_attention_heads=2)
        >>> find_sites(LlamaForCausalLM(config))["model.layers.0.mlp"].units
        12
    """
    model = plain_model(model)
    config = getattr(model, "config", None)
    model_type = str(getattr(config, "model_type", type(model).__name__))
    layout = LAYOUTS.get(model_type)
    if layout is None:
        raise UnsupportedModelError(
            f"There is no site rule for model type {model_type!r}, so its neurons cannot be named; "
            f"guessing would freeze the wrong weights. Supported: {', '.join(sorted(LAYOUTS))}. "
            "A new layout is an entry in safeft/sites.py."
        )
    heads = int(getattr(config, "num_attention_heads", 0))
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    sites: dict[str, Site] = {}
    for path, block in model.named_modules():
        match = _BLOCK.search(path)
        if match is None:
            continue
        layer, path, block = int(match.group(1)), plain_name(path), bare(block)
        if "mlp" in kinds:
            site = _mlp(block, path, layer, layout, model_type)
            sites[site.name] = site
        if "attention" in kinds:
            site = _attention(block, path, layer, layout, model_type, heads, groups)
            sites[site.name] = site
    if not sites:
        raise UnsupportedModelError(
            f"No decoder block was found in {type(model).__name__} ({model_type}). Load it with a "
            "task class such as AutoModelForCausalLM."
        )
    return sites


def _mlp(block: nn.Module, path: str, layer: int, layout: Layout, model_type: str) -> Site:
    name = f"{path}.{layout.mlp}"
    holder = _child(block, layout.mlp, name, model_type)
    writer = _linear(holder, layout.mlp_writes, name, model_type)
    units = writer.in_features
    for part in layout.mlp_reads:
        _expect(_linear(holder, part, name, model_type).out_features, units, name, part, model_type)
    reads = tuple(Part(f"{name}.{part}", "rows") for part in layout.mlp_reads)
    return Site(name, "mlp", layer, units, 1, reads, Part(f"{name}.{layout.mlp_writes}", "columns"))


def _attention(
    block: nn.Module,
    path: str,
    layer: int,
    layout: Layout,
    model_type: str,
    heads: int,
    groups: int,
) -> Site:
    name = f"{path}.{layout.attention}"
    holder = _child(block, layout.attention, name, model_type)
    writer = _linear(holder, layout.attention_writes, name, model_type)
    width, share = writer.in_features // heads, heads // groups
    _expect(width * heads, writer.in_features, name, layout.attention_writes, model_type)
    reads: list[Part] = []
    for names, rows, sharing in (
        (layout.query, heads * width, 1),
        (layout.key_value, groups * width, share),
    ):
        for part in names:
            found = dense(_child(holder, part, name, model_type))
            is_norm = part.endswith("_norm")
            child = found if is_norm else _linear(holder, part, name, model_type)
            weight = child.weight if isinstance(child.weight, Tensor) else torch.empty(0)
            _expect(shape_of(weight)[0], rows, name, part, model_type)
            reads.append(Part(f"{name}.{part}", "rows", width, sharing))
    writes = Part(f"{name}.{layout.attention_writes}", "columns", width)
    return Site(name, "attention", layer, heads, width, tuple(reads), writes)


def _child(holder: nn.Module, child: str, site: str, model_type: str) -> nn.Module:
    found = dict(holder.named_children()).get(child)
    if found is None:
        raise UnsupportedModelError(
            f"{site} of this {model_type!r} model has no module {child!r} (it has "
            f"{[name for name, _ in holder.named_children()]}): its layout is not the one safeft "
            "knows for that type, so its neurons cannot be named."
        )
    return found


def _linear(holder: nn.Module, child: str, site: str, model_type: str) -> nn.Linear:
    found = dense(_child(holder, child, site, model_type))
    if not isinstance(found, nn.Linear):
        raise UnsupportedModelError(
            f"{site}.{child} of this {model_type!r} model is a {type(found).__name__}, not a "
            "Linear: which axis is the unit is unknown, so it cannot be frozen."
        )
    shape = (found.out_features, found.in_features)
    if shape_of(found.weight) != shape or found.weight.dtype not in _PLAIN_DTYPES:
        raise UnsupportedModelError(
            f"{site}.{child} of this {model_type!r} model holds a {found.weight.dtype} weight of "
            f"shape {shape_of(found.weight)} for {shape}. Quantised weights have no rule yet: "
            "their numbers mean nothing without scales. Load the model in bfloat16 or float32."
        )
    return found


def _expect(found: int, wanted: int, site: str, part: str, model_type: str) -> None:
    if found != wanted:
        raise UnsupportedModelError(
            f"{site}.{part} of this {model_type!r} model has {found} entries where its layout "
            f"wants {wanted}; its neurons cannot be named. Quantised or fused weights have no rule "
            "yet."
        )

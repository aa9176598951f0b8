"""From the modules of one block to its sites: the rules behind the tables."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from safeft.blocks import Axis
from safeft.errors import UnsupportedModelError
from safeft.shards import shape_of
from safeft.sites.parts import Part, Site, TowerName
from safeft.sites.tables import FUSED, LATENT, MLPS, SPLIT, TWO_IN_ONE, Tower
from safeft.sites.wrapped import bare, dense, plain_name


@dataclass(frozen=True)
class Where:
    """A block, and what to call it in an error."""

    path: str
    module: nn.Module
    layer: int
    model_type: str
    tower: TowerName

    def modules(self) -> Iterator[tuple[str, nn.Module]]:
        """What is inside, by path, the block itself first; adapters' own modules left out."""
        for path, module in self.module.named_modules(prefix=self.path):
            steps = path.split(".")
            if "base_layer" not in steps and not any(step.startswith("lora_") for step in steps):
                yield plain_name(path), bare(module)

    def matrix(self, holder: nn.Module, path: str, child: str) -> "_Matrix":
        """The named linear layer of ``holder``, whichever way round it stores its matrix."""
        module = dense(_descend(holder, child) or holder)
        name = f"{path}.{child}"
        bias = "bias" if isinstance(getattr(module, "bias", None), nn.Parameter) else ""
        if isinstance(module, nn.Linear):
            return _Matrix(name, module.out_features, module.in_features, "rows", bias)
        if type(module).__name__ == "Conv1D" and isinstance(module.weight, Tensor):
            inputs, outputs = shape_of(module.weight)
            return _Matrix(name, outputs, inputs, "columns", bias)
        raise UnsupportedModelError(
            f"{name} of this {self.model_type!r} model is a {type(module).__name__}, not a Linear: "
            "which axis is the unit is unknown, so it cannot be frozen."
        )

    def expect(self, found: int, wanted: int, name: str) -> None:
        """Refuse a part that does not have the entries its layout wants."""
        if found != wanted:
            raise UnsupportedModelError(
                f"{name} of this {self.model_type!r} model has {found} entries where its layout "
                f"wants {wanted}; its neurons cannot be named."
            )


@dataclass(frozen=True)
class _Matrix:
    name: str
    outputs: int
    inputs: int
    out_axis: Axis
    bias: str

    def reads(self, **where: Any) -> Part:
        return Part(self.name, self.out_axis, bias=self.bias, **where)

    def writes(self, **where: Any) -> Part:
        return Part(self.name, "columns" if self.out_axis == "rows" else "rows", **where)


def _descend(holder: nn.Module, child: str) -> nn.Module | None:
    """The module at a dotted path below, or None; wrappers on the way are looked through."""
    found: nn.Module | None = holder
    for step in child.split("."):
        found = bare(found)._modules.get(step) if found is not None else None
    return bare(found) if found is not None else None


def has(holder: nn.Module, *children: str) -> bool:
    """Whether all these modules are there, by dotted paths from ``holder``."""
    return all(_descend(holder, child) is not None for child in children)


def mlps_of(where: Where, tower: Tower) -> list[Site]:
    """The MLPs of a block: several where experts, shared ones and others stand side by side."""
    found: list[Site] = []
    rules = (*MLPS, (("up_proj",), "down_proj")) if tower.ungated else MLPS
    for path, holder in where.modules():
        rule = next((rule for rule in rules if has(holder, *rule[0], rule[1])), None)
        if rule is not None:
            found.append(mlp_of(where, path, holder, *rule))
        elif _is_experts(dense(holder)):
            found += _experts(where, path, dense(holder), tower)
    if not found:
        raise UnsupportedModelError(
            f"{where.path} of this {where.model_type!r} model has no MLP of a layout that safeft "
            f"knows (it has {[name for name, _ in where.module.named_children()]}), so its neurons "
            "cannot be named."
        )
    return found


def mlp_of(where: Where, path: str, holder: nn.Module, reads: tuple[str, ...], writes: str) -> Site:
    """The hidden units between what an MLP reads with and what it writes with."""
    writer = where.matrix(holder, path, writes)
    units = writer.inputs
    parts: list[Part] = []
    for child in reads:
        matrix = where.matrix(holder, path, child)
        together = 2 if child in TWO_IN_ONE else 1
        where.expect(matrix.outputs, together * units, matrix.name)
        parts += [matrix.reads(first=number * units) for number in range(together)]
    return Site(path, "mlp", where.layer, units, 1, tuple(parts), writer.writes(), where.tower)


def _is_experts(module: nn.Module) -> bool:
    down = module._parameters.get("down_proj")
    return down is not None and len(shape_of(down)) == 3


def _experts(where: Where, path: str, holder: nn.Module, tower: Tower) -> list[Site]:
    """One site per expert of a stack; which way its matrices lie is what its class says."""
    transposed = getattr(holder, "is_transposed", tower.experts_transposed)
    gate = holder._parameters.get("gate_up_proj")
    if transposed is None or gate is None or len(shape_of(gate)) != 3:
        raise UnsupportedModelError(
            f"{path} of this {where.model_type!r} model is a {type(holder).__name__}, which does "
            "not say how its experts' matrices lie; they cannot be told apart by shape."
        )
    down = holder._parameters["down_proj"]
    assert down is not None
    experts, units = shape_of(down)[0], shape_of(down)[1 if transposed else 2]
    outputs = shape_of(gate)[2 if transposed else 1]
    where.expect(outputs, 2 * units, f"{path}.gate_up_proj")
    out_axis, in_axis = ("columns", "rows") if transposed else ("rows", "columns")
    bias = "gate_up_proj_bias" if "gate_up_proj_bias" in holder._parameters else ""
    concatenated = getattr(holder, "is_concatenated", True)
    starts = ((0, 1), (units, 1)) if concatenated else ((0, 2), (1, 2))
    found = []
    for expert in range(experts):
        reads = tuple(
            Part(path, out_axis, first=expert * outputs + first, step=step, leaf="gate_up_proj",
                 bias=bias, expert=expert)
            for first, step in starts
        )  # fmt: skip
        writes = Part(path, in_axis, first=expert * units, leaf="down_proj", expert=expert)
        name = f"{path}.{expert}"
        found.append(Site(name, "mlp", where.layer, units, 1, reads, writes, where.tower))
    return found


def attention_of(where: Where, tower: Tower, config: Any) -> list[Site]:
    """The query heads of a block; none where its attention is linear and the tower says so."""
    heads = int(getattr(config, "num_attention_heads", None) or config.num_heads)
    for path, holder in where.modules():
        for *reads, writes in SPLIT:
            if tower.shared_keys and has(holder, reads[0], writes):
                reads = [read for read in reads if has(holder, read)]
            if has(holder, *reads, writes):
                groups = 0 if tower.shared_keys else _groups(config, heads)
                return [_split_attention(where, path, holder, reads, writes, heads, groups, tower)]
        for *reads, writes in LATENT:
            if has(holder, *reads, writes):
                return [_latent_attention(where, path, holder, reads, writes, heads)]
        for read, writes in FUSED:
            if has(holder, read, writes):
                return [_fused_attention(where, path, holder, read, writes, heads, tower, config)]
        if tower.linear and has(holder, tower.linear):
            return []
    raise UnsupportedModelError(
        f"{where.path} of this {where.model_type!r} model has no attention of a layout that safeft "
        f"knows (it has {[name for name, _ in where.module.named_children()]}), so its heads "
        "cannot be named."
    )


def _groups(config: Any, heads: int) -> int:
    return int(getattr(config, "num_key_value_heads", None) or heads)


def _head_width(where: Where, writer: _Matrix, heads: int) -> int:
    where.expect(writer.inputs // heads * heads, writer.inputs, writer.name)
    return writer.inputs // heads


def _split_attention(
    where: Where,
    path: str,
    holder: nn.Module,
    reads: list[str],
    writes: str,
    heads: int,
    groups: int,
    tower: Tower,
) -> Site:
    writer = where.matrix(holder, path, writes)
    width = _head_width(where, writer, heads)
    if has(holder, "q_layernorm.norms"):
        raise UnsupportedModelError(
            f"{path} of this {where.model_type!r} model has a norm of its own for each head "
            "(qk_layernorm), which there is no rule for, so its heads could not be held whole."
        )
    parts: list[Part] = []
    for child, norm in zip(reads, ("q_norm", "k_norm", ""), strict=False):
        matrix = where.matrix(holder, path, child)
        count = heads if child == reads[0] else groups
        count = count or matrix.outputs // width
        share = heads // count
        rows = 2 * width if tower.gated_queries and child == reads[0] else width
        where.expect(matrix.outputs, count * rows, matrix.name)
        parts.append(matrix.reads(width=rows, share=share))
        gain = getattr(_descend(holder, norm), "weight", None) if norm else None
        if isinstance(gain, Tensor) and shape_of(gain) != (width,):
            # A norm with one gain shared by all heads belongs to no head.
            where.expect(torch.Size(shape_of(gain)).numel(), count * width, f"{path}.{norm}")
            axis: Axis = "rows" if len(shape_of(gain)) == 1 else "numbers"
            parts.append(Part(f"{path}.{norm}", axis, width, share))
    if "sinks" in holder._parameters:  # what a head attends to where nothing else fits
        parts.append(Part(path, "rows", leaf="sinks"))
    return Site(
        path, "attention", where.layer, heads, width, tuple(parts), writer.writes(width=width),
        where.tower,
    )  # fmt: skip


def _latent_attention(
    where: Where, path: str, holder: nn.Module, reads: list[str], writes: str, heads: int
) -> Site:
    """Heads that read a latent vector which all of them share (DeepSeek)."""
    writer = where.matrix(holder, path, writes)
    width = _head_width(where, writer, heads)
    matrices = [where.matrix(holder, path, child) for child in reads]
    for matrix in matrices:
        where.expect(matrix.outputs // heads * heads, matrix.outputs, matrix.name)
    parts = tuple(matrix.reads(width=matrix.outputs // heads) for matrix in matrices)
    return Site(
        path, "attention", where.layer, heads, width, parts, writer.writes(width=width), where.tower
    )


def _fused_attention(
    where: Where,
    path: str,
    holder: nn.Module,
    read: str,
    writes: str,
    heads: int,
    tower: Tower,
    config: Any,
) -> Site:
    writer, matrix = where.matrix(holder, path, writes), where.matrix(holder, path, read)
    width = _head_width(where, writer, heads)
    groups, order = _groups(config, heads), tower.fused
    if order == "falcon":
        if getattr(config, "new_decoder_architecture", False):
            groups, order = int(config.num_kv_heads), "groups"
        else:
            groups, order = (1, "chunks") if config.multi_query else (heads, "heads")
    where.expect(matrix.outputs, (heads + 2 * groups) * width, matrix.name)
    share, queries = heads // groups, heads * width
    if order == "heads":
        reads = (matrix.reads(width=3 * width),)
    elif order == "groups":
        whole = (share + 2) * width
        reads = (
            matrix.reads(width=width, run=share, gap=2 * width),
            *(matrix.reads(width=width, share=share, first=first * width, step=whole)
              for first in (share, share + 1)),
        )  # fmt: skip
    else:
        reads = (
            matrix.reads(width=width),
            *(matrix.reads(width=width, share=share, first=queries + number * groups * width)
              for number in (0, 1)),
        )  # fmt: skip
    return Site(
        path, "attention", where.layer, heads, width, reads, writer.writes(width=width), where.tower
    )

"""A dampener in the weights: the columns that its units write with, times their gains.

A writing matrix is linear in what it receives, so ``W (g * x) = (W diag(g)) x``: scaling column
``j`` of ``down_proj`` (a row where a layer stores its matrix as inputs by outputs, a column block
of ``o_proj`` for a head, of one matrix of the stack for an expert) is the hook, up to one rounding
a weight. The checkpoint then runs in any engine and at the speed it had.

It is refused where it would not be exact: ceilings (no weight caps an activation), codes of
quantised layers, adapters in memory (they read the activation too), weights that something else
reads as well (tied), parametrised, sharded or offloaded ones.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from safeft.blocks import Axis, Block, form_of, take
from safeft.detox.dampener import Dampener
from safeft.errors import ArtefactError, SafeftError
from safeft.files import sha256, write_together
from safeft.freeze.certificate import bits
from safeft.shards import is_split, shape_of
from safeft.sites import bare, dense, find_sites, is_quantised, plain_model

FOLD_NAME, ORIGINALS_NAME = "safeft_fold.json", "safeft_fold.safetensors"
MARK = "safeft_fold"
"""Name in a folded model's config: the hash of the dampener that is in its weights."""


class FoldError(SafeftError, RuntimeError):
    """A dampener cannot be put into these weights exactly, or not taken out of them again."""


@dataclass(frozen=True, eq=False)
class Lines:
    """Rows or columns of one weight and the gain of each.

    Attributes:
        axis: What they are.
        entries: Their numbers, sorted, int64 ``(entries,)``.
        gains: Float32 ``(entries,)``.
    """

    axis: Axis
    entries: Tensor
    gains: Tensor

    def scaled(self, values: Tensor) -> Tensor:
        """``(entries, ...)`` times the gains, rounded once into their dtype."""
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        shape = (-1, *[1] * (values.ndim - 1))
        return (wide * self.gains.to(wide).view(shape)).to(values.dtype)


@dataclass(frozen=True, eq=False)
class Fold:
    """What a fold changed, with the bits of before.

    Attributes:
        dampener: Hash of the dampener.
        lines: Weight to what of it was scaled.
        originals: Weight to these rows (or columns, transposed) as they were, in their dtype.
    """

    dampener: str
    lines: Mapping[str, Lines]
    originals: Mapping[str, Tensor]

    def files(self) -> dict[str, str | bytes]:
        """What :func:`unfold` needs, to be saved beside the folded model."""
        tensors = {}
        for name, lines in self.lines.items():
            tensors[f"{name}.entries"], tensors[f"{name}.gains"] = lines.entries, lines.gains
            tensors[f"{name}.original"] = self.originals[name].contiguous()
        data = save(tensors)
        record = {
            "safeft_fold": 1,
            "dampener": self.dampener,
            "axes": {name: lines.axis for name, lines in self.lines.items()},
            "tensors_sha256": sha256(data),
        }
        return {ORIGINALS_NAME: data, FOLD_NAME: json.dumps(record, indent=2) + "\n"}

    def save(self, folder: str | Path) -> None:
        """Write them into a folded model's folder."""
        write_together(Path(folder), self.files())

    @classmethod
    def load(cls, folder: str | Path) -> "Fold":
        """Read what :meth:`save` wrote.

        Raises:
            ArtefactError: Missing, truncated or edited.
        """
        folder = Path(folder)
        try:
            record = json.loads((folder / FOLD_NAME).read_text(encoding="utf-8"))
            data = (folder / ORIGINALS_NAME).read_bytes()
            if sha256(data) != record["tensors_sha256"]:
                raise ValueError("the SHA-256 of the original weights differs")
            tensors = load(data)
            lines = {
                name: Lines(axis, tensors[f"{name}.entries"], tensors[f"{name}.gains"])
                for name, axis in record["axes"].items()
            }
            originals = {name: tensors[f"{name}.original"] for name in lines}
            return cls(str(record["dampener"]), lines, originals)
        except (OSError, ValueError, KeyError, AttributeError, TypeError, SafetensorError) as error:
            raise ArtefactError(
                f"{str(folder)!r} does not say what was folded into it ({FOLD_NAME} and "
                f"{ORIGINALS_NAME}: {error}), so it cannot be undone. Give the folder that "
                "`safeft detox --fold` wrote, or use the base model."
            ) from error


def lines_of(model: nn.Module, dampener: Dampener) -> dict[str, Lines]:
    """What of which weight a dampener scales, by the weight's name.

    Raises:
        FoldError: Two sites write with the same rows or columns.
    """
    sites = find_sites(model)
    found: dict[str, tuple[Axis, list[Tensor], list[Tensor]]] = {}
    for name in dampener.gains:
        site, units = sites[name], dampener.neurons.units_of(name)
        part = site.writes
        entries = part.table(site.units)[units].flatten()
        gains = dampener.row(name, site.units)[units].repeat_interleave(site.width)
        axis, *kept = found.setdefault(part.name, (part.axis, [], []))
        assert axis == part.axis
        kept[0].append(entries)
        kept[1].append(gains)
    lines = {}
    for name, (axis, entries, gains) in found.items():
        numbers, order = torch.cat(entries).sort()
        if len(numbers.unique()) < len(numbers):
            raise FoldError(
                f"Several units write with the same {axis} of {name}, so scaling them for one "
                "would scale them for the other. Use the hooks (no --fold)."
            )
        lines[name] = Lines(axis, numbers, torch.cat(gains)[order])
    return lines


@torch.no_grad()
def fold(model: nn.Module, dampener: Dampener) -> Fold:
    """Scale, in place, what the dampener's units write with.

    Everything is checked before anything is changed.

    Returns:
        What was changed, for :func:`unfold` and for the folder it is saved in.

    Raises:
        FoldError: It would not be exact (see the module), or something is folded in already.
        FingerprintError: The dampener was made for other weights.

    Example:
        >>> folded = fold(model, dampener)  # doctest: +SKIP
        >>> model.save_pretrained("out"); folded.save("out")  # doctest: +SKIP
    """
    plain: Any = plain_model(model)
    check_not_folded(plain)
    if dampener.caps:
        raise FoldError(
            "The dampener caps activations, and no weight does that: folded, it would be another "
            "dampener. Use the hooks (no --fold), or a rule of gains (aura, constant, sgm, det0)."
        )
    if any(".lora_" in name for name, _ in model.named_parameters()):
        raise FoldError(
            "The model carries an adapter, which reads the dampened units as well. Merge it first "
            "(merge_and_unload), then fold."
        )
    dampener.neurons.check_model(model)
    lines = lines_of(model, dampener)
    weights = {name: _plain_weight(plain, name) for name in lines}
    originals = {
        name: take(weights[name], lines[name].axis, lines[name].entries).cpu() for name in lines
    }
    for name, each in lines.items():
        _put(weights[name], each, each.scaled(originals[name]))
    setattr(plain.config, MARK, dampener.hash)
    return Fold(dampener.hash, lines, originals)


@torch.no_grad()
def unfold(model: nn.Module, folded: Fold) -> None:
    """Put the original weights back, bit for bit.

    Raises:
        FoldError: Another dampener, or none, is folded in, or the weights have been tuned since.

    Example:
        >>> unfold(model, Fold.load("out"))  # doctest: +SKIP
    """
    plain: Any = plain_model(model)
    if (mark := getattr(plain.config, MARK, None)) != folded.dampener:
        raise FoldError(
            f"The model says that {mark or 'nothing'} is folded in, not {folded.dampener}: to put "
            "these weights back would break it. Give the folder of the folded model itself."
        )
    weights = {name: _plain_weight(plain, name) for name in folded.lines}
    for name, lines in folded.lines.items():
        now = take(weights[name], lines.axis, lines.entries).cpu()
        then = lines.scaled(folded.originals[name].to(now.dtype))
        if not torch.equal(bits(now), bits(then)):
            raise FoldError(
                f"{name} is not as it was folded: the model was tuned since, or loaded in another "
                "dtype. What tuning changed cannot be told from the gains; undo first, then tune."
            )
    for name, lines in folded.lines.items():
        _put(weights[name], lines, folded.originals[name])
    delattr(plain.config, MARK)


def check_not_folded(model: Any) -> None:
    """Refuse a model that a dampener is folded into.

    Raises:
        FoldError: Its config says so.
    """
    if (mark := getattr(plain_model(model).config, MARK, None)) is not None:
        raise FoldError(
            f"A dampener ({str(mark)[:12]}) is folded into this model already; a second would act "
            "on what the first has left. Undo the first (`safeft detox --undo`), or start from "
            "the base."
        )


def _plain_weight(model: nn.Module, name: str) -> Tensor:
    """The weight itself, where scaling it in place is all there is to do."""
    path, _, leaf = name.rpartition(".")
    module = dense(bare(model.get_submodule(path)))
    weight = module._parameters.get(leaf)
    names = [n for n, p in model.named_parameters(remove_duplicate=False) if p is weight]
    reason = ""
    if weight is None:
        reason = "is no plain parameter (parametrised?)"
    elif is_quantised(module):
        reason = f"holds codes of a quantised layer ({type(module).__name__}), which have no gain"
    elif is_split(weight):
        reason = "is sharded over processes"
    elif weight.is_meta:
        reason = "is not in memory (offloaded)"
    elif len(names) > 1:
        reason = f"is read in several places ({', '.join(names[:3])})"
    elif not weight.is_contiguous():
        reason = "is a view of something else"
    if reason:
        raise FoldError(
            f"{name} {reason}, so the gains cannot be put into it exactly. Load the plain model "
            "whole, in float32, bfloat16 or float16, or use the hooks (no --fold)."
        )
    assert weight is not None
    return weight


def _put(weight: Tensor, lines: Lines, values: Tensor) -> None:
    form = form_of(shape_of(weight), lines.axis)
    places = Block((0, 0, 0), form).lines(lines.axis, lines.entries.to(weight.device), form)
    whole = values.to(weight).reshape(len(lines.entries), -1)
    places.put(weight.data, places.cut(whole))

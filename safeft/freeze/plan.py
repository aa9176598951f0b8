"""What exactly is held: a set of neurons resolved on a model, before anything is trained.

Full tuning holds rows and columns of the weights themselves. Under LoRA, ``W0 + s B A``, the base
does not move, so rows R hold where ``B[R] = 0`` and columns C where ``A[:, C] = 0``, exactly and
after merging too.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from safeft.errors import ConfigError, FreezeError
from safeft.freeze.adapters import lora_factors
from safeft.neurons import NeuronSet
from safeft.sites import Axis, Site, dense, find_sites, plain_model
from safeft.weights import ModelWeights, part_tensors

Mode: TypeAlias = Literal["freeze", "train_only"]
"""``freeze`` holds the neurons; ``train_only`` holds everything else (Precise Shield)."""

Group: TypeAlias = Literal["embeddings", "norms", "head", "biases"]
"""Whole groups of parameters that can be held beside the neurons."""


@dataclass(frozen=True)
class Slice:
    """Rows or columns of a weight of the plain model, by name; ``entries`` None means all of it."""

    name: str
    axis: Axis
    entries: Tensor | None


@dataclass(frozen=True, eq=False)
class Hold:
    """Rows or columns of a trainable parameter that must not move.

    Attributes:
        name: The parameter's name in the plain model, adapter factors included.
        parameter: The parameter the optimizer sees.
        axis: Which axis ``entries`` counts along.
        entries: int64 ``(entries,)``, sorted.
        at_zero: Held at zero (an adapter's factor) rather than at its value.
        site: The site it belongs to.
    """

    name: str
    parameter: nn.Parameter
    axis: Axis
    entries: Tensor
    at_zero: bool
    site: str

    @property
    def dim(self) -> int:
        """The dimension that ``entries`` index."""
        return 0 if self.axis == "rows" else 1


@dataclass(frozen=True)
class Plan:
    """A set of neurons resolved on one model.

    Attributes:
        mode: The direction.
        slices: All protected slices of the plain model's weights, trainable or not.
        holds: What has to be masked and pinned in trainable parameters.
        still: Trainable parameters to be held whole, by switching their gradient off.
        held_weights: Number of the plain model's weights that are protected.
        all_weights: Number of all its weights.
    """

    mode: Mode
    slices: tuple[Slice, ...]
    holds: tuple[Hold, ...]
    still: tuple[tuple[str, nn.Parameter], ...]
    held_weights: int
    all_weights: int

    @property
    def frozen_share(self) -> float:
        """Share of the model's weights that are protected, 0 to 1."""
        return self.held_weights / self.all_weights


@dataclass
class _Draft:
    slices: list[Slice] = field(default_factory=list)
    holds: list[Hold] = field(default_factory=list)


def make_plan(
    model: nn.Module, neurons: NeuronSet, mode: Mode = "freeze", hold: Collection[Group] = ()
) -> Plan:
    """Resolve ``neurons`` on ``model``; nothing is changed yet.

    Args:
        model: The model as the trainer has it, adapters included.
        neurons: The set; it must fit the model (see ``NeuronSet.check_model``).
        mode: ``freeze`` or ``train_only``.
        hold: Groups of parameters to hold whole as well; only with ``freeze``.

    Raises:
        FreezeError: An empty set, or an adapter under which the slices cannot be held exactly.
        ConfigError: An unknown mode or group.
    """
    if mode not in get_args(Mode):
        raise ConfigError(f"mode={mode!r} is not one of {', '.join(get_args(Mode))}.")
    if unknown := [group for group in hold if group not in get_args(Group)]:
        raise ConfigError(f"hold={unknown} names none of {', '.join(get_args(Group))}.")
    if not len(neurons):
        raise FreezeError(
            "The set holds no neuron. Freezing nothing protects nothing, and it would look like "
            "protection; locate with a larger fraction."
        )
    plain, sites = plain_model(model), find_sites(model)
    draft = _Draft()
    for name in neurons.indices:
        _hold_site(plain, sites[name], neurons.units_of(name), mode, draft)
    total = sum(p.numel() for n, p in plain.named_parameters() if not _is_adapter(n))
    if mode == "train_only":
        still = _everything_else(plain, draft)
    else:
        still = _groups(plain, hold)
    weights = ModelWeights(plain)
    held = sum(_size(weights, piece) for piece in draft.slices)
    return Plan(mode, tuple(draft.slices), tuple(draft.holds), tuple(still), held, total)


def _hold_site(plain: nn.Module, site: Site, units: Tensor, mode: Mode, draft: _Draft) -> None:
    weights = ModelWeights(plain)
    for part in site.parts:
        if mode == "freeze":
            entries = part.entries(units)
        else:
            blocks = torch.arange(site.units // part.share) * part.share
            free = part.own_entries(units)
            every = part.entries(blocks)
            entries = every[~torch.isin(every, free)]
        if not len(entries):
            continue
        names = part_tensors(weights, part)
        draft.slices += [Slice(name, part.axis, entries) for name in names]
        module = plain.get_submodule(part.module)
        for name, parameter in dense(module).named_parameters(recurse=False):
            full = f"{part.module}.{name}"
            if parameter.requires_grad and full in names:
                draft.holds.append(Hold(full, parameter, part.axis, entries, False, site.name))
        for name, parameter in lora_factors(module, part.module, part.axis):
            draft.holds.append(Hold(name, parameter, part.axis, entries, True, site.name))


def _everything_else(plain: nn.Module, draft: _Draft) -> list[tuple[str, nn.Parameter]]:
    """Whatever no located neuron touches: switched off, and protected whole."""
    partly = {id(held.parameter) for held in draft.holds}
    named = {piece.name for piece in draft.slices}
    touched = {name.rpartition(".")[0] for name in named}
    still = []
    for name, parameter in plain.named_parameters():
        if _is_adapter(name):
            # The factor that is not held is what learns; a module without neurons learns nothing.
            if parameter.requires_grad and _module_of(name) not in touched:
                still.append((name, parameter))
            continue
        canonical = name.replace(".base_layer.", ".")
        if id(parameter) in partly or canonical in named:
            continue
        draft.slices.append(Slice(canonical, "rows", None))
        if parameter.requires_grad:
            still.append((canonical, parameter))
    return still


def _groups(plain: nn.Module, hold: Collection[Group]) -> list[tuple[str, nn.Parameter]]:
    members: dict[int, tuple[str, nn.Parameter]] = {}

    def add(prefix: str, module: nn.Module | None) -> None:
        for name, parameter in module.named_parameters() if module is not None else ():
            if parameter.requires_grad and not _is_adapter(name):
                members[id(parameter)] = (f"{prefix}.{name}", parameter)

    paths = {id(module): path for path, module in plain.named_modules()}

    def embedding(getter: str) -> None:
        module = getattr(plain, getter)()
        if isinstance(module, nn.Module):
            add(paths.get(id(module), getter), module)

    if "embeddings" in hold:
        embedding("get_input_embeddings")
    if "head" in hold:
        embedding("get_output_embeddings")
    for path, module in plain.named_modules():
        if "norms" in hold and "norm" in type(module).__name__.lower():
            add(path, module)
        if "biases" in hold and isinstance(bias := getattr(module, "bias", None), nn.Parameter):
            if bias.requires_grad:
                members[id(bias)] = (f"{path}.bias", bias)
    return list(members.values())


def _is_adapter(name: str) -> bool:
    return ".lora_" in name


def _module_of(name: str) -> str:
    return name.split(".lora_")[0]


def _size(weights: ModelWeights, piece: Slice) -> int:
    shape = weights.shape(piece.name) or ()
    total = torch.Size(shape).numel()
    if piece.entries is None:
        return total
    return total // shape[0 if piece.axis == "rows" else 1] * len(piece.entries)

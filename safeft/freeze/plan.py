"""What exactly is held: a set of neurons resolved on a model, before anything is trained.

Full tuning holds rows and columns of the weights themselves. Under LoRA, ``W0 + s B A``, the base
does not move, so rows R hold where ``B[R] = 0`` and columns C where ``A[:, C] = 0``, exactly and
after merging too.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from safeft.errors import ConfigError, FreezeError
from safeft.freeze.adapters import is_factor, learning_factors, lora_factors, zero_axis
from safeft.neurons import NeuronSet
from safeft.shards import Axis, shape_of
from safeft.sites import Site, bare, dense, find_sites, plain_model, plain_name
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
    free: set[int] = field(default_factory=set)
    """Ids of parameters of which something may train, under ``train_only``."""


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
    if hold and mode == "train_only":
        raise ConfigError(
            f"hold={list(hold)} goes with mode='freeze'; train_only holds all but the neurons."
        )
    plain, sites = plain_model(model), find_sites(model)
    draft = _Draft()
    for name in neurons.indices:
        _hold_site(plain, sites[name], neurons.units_of(name), mode, draft)
    if mode == "train_only":
        whole = {
            plain_name(name): parameter
            for name, parameter in plain.named_parameters()
            if id(parameter) not in draft.free
        }
    else:
        whole = group_parameters(plain, hold)
    _hold_whole(whole, draft)
    weights = ModelWeights(plain)
    total = sum(
        torch.Size(shape_of(p)).numel() for n, p in plain.named_parameters() if not is_factor(n)
    )
    held = sum(_size(weights, piece) for piece in draft.slices)
    still = tuple((n, p) for n, p in whole.items() if p.requires_grad)
    return Plan(mode, tuple(draft.slices), tuple(draft.holds), still, held, total)


def _hold_site(plain: nn.Module, site: Site, units: Tensor, mode: Mode, draft: _Draft) -> None:
    weights = ModelWeights(plain)
    for part in site.parts:
        entries = part.entries(units)
        module = plain.get_submodule(part.module)
        names = part_tensors(weights, part)
        own = {f"{part.module}.{n}": p for n, p in dense(module).named_parameters(recurse=False)}
        own = {name: parameter for name, parameter in own.items() if name in names}
        factors = lora_factors(module, part.module, part.axis)
        if mode == "train_only":
            free = part.own_entries(units)
            if not len(free):
                continue
            every = part.entries(torch.arange(site.units))
            entries = every[~torch.isin(every, free)]
            draft.free |= {id(parameter) for parameter in own.values()}
            draft.free |= {id(parameter) for parameter in learning_factors(module, part.axis)}
        if not len(entries):
            continue
        draft.slices += [Slice(name, part.axis, entries) for name in names]
        for name, parameter in own.items():
            if parameter.requires_grad:
                draft.holds.append(Hold(name, parameter, part.axis, entries, False, site.name))
        for name, parameter in factors:
            draft.holds.append(Hold(name, parameter, part.axis, entries, True, site.name))


def _hold_whole(whole: Mapping[str, nn.Parameter], draft: _Draft) -> None:
    """Parameters held whole; what is held of them in part need not be held twice."""
    names = [name.replace(".base_layer.", ".") for name in whole if not is_factor(name)]
    held = {id(parameter) for parameter in whole.values()}
    draft.slices = [piece for piece in draft.slices if piece.name not in names]
    draft.slices += [Slice(name, "rows", None) for name in names]
    draft.holds = [hold for hold in draft.holds if id(hold.parameter) not in held]
    for name, parameter in whole.items():
        axis = zero_axis(name)
        if axis is not None and parameter.requires_grad:
            entries = torch.arange(shape_of(parameter)[0 if axis == "rows" else 1])
            draft.holds.append(Hold(name, parameter, axis, entries, True, ""))


def group_parameters(plain: nn.Module, hold: Collection[Group]) -> dict[str, nn.Parameter]:
    """The parameters of whole groups, by name, each once where weights are tied."""
    members: dict[int, tuple[str, nn.Parameter]] = {}

    def add(prefix: str, module: nn.Module) -> None:
        for name, parameter in module.named_parameters(prefix):
            members[id(parameter)] = (plain_name(name), parameter)

    paths = {id(module): path for path, module in plain.named_modules()}
    for group, side in (("embeddings", "input"), ("head", "output")):
        module = getattr(plain, f"get_{side}_embeddings")() if group in hold else None
        if isinstance(module, nn.Module):
            add(paths[id(module)], module)
    for path, module in plain.named_modules():
        if "norms" in hold and "norm" in type(module).__name__.lower():
            add(path, module)
        module = bare(module)
        bias = getattr(module, "bias", None)
        if "biases" in hold and isinstance(bias, nn.Parameter):
            members[id(bias)] = (plain_name(f"{path}.bias"), bias)
    return dict(members.values())


def _size(weights: ModelWeights, piece: Slice) -> int:
    shape = weights.shape(piece.name) or ()
    total = torch.Size(shape).numel()
    if piece.entries is None:
        return total
    return total // shape[0 if piece.axis == "rows" else 1] * len(piece.entries)

"""What exactly is held: a set of neurons resolved on a model, before anything is trained.

Full tuning holds rows and columns of the weights themselves. Under LoRA, ``W0 + s B A``, the base
does not move, so rows R hold where ``B[R] = 0`` and columns C where ``A[:, C] = 0``, exactly and
after merging too.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn

from safeft.blocks import Axis, Form, count_of, form_of, length_of
from safeft.errors import ConfigError, FreezeError
from safeft.freeze.adapters import factors_of, is_factor, learning_factors, zero_axis
from safeft.freeze.covering import held_directions, uncovered
from safeft.freeze.directions import Directions
from safeft.neurons import NeuronSet
from safeft.shards import shape_of
from safeft.sites import Site, bare, dense, find_linears, find_sites, plain_model, plain_name
from safeft.subspace import SafetySubspace
from safeft.weights import ModelWeights

Mode: TypeAlias = Literal["freeze", "train_only"]
"""``freeze`` holds the neurons; ``train_only`` holds everything else (Precise Shield)."""

Group: TypeAlias = Literal["embeddings", "norms", "head", "biases", "tokens"]
"""Groups of parameters that can be held beside neurons or directions; ``tokens`` are the embeddings
of those that a subspace was found on, the others whole."""


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
        axis: Which axis ``entries`` count along.
        entries: int64 ``(entries,)``, sorted.
        at_zero: Held at zero (an adapter's factor) rather than at its value.
        form: As what stack of matrices the parameter is seen.
    """

    name: str
    parameter: nn.Parameter
    axis: Axis
    entries: Tensor
    at_zero: bool
    form: Form

    @property
    def weights(self) -> int:
        """How many numbers are held."""
        return len(self.entries) * length_of(self.form, self.axis)


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
        directions: Of which trainable parameters input directions are held.
        loose: Trainable parameters that neither are held nor have a basis, by the caller's will.
    """

    mode: Mode
    slices: tuple[Slice, ...]
    holds: tuple[Hold, ...]
    still: tuple[tuple[str, nn.Parameter], ...]
    held_weights: int
    all_weights: int
    directions: tuple[Directions, ...] = ()
    loose: tuple[str, ...] = ()

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
    model: nn.Module,
    neurons: NeuronSet | None,
    mode: Mode = "freeze",
    hold: Collection[Group] | None = None,
    subspace: SafetySubspace | None = None,
) -> Plan:
    """Resolve what is to be held on ``model``; nothing is changed yet.

    Args:
        model: The model as the trainer has it, adapters included.
        neurons: The set; it must fit the model (see ``NeuronSet.check_model``).
        mode: ``freeze`` or ``train_only``.
        hold: Groups of parameters to hold whole as well; only with ``freeze``. None holds no group
            beside neurons, and beside a subspace all that it does not cover.
        subspace: Input directions to hold; only with ``freeze``.

    Raises:
        FreezeError: An empty set, or an adapter under which the slices cannot be held exactly.
        ConfigError: An unknown mode or group, or nothing to hold.
    """
    _check_wanted(neurons, mode, hold, subspace)
    plain, sites = plain_model(model), find_sites(model)
    draft = _Draft()
    weights = ModelWeights(plain)
    for tensor in _tensors(sites, neurons, mode) if neurons is not None else ():
        _hold_tensor(plain, weights, tensor, mode, draft)
    directions, loose = [], ()
    if mode == "train_only":
        whole = {
            plain_name(name): parameter
            for name, parameter in plain.named_parameters()
            if id(parameter) not in draft.free
        }
    else:
        whole = group_parameters(plain, hold or ())
        if subspace is not None:
            held_whole = {id(parameter) for parameter in whole.values()}
            directions = [
                held
                for held in held_directions(plain, subspace, _held_inputs(plain, draft))
                if id(held.parameter) not in held_whole
            ]
            rest = uncovered(plain, directions, whole)
            if "tokens" in (hold or ()):
                rest.pop(_hold_tokens(plain, subspace, draft), None)
            left = set() if hold is None else set(group_parameters(plain, get_args(Group)))
            loose = tuple(name for name in rest if name in left)
            whole |= {name: found for name, found in rest.items() if name not in loose}
    _hold_whole(whole, draft)
    total = sum(torch.Size(weights.shape(name) or ()).numel() for name in weights.names())
    held = sum(_size(weights, piece) for piece in draft.slices)
    still = tuple((n, p) for n, p in whole.items() if p.requires_grad)
    found = (tuple(draft.slices), tuple(draft.holds), still, held, total)
    return Plan(mode, *found, tuple(directions), loose)


def _check_wanted(
    neurons: NeuronSet | None,
    mode: Mode,
    hold: Collection[Group] | None,
    subspace: SafetySubspace | None,
) -> None:
    if mode not in get_args(Mode):
        raise ConfigError(f"mode={mode!r} is not one of {', '.join(get_args(Mode))}.")
    if unknown := [group for group in hold or () if group not in get_args(Group)]:
        raise ConfigError(f"hold={unknown} names none of {', '.join(get_args(Group))}.")
    if neurons is None and subspace is None:
        raise ConfigError("Neither neurons nor a subspace is given, so nothing would be held.")
    if "tokens" in (hold or ()) and subspace is None:
        raise ConfigError(
            "hold=['tokens'] means the tokens that a subspace was found on, and none is given. "
            "Hold 'embeddings' instead."
        )
    if "tokens" in (hold or ()) and subspace is not None and not len(subspace.tokens):
        raise ConfigError(
            "hold=['tokens'] means the tokens that the subspace was found on, and it knows of none "
            "(it was not located, but given). All embeddings would be free; hold 'embeddings'."
        )
    if neurons is not None and not len(neurons):
        raise FreezeError(
            "The set holds no neuron. Freezing nothing protects nothing, and it would look like "
            "protection; locate with a larger fraction."
        )
    if mode == "train_only" and (hold or subspace is not None):
        given = f"hold={list(hold or ())}" if subspace is None else "A subspace"
        raise ConfigError(f"{given} goes with mode='freeze'; train_only holds all but the neurons.")


def _hold_tokens(plain: Any, subspace: SafetySubspace, draft: _Draft) -> str:
    """Hold the embeddings of the tokens the subspace was found on; gives the weight's name."""
    embeddings, head = dense(plain.get_input_embeddings()), plain.get_output_embeddings()
    weight: Any = embeddings.weight
    name = next(name for name, found in plain.named_parameters() if found is weight)
    if head is not None and dense(head).weight is weight:
        raise ConfigError(
            "hold=['tokens'] frees the embeddings of other tokens, and this model's head reads the "
            "same weights: their odds would move in every answer. Hold 'embeddings' instead."
        )
    draft.slices.append(Slice(plain_name(name), "rows", subspace.tokens))
    if weight.requires_grad:
        form = form_of(shape_of(weight))
        draft.holds.append(Hold(plain_name(name), weight, "rows", subspace.tokens, False, form))
    return plain_name(name)


def _held_inputs(plain: nn.Module, draft: _Draft) -> dict[str, Tensor]:
    """Of linear layers, the inputs that neurons hold to the bit."""
    linears = find_linears(plain, ("text", "vision", "projector"))
    return {
        piece.name: piece.entries
        for piece in draft.slices
        if piece.name in linears
        and piece.axis == linears[piece.name].axis
        and piece.entries is not None
    }


@dataclass(frozen=True)
class _Slices:
    """What the chosen units use of one weight; ``own`` without what other units use as well."""

    module: str
    leaf: str
    axis: Axis
    used: Tensor
    own: Tensor

    @property
    def name(self) -> str:
        return f"{self.module}.{self.leaf}"


def _tensors(sites: Mapping[str, Site], neurons: NeuronSet, mode: Mode) -> list[_Slices]:
    """Weight by weight, since several parts of several sites may lie in one."""
    used: dict[tuple[str, str, Axis], list[Tensor]] = {}
    own: dict[tuple[str, str, Axis], list[Tensor]] = {}
    for site in neurons.indices:
        units = neurons.units_of(site)
        for part in sites[site].parts:
            for name, axis in part.tensors:
                key = (part.module, name.removeprefix(f"{part.module}."), axis)
                used.setdefault(key, []).append(part.entries(units))
                own.setdefault(key, []).append(part.own_entries(units))
    return [
        _Slices(*key, torch.cat(used[key]).unique(), torch.cat(own[key]).unique()) for key in used
    ]


def _hold_tensor(
    plain: nn.Module, weights: ModelWeights, tensor: _Slices, mode: Mode, draft: _Draft
) -> None:
    module, axis = plain.get_submodule(tensor.module), tensor.axis
    entries = tensor.used
    parameter = dense(bare(module))._parameters.get(tensor.leaf)
    if mode == "train_only":
        if not len(tensor.own):
            return
        form = form_of(weights.shape(tensor.name) or (), axis)
        every = torch.arange(count_of(form, axis))
        entries = every[~torch.isin(every, tensor.own)]
        draft.free |= {id(parameter)} if parameter is not None else set()
        draft.free |= {id(factor) for factor in learning_factors(module, tensor.leaf, axis)}
    if not len(entries):
        return
    draft.slices.append(Slice(tensor.name, axis, entries))
    if parameter is not None and parameter.requires_grad:
        form = form_of(shape_of(parameter), axis)
        draft.holds.append(Hold(tensor.name, parameter, axis, entries, False, form))
    for factor in factors_of(module, tensor.module, tensor.leaf, axis):
        inside = factor.entries(entries)
        draft.holds.append(
            Hold(factor.name, factor.parameter, factor.axis, inside, True, factor.form)
        )


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
            form = form_of(shape_of(parameter))
            entries = torch.arange(count_of(form, axis))
            draft.holds.append(Hold(name, parameter, axis, entries, True, form))


def group_parameters(plain: nn.Module, hold: Collection[Group]) -> dict[str, nn.Parameter]:
    """The parameters of whole groups, by name, each once where weights are tied."""
    members: set[int] = set()
    for group, side in (("embeddings", "input"), ("head", "output")):
        module = getattr(plain, f"get_{side}_embeddings")() if group in hold else None
        if isinstance(module, nn.Module):
            members.update(id(parameter) for parameter in module.parameters())
    for module in plain.modules():
        norm = "norms" in hold and "norm" in type(module).__name__.lower()
        if norm or ("embeddings" in hold and isinstance(module, nn.Embedding)):  # of positions
            members.update(id(parameter) for parameter in module.parameters())
        bias = getattr(bare(module), "bias", None)
        if "biases" in hold and isinstance(bias, nn.Parameter):
            members.add(id(bias))
    # Of tied weights, the name that checkpoints know.
    return {plain_name(n): p for n, p in plain.named_parameters() if id(p) in members}


def _size(weights: ModelWeights, piece: Slice) -> int:
    shape = weights.shape(piece.name) or ()
    if piece.entries is None:
        return torch.Size(shape).numel()
    return len(piece.entries) * length_of(form_of(shape, piece.axis), piece.axis)

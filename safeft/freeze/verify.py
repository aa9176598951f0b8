"""``verify``: base against tuned, slice by slice from safetensors, merged effect for adapters."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from safeft.blocks import Axis, count_of, form_of
from safeft.errors import ArtefactError, FingerprintError
from safeft.fingerprint import ModelFingerprint, layout_hash
from safeft.freeze.certificate import (
    Certificate,
    Violation,
    bytes_hash,
    describe_set,
    describe_subspace,
    differences,
    off_directions,
)
from safeft.freeze.directions import products_of, tolerance
from safeft.freeze.merged import MergedWeights
from safeft.freeze.plan import Group, Mode, Plan, Slice, make_plan
from safeft.neurons import NeuronSet, moved_error
from safeft.progress import progress
from safeft.sites import Site, check_type, find_sites, plain_model
from safeft.subspace import SafetySubspace, protected_pair
from safeft.weights import (
    CheckpointWeights,
    DistributedCheckpointWeights,
    ModelWeights,
    Weights,
)

_ROWS = 4096
"""Rows compared at once where a whole weight is protected."""


def verify(
    base: str | Path | nn.Module,
    tuned: str | Path | nn.Module,
    protected: NeuronSet | SafetySubspace | str | Path,
    *,
    mode: Mode = "freeze",
    hold: Collection[Group] | None = None,
    subspace: SafetySubspace | str | Path | None = None,
) -> Certificate:
    """Compare what is protected in the base with the same in the tuned model, bit by bit.

    Args:
        base: Folder (or hub id) of the base checkpoint in safetensors, or a model in memory.
        tuned: Folder of the tuned checkpoint (safetensors, or torch's distributed format as FSDP2
            saves it), or of a LoRA adapter, or a model in memory. For an adapter the merged
            effect counts: any non-zero update of a protected slice violates.
        protected: The neuron set or the subspace, or its folder. Of a subspace ``W U`` must be
            unchanged up to rounding, and what it does not cover to the bit.
        mode: ``freeze``: the neurons must be unchanged. ``train_only``: everything else must.
        hold: Groups of parameters that must be unchanged as well, as given to the callback.
        subspace: A subspace that was held beside a neuron set.

    Returns:
        A certificate; ``exact`` is the verdict and ``violations`` name tensor, neuron and row or
        column. Where the tuned checkpoint has another dtype, the base is cast to it first.

    Raises:
        ArtefactError: A folder without safetensors, a truncated file, a missing tensor.
        ConfigError: Two subspaces.
        FingerprintError: The set was not located in this base.

    Example:
        >>> verify("base", "tuned", "safety_neurons").exact  # doctest: +SKIP
        True
    """
    neurons, subspace = protected_pair(protected, subspace)
    where = _describe(base)
    with ExitStack() as files:
        every = subspace is not None or bool(hold) or mode == "train_only"
        shape_model, before = _open_base(base, files, every)
        sites = find_sites(shape_model)
        for fingerprint in [found.model for found in (neurons, subspace) if found is not None]:
            _check_layout(fingerprint, sites, before, where)
        if neurons is not None and (moved := neurons.moved(before, sites)):
            raise moved_error(neurons, moved, where)
        if subspace is not None:
            subspace.check_weights(before, where)
        shape_model.requires_grad_(True)
        plan = make_plan(shape_model, neurons, mode, hold, subspace)
        after = _open_tuned(tuned, before, shape_model, files, every)
        rows, violations = _compare(plan, sites, before, after)
        directions = _compare_directions(plan, before, after)
    violations += off_directions(directions)
    run = {"base": _describe(base), "tuned": _describe(tuned), "compared": type(after).__name__}
    return Certificate(
        not violations,
        tuple(violations),
        mode,
        {} if neurons is None else describe_set(neurons),
        tuple(rows),
        plan.frozen_share,
        run,
        {} if subspace is None else describe_subspace(subspace),
        tuple(directions),
    )


@torch.no_grad()
def _compare_directions(plan: Plan, before: Weights, after: Weights) -> list[dict[str, Any]]:
    """The relative change of each held ``W U``."""
    found = []
    for held in progress(plan.directions, "verifying directions", total=len(plan.directions)):
        was, shape = before.shape(held.name), after.shape(held.name)
        if shape != was:
            raise _other_shape(held.name, was, shape)
        base = products_of(before, held.name, held.basis, held.axis)
        change, dtype = changed_products(before, after, held.name, held.basis, held.axis)
        found.append(
            {
                "tensor": held.name,
                "rank": held.basis.shape[1],
                "features": held.basis.shape[0],
                "relative_change": change / base.scale,
                "tolerance": tolerance(dtype),
            }
        )
    return found


def changed_products(
    before: Weights, after: Weights, name: str, basis: Tensor, axis: Axis
) -> tuple[float, torch.dtype]:
    """``norm(W U - W0 U)``, and the dtype in which the tuned weights are rounded.

    Of an adapter its update alone counts, which is not rounded into the base's dtype, but in that
    of its factors.
    """
    merged = after if isinstance(after, MergedWeights) else None
    total = torch.zeros(())
    squares, dtype = 0.0, torch.float32 if merged is None else merged.rounded_in(name)
    for rows in torch.arange(count_of(form_of(before.shape(name) or ()), "rows")).split(_ROWS):
        if merged is not None:
            gap = merged.change(name, "rows", rows)
        else:
            now = after.read(name, "rows", rows)
            dtype = now.dtype
            gap = now.float() - before.read(name, "rows", rows).float()
        if axis == "rows":
            total = total + gap.T @ basis[rows]
        else:
            squares += float((gap @ basis).double().square().sum())
    return (float(total.norm()) if axis == "rows" else squares**0.5), dtype


def _compare(
    plan: Plan, sites: Mapping[str, Site], before: Weights, after: Weights
) -> tuple[list[dict[str, Any]], list[Violation]]:
    owner: dict[tuple[str, int], str] | None = None
    rows: list[dict[str, Any]] = []
    violations: list[Violation] = []
    for piece in progress(plan.slices, "verifying", total=len(plan.slices)):
        was, shape = before.shape(piece.name), after.shape(piece.name)
        if shape != was:
            raise _other_shape(piece.name, was, shape)
        hashes: tuple[list[str], list[str]] = ([], [])
        count = 0
        for chunk in _chunks(piece, was or ()):
            assert chunk.entries is not None
            now = after.read(chunk.name, chunk.axis, chunk.entries)
            then = before.read(chunk.name, chunk.axis, chunk.entries).to(now.dtype)
            hashes[0].append(bytes_hash([then]))
            hashes[1].append(bytes_hash([now]))
            count += len(chunk.entries)
            for entry, changed, gap in differences(then, now):
                index = int(chunk.entries[entry])
                owner = owner or _owners(plan, sites)
                neuron = owner.get((piece.name, index), "")
                violations.append(Violation(piece.name, neuron, piece.axis, index, changed, gap))
        rows.append(
            {
                "tensor": piece.name,
                "axis": piece.axis,
                "count": count,
                "sha256_base": _joined(hashes[0]),
                "sha256_now": _joined(hashes[1]),
            }
        )
    return rows, violations


def _owners(plan: Plan, sites: Mapping[str, Site]) -> dict[tuple[str, int], str]:
    """Which (first) neuron a row or column of a weight belongs to."""
    compared = {piece.name for piece in plan.slices}
    found: dict[tuple[str, int], str] = {}
    for site in sites.values():
        for part in site.parts:
            names = [name for name, _ in part.tensors if name in compared]
            if not names:
                continue
            for unit, entries in enumerate(part.table(site.units).tolist()):
                for name in names:
                    for entry in entries:
                        found.setdefault((name, entry), f"{site.name}#{unit}")
    return found


def slice_hashes(values: Tensor, axis: Axis) -> tuple[str, str]:
    """A slice's SHA-256 as certificates of trainings and as those of :func:`verify` state it.

    They differ only where a slice has more rows than ``verify`` reads at once.
    """
    whole = bytes_hash([values])
    if axis == "columns":
        return whole, whole
    return whole, _joined([bytes_hash([chunk]) for chunk in values.split(_ROWS)])


def _joined(hashes: list[str]) -> str:
    if len(hashes) == 1:
        return hashes[0]
    return bytes_hash([torch.tensor(list("".join(hashes).encode()), dtype=torch.uint8)])


def _chunks(piece: Slice, shape: tuple[int, ...]) -> Iterator[Slice]:
    entries = piece.entries
    if entries is None:
        entries = torch.arange(count_of(form_of(shape), "rows"))
    if piece.axis == "columns":
        yield replace(piece, entries=entries)
        return
    for chosen in entries.split(_ROWS):
        yield replace(piece, entries=chosen)


def _open_base(
    base: str | Path | nn.Module, files: ExitStack, every: bool
) -> tuple[nn.Module, Weights]:
    if isinstance(base, nn.Module):
        plain = plain_model(base)
        config = getattr(plain, "config", None)
        with torch.device("meta"):
            return type(plain)(config), ModelWeights(plain)
    folder = _folder(base)
    shape_model = model_of_shapes(folder)
    return shape_model, _open_checkpoint(folder, shape_model, files, every)


def _open_tuned(
    tuned: str | Path | nn.Module,
    before: Weights,
    shape_model: nn.Module,
    files: ExitStack,
    every: bool,
) -> Weights:
    if isinstance(tuned, nn.Module):
        if any(".lora_" in name for name, _ in tuned.named_parameters()):
            raise ArtefactError(
                "The tuned model carries an adapter in memory. Save the adapter and give its "
                "folder, or merge it first (merge_and_unload)."
            )
        return ModelWeights(tuned)
    folder = _folder(tuned)
    for place in (folder, folder / "pytorch_model_fsdp_0"):
        if (place / ".metadata").is_file():
            return files.enter_context(DistributedCheckpointWeights(place))
    if not (folder / "adapter_config.json").is_file():
        return _open_checkpoint(folder, shape_model, files, every)
    return files.enter_context(MergedWeights(before, folder, shape_model))


def _open_checkpoint(
    folder: Path, shape_model: nn.Module, files: ExitStack, every: bool
) -> Weights:
    """A saved model, slice by slice where its weights are stored under the model's own names.

    Transformers saves some models under others: experts one by one, towers by older names. Such a
    model is loaded whole, by transformers. ``every``: more than the neurons' weights is compared.
    """
    stored = files.enter_context(CheckpointWeights(folder))
    sites = find_sites(shape_model).values()
    wanted = {name for site in sites for part in site.parts for name, _ in part.tensors}
    wanted |= {name for name, _ in shape_model.named_parameters()} if every else set()
    if wanted <= set(stored.names()):
        return stored
    cls: Any = type(shape_model)
    try:
        model, seen = cls.from_pretrained(folder, dtype="auto", output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ArtefactError(
            f"{str(folder)!r} cannot be loaded as a {cls.__name__}: {str(error).splitlines()[0]}"
        ) from error
    lost = wanted & {*seen["missing_keys"], *(key for key, *_ in seen["mismatched_keys"])}
    return stored if lost else ModelWeights(model)


def _folder(place: str | Path) -> Path:
    if Path(place).is_dir():
        return Path(place)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        wanted = ["*.json", "*.safetensors"]
        return Path(snapshot_download(str(place), allow_patterns=wanted))
    except (OSError, ValueError, HFValidationError, RuntimeError) as error:
        raise ArtefactError(
            f"{str(place)!r} is neither a folder nor a model that the hub or its cache has "
            f"({type(error).__name__}). Give the folder of a saved model."
        ) from error


def model_of_shapes(folder: str | Path) -> nn.Module:
    """The model of a folder or hub name on the meta device: names and shapes, no weights.

    Raises:
        ArtefactError: There is no config that transformers can read.
        UnsupportedModelError: It is of a type whose units cannot be named.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ArtefactError(
            f"{str(folder)!r} has no readable config.json, so its layout is unknown "
            f"({str(error).splitlines()[0]}). Give the folder of a saved model."
        ) from error
    check_type(config.model_type)
    named = getattr(transformers, (config.architectures or [""])[0], None)
    kinds = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModel)
    fitting = next(kind for kind in kinds if type(config) in kind._model_mapping)
    with torch.device("meta"):
        return named(config) if named is not None else fitting.from_config(config)


def _other_shape(name: str, was: Any, shape: Any) -> ArtefactError:
    return ArtefactError(
        f"{name} has shape {was} in the base and {shape or 'is missing'} in the tuned model: it "
        "was not tuned from this base (or its layers were renamed or resized). Give the base it "
        "was tuned from."
    )


def _check_layout(
    made_for: ModelFingerprint, sites: Mapping[str, Site], before: Weights, where: str
) -> None:
    first = next(iter(sites.values())).writes.name
    if before.shape(first) is None:
        raise ArtefactError(
            f"The base has no weight {first!r}: its weights are not named as its config says."
        )
    if layout_hash(sites, before) != made_for.layout:
        raise FingerprintError(
            f"The neurons were located in {made_for.name_or_path or 'a model'!r} "
            f"({made_for.model_type}); {where!r} has other weights or shapes, so the same "
            "numbers would name other neurons. Give the base they were located in."
        )


def _describe(place: str | Path | nn.Module) -> str:
    return type(place).__name__ if isinstance(place, nn.Module) else str(place)

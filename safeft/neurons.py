"""``NeuronSet``: a frozen value that says which neurons, of which model, found how.

On disk a folder with ``config.json`` and ``model.safetensors``, never a pickle. Each neuron
carries a digest of its own weights, so a set is checked against a model neuron by neuron, also
after tuning has moved everything else.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save
from torch import Tensor, nn

from safeft.artefacts import intact, read_tensors
from safeft.errors import ArtefactError, FingerprintError, SelectionError
from safeft.files import sha256, upload, write_together
from safeft.fingerprint import ModelFingerprint, check_layout
from safeft.sites import Site, find_sites
from safeft.weights import ModelWeights, Weights, digests

SCHEMA_VERSION = 1
CONFIG_NAME, TENSORS_NAME, CARD_NAME = "config.json", "model.safetensors", "README.md"

_CARD = """---
library_name: safeft
tags: [safeft, safety, neurons]
---
# Neuron set

{count} neurons of `{model}` ({method}), for `safeft`. Load it with
`safeft.NeuronSet.from_pretrained(folder)`.

**Sensitive.** The places that carry a model's refusals are also a map for removing them. Share
this folder as you would share a vulnerability report.
"""


@dataclass(frozen=True)
class NeuronSet:
    """Which neurons, of which model, found how.

    Supports ``len``, ``in`` (``(site, unit) in neurons``), ``|``, ``&`` and ``-`` between sets of
    one model.

    Attributes:
        indices: Site (module path) to sorted unit numbers; sites without units are left out.
        digests: Per site, the digest of each unit's weights, in the order of ``indices``.
        model: The fingerprint of the model it was located in.
        source: Method, settings and hashes of the calibration data.

    Example:
        >>> both = NeuronSet.of(model, {"model.layers.1.mlp": [3, 7]}) | located  # doctest: +SKIP
    """

    indices: Mapping[str, tuple[int, ...]]
    digests: Mapping[str, tuple[int, ...]]
    model: ModelFingerprint
    source: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        indices: Mapping[str, Any],
        source: Mapping[str, Any] | None = None,
    ) -> Self:
        """The set of the named units of ``model``, with digests of their weights as they are now.

        Raises:
            SelectionError: A site or a unit that the model does not have.
        """
        sites, weights = find_sites(model), ModelWeights(model)
        chosen: dict[str, tuple[int, ...]] = {}
        for name, units in indices.items():
            if name not in sites:
                raise SelectionError(
                    f"The model has no site {name!r}; its sites are {_shorten(list(sites))}."
                )
            numbers = tuple(sorted({int(unit) for unit in units}))
            _check_range(name, numbers, sites[name].units)
            if numbers:
                chosen[name] = numbers
        ordered = {name: chosen[name] for name in sites if name in chosen}
        return cls(
            ordered,
            {name: digests(weights, sites[name], units) for name, units in ordered.items()},
            ModelFingerprint.of(model),
            dict(source or {"method": "given"}),
        )

    def __len__(self) -> int:
        return sum(len(units) for units in self.indices.values())

    def __contains__(self, neuron: object) -> bool:
        if not isinstance(neuron, tuple) or len(neuron) != 2:
            return False
        return neuron[1] in self.indices.get(neuron[0], ())

    def __or__(self, other: "NeuronSet") -> "NeuronSet":
        return self._combine(other, "|", lambda a, b: a | b)

    def __and__(self, other: "NeuronSet") -> "NeuronSet":
        return self._combine(other, "&", lambda a, b: a & b)

    def __sub__(self, other: "NeuronSet") -> "NeuronSet":
        return self._combine(other, "-", lambda a, b: a - b)

    def _combine(
        self,
        other: "NeuronSet",
        sign: str,
        rule: Callable[[set[int], set[int]], set[int]],
    ) -> "NeuronSet":
        if self.model.layout != other.model.layout:
            raise FingerprintError(
                f"Sets of unlike models cannot be combined: {self.model.name_or_path or 'one'} "
                f"({self.model.model_type}) and {other.model.name_or_path or 'the other'} "
                f"({other.model.model_type}) name different weights."
            )
        mine, theirs = self._by_unit(), other._by_unit()
        for neuron in mine.keys() & theirs.keys():
            if mine[neuron] != theirs[neuron]:
                raise FingerprintError(
                    f"{neuron[0]}#{neuron[1]} has other weights in the two sets: they were located "
                    "in different checkpoints. Locate both in the same one."
                )
        known = theirs | mine
        indices, found = {}, {}
        for name in self.model.units:
            units = sorted(rule(set(self.indices.get(name, ())), set(other.indices.get(name, ()))))
            if units:
                indices[name] = tuple(units)
                found[name] = tuple(known[name, unit] for unit in units)
        source = {"method": sign, "of": [dict(self.source), dict(other.source)]}
        return replace(self, indices=indices, digests=found, source=source)

    def _by_unit(self) -> dict[tuple[str, int], int]:
        return {
            (name, unit): digest
            for name, units in self.indices.items()
            for unit, digest in zip(units, self.digests[name], strict=True)
        }

    def units_of(self, site: str) -> Tensor:
        """Unit numbers of one site, int64 ``(units,)``, empty where it has none."""
        return torch.tensor(self.indices.get(site, ()), dtype=torch.long)

    @property
    def hash(self) -> str:
        """SHA-256 over the neurons and their weights' digests: what a certificate refers to."""
        rows = [[name, self.indices[name], self.digests[name]] for name in sorted(self.indices)]
        return sha256(json.dumps([self.model.layout, rows]).encode())

    def moved(self, weights: Weights, sites: Mapping[str, Site]) -> list[tuple[str, int]]:
        """The neurons whose weights in ``weights`` are not those the set was made from."""
        return [
            (name, unit)
            for name, units in self.indices.items()
            for unit, was, now in zip(
                units, self.digests[name], digests(weights, sites[name], units), strict=True
            )
            if was != now
        ]

    def check_model(self, model: nn.Module, *, weights_too: bool = True) -> None:
        """Refuse a model that these neurons were not located in.

        Args:
            model: The model in memory.
            weights_too: Also compare each neuron's weights; without it shapes and names suffice.

        Raises:
            FingerprintError: Other names or shapes, or other weights.
        """
        here = ModelFingerprint.of(model)
        check_layout(self.model, here)
        if not weights_too:
            return
        moved = self.moved(ModelWeights(model), find_sites(model))
        if moved:
            raise moved_error(self, moved, here.name_or_path or "the model")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the set as a folder: ``config.json``, ``model.safetensors`` and a card.

        Raises:
            ArtefactError: The folder holds a model, or cannot be written.
        """
        folder = Path(folder)
        check_own(folder, "NeuronSet")
        write_together(folder, self.files())

    def files(self) -> dict[str, str | bytes]:
        """What :meth:`save_pretrained` writes, by file name."""
        tensors = {}
        for name in self.indices:
            tensors[f"{name}.indices"] = self.units_of(name)
            tensors[f"{name}.digests"] = torch.tensor(self.digests[name], dtype=torch.long)
        data = save(tensors)
        config = {
            "safeft": SCHEMA_VERSION,
            "kind": "NeuronSet",
            "base_model": self.model.to_dict(),
            "source": dict(self.source),
            "count": len(self),
            "counts": {name: len(units) for name, units in self.indices.items()},
            "tensors_sha256": sha256(data),
        }
        card = _CARD.format(
            count=len(self),
            model=self.model.name_or_path or self.model.model_type,
            method=self.source.get("method", "given"),
        )
        settings = json.dumps(config, indent=2) + "\n"
        return {TENSORS_NAME: data, CONFIG_NAME: settings, CARD_NAME: card}

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read a set that :meth:`save_pretrained` wrote.

        Raises:
            ArtefactError: Missing, truncated, edited, of a newer schema, or with units that its
                own model does not have.
        """
        folder = Path(folder)
        config = read_config(folder)
        if config.get("kind") != "NeuronSet":
            raise _other_kind(folder, config.get("kind"))
        if config.get("safeft") != SCHEMA_VERSION:
            raise ArtefactError(
                f"{str(folder)!r} has schema {config.get('safeft')!r}; this safeft reads "
                f"{SCHEMA_VERSION}. Locate again, or use the release that wrote it."
            )
        with intact(folder, "Locate again"):
            tensors = read_tensors(folder / TENSORS_NAME, config["tensors_sha256"], "Locate again")
            fingerprint = ModelFingerprint.read(config["base_model"])
            indices = {name: _numbers(tensors[f"{name}.indices"]) for name in config["counts"]}
            found = {name: _numbers(tensors[f"{name}.digests"]) for name in indices}
            counts = {name: len(numbers) for name, numbers in indices.items()}
            source = dict(config.get("source", {}))
        if counts != config["counts"] or sum(counts.values()) != config.get("count"):
            raise ArtefactError(
                f"{str(folder)!r}: config.json says {config.get('count')} neurons, the tensors "
                f"hold {sum(counts.values())}: edited. Locate again or restore it."
            )
        for name, numbers in indices.items():
            if len(found[name]) != len(numbers) or list(numbers) != sorted(set(numbers)):
                raise ArtefactError(
                    f"{str(folder)!r}: units of {name!r} are not sorted and unique."
                )
            try:
                _check_range(name, numbers, fingerprint.units.get(name, 0))
            except SelectionError as error:
                raise ArtefactError(f"{str(folder)!r}: {error}") from error
        return cls(indices, found, fingerprint, source)

    def push_to_hub(self, repo_id: str, *, private: bool = True) -> None:
        """Upload the folder to a hub repository, private unless you say otherwise."""
        upload(self.save_pretrained, repo_id, private)


def moved_error(neurons: NeuronSet, moved: list[tuple[str, int]], where: str) -> FingerprintError:
    """The error for neurons that do not have the weights they were located with."""
    shown = ", ".join(f"{name}#{unit}" for name, unit in moved[:3])
    return FingerprintError(
        f"{len(moved)} of {len(neurons)} neurons ({shown}{', ...' if len(moved) > 3 else ''}) do "
        f"not have the weights in {where} that they were located with in "
        f"{neurons.model.name_or_path or 'their model'!r}: this is another checkpoint, and a set "
        "made for one may mean nothing in another. Locate in this checkpoint."
    )


def read_config(folder: Path) -> dict[str, Any]:
    """The settings of a saved artefact.

    Raises:
        ArtefactError: Missing, unreadable, or not a mapping.
    """
    path = folder / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtefactError(
            f"{str(folder)!r} has no readable {CONFIG_NAME} ({error.strerror}). Give the folder "
            "that `safeft locate` wrote."
        ) from error
    except ValueError as error:
        raise ArtefactError(
            f"{str(path)!r} is not JSON ({error}); it is truncated or edited."
        ) from error
    if not isinstance(config, dict):
        raise ArtefactError(f"{str(path)!r} holds {type(config).__name__}, not settings.")
    return config


def _other_kind(folder: Path, kind: Any) -> ArtefactError:
    if kind != "UnitGroups":
        return ArtefactError(
            f"{str(folder)!r} is not a neuron set (kind: {kind!r}). Give the output folder of "
            "`safeft locate`."
        )
    return ArtefactError(
        f"{str(folder)!r} holds four groups of units, and it is not said which of them is meant; "
        "to train what should be held would undo what you protect. Give `freeze: scu+cu:6%` or "
        f"`budget: ru` beside it, or the folder of one group, {str(folder / 'scu')!r}."
    )


def check_own(folder: Path, kind: str) -> None:
    """Refuse to save where a model, or anything but an artefact of this kind, would be overwritten.

    Raises:
        ArtefactError: There is such a thing.
    """
    names = (CONFIG_NAME, TENSORS_NAME, CARD_NAME)
    taken = [name for name in names if (folder / name).exists()]
    if taken and (not (folder / CONFIG_NAME).is_file() or read_config(folder).get("kind") != kind):
        raise ArtefactError(
            f"{str(folder)!r} holds a model or something else ({', '.join(taken)}); saving the "
            "set there would overwrite its files. Give a folder of its own."
        )


def _numbers(tensor: Tensor) -> tuple[int, ...]:
    if tensor.ndim != 1 or tensor.dtype != torch.long:
        raise ValueError(f"expected a list of integers, found {tensor.dtype} {tuple(tensor.shape)}")
    return tuple(tensor.tolist())


def _check_range(name: str, numbers: tuple[int, ...], units: int) -> None:
    if numbers and not 0 <= numbers[0] <= numbers[-1] < units:
        wrong = numbers[0] if numbers[0] < 0 else numbers[-1]
        raise SelectionError(
            f"{name!r} has units 0 to {units - 1}, but the set names unit {wrong}. It was made for "
            "another model or edited; locate again."
        )


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f", ... ({len(names)} in all)" if len(names) > 4 else "")

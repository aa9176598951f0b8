"""The certificate: what was frozen, and that it held, as JSON with hashes."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from safeft.files import write_whole
from safeft.neurons import NeuronSet
from safeft.processes import flat_bytes
from safeft.subspace import SafetySubspace

CERTIFICATE_NAME = "safeft_certificate.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Violation:
    """One row or column of a weight that should have stayed and did not.

    Attributes:
        tensor: The weight's name.
        neuron: ``site#unit``, or an empty string where the weight belongs to no neuron.
        axis: ``rows``, ``columns`` or ``directions``.
        index: The row or column; None where only hashes were compared (during training).
        changed: How many of its weights differ in some bit, where known.
        max_abs: The largest difference, where known.
    """

    tensor: str
    neuron: str
    axis: str
    index: int | None = None
    changed: int | None = None
    max_abs: float | None = None

    def __str__(self) -> str:
        if self.axis == "directions":
            return f"{self.tensor}: W U changed by {self.max_abs:.3g}, more than rounding explains"
        if self.index is None:
            return f"{self.tensor}: protected {self.axis} differ"
        neuron = f" ({self.neuron})" if self.neuron else ""
        return (
            f"{self.tensor} {self.axis}[{self.index}]{neuron}: {self.changed} weights differ, by "
            f"up to {self.max_abs:.3g}"
        )


@dataclass(frozen=True)
class Certificate:
    """Whether everything protected is bit-identical, and what that rests on.

    Attributes:
        exact: True if no protected weight differs in any bit, and no held direction by more than
            rounding.
        violations: What differs, one entry per row or column.
        mode: ``freeze`` or ``train_only``.
        neurons: Hash, count and origin of the set.
        slices: Per protected weight: name, axis, number of rows or columns, SHA-256 of its bytes
            in the base and now.
        frozen_share: Share of the model's weights that are protected, 0 to 1.
        run: How it came about: engine, processes, optimizer, steps, or the two folders compared.
        subspace: Hash, share of the rank and origin of the subspace, where one was held.
        directions: Per weight whose input directions were held: rank, features, the relative
            change ``norm(W U - W0 U) / norm(W0 U)``, and what of it rounding explains.
    """

    exact: bool
    violations: tuple[Violation, ...]
    mode: str
    neurons: Mapping[str, Any]
    slices: tuple[Mapping[str, Any], ...]
    frozen_share: float
    run: Mapping[str, Any] = field(default_factory=dict)
    subspace: Mapping[str, Any] = field(default_factory=dict)
    directions: tuple[Mapping[str, Any], ...] = ()

    @property
    def largest_change(self) -> float:
        """The largest relative change of any held ``W U``; 0 where none is held."""
        return max((float(held["relative_change"]) for held in self.directions), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, schema version first."""
        return {"safeft_certificate": SCHEMA_VERSION, **asdict(self)}

    def save(self, path: str | Path) -> None:
        """Write the certificate whole, to ``path`` or into it where it is a folder.

        Raises:
            ArtefactError: It cannot be written.
        """
        path = Path(path)
        target = path / CERTIFICATE_NAME if path.is_dir() else path
        write_whole(target, json.dumps(self.to_dict(), indent=2) + "\n")

    def summary(self) -> str:
        """Two or three lines for a person."""
        off = {violation.axis == "directions" for violation in self.violations}
        verdict = "VIOLATED" if False in off else "EXACT"
        lines = []
        if self.neurons or self.slices:
            what = "what no direction is held of"
            if self.neurons:
                what = f"{self.neurons['count']} neurons"
                what = what if self.mode == "freeze" else f"everything but {what}"
            lines.append(
                f"{verdict}: {what}, {self.frozen_share:.2%} of the weights, "
                f"{len(self.slices)} tensors compared."
            )
        if self.directions:
            lines.append(
                f"{'VIOLATED' if True in off else 'HELD'}: input directions of "
                f"{len(self.directions)} layers, {self.subspace['share']:.1%} of their rank; "
                f"the largest relative change of W U is {self.largest_change:.1e}."
            )
        lines += [f"  {violation}" for violation in self.violations[:5]]
        if len(self.violations) > 5:
            lines.append(f"  and {len(self.violations) - 5} more")
        return "\n".join(lines)


def describe_set(neurons: NeuronSet) -> dict[str, Any]:
    """What a certificate says about the set it speaks of."""
    return {
        "count": len(neurons),
        "sha256": neurons.hash,
        "source": dict(neurons.source),
        "causal": causal_verdict(neurons),
        "base_model": neurons.model.name_or_path,
    }


def describe_subspace(subspace: SafetySubspace) -> dict[str, Any]:
    """What a certificate says about the subspace it speaks of."""
    source = {key: value for key, value in subspace.source.items() if key != "coverage"}
    return {
        "layers": len(subspace.readers),
        "share": subspace.share,
        "sha256": subspace.hash,
        "source": source,
        "base_model": subspace.model.name_or_path,
    }


def off_directions(directions: Iterable[Mapping[str, Any]]) -> list[Violation]:
    """Those that moved by more than rounding."""
    return [
        Violation(held["tensor"], "", "directions", max_abs=held["relative_change"])
        for held in directions
        if not held["relative_change"] <= held["tolerance"]  # NaN is a violation too
    ]


def causal_verdict(neurons: NeuronSet) -> str:
    """What the set itself says of its effect on refusal, or ``never validated``.

    Example:
        >>> causal_verdict(NeuronSet.from_pretrained("safety_neurons"))  # doctest: +SKIP
        'effect'
    """
    known = neurons.source.get("causal")
    return str(known.get("verdict")) if isinstance(known, Mapping) else "never validated"


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes, ``(..., itemsize)`` uint8: equal only where every bit is."""
    return flat_bytes(tensor.cpu()).view(*tensor.shape, tensor.element_size())


def bytes_hash(tensors: Iterable[Tensor]) -> str:
    """SHA-256 over the bytes of tensors in turn."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(flat_bytes(tensor.cpu()).numpy().data)
    return digest.hexdigest()


def differences(base: Tensor, now: Tensor) -> list[tuple[int, int, float]]:
    """Entries (first axis) that differ in some bit: (entry, weights changed, largest gap)."""
    changed = (bits(base) != bits(now)).any(-1).reshape(len(base), -1).sum(1)
    gap = (base.double() - now.double().to(base.device)).abs().reshape(len(base), -1)
    largest = gap.amax(1) if gap.shape[1] else gap.sum(1)
    return [
        (entry, int(changed[entry]), float(largest[entry]))
        for entry in changed.nonzero().flatten().tolist()
    ]

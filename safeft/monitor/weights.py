"""Whether located neurons weigh what they weighed when they were recorded, or certified."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safeft.errors import ArtefactError, ConfigError, FingerprintError
from safeft.freeze.certificate import CERTIFICATE_NAME, SCHEMA_VERSION, Certificate
from safeft.freeze.plan import Slice, make_plan
from safeft.freeze.verify import slice_hashes
from safeft.neurons import NeuronSet
from safeft.sites import find_sites
from safeft.weights import ModelWeights

_NARROWER = (torch.bfloat16, torch.float16)


def moved_weights(
    model: nn.Module, neurons: NeuronSet, certificate: Certificate | str | Path | None = None
) -> list[str]:
    """What of the neurons' weights is not as recorded: ``site#unit``, and certified tensors.

    The set's digests round to bfloat16; a certificate's hashes are of every bit. A model that was
    loaded in a wider type than the certificate speaks of is compared after rounding to that one.

    Args:
        model: The model in use.
        neurons: The set, with the digests to compare with.
        certificate: What a training or ``verify`` certified of this set, or its file or folder.

    Raises:
        ArtefactError: No certificate, or one of another schema.
        ConfigError: It does not hold these neurons; or an adapter hides what they really weigh.
        FingerprintError: It speaks of another set.

    Example:
        >>> moved_weights(model, located, "out/safeft_certificate.json")  # doctest: +SKIP
        []
    """
    if adapted := [name for name, _ in model.named_parameters() if ".lora_" in name]:
        raise ConfigError(
            f"The model carries an adapter ({adapted[0]}, ...), so what its neurons weigh is not "
            "what is stored. Merge it first (merge_and_unload), and locate or record after that."
        )
    weights = ModelWeights(model)
    moved = [f"{site}#{unit}" for site, unit in neurons.moved(weights, find_sites(model))]
    if certificate is None:
        return moved
    known = _hashes(certificate, neurons)
    for piece in make_plan(model, neurons).slices:
        if (expected := known.get((piece.name, piece.axis))) is None:
            raise ConfigError(
                f"The certificate says nothing of {piece.axis} of {piece.name}, which these "
                "neurons use: it is of another run, or its list was cut. Give the one written "
                "when they were frozen."
            )
        if expected not in _now(weights, piece):
            moved.append(f"{piece.name} {piece.axis}")
    return moved


def _now(weights: ModelWeights, piece: Slice) -> Iterator[str]:
    assert piece.entries is not None
    values: Tensor = weights.read(piece.name, piece.axis, piece.entries)
    yield from slice_hashes(values, piece.axis)
    if values.dtype == torch.float32:
        for dtype in _NARROWER:
            yield from slice_hashes(values.to(dtype), piece.axis)


def _hashes(
    certificate: Certificate | str | Path, neurons: NeuronSet
) -> Mapping[tuple[str, str], str]:
    data = _read(certificate)
    try:
        if data["safeft_certificate"] != SCHEMA_VERSION:
            raise ArtefactError(
                f"The certificate has schema {data['safeft_certificate']!r}; this safeft reads "
                f"{SCHEMA_VERSION}. Verify again, or use the release that wrote it."
            )
        if data["mode"] != "freeze":
            raise ConfigError(
                f"The certificate is of a run with mode={data['mode']!r}, which trained these "
                "neurons and held the rest, so it says nothing of what they weigh."
            )
        if data["neurons"].get("sha256") != neurons.hash:
            raise FingerprintError(
                "The certificate speaks of another set of neurons, or of these before they were "
                "trained: its hash is not that of the recorded set. Record the profile with the "
                "set that was frozen, on the model that was certified."
            )
        return {(row["tensor"], row["axis"]): row["sha256_now"] for row in data["slices"]}
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtefactError(
            f"This is no certificate ({type(error).__name__}: {error}): edited, or another file."
        ) from error


def _read(certificate: Certificate | str | Path) -> dict[str, Any]:
    if isinstance(certificate, Certificate):
        return certificate.to_dict()
    path = Path(certificate)
    path = path / CERTIFICATE_NAME if path.is_dir() else path
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtefactError(
            f"{str(path)!r} cannot be read as a certificate ({error}). Give the "
            f"{CERTIFICATE_NAME} of the run that froze these neurons."
        ) from error

"""What a set of neurons belongs to: the names and shapes of the weights its sites live in."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from torch import nn

from safeft.errors import FingerprintError
from safeft.files import sha256
from safeft.sites import Site, find_sites, plain_model
from safeft.weights import ModelWeights, Weights


@dataclass(frozen=True)
class ModelFingerprint:
    """What a set of neurons belongs to: names and shapes of the weights its sites live in.

    Attributes:
        name_or_path: Where the model came from, for people.
        model_type: The architecture's name in transformers.
        layout: SHA-256 over sites, units, weight names and shapes.
        units: Number of units of every site of the model.
    """

    name_or_path: str
    model_type: str
    layout: str
    units: Mapping[str, int]

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """The fingerprint of a model in memory (the meta device will do)."""
        plain = plain_model(model)
        config = getattr(plain, "config", None)
        sites = find_sites(plain)
        return cls(
            str(getattr(config, "_name_or_path", "")),
            str(getattr(config, "model_type", "")),
            layout_hash(sites, ModelWeights(plain)),
            {name: site.units for name, site in sites.items()},
        )

    @classmethod
    def read(cls, saved: Mapping[str, Any]) -> Self:
        """From what :meth:`to_dict` gave, out of a file: ValueError and the like where edited."""
        units = {str(name): int(count) for name, count in saved["units"].items()}
        return cls(str(saved["name_or_path"]), str(saved["type"]), str(saved["layout"]), units)

    def to_dict(self) -> dict[str, Any]:
        """For the ``base_model`` of an artefact's settings."""
        return {
            "name_or_path": self.name_or_path,
            "type": self.model_type,
            "layout": self.layout,
            "units": dict(self.units),
        }


def layout_hash(sites: Mapping[str, Site], weights: Weights) -> str:
    """SHA-256 over what makes two models' neurons the same places: names, units, shapes."""
    rows = [
        [site.name, site.units, axis, *where, name, list(weights.shape(name) or ())]
        for site in sites.values()
        for part in site.parts
        for where in [(part.share, part.width, part.first, part.step, part.run, part.gap)]
        for name, axis in part.tensors
    ]
    return sha256(json.dumps(rows).encode())


def check_layout(made_for: ModelFingerprint, here: ModelFingerprint) -> None:
    """Refuse a model whose sites have other names or shapes than the set's.

    Raises:
        FingerprintError: They differ.
    """
    if made_for.layout != here.layout or made_for.units != here.units:
        raise FingerprintError(
            f"The neurons were located in {made_for.name_or_path or 'a model'!r} "
            f"({made_for.model_type}, {sum(made_for.units.values())} units), but this model "
            f"({here.name_or_path or here.model_type!r}, {here.model_type}, "
            f"{sum(here.units.values())} units) has other weights or shapes. The same numbers "
            "would name other neurons. Locate in this model."
        )

"""``GuardHead``: what a guard knows beside the model it reads; a frozen value, saved and loaded."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save
from torch import Tensor, nn

from safeft.artefacts import intact, read_tensors
from safeft.errors import ArtefactError, ConfigError, FingerprintError
from safeft.files import sha256, write_together
from safeft.fingerprint import ModelFingerprint, check_layout
from safeft.guard.places import Place
from safeft.guard.training import Network
from safeft.neurons import CARD_NAME, CONFIG_NAME, TENSORS_NAME, check_own, read_config
from safeft.sites import find_sites, plain_model
from safeft.weights import ModelWeights, digests

SCHEMA_VERSION = 1

_CARD = """---
library_name: safeft
tags: [safeft, safety, guard]
---
# Guard

Harmfulness from the inner activations of `{model}`: {units} of its units, {outputs} outputs, for
`safeft`. Load it with `safeft.guard.Guard.from_pretrained(folder)`.

It was fitted on {texts} texts and knows what these call harmful. Measure it on texts of your own
(`safeft guard evaluate`) before anything hangs on it. **Sensitive:** who holds this folder can try
out texts until one passes.
"""


@dataclass(frozen=True, eq=False)
class LayerProbe:
    """The linear probe of one place, and which of its units the guard reads.

    Attributes:
        place: Where.
        weights: On standardised units, float32 ``(width,)``, most of them 0.
        bias: Log-odds where all units are at their mean.
        mean: Of each unit, float32 ``(width,)``.
        scale: Standard deviation of each unit, float32 ``(width,)``.
        strength: The penalty, as a share of the least one that leaves no unit.
        f1: Macro-F1 on sources it was not fitted on, their mean; on random parts of one source.
        selected: Units the guard reads, int64, sorted; none where it does not look.
        layer_weight: What they count for, at most 1.
    """

    place: Place
    weights: Tensor
    bias: float
    mean: Tensor
    scale: Tensor
    strength: float
    f1: float
    selected: Tensor
    layer_weight: float

    def logits(self, means: Tensor) -> Tensor:
        """Log-odds of texts by this layer alone, from ``(texts, width)``."""
        return ((means.float() - self.mean) / self.scale) @ self.weights + self.bias


@dataclass(frozen=True, eq=False)
class GuardHead:
    """Selected units of every place, the network that reads them, and its calibration.

    Attributes:
        probes: One a place, in order of depth.
        network: Reads the selected units, standardised and times their layer's weight.
        labels: Names of the outputs; the first is ``harmful``.
        calibration: Slope and offset from logit to log-odds, float32 ``(2, outputs)``.
        safe_scores: Scores of harmless validation texts, float32, sorted.
        trained_on: Hashes of the texts it was fitted on, int64, sorted.
        model: The fingerprint of the model it reads.
        weights: SHA-256 over some weights of it.
        reading: How texts are shown: ``chat``, ``chat_template`` and ``max_length``.
        source: Settings, counts and what was found on the way.
    """

    probes: tuple[LayerProbe, ...]
    network: Network
    labels: tuple[str, ...]
    calibration: Tensor
    safe_scores: Tensor
    trained_on: Tensor
    model: ModelFingerprint
    weights: str
    reading: Mapping[str, Any]
    source: Mapping[str, Any]

    @property
    def places(self) -> list[Place]:
        """Where it reads: what no unit was selected of is not looked at."""
        return [probe.place for probe in self._read]

    @property
    def _read(self) -> list[LayerProbe]:
        return [probe for probe in self.probes if len(probe.selected)]

    @property
    def units(self) -> int:
        """How many units it reads."""
        return sum(len(probe.selected) for probe in self.probes)

    @cached_property
    def _folded(self) -> tuple[Tensor, Network]:
        """Means of the selected units, and the network with scales and layer weights in it."""
        chosen = [(probe, probe.selected) for probe in self._read]
        mean = torch.cat([probe.mean[units] for probe, units in chosen])
        by = torch.cat([probe.layer_weight / probe.scale[units] for probe, units in chosen])
        slope, offset = self.calibration.double().unbind()
        net = self.network
        folded = Network(
            (net.first.double() * by).float(),
            net.first_bias,
            (net.second.double() * slope[:, None]).float(),
            (net.second_bias.double() * slope + offset).float(),
        )
        return mean, folded

    def on(self, device: torch.device | str) -> "ReadyHead":
        """The head where activations are."""
        mean, net = self._folded
        moved = Network(
            net.first.to(device),
            net.first_bias.to(device),
            net.second.to(device),
            net.second_bias.to(device),
        )
        return ReadyHead([p.selected.to(device) for p in self._read], mean.to(device), moved)

    def threshold(self, false_positives: float) -> float:
        """The least score that at most so large a share of harmless texts reaches.

        A conformal bound: on texts like the validation ones the promise holds on average over
        draws of these, whatever the scores' distribution (Vovk et al. 2005).

        Args:
            false_positives: Share of harmless texts, above 0 and below 1.

        Raises:
            ConfigError: No such share, or too few harmless validation texts to promise it.

        Example:
            >>> head.threshold(0.01)  # doctest: +SKIP
            0.83
        """
        count = len(self.safe_scores)
        if not 0 < false_positives < 1:
            raise ConfigError(
                f"A false-positive rate of {false_positives} is none that a threshold can have. "
                "Give a share above 0 and below 1, such as 0.01."
            )
        above = int(false_positives * (count + 1))
        if above < 1:
            raise ConfigError(
                f"{count} harmless validation texts cannot promise a false-positive rate of "
                f"{false_positives:g}: the least they can is {1 / (count + 1):.2g}. Fit with more "
                "harmless texts, or ask for a higher rate."
            )
        score = self.safe_scores[count - above]
        return float(torch.nextafter(score, torch.tensor(2.0)))

    def check_model(self, model: nn.Module, *, weights_too: bool = True) -> None:
        """Refuse a model that this guard was not fitted on.

        Args:
            model: The model in memory.
            weights_too: Also compare weights; without it shapes and names suffice.

        Raises:
            FingerprintError: Another model, or another checkpoint of it.
        """
        here = ModelFingerprint.of(model)
        check_layout(self.model, here)
        if weights_too and weights_of(model) != self.weights:
            raise FingerprintError(
                f"{here.name_or_path or 'The model'} has the shapes of "
                f"{self.model.name_or_path or 'the model'} that this guard was fitted on, and "
                "other weights: another revision, or a tuned one, whose activations mean other "
                "things. Fit a guard on this checkpoint, or measure how much of this one is left "
                "with `safeft evaluate --guard`."
            )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the head as a folder: ``config.json``, ``model.safetensors`` and a card.

        Raises:
            ArtefactError: The folder holds something else, or cannot be written.
        """
        folder = Path(folder)
        check_own(folder, "Guard")
        data = save({name: part.contiguous() for name, part in self._tensors().items()})
        config = {
            "safeft": SCHEMA_VERSION,
            "kind": "Guard",
            "base_model": asdict(self.model) | {"units": dict(self.model.units)},
            "weights_sha256": self.weights,
            "labels": list(self.labels),
            "reading": dict(self.reading),
            "places": [
                {
                    **asdict(probe.place),
                    "bias": probe.bias,
                    "strength": probe.strength,
                    "f1": probe.f1,
                    "selected": len(probe.selected),
                    "layer_weight": probe.layer_weight,
                }
                for probe in self.probes
            ],
            "source": dict(self.source),
            "tensors_sha256": sha256(data),
        }
        card = _CARD.format(
            model=self.model.name_or_path or self.model.model_type,
            units=self.units,
            outputs=len(self.labels),
            texts=len(self.trained_on),
        )
        settings = json.dumps(config, indent=2) + "\n"
        write_together(folder, {TENSORS_NAME: data, CONFIG_NAME: settings, CARD_NAME: card})

    def _tensors(self) -> dict[str, Tensor]:
        net = self.network
        tensors = {
            "first": net.first.half(),
            "first_bias": net.first_bias,
            "second": net.second,
            "second_bias": net.second_bias,
            "calibration": self.calibration,
            "safe_scores": self.safe_scores,
            "trained_on": self.trained_on,
        }
        for number, probe in enumerate(self.probes):
            for name in ("weights", "mean", "scale", "selected"):
                tensors[f"{number}.{name}"] = getattr(probe, name)
        return tensors

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read a head that :meth:`save_pretrained` wrote.

        Raises:
            ArtefactError: Missing, truncated, edited, or something else.
        """
        folder = Path(folder)
        config = read_config(folder)
        if config.get("kind") != "Guard" or config.get("safeft") != SCHEMA_VERSION:
            raise ArtefactError(
                f"{str(folder)!r} is no guard of schema {SCHEMA_VERSION} (kind: "
                f"{config.get('kind')!r}, schema {config.get('safeft')!r}). Give the folder that "
                "`safeft guard fit` wrote."
            )
        with intact(folder, "Fit again"):
            tensors = read_tensors(folder / TENSORS_NAME, config["tensors_sha256"], "Fit again")
            return cls._of(config, tensors)

    @classmethod
    def _of(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        probes = []
        for number, row in enumerate(config["places"]):
            place = Place(*(row[name] for name in ("module", "kind", "layer", "width")))
            weights, mean, scale, selected = (
                tensors[f"{number}.{name}"] for name in ("weights", "mean", "scale", "selected")
            )
            if not len(weights) == len(mean) == len(scale) == place.width:
                raise ValueError(f"{place.name} is not {place.width} wide")
            if len(selected) != row["selected"]:
                raise ValueError(f"{place.name} has not {row['selected']} units")
            bias, strength, f1, counts = (
                float(row[name]) for name in ("bias", "strength", "f1", "layer_weight")
            )
            probes.append(
                LayerProbe(place, weights, bias, mean, scale, strength, f1, selected, counts)
            )
        names = ("first", "first_bias", "second", "second_bias")
        network = Network(*(tensors[name].float() for name in names))
        if network.first.shape[1] != sum(len(probe.selected) for probe in probes):
            raise ValueError("its network reads other units than its layers select")
        return cls(
            tuple(probes),
            network,
            tuple(str(name) for name in config["labels"]),
            tensors["calibration"],
            tensors["safe_scores"],
            tensors["trained_on"],
            ModelFingerprint(**config["base_model"]),
            str(config["weights_sha256"]),
            dict(config["reading"]),
            dict(config["source"]),
        )


@dataclass(frozen=True, eq=False)
class ReadyHead:
    """A head on one device, standardisation and calibration folded in."""

    selected: Sequence[Tensor]
    mean: Tensor
    network: Network

    def units(self, means: Sequence[Tensor]) -> Tensor:
        """The selected units side by side, float32 ``(texts, units)``."""
        parts = [m.index_select(-1, s) for m, s in zip(means, self.selected, strict=True)]
        return torch.cat(parts, -1).float()

    def scores(self, units: Tensor) -> Tensor:
        """Probabilities, float32 ``(texts, outputs)``."""
        return self.network.logits(units - self.mean).sigmoid_()


def weights_of(model: nn.Module) -> str:
    """SHA-256 over some weights of every block, the embeddings, and all adapters.

    Rounded to bfloat16, so that a checkpoint is the same in float32 and bfloat16.
    """
    plain: Any = plain_model(model)
    weights, found = ModelWeights(plain), hashlib.sha256()
    for site in find_sites(plain).values():
        units = sorted({0, site.units // 2, site.units - 1})
        found.update(json.dumps([site.name, digests(weights, site, units)]).encode())
    table = plain.get_input_embeddings().weight.detach()
    rows = torch.linspace(0, len(table) - 1, min(len(table), 64)).long()
    pieces = [table[rows.to(table.device)]]
    pieces += [p.detach() for name, p in plain.named_parameters() if ".lora_" in name]
    for piece in pieces:
        rounded = piece.to("cpu", torch.bfloat16).contiguous()
        found.update(rounded.view(torch.int16).numpy().tobytes())
    return found.hexdigest()

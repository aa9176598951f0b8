"""What located neurons normally do: a frozen value, recorded on reference traffic."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save
from torch import Tensor

from safeft.artefacts import intact, read_tensors
from safeft.errors import ArtefactError, SelectionError
from safeft.files import sha256, write_together
from safeft.monitor.limits import Limits
from safeft.monitor.windows import LEAST_SPREAD, STATISTICS
from safeft.neurons import CONFIG_NAME, TENSORS_NAME, NeuronSet, check_own, read_config

SCHEMA_VERSION = 1
_PER_OCTAVE, _LOWEST, _HIGHEST = 4, -24, 16
_SIDE = _PER_OCTAVE * (_HIGHEST - _LOWEST) + 1
BINS = 2 * _SIDE + 1
"""Quarter octaves on both sides of 0, fixed beforehand, so that histograms add up (as DDSketch
does, Masson et al., VLDB 2019): a quantile is off by 9% at most."""


def bins_of(values: Tensor) -> Tensor:
    """The histogram's bin of each value, int64, of the shape given.

    Example:
        >>> bins_of(torch.tensor([-1.0, 0.0, 1.0])).sub(BINS // 2).tolist()
        [-97, 0, 97]
    """
    octave = values.abs().clamp(2.0**_LOWEST, 2.0**_HIGHEST).log2() - _LOWEST
    place = (octave * _PER_OCTAVE).round().long() + 1
    return BINS // 2 + torch.where(values.abs() < 2.0**_LOWEST, 0, place) * values.sign().long()


def middles() -> Tensor:
    """The value that stands for each bin, float64 ``(BINS,)``."""
    side = torch.exp2(torch.arange(_SIDE, dtype=torch.float64) / _PER_OCTAVE + _LOWEST)
    return torch.cat([-side.flip(0), torch.zeros(1), side])


@dataclass(frozen=True)
class Normal:
    """What one neuron normally does.

    Attributes:
        low: The activation that 0.1% of tokens lie below.
        median: Half of them.
        high: 99.9% of them.
        entropy: Of its activations in quarter octaves, in bits.
    """

    low: float
    median: float
    high: float
    entropy: float


@dataclass(frozen=True, eq=False)
class Profile:
    """What a set's neurons do on reference traffic, and the limits that follow.

    Attributes:
        neurons: The set, with the digests of its weights.
        watched: Site and unit of those watched, in the order of the tensors.
        counts: Histogram of each neuron's activations, int64 ``(neurons, BINS)``.
        limits: Of windows; see :class:`Limits`.
        window: Tokens in a window.
        tokens: How many were seen.
        source: Rate and confidence of the limits, and what the traffic was.
    """

    neurons: NeuronSet
    watched: tuple[tuple[str, int], ...]
    counts: Tensor
    limits: Limits
    window: int
    tokens: int
    source: Mapping[str, Any]

    def of(self, site: str, unit: int) -> Normal:
        """What one neuron normally does.

        Raises:
            SelectionError: It is not in the profile.
        """
        if (site, unit) not in self.watched:
            raise SelectionError(f"{site}#{unit} is not among the {len(self.watched)} watched.")
        share = self.counts[self.watched.index((site, unit))].double()
        share = share / share.sum()
        upto = share.cumsum(0)
        values = middles()
        low, median, high = (float(values[int((upto < q).sum())]) for q in (0.001, 0.5, 0.999))
        entropy = -float(torch.special.xlogy(share, share).sum()) / math.log(2)
        return Normal(low, median, high, entropy)

    @property
    def blind(self) -> tuple[tuple[str, int], ...]:
        """Neurons that may be stuck at one value without an alarm: they are so in clean traffic."""
        spread, entropy = self.limits.values[1:3]
        stuck = ((spread <= LEAST_SPREAD) & (entropy <= 0)).tolist()
        return tuple(each for each, unseen in zip(self.watched, stuck, strict=True) if unseen)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write as a folder: ``config.json``, ``model.safetensors`` and the set in ``neurons/``.

        Raises:
            ArtefactError: The folder holds something else, or cannot be written.
        """
        folder = Path(folder)
        check_own(folder, "Profile")
        data = save(
            {
                "counts": self.counts,
                "limits": self.limits.values.contiguous(),
                "typical": self.limits.typical.contiguous(),
            }
        )
        config = {
            "safeft": SCHEMA_VERSION,
            "kind": "Profile",
            "watched": self.watched,
            "statistics": STATISTICS,
            "factors": self.limits.factors,
            "window": self.window,
            "tokens": self.tokens,
            "source": dict(self.source),
            "tensors_sha256": sha256(data),
        }
        parts = {f"neurons/{name}": content for name, content in self.neurons.files().items()}
        settings = json.dumps(config, indent=1) + "\n"
        write_together(folder, {TENSORS_NAME: data, CONFIG_NAME: settings, **parts})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read what :meth:`save_pretrained` wrote.

        Raises:
            ArtefactError: Missing, truncated, edited, or of another schema.
        """
        folder = Path(folder)
        config = read_config(folder)
        if (config.get("kind"), config.get("safeft")) != ("Profile", SCHEMA_VERSION):
            raise ArtefactError(
                f"{str(folder)!r} holds {config.get('kind')!r} of schema {config.get('safeft')!r}, "
                f"and not a neuron profile of schema {SCHEMA_VERSION}. Record it again."
            )
        neurons = NeuronSet.from_pretrained(folder / "neurons")
        with intact(folder, "Record the profile again"):
            tensors = read_tensors(
                folder / TENSORS_NAME, config["tensors_sha256"], "Record the profile again"
            )
            watched = tuple((str(site), int(unit)) for site, unit in config["watched"])
            first, second = config["factors"]
            limits = Limits(tensors["limits"], tensors["typical"], (float(first), float(second)))
            found = cls(
                neurons, watched, tensors["counts"], limits, int(config["window"]),
                int(config["tokens"]), dict(config["source"]),
            )  # fmt: skip
        shapes = [tuple(found.counts.shape), tuple(limits.values.shape)]
        strange = [each for each in watched if each not in neurons]
        if strange or shapes != [(len(watched), BINS), (len(STATISTICS), len(watched))]:
            raise ArtefactError(
                f"{str(folder)!r}: its tensors {shapes} are not those of the {len(watched)} "
                "neurons it names: edited. Record the profile again."
            )
        return found

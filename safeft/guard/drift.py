"""What tuning did to the inside: is harmfulness still readable, in which layers, and by whom."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from safeft.errors import PromptError
from safeft.guard.figures import auroc
from safeft.guard.folds import folds
from safeft.guard.guards import Guard
from safeft.guard.pooling import FeatureStore, fill
from safeft.guard.probes import probe_path
from safeft.guard.reading import Example, as_examples, windows
from safeft.prompts import Reader

_STRENGTH = 0.1
_FOLDS = 4


@dataclass(frozen=True)
class Readability:
    """How well one model's activations tell harmful from harmless texts, as AUROC.

    Attributes:
        guard: By the guard as it was fitted.
        layers: By name of the place, by the guard's own probe there.
        anew: By name of the place, by a probe fitted on this model, on texts it was not fitted on.
    """

    guard: float
    layers: dict[str, float]
    anew: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def readability(
    guard: Guard,
    model: Any,
    tokenizer: Reader,
    harmful: Sequence[Example],
    benign: Sequence[Example],
    *,
    batch_size: int = 16,
) -> Readability:
    """Read a model, tuned or not, with a guard of its base, and with probes of its own.

    Where the guard's probes fail and new ones do not, harmfulness is still inside, elsewhere; where
    both fail it is gone from what is read.

    Args:
        guard: Fitted on the base.
        model: Of the same shapes.
        tokenizer: The model's.
        harmful: Harmful prompts, that the guard was not fitted on.
        benign: Harmless ones.
        batch_size: Texts a pass.

    Raises:
        PromptError: Fewer than 8 texts a side.
        FingerprintError: A model of other shapes.
    """
    if min(len(harmful), len(benign)) < 2 * _FOLDS:
        raise PromptError(
            f"{len(harmful)} harmful and {len(benign)} harmless texts are too few to say what can "
            f"be read: give at least {2 * _FOLDS} of each, and better 100."
        )
    guard.head.check_model(model, weights_too=False)
    truth = torch.tensor([True] * len(harmful) + [False] * len(benign))
    prompts = as_examples([*harmful, *benign])
    reading, places = guard.head.reading, [probe.place for probe in guard.head.probes]
    shown = [
        windows(tokenizer, p, reading["max_length"], reading["chat"], reading["chat_template"])[0]
        for p in prompts
    ]
    store = FeatureStore(None, "readability", sum(place.width for place in places))
    rows = fill(store, model, tokenizer, places, shown, batch_size)
    features = store.features[rows]
    parts = features.split([place.width for place in places], 1)
    ready = guard.head.on("cpu")
    layers, anew = {}, {}
    for probe, part in zip(guard.head.probes, parts, strict=True):
        layers[probe.place.name] = auroc(probe.logits(part), truth)
        anew[probe.place.name] = _anew(part, truth)
    read = [
        part for probe, part in zip(guard.head.probes, parts, strict=True) if len(probe.selected)
    ]
    return Readability(auroc(ready.scores(ready.units(read))[:, 0], truth), layers, anew)


def _anew(features: Tensor, truth: Tensor) -> float:
    """AUROC of a sparse probe over folds: each text by a probe that has not seen it."""
    found = torch.zeros(len(truth))
    parts = folds(truth.tolist(), range(len(truth)), _FOLDS, 0)
    for number, held in enumerate(parts):
        rows = torch.cat([part for n, part in enumerate(parts) if n != number])
        path = probe_path(features, rows, truth[rows].float(), [0.3, _STRENGTH])
        # Folds have offsets of their own; ranks within them can be put together.
        logits = path.logits(features, held)[:, -1]
        found[held] = logits.argsort().argsort().float() / len(held)
    return auroc(found, truth)

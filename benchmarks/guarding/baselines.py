"""What the guard is compared with: the same without one of its parts, and other methods.

``SirenScheme`` is written after the released scripts' description (arXiv 2604.18519; the package
``llm-siren`` holds the runtime only): Adam probes, then a network found by cross-validated search.
Its search draws recipes at random where the paper uses a Parzen estimator. With fewer trials than
the paper's, its fitting time is below what the scheme takes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from safeft.guard.figures import macro_f1
from safeft.guard.fitter import GuardFitter
from safeft.guard.head import LayerProbe
from safeft.guard.pooling import fill
from safeft.guard.probes import fewest
from safeft.guard.reading import as_example, windows

Probes: TypeAlias = list[LayerProbe]


class Variant(GuardFitter):
    """A fitter whose probes are changed before the network reads what they select.

    They are found once for all changes: a change is set, and ``fit`` called with the same seed.
    """

    change: Callable[[Probes], Probes] | None = None
    _found: tuple[Probes, dict[str, Any]] | None = None

    def _probes(self, *given: Any) -> tuple[Probes, dict[str, Any]]:
        if self._found is None:
            self._found = super()._probes(*given)
        probes, about = self._found
        return (probes if self.change is None else self.change(probes)), about

    def means(self, texts: Sequence[str]) -> Tensor:
        """Activations of texts, float32 ``(texts, width of all places)``, from the same store."""
        shown = [
            windows(
                self._tokenizer, as_example(text, number), self.reading["max_length"],
                self.reading["chat"], self.reading["chat_template"],
            )[0]
            for number, text in enumerate(texts)
        ]  # fmt: skip
        rows = fill(
            self._store, self._model, self._tokenizer, self._places, shown, self._batch_size
        )
        return self._store.features[rows]


def uniform(probes: Probes) -> Probes:
    """All layers are read and count alike."""
    return [
        replace(probe, layer_weight=1.0, selected=fewest(probe.weights, 0.9)) for probe in probes
    ]


def every_unit(probes: Probes) -> Probes:
    """Every unit of the layers that are read, whatever the probes say."""
    return [
        replace(p, selected=torch.arange(p.place.width)) if len(p.selected) else p for p in probes
    ]


def random_units(probes: Probes) -> Probes:
    """As many units of each layer, drawn at random; of them no probe knows anything."""
    draw = torch.Generator().manual_seed(0)
    drawn = [
        torch.randperm(p.place.width, generator=draw)[: len(p.selected)].sort().values
        for p in probes
    ]
    return [
        replace(p, selected=units, weights=torch.zeros_like(p.weights), bias=0.0)
        for p, units in zip(probes, drawn, strict=True)
    ]


def last_layer(probes: Probes) -> Probes:
    """The network reads the last block's residual stream alone, all of it."""
    last = max(n for n, probe in enumerate(probes) if probe.place.kind == "residual")
    none, every = torch.arange(0), torch.arange(probes[last].place.width)
    return [
        replace(probe, selected=every if n == last else none, layer_weight=1.0)
        for n, probe in enumerate(probes)
    ]


def last_layer_probe(train: Tensor, truth: Sequence[bool], test: Tensor) -> Tensor:
    """Logistic regression on the last block's means; its strength by cross-validation."""
    from sklearn.preprocessing import StandardScaler

    model = _searched(StandardScaler(), [1e-4, 1e-3, 1e-2, 1e-1, 1.0]).fit(train.numpy(), truth)
    return torch.tensor(model.predict_proba(test.numpy())[:, 1])


def tfidf(train: Sequence[str], truth: Sequence[bool], test: Sequence[str]) -> Tensor:
    """Words and pairs of words, with logistic regression; its strength by cross-validation."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2)
    model = _searched(words, [0.1, 1.0, 10.0, 100.0]).fit(train, truth)
    return torch.tensor(model.predict_proba(test)[:, 1])


def _searched(first: Any, strengths: Sequence[float]) -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.pipeline import make_pipeline

    return GridSearchCV(
        make_pipeline(first, LogisticRegression(max_iter=300)),
        {"logisticregression__C": strengths},
        scoring="f1_macro",
        cv=StratifiedKFold(3, shuffle=True, random_state=0),
    )


class SirenScheme:
    """Probes by Adam, selection, layer weights, and a searched network, on pooled features.

    Args:
        layers: Number of layers whose features lie side by side.
        trials: Recipes of the search; the paper's 32. Of one there is nothing to search.
        splits: Of the cross-validation; the paper's 5.
        epochs: Of one trial.
        final: Epochs of the network that is kept.
        seed: Of everything.
    """

    strengths = (200.0, 500.0, 1000.0)

    def __init__(
        self, layers: int, *, trials: int = 32, splits: int = 5, epochs: int = 50,
        final: int = 512, seed: int = 0,
    ) -> None:  # fmt: skip
        self.layers, self.trials, self.splits = layers, trials, splits
        self.epochs, self.final, self.seed = epochs, final, seed

    def fit(self, features: Tensor, truth: Tensor, rows: Tensor, held: Tensor) -> SirenScheme:
        """Fit on ``rows``, choosing on ``held``."""
        torch.manual_seed(self.seed)
        target = truth.float()
        chosen, scores = [], []
        for layer in features.chunk(self.layers, 1):
            best = (-1.0, torch.zeros(0))
            for strength in self.strengths:
                probe = self._probe(layer, target, rows, held, strength, 100, 15)
                score = float(macro_f1(layer[held] @ probe[0] + probe[1] > 0, truth[held]))
                best = max(best, (score, torch.tensor(strength)), key=lambda pair: pair[0])
            weights, bias = self._probe(layer, target, rows, held, float(best[1]), 500, 50)
            scores.append(float(macro_f1(layer[held] @ weights + bias > 0, truth[held])))
            chosen.append(fewest(weights, 0.9))
        low, high = min(scores), max(scores)
        weights = [max(0.1, (s - low) / (high - low)) if high > low else 1.0 for s in scores]
        self._read = list(zip(chosen, weights, strict=True))
        inputs = self._inputs(features)
        self._network(inputs, target, torch.cat([rows, held]))
        return self

    def scores(self, features: Tensor) -> Tensor:
        """Probabilities, float32 ``(texts,)``."""
        with torch.no_grad():
            return self._net(self._inputs(features))[:, 0].sigmoid()

    def _inputs(self, features: Tensor) -> Tensor:
        parts = zip(features.chunk(self.layers, 1), self._read, strict=True)
        return torch.cat([layer[:, units] * weight for layer, (units, weight) in parts], 1)

    def _probe(
        self, layer: Tensor, target: Tensor, rows: Tensor, held: Tensor, strength: float,
        epochs: int, patience: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        weights = torch.zeros(layer.shape[1]).uniform_(-0.05, 0.05).requires_grad_()
        bias = torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.Adam([weights, bias], lr=0.01)
        best, kept, waited = -1.0, (weights.detach().clone(), bias.detach().clone()), 0
        for _ in range(epochs):
            for part in rows[torch.randperm(len(rows))].split(256):
                optimizer.zero_grad()
                loss = cross_entropy(layer[part] @ weights + bias, target[part])
                (loss + (weights.abs().sum() + bias.abs().sum()) / strength).backward()
                optimizer.step()
            with torch.no_grad():
                now = float(macro_f1(layer[held] @ weights + bias > 0, target[held] > 0.5))
            waited += 1
            if now > best:
                best, kept, waited = now, (weights.detach().clone(), bias.detach().clone()), 0
            if waited > patience:
                break
        return kept

    def _network(self, inputs: Tensor, target: Tensor, rows: Tensor) -> None:
        draw = random.Random(self.seed)
        order = rows[torch.randperm(len(rows))]
        folds = order.chunk(self.splits)
        found: list[tuple[float, Any]] = []
        for _ in range(self.trials):
            depth = draw.choice((1, 2))
            sizes = draw.choice((256, 512, 1024, 2048)), draw.choice((128, 256, 512, 1024))
            recipe = {
                "hidden": sizes[:depth],
                "dropout": draw.uniform(0.2, 0.5),
                "rate": 10 ** draw.uniform(-4, -2.3),
            }
            scores = []
            for number, fold in enumerate(folds if self.trials > 1 else ()):
                others = torch.cat([f for n, f in enumerate(folds) if n != number])
                net = self._train(inputs, target, others, recipe, self.epochs)
                with torch.no_grad():
                    flagged = net(inputs[fold])[:, 0] > 0
                scores.append(float(macro_f1(flagged, target[fold] > 0.5)))
            found.append((sum(scores), recipe))
        best = max(found, key=lambda pair: pair[0])[1]
        self._net = self._train(inputs, target, rows, best, self.final)

    def _train(
        self, inputs: Tensor, target: Tensor, rows: Tensor, recipe: Any, epochs: int
    ) -> nn.Module:
        sizes = [inputs.shape[1], *recipe["hidden"]]
        parts: list[nn.Module] = []
        for one, other in zip(sizes, sizes[1:], strict=False):
            parts += [nn.Linear(one, other), nn.ReLU(), nn.Dropout(recipe["dropout"])]
        net = nn.Sequential(*parts, nn.Linear(sizes[-1], 1))
        optimizer = torch.optim.Adam(net.parameters(), lr=recipe["rate"], weight_decay=1e-4)
        for _ in range(epochs):
            for part in rows[torch.randperm(len(rows))].split(8192):
                optimizer.zero_grad()
                cross_entropy(net(inputs[part])[:, 0], target[part]).backward()
                optimizer.step()
        return net.eval()

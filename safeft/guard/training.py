"""The small network that reads the selected units: seeded search, early stopping, several members.

A network of one hidden layer; the mean of several such is again one, only wider, so members cost
one matrix product at work. The paper (arXiv 2604.18519, section 3.3) searches two or three layers
by cross-validation; members on unlike folds serve the same end at a fraction of the time.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from safeft.guard.probes import chunks
from safeft.progress import progress

EPOCHS, PATIENCE, BATCH = 200, 12, 256

FILE_BYTES = 50_000_000
"""What the first layer may take on disk: over many units, hidden ones are fewer."""


@dataclass(frozen=True)
class Recipe:
    """How one network is trained: hidden units, dropout, learning rate, weight decay."""

    hidden: int
    dropout: float
    rate: float
    decay: float


def widest(units: int, members: int) -> int:
    """Hidden units of a member that the file has room for, in float16."""
    return max(8, FILE_BYTES // (2 * max(1, units) * members))


def recipes(count: int, seed: int, most: int = 64) -> list[Recipe]:
    """The usual recipe, then drawn ones, of ``most`` hidden units at most."""
    draw = torch.Generator().manual_seed(seed)

    def one() -> Recipe:
        a, b, c, d = torch.rand(4, generator=draw).tolist()
        hidden, dropout = (16, 32, 64)[int(3 * a)], round(0.1 + 0.5 * b, 3)
        return Recipe(min(hidden, most), dropout, 10 ** (-3.7 + 1.4 * c), 10 ** (-3 + 2.5 * d))

    return [Recipe(min(32, most), 0.3, 1e-3, 1e-2), *(one() for _ in range(count - 1))]


@dataclass(frozen=True, eq=False)
class Network:
    """One hidden layer: ``relu(x A' + a) B' + b``.

    Attributes:
        first: float32 ``(hidden, units)``.
        first_bias: float32 ``(hidden,)``.
        second: float32 ``(outputs, hidden)``.
        second_bias: float32 ``(outputs,)``.
    """

    first: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor

    def logits(self, inputs: Tensor) -> Tensor:
        """``(texts, outputs)``."""
        hidden = torch.addmm(self.first_bias, inputs, self.first.T).relu_()
        return torch.addmm(self.second_bias, hidden, self.second.T)

    def beside(self, line: Tensor, offset: float, inputs: Tensor, rows: Tensor) -> "Network":
        """The network whose first logit is the mean of this one's and of a line's.

        A line is the difference of two hidden units. It is scaled to deviate on the rows by as much
        as the network does.

        Args:
            line: float32 ``(units,)``.
            offset: Of the line.
            inputs: See :func:`train`.
            rows: Texts.
        """
        said = torch.cat([part @ line for part in chunks(inputs, rows)])
        deviation = outputs(self, inputs, rows)[:, 0].std() / said.std().clamp(min=1e-9)
        pair, bias = torch.stack([line, -line]), torch.tensor([offset, -offset])
        second = torch.cat([self.second, torch.zeros(len(self.second), 2)], 1)
        second[0] /= 2
        second[0, -2:] = torch.stack([deviation, -deviation]) / 2
        second_bias = self.second_bias.clone()
        second_bias[0] /= 2
        first = torch.cat([self.first, pair])
        return Network(first, torch.cat([self.first_bias, bias]), second, second_bias)

    @classmethod
    def mean(cls, members: Sequence["Network"]) -> "Network":
        """The network whose logits are the mean of the members'."""
        return cls(
            torch.cat([m.first for m in members]),
            torch.cat([m.first_bias for m in members]),
            torch.cat([m.second for m in members], 1) / len(members),
            torch.stack([m.second_bias for m in members]).mean(0),
        )


def train(
    inputs: Tensor,
    targets: Tensor,
    counts: Tensor,
    rows: Tensor,
    stop: Tensor,
    recipe: Recipe,
    seed: int,
) -> tuple[Network, float]:
    """A network, and its loss on the rows by which it was stopped.

    Args:
        inputs: float32 ``(texts, units)``, also mapped from disk.
        targets: 0 and 1, float32 ``(texts, outputs)``; NaN where a label is not known.
        counts: What each text counts for, float32 ``(texts,)``.
        rows: Trained on.
        stop: Training ends when the loss on these no longer falls; the best weights are kept.
        recipe: How.
        seed: Of the weights, the order and the dropout.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Linear(inputs.shape[1], recipe.hidden),
            nn.ReLU(),
            nn.Dropout(recipe.dropout),
            nn.Linear(recipe.hidden, targets.shape[1]),
        )
        optimizer = torch.optim.AdamW(
            net.parameters(), lr=recipe.rate, weight_decay=recipe.decay, foreach=True
        )
        best, kept, waited = float("inf"), _network(net), 0
        for _ in range(EPOCHS):
            net.train()
            for part in rows[torch.randperm(len(rows))].split(BATCH):
                optimizer.zero_grad()
                loss_of(net(inputs[part]), targets[part], counts[part]).backward()
                optimizer.step()
            now = _network(net)
            found = float(loss_of(outputs(now, inputs, stop), targets[stop], counts[stop]))
            waited += 1
            if found < best - 1e-4:
                best, kept, waited = found, now, 0
            if waited > PATIENCE:
                break
    return kept, best


def outputs(network: Network, inputs: Tensor, rows: Tensor) -> Tensor:
    """The network's logits on the rows, ``(rows, outputs)``."""
    return torch.cat([network.logits(part) for part in chunks(inputs, rows)])


def loss_of(logits: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
    """Cross-entropy: that of the first output, and of the others, where known, their mean."""
    each = cross_entropy(logits, targets.nan_to_num(), reduction="none") * counts[:, None]
    known = ~targets[:, 1:].isnan()
    total = each[:, 0].mean()
    return total + each[:, 1:][known].mean() if bool(known.any()) else total


def _network(net: nn.Sequential) -> Network:
    first: Any = net[0]
    second: Any = net[3]
    parts = (first.weight, first.bias, second.weight, second.bias)
    return Network(*(part.detach().clone() for part in parts))


def searched(
    inputs: Tensor,
    targets: Tensor,
    counts: Tensor,
    folds: Sequence[Tensor],
    count: int,
    seed: int,
) -> tuple[Network, dict[str, Any]]:
    """The mean of one network a fold, by the recipe that is best on the first fold.

    Args:
        inputs: See :func:`train`.
        targets: See :func:`train`.
        counts: See :func:`train`.
        folds: Rows in parts; each member is stopped by one and trained on the others.
        count: Recipes to try.
        seed: Of recipes and networks.

    Returns:
        The network, and what was tried.
    """
    tried = recipes(count, seed, widest(inputs.shape[1], len(folds)))
    steps = iter(progress(range(len(tried) + len(folds) - 1), "training the guard"))

    def without(number: int, recipe: Recipe) -> tuple[Network, float]:
        next(steps, None)
        others = torch.cat([fold for n, fold in enumerate(folds) if n != number])
        return train(inputs, targets, counts, others, folds[number], recipe, seed + number)

    first = [without(0, recipe) for recipe in tried]
    losses = [loss for _, loss in first]
    best = losses.index(min(losses))
    members = [first[best][0], *(without(n, tried[best])[0] for n in range(1, len(folds)))]
    next(steps, None)
    about = {**asdict(tried[best]), "tried": count, "members": len(folds), "losses": losses}
    return Network.mean(members), about

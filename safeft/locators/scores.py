"""What a locator gathers and what it gives: the shared shapes of all methods."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from safeft.prompts import Batch
from safeft.sites import Part, Site
from safeft.weights import ModelWeights

Side: TypeAlias = Literal["harmful", "benign"]

SIDES: tuple[Side, ...] = ("harmful", "benign")

Rule: TypeAlias = Literal["plain", "difference", "exclude"]
"""How safety and utility become one ranking; see :func:`safeft.locators.select.select`."""


@dataclass(frozen=True)
class Scores:
    """One number per unit and site.

    Attributes:
        safety: Site to float64 ``(units,)``; higher is more safety-critical.
        utility: The same for ordinary use, where the method weighs the two.
        rule: How the two are to be ranked together.
        unscored: Sites that no token of the prompts was routed to (experts): nothing is known of
            their units, so they are left out of ranking rather than ranked last.
    """

    safety: Mapping[str, Tensor]
    utility: Mapping[str, Tensor] | None
    rule: Rule
    unscored: tuple[str, ...] = ()


class Fitter(Protocol):
    """Gathers statistics batch by batch; nothing of a batch is kept."""

    needs_responses: bool
    """Whether the batches must hold answers as well as prompts."""

    statistics: "Statistics"
    """All that was gathered; those of several processes add up (:func:`merged`)."""

    def update(self, side: Side, batch: Batch) -> None:
        """Run the model on one batch and take up what was seen."""
        ...

    def scores(self) -> Scores:
        """The scores of what has been seen so far."""
        ...


class Moments:
    """Running count, mean and variance of feature vectors (Chan's parallel form of Welford's).

    Example:
        >>> moments = Moments()
        >>> moments.update(torch.tensor([[1.0], [3.0]])); moments.update(torch.tensor([[5.0]]))
        >>> float(moments.mean), float(moments.variance)
        (3.0, 4.0)
    """

    def __init__(self) -> None:
        self.count = 0
        self._mean: Tensor | None = None
        self._squares: Tensor | None = None

    def update(self, values: Tensor) -> None:
        """Take up ``values`` of shape ``(samples, features)``."""
        if not len(values):
            return
        exact = values.double()
        seen = Moments()
        seen.count, seen._mean = len(values), exact.mean(0)
        seen._squares = (exact - seen._mean).square_().sum(0)
        self.merge(seen)

    def out_of(self, samples: int, features: int) -> "Moments":
        """The same among so many samples, of which the others were zero.

        An expert's units are at zero for each token that is routed elsewhere.
        """
        others, whole = Moments(), Moments()
        others.count = samples - self.count
        others._mean = torch.zeros(features, dtype=torch.double)
        others._squares = torch.zeros_like(others._mean)
        whole.merge(self)
        if others.count:
            whole.merge(others)
        return whole

    def merge(self, other: "Moments") -> None:
        """Take up what another has seen, as if it had been seen here."""
        if other._mean is None or other._squares is None:
            return
        if self._mean is None or self._squares is None:
            self.count, self._mean, self._squares = other.count, other._mean, other._squares
            return
        total = self.count + other.count
        shift = other._mean.to(self._mean) - self._mean
        here = self._squares + other._squares.to(self._squares)
        self._squares = here + shift.square() * (self.count * other.count / total)
        self._mean = self._mean + shift * (other.count / total)
        self.count = total

    @property
    def mean(self) -> Tensor:
        """Float64 ``(features,)``."""
        assert self._mean is not None
        return self._mean

    @property
    def variance(self) -> Tensor:
        """Unbiased, float64 ``(features,)``; zero while there is one sample only."""
        assert self._squares is not None
        return self._squares / max(1, self.count - 1)


class Samples:
    """Rows kept as they came, on the CPU: what ranks are made of, which do not add up.

    Example:
        >>> samples = Samples()
        >>> samples.update(torch.tensor([[1.0], [3.0]])); samples.update(torch.tensor([[5.0]]))
        >>> samples.rows.flatten().tolist()
        [1.0, 3.0, 5.0]
    """

    def __init__(self) -> None:
        self._parts: list[Tensor] = []

    def update(self, rows: Tensor) -> None:
        """Take up ``rows`` of shape ``(samples, features)``."""
        self._parts.append(rows.cpu())

    def merge(self, other: "Samples") -> None:
        """Take up another's rows after those that are here."""
        self._parts += other._parts

    @property
    def rows(self) -> Tensor:
        """``(samples, features)``, none where nothing was seen."""
        if len(self._parts) > 1:
            self._parts = [torch.cat(self._parts)]
        return self._parts[0] if self._parts else torch.zeros(0, 0)


class Statistics(dict[Any, Moments | Samples | Tensor]):
    """What a fitter gathered, by name: moments, samples, and sums as tensors."""

    def moments(self, *key: str) -> Moments:
        """The moments of that name."""
        found = self[key]
        assert isinstance(found, Moments)
        return found

    def samples(self, *key: str) -> Samples:
        """The samples of that name."""
        found = self[key]
        assert isinstance(found, Samples)
        return found

    def total(self, *key: str) -> Tensor:
        """The sum of that name."""
        found = self[key]
        assert isinstance(found, Tensor)
        return found

    def add(self, values: Tensor, *key: str) -> None:
        """Take ``values`` up into the sum of that name."""
        known = self.get(key)
        self[key] = known + values.to(known.device) if isinstance(known, Tensor) else values


def merged(parts: Sequence[Statistics]) -> Statistics:
    """Statistics of several processes as one: moments by Chan's rule, tensors summed.

    Samples follow each other in the order of the processes.
    """
    whole = Statistics()
    for part in parts:
        for key, value in part.items():
            if isinstance(value, Moments):
                whole.setdefault(key, Moments())
                whole.moments(*key).merge(value)
            elif isinstance(value, Samples):
                whole.setdefault(key, Samples())
                whole.samples(*key).merge(value)
            else:
                whole.add(value, *key)
    return whole


def is_matrix(model: nn.Module, part: Part) -> bool:
    """Whether a part is cut out of a matrix (a norm's gain is not)."""
    shape = ModelWeights(model).shape(part.name) or ()
    return len(shape) > 1 and part.axis != "numbers"


def per_unit(part: Part, entries: Tensor, units: int) -> Tensor:
    """Sums over units' entries, ``(rows or columns,)`` to ``(units,)``; shared ones in full."""
    return entries[part.table(units).to(entries.device)].sum(1)


def written_by(model: nn.Module, site: Site) -> Tensor:
    """What units write with, adapters left out: float64 ``(units, width, hidden)``."""
    part = site.writes
    columns = part.table(site.units).flatten()
    found = ModelWeights(model).lines(part.name, part.axis, columns).double()
    return found.unflatten(0, (site.units, site.width))


def contributions(model: nn.Module, site: Site, activations: Tensor) -> Tensor:
    """Norm of what each unit writes: ``norm(W[:, unit] x_unit)``.

    Args:
        model: The model.
        site: The site.
        activations: ``(units * width,)``.

    Returns:
        Float64 ``(units,)``.
    """
    written = written_by(model, site)
    parts = activations.to(written).view(site.units, site.width)
    return torch.einsum("uwo,uw->uo", written, parts).norm(dim=1)


def forward(model: PreTrainedModel, batch: Batch, keep_logits: int = 1) -> Tensor:
    """One forward pass; logits ``(prompts, keep_logits or tokens, vocabulary)``.

    Locators that read activations only need no logits of the whole sequence; ``keep_logits=0``
    keeps all.
    """
    output = model(**batch.inputs, use_cache=False, logits_to_keep=keep_logits)
    return output.logits

"""How many directions of each input a subspace holds: by energy, by rank, or by memory."""

import math
from collections.abc import Mapping
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from safeft.errors import ConfigError, SelectionError

GIB = 2**30

Amount: TypeAlias = tuple[Literal["energy", "rank_share", "memory"], float]


def amount_of(energy: float | None, rank_share: float | None, memory: float | None) -> Amount:
    """What a caller said, of three ways to say it; an energy of 0.9 where nothing was.

    Raises:
        ConfigError: More than one is given, or one out of its range.
    """
    given = {"energy": energy, "rank_share": rank_share, "memory": memory}
    given = {name: float(value) for name, value in given.items() if value is not None}
    if len(given) > 1:
        raise ConfigError(
            f"{given} are given, and each says how many directions to hold: give one."
        )
    name, value = next(iter(given.items()), ("energy", 0.9))
    if not 0 < value or (name != "memory" and not value < 1):
        raise ConfigError(
            f"{name}={value}: give a number above 0"
            + (" (GiB)." if name == "memory" else " and below 1.")
        )
    return name, value  # pyright: ignore[reportReturnType]


def choose_ranks(
    spectra: Mapping[str, Tensor], outputs: Mapping[str, int], amount: Amount
) -> dict[str, int]:
    """How many directions of each input are held.

    Args:
        spectra: Input to its eigenvalues, float64 ``(features,)``, the largest first.
        outputs: Input to the number of outputs of all layers that receive it.
        amount: By what.

    Raises:
        SelectionError: More than the tokens span, or none would be left free.

    Example:
        >>> choose_ranks({"a": torch.tensor([6.0, 3.0, 1.0])}, {"a": 5}, ("energy", 0.85))
        {'a': 2}
    """
    kind, value = amount
    spans = {inlet: _span(values) for inlet, values in spectra.items()}
    if kind == "rank_share":
        ranks_ = {i: max(1, round(value * len(values))) for i, values in spectra.items()}
    elif kind == "energy":
        ranks_ = {i: _rank_of(values, value) for i, values in spectra.items()}
    else:
        ranks_ = _within(spectra, spans, outputs, value)
    for inlet, values in spectra.items():
        if ranks_[inlet] >= len(values):
            raise SelectionError(
                f"{kind}={value} takes all {len(values)} directions of what {inlet} receives, "
                "which leaves its layers nothing to learn with. Give less."
            )
        if ranks_[inlet] > spans[inlet]:
            largest = min(span / len(spectra[other]) for other, span in spans.items())
            raise SelectionError(
                f"{kind}={value} asks for {ranks_[inlet]} directions of what {inlet} receives, and "
                f"the prompts' tokens span {spans[inlet]} of its {len(values)}. Give more prompts, "
                f"or at most rank_share={math.floor(largest * 1e6) / 1e6}."
            )
    return ranks_


def _span(values: Tensor) -> int:
    """How many eigenvalues, the largest first, are more than rounding."""
    return int((values > values[0] * len(values) * torch.finfo(torch.float32).eps).sum())


def _rank_of(values: Tensor, energy: float) -> int:
    return 1 + int((values.cumsum(0) < energy * values.sum()).sum())


def _within(
    spectra: Mapping[str, Tensor],
    spans: Mapping[str, int],
    outputs: Mapping[str, int],
    memory: float,
) -> dict[str, int]:
    """The highest energy whose ``W U`` and U fit, as far as tokens span, by halving."""
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        ranks_ = {inlet: _rank_of(values, middle) for inlet, values in spectra.items()}
        size = sum(4 * k * (outputs[i] + len(spectra[i])) for i, k in ranks_.items())
        full = any(k >= len(spectra[i]) or k > spans[i] for i, k in ranks_.items())
        low, high = (low, middle) if full or size > memory * GIB else (middle, high)
    if not low:
        raise SelectionError(
            f"memory={memory} GiB does not hold one direction of each input. Give more, or choose "
            "by energy."
        )
    return {inlet: _rank_of(values, low) for inlet, values in spectra.items()}

"""``fitted``: gains chosen for what they do to the model's words, not for what units know (ours).

Expertise is correlation. Here gains in [0, 1] are fitted by gradient, the weights as they are, on

    mean softplus(b r(toxic)) / b + mean softplus(-b r(neutral)) / b
        + price * mean max(0, rise(ordinary)) + toll * sum(1 - gain)

with ``r`` what the gains add to a text's log-likelihood, in nats over its response: toxic texts
are to become less likely and others of the same form, best after the same prompts, no less. Both
terms end once a text has moved by some ``1 / b`` nats, so little is won by breaking text. ``rise``
is what a token of an ordinary text costs more, each text by itself: that others get cheaper does
not pay for one that names a group. The first two are, up to pairing, what direct preference
optimisation maximises, over gains alone.

Only the share of units may move whose gains, turned down a little, lower the first two terms most:
one forward and backward pass gives that effect for all units at once. The toll is a share of the
largest such effect, so a unit that does next to nothing keeps its gain of 1.

It is dearer than a rule and need not be better: on the models of ``benchmarks/detox.py`` silencing
the units of highest AUROC (``det0``) took more toxicity for less perplexity.
"""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from safeft.detox.dampener import Dampener
from safeft.detox.experts import Expertise
from safeft.detox.hooks import changed
from safeft.detox.losses import Texts, nats
from safeft.errors import ConfigError, PromptError, SelectionError
from safeft.generation import evaluation_mode
from safeft.locators.calibration import calibrated, check_choice
from safeft.locators.gradients import gradients_of
from safeft.progress import progress
from safeft.prompts import Batch, Prompt, PromptLike, Reader, as_prompts
from safeft.sites import Site, find_sites

SLOPE = 0.3
"""``b``: a text has moved enough after some three nats."""

_LEAST = 0.02
"""A gain nearer to 1 than this is 1."""


@dataclass(frozen=True, eq=False)
class _Side:
    """Texts and how likely they were before."""

    batches: Sequence[Batch]
    before: Sequence[Tensor]

    @classmethod
    def of(cls, model: PreTrainedModel, texts: Texts) -> "_Side":
        with torch.no_grad():
            return cls(texts.batches, [nats(model, batch)[0] for batch in texts.batches])

    def gained(self, model: PreTrainedModel, at: int) -> tuple[Tensor, Tensor]:
        """``r`` of each text of a batch, and its number of tokens."""
        now, counts = nats(model, self.batches[at])
        return self.before[at] - now, counts


def fit_gains(
    model: PreTrainedModel,
    tokenizer: Reader,
    toxic: Iterable[PromptLike],
    neutral: Iterable[PromptLike],
    *,
    ordinary: Iterable[PromptLike] | None = None,
    price: float = 20.0,
    toll: float = 0.02,
    fraction: float = 0.3,
    strength: float = 1.0,
    steps: int = 50,
    rate: float = 0.1,
    among: Expertise | None = None,
    kinds: Sequence[str] = ("mlp",),
    seed: int = 0,
    **batching: Any,
) -> Dampener:
    """Fit a gain to each of the units that matter most.

    Args:
        model: The model; its weights are not changed.
        tokenizer: Its tokenizer.
        toxic: Toxic texts, as ``response`` to prompts where the model is to have written them.
        neutral: Others of the same form, best after the same prompts; among them texts that name
            the groups that toxic ones attack, or the name itself is turned down.
        ordinary: Texts whose loss may not rise: what the model is for. None: ``neutral``.
        price: What a nat that an ordinary token costs more weighs against a nat a whole text.
        toll: What turning a unit down has to bring, as a share of the largest effect; the lower,
            the more units.
        fraction: Share of the units that may be dampened; of each site at most two fifths, so that
            there are others to compare with.
        strength: 1 uses the fitted gains ``g``, less ``1 - strength (1 - g)``.
        steps: Gradient steps, each on a batch of every kind of texts.
        rate: Of Adam, falling to a fifth.
        among: Only experts may be dampened, if given.
        kinds: ``mlp``, ``attention`` or both; text towers alone.
        seed: Of the order of batches.
        **batching: ``batch_size`` (16), ``max_length``, ``chat_template``.

    Raises:
        ConfigError: A setting out of its range.
        PromptError: A kind of texts is empty.
        SelectionError: No unit makes toxic texts less likely by being turned down.

    Example:
        >>> dampener = fit_gains(model, tokenizer, toxic, neutral)  # doctest: +SKIP
    """
    shares = {"fraction": fraction, "strength": strength}
    _check({"price": price, "toll": toll}, shares, steps, rate, kinds)
    texts = {"toxic": as_prompts(toxic), "neutral": as_prompts(neutral)}
    texts["ordinary"] = texts["neutral"] if ordinary is None else as_prompts(ordinary)
    _check_texts(texts)
    wanted: Any = tuple(kinds)
    sites = {n: s for n, s in find_sites(model, wanted).items() if s.tower == "text"}
    with evaluation_mode(model), gradients_of(model, {}):
        sides = [
            _Side.of(model, Texts.of(model, tokenizer, each, **batching)) for each in texts.values()
        ]
        gates = {n: torch.ones(site.units, requires_grad=True) for n, site in sites.items()}
        free, least = _free(model, sites, gates, sides, fraction, toll, among)
        _descend(model, sites, gates, sides, free, (price, least), steps, rate, seed)
    gains = {
        name: {
            unit: 1 - strength * (1 - gain)
            for unit, gain in enumerate(gate.tolist())
            if gain < 1 - _LEAST
        }
        for name, gate in gates.items()
    }
    settings = {"price": price, "toll": toll, "fraction": fraction, "strength": strength,
                "steps": steps, "rate": rate, "kinds": list(kinds), "seed": seed,
                "among_experts": among is not None}  # fmt: skip
    source = {"method": "fitted", "rule": "fitted", **settings, "calibration": calibrated(texts)}
    return Dampener.of(model, gains, source)


def _terms(model: PreTrainedModel, sides: Sequence[_Side], at: Sequence[int]) -> list[Tensor]:
    """What one batch of each kind says."""
    toxic, neutral, ordinary = (s.gained(model, i) for s, i in zip(sides, at, strict=True))
    return [
        functional.softplus(SLOPE * toxic[0]).mean() / SLOPE,
        functional.softplus(-SLOPE * neutral[0]).mean() / SLOPE,
        (-ordinary[0] / ordinary[1].clamp(min=1)).clamp(min=0).mean(),
    ]


def _gated(model: PreTrainedModel, sites: Mapping[str, Site], gates: Mapping[str, Tensor]) -> Any:
    def change(name: str) -> Any:
        width = sites[name].width
        return lambda values: values * gates[name].repeat_interleave(width).to(values)

    return changed(model, {name: change(name) for name in gates}, sites)


def _free(
    model: PreTrainedModel,
    sites: Mapping[str, Site],
    gates: Mapping[str, Tensor],
    sides: Sequence[_Side],
    fraction: float,
    toll: float,
    among: Expertise | None,
) -> tuple[dict[str, Tensor], float]:
    """Whose gains may move, bool ``(units,)`` a site, by first-order effect; the toll of each."""
    for side, sign in zip(sides[:2], (1, -1), strict=True):
        for at in progress(range(len(side.batches)), "effects of units", len(side.batches)):
            with _gated(model, sites, gates):
                gained = side.gained(model, at)[0]
                (sign * gained.mean() / len(side.batches)).backward()
    effects = {name: _taken(gate) for name, gate in gates.items()}
    if among is not None:
        for name, effect in effects.items():
            if name in among.sites:
                effect[~among.experts(name)] = 0
            else:
                effect[:] = 0
    every = torch.cat([*effects.values()])
    lowest = toll * float(every.max())
    least = every.topk(max(1, round(fraction * len(every)))).values[-1].clamp(min=lowest)
    free = {}
    for name, effect in effects.items():
        most = effect.topk(max(1, 2 * len(effect) // 5)).values[-1]
        free[name] = (effect > 0) & (effect >= least) & (effect >= most)
    if not any(bool(each.any()) for each in free.values()):
        raise SelectionError(
            f"Of {len(every)} units none makes toxic texts less likely than neutral ones by being "
            "turned down, so there is nothing to fit. Do the texts differ in toxicity, and is "
            "`among` a set of experts of this model?"
        )
    return free, lowest


def _descend(
    model: PreTrainedModel,
    sites: Mapping[str, Site],
    gates: Mapping[str, Tensor],
    sides: Sequence[_Side],
    free: Mapping[str, Tensor],
    prices: tuple[float, float],
    steps: int,
    rate: float,
    seed: int,
) -> None:
    """Move the free gains, staying within 0 and 1."""
    optimizer = torch.optim.Adam(gates.values(), lr=rate)
    rng = random.Random(seed)
    left: list[list[int]] = [[] for _ in sides]
    for step in progress(range(steps), "fitting gains", steps):
        for numbers, side in zip(left, sides, strict=True):
            if not numbers:
                numbers += rng.sample(range(len(side.batches)), len(side.batches))
        at = [numbers.pop() for numbers in left]
        with _gated(model, sites, gates):
            less, no_less, rise = _terms(model, sides, at)
            taken = torch.stack([(1 - gate).sum() for gate in gates.values()]).sum()
            (less + no_less + prices[0] * rise + prices[1] * taken).backward()
        optimizer.param_groups[0]["lr"] = rate * (1 - 0.8 * step / steps)
        for name, gate in gates.items():
            assert gate.grad is not None
            gate.grad *= free[name]
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for gate in gates.values():
                gate.clamp_(0, 1)


def _taken(gate: Tensor) -> Tensor:
    """A gate's gradient, 0 where no token came to its units (experts); and none is left."""
    found, gate.grad = gate.grad, None
    return torch.zeros_like(gate) if found is None else found


def _check_texts(texts: Mapping[str, Sequence[Prompt]]) -> None:
    if empty := [name for name, each in texts.items() if not each]:
        raise PromptError(f"There are 0 {' and 0 '.join(empty)} texts. Give some 100 of each kind.")
    if {(p.text, p.response) for p in texts["toxic"]} == {
        (p.text, p.response) for p in texts["neutral"]
    }:
        raise PromptError("Toxic and neutral texts are the same. Is one file given twice?")


def _check(
    prices: Mapping[str, float], shares: Mapping[str, float], steps: int, rate: float,
    kinds: Sequence[str],
) -> None:  # fmt: skip
    for name, value in prices.items():
        if not value >= 0:
            raise ConfigError(f"{name}={value}: what a change has to pay is 0 or more.")
    if not (rate > 0 and steps >= 1):
        raise ConfigError(f"steps={steps}, rate={rate}: give a step or more and a rate above 0.")
    for name, value in shares.items():
        if not 0 < value <= 1:
            raise ConfigError(f"{name}={value}: give a share above 0 and at most 1.")
    for kind in kinds:
        check_choice("kinds", kind, ("mlp", "attention"))

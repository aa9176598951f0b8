"""How good a guard is: by set, with intervals; calibration; how soon a stream is found out."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor

from safeft.errors import PromptError
from safeft.guard.figures import auroc, macro_f1
from safeft.guard.guards import Guard, Scorer
from safeft.guard.reading import Example, as_examples, text_hashes
from safeft.intervals import Interval, Rate
from safeft.progress import progress

BINS = 10
_RESAMPLES = 2000


@dataclass(frozen=True)
class Bin:
    """Texts of like score: how many, their mean score, and the share that is harmful."""

    texts: int
    score: float
    harmful: float


@dataclass(frozen=True)
class SetResult:
    """What a guard does on one set.

    Attributes:
        name: Of the set.
        texts: How many there are.
        macro_f1: Mean of the F1 of harmful and of harmless texts.
        interval: Its 95% interval, by 2000 resamples of the texts.
        recall: Share of harmful texts flagged; None where there are none.
        precision: Share of flagged texts that are harmful; None where none is flagged.
        false_positives: Share of harmless texts flagged; None where there are none.
        auroc: Probability that a harmful text scores above a harmless one; None without both.
        error: Mean distance between score and share over the bins (expected calibration error).
        bins: For the picture.
    """

    name: str
    texts: int
    macro_f1: float
    interval: Interval
    recall: Rate | None
    precision: Rate | None
    false_positives: Rate | None
    auroc: float | None
    error: float
    bins: tuple[Bin, ...]


@dataclass(frozen=True)
class Latency:
    """How soon streams are found out.

    Attributes:
        tokens: Tokens after the unsafe boundary.
        recall: Share of unsafe answers flagged by then, one a number of tokens.
        false_alarms: Share of safe answers that are flagged anywhere.
    """

    tokens: tuple[int, ...]
    recall: tuple[Rate, ...]
    false_alarms: Rate


@dataclass(frozen=True)
class GuardEvaluation:
    """What :func:`evaluate_guard` found.

    Attributes:
        sets: One a set.
        threshold: The score from which a text is flagged.
        layers: Of each place its name, kind, layer, validation F1, weight and units.
        about: Of the guard: model, labels, counts.
        latency: Of streams, where they were measured.
    """

    sets: tuple[SetResult, ...]
    threshold: float
    layers: tuple[Mapping[str, Any], ...]
    about: Mapping[str, Any]
    latency: Latency | None = None

    @property
    def macro_f1(self) -> float:
        """The mean over sets."""
        return sum(each.macro_f1 for each in self.sets) / len(self.sets)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"schema": 1, "macro_f1": self.macro_f1, **asdict(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """What :meth:`to_dict` made."""

        def rate(found: Any) -> Rate | None:
            return None if found is None else Rate(**found)

        sets = tuple(
            SetResult(
                **{
                    **row,
                    "interval": Interval(**row["interval"]),
                    "bins": tuple(Bin(**each) for each in row["bins"]),
                    **{k: rate(row[k]) for k in ("recall", "precision", "false_positives")},
                }
            )
            for row in data["sets"]
        )
        late = data["latency"]
        latency = late and Latency(
            tuple(late["tokens"]),
            tuple(Rate(**each) for each in late["recall"]),
            Rate(**late["false_alarms"]),
        )
        return cls(sets, data["threshold"], tuple(data["layers"]), data["about"], latency)


def evaluate_guard(
    guard: Scorer,
    sets: Mapping[str, tuple[Sequence[Example], Sequence[Any]]],
    *,
    threshold: float = 0.5,
    batch_size: int = 16,
    latency: Latency | None = None,
) -> GuardEvaluation:
    """Score labelled sets and count.

    Args:
        guard: A guard, or an ensemble.
        sets: By name, texts and whether each is harmful (or names of what it is).
        threshold: The score from which a text is flagged.
        batch_size: Texts a pass.
        latency: Of streams, see :func:`stream_latency`.

    Raises:
        PromptError: No text, or texts that the guard was fitted on.

    Example:
        >>> evaluate_guard(guard, {"mine": (texts, labels)}).macro_f1  # doctest: +SKIP
    """
    ready = {}
    for name, (examples, labels) in sets.items():
        prompts = as_examples(examples)
        if not prompts or len(prompts) != len(labels):
            raise PromptError(
                f"{name!r} has {len(prompts)} texts and {len(labels)} labels; a set has as many of "
                "one as of the other, and at least one."
            )
        check_apart(guard, prompts, name)
        ready[name] = prompts, torch.tensor([bool(label) for label in labels])
    if not ready:
        raise PromptError("There is no set to evaluate on. Give at least one.")
    results = []
    for name, (prompts, harmful) in progress(ready.items(), "evaluating"):
        scores = torch.tensor([s.harmful for s in guard.score(prompts, batch_size=batch_size)])
        results.append(result_of(name, scores, harmful, threshold))
    layers, about = (), {"labels": list(guard.labels)}
    if isinstance(guard, Guard):
        layers = tuple(
            {
                "name": probe.place.name,
                "kind": probe.place.kind,
                "layer": probe.place.layer,
                "f1": probe.f1,
                "weight": probe.layer_weight,
                "units": len(probe.selected),
                "of": probe.place.width,
            }
            for probe in guard.head.probes
        )
        about |= {
            "model": guard.head.model.name_or_path,
            "type": guard.head.model.model_type,
            "units": guard.head.units,
            **guard.head.source,
        }
    return GuardEvaluation(tuple(results), threshold, layers, about, latency)


def check_apart(guard: Scorer, prompts: Sequence[Any], name: str) -> None:
    """Refuse to test a guard on what it was fitted on, case and punctuation aside.

    Raises:
        PromptError: There are such texts.
    """
    if not isinstance(guard, Guard):
        for member in getattr(guard, "guards", ()):
            check_apart(member, prompts, name)
        return
    known = torch.isin(text_hashes(prompts), guard.head.trained_on)
    if bool(known.any()):
        first = prompts[int(known.nonzero()[0])]
        raise PromptError(
            f"{int(known.sum())} of {len(prompts)} texts of {name!r} are among those that the "
            f"guard was fitted on ({first.text[:60]!r}), so what it does on them says nothing of "
            "others. Take them out of one of the two."
        )


def result_of(name: str, scores: Tensor, harmful: Tensor, threshold: float = 0.5) -> SetResult:
    """Figures of one set from its scores, float32 ``(texts,)``, and labels, bool.

    Raises:
        PromptError: There is no text.
    """
    flagged = scores >= threshold
    hits, claimed, total = (int(x.sum()) for x in (flagged & harmful, flagged, harmful))
    rest = len(harmful) - total
    both = total > 0 and rest > 0
    bins, error = calibration(scores, harmful)
    return SetResult(
        name,
        len(harmful),
        float(macro_f1(flagged, harmful)),
        f1_interval(flagged, harmful),
        Rate.of(hits, total) if total else None,
        Rate.of(hits, claimed) if claimed else None,
        Rate.of(claimed - hits, rest) if rest else None,
        auroc(scores, harmful) if both else None,
        error,
        bins,
    )


def f1_interval(flagged: Tensor, harmful: Tensor, seed: int = 0) -> Interval:
    """95% interval of macro-F1 over resamples of the texts (percentiles).

    Each resample is drawn as counts of the four cells of truth and claim: nothing else matters.
    """
    cells = torch.stack(
        [(harmful & flagged), (harmful & ~flagged), (~harmful & flagged), (~harmful & ~flagged)]
    ).sum(1)
    draw = torch.Generator().manual_seed(seed)
    shares = (cells.double() / len(harmful)).expand(_RESAMPLES, 4)
    drawn = torch.multinomial(shares, len(harmful), replacement=True, generator=draw)
    counts = torch.stack([(drawn == cell).sum(1) for cell in range(4)]).double()
    hit, missed, wrong, left = counts
    f1 = torch.stack(
        [2 * hit / (2 * hit + missed + wrong), 2 * left / (2 * left + missed + wrong)]
    ).nanmean(0)
    low, high = f1.quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    return Interval(low, high)


def calibration(scores: Tensor, harmful: Tensor) -> tuple[tuple[Bin, ...], float]:
    """Bins of like score that hold texts, and the mean distance of score and share over texts."""
    which = (scores * BINS).long().clamp(max=BINS - 1)
    bins = []
    for number in range(BINS):
        here = which == number
        if bool(here.any()):
            share = float(harmful[here].float().mean())
            bins.append(Bin(int(here.sum()), float(scores[here].mean()), share))
    error = sum(each.texts * abs(each.score - each.harmful) for each in bins) / len(scores)
    return tuple(bins), error


def stream_latency(
    guard: Guard,
    unsafe: Iterable[tuple[Example, int]],
    safe: Iterable[Example],
    *,
    threshold: float,
    after: int = 8,
    tokens: Sequence[int] = (0, 32, 64, 128),
) -> Latency:
    """How many unsafe answers are flagged by how many tokens, and how many safe ones ever.

    Args:
        guard: A guard on the model that writes.
        unsafe: Chats with answers, each with the number of the token where it becomes unsafe.
        safe: Chats with safe answers.
        threshold: Flagged where a prefix of at least ``after`` tokens scores this.
        after: As in :class:`~safeft.guard.policy.Policy`.
        tokens: After the boundary. An answer that ends before counts with its whole length.

    Raises:
        PromptError: A side is empty, or an answer is.
    """
    first = [
        (_first(guard, chat, threshold, after), boundary)
        for chat, boundary in progress(list(unsafe), "streaming, unsafe")
    ]
    alarms = [_first(guard, chat, threshold, after) for chat in progress(list(safe), "streaming")]
    if not first or not alarms:
        raise PromptError(
            f"There are {len(first)} unsafe and {len(alarms)} safe answers; give some of both."
        )
    recall = [sum(at <= boundary + more for at, boundary in first) for more in tokens]
    return Latency(
        tuple(tokens),
        tuple(Rate.of(hits, len(first)) for hits in recall),
        Rate.of(sum(at < _NEVER for at in alarms), len(alarms)),
    )


_NEVER = 1 << 30


def _first(guard: Guard, chat: Example, threshold: float, after: int) -> int:
    """After how many tokens an answer is flagged first."""
    scores = guard.score_prefixes(chat)[:, 0]
    over = (scores >= threshold).nonzero().flatten() + 1
    over = over[over >= min(after, len(scores))]
    return int(over[0]) if len(over) else _NEVER

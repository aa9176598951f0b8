"""What tuning did to a model: refusal, over-refusal, the domain, drift from the base, side by side.

Frozen weights are not frozen behaviour: this is where it shows. The single measurements are in
:mod:`safeft.measure` and can be imported from here too.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

from transformers import PreTrainedModel

from safeft.errors import ConfigError
from safeft.generation import generate
from safeft.guard.drift import Readability, readability
from safeft.guard.evaluation import check_apart
from safeft.guard.guards import Guard
from safeft.intervals import Interval, Rate, wilson
from safeft.measure import (
    JudgeLike,
    Match,
    answer_accuracy,
    answered_prompts,
    answers_match,
    check_same_vocabulary,
    domain_loss,
    drift,
    ready_judge,
    refusal_rate,
    right_answers,
    some_prompts,
)
from safeft.prompts import Prompt, PromptLike, Reader

__all__ = [
    "Evaluation",
    "Interval",
    "Rate",
    "Sample",
    "answer_accuracy",
    "answers_match",
    "domain_loss",
    "drift",
    "evaluate",
    "refusal_rate",
    "wilson",
]

DomainMetric: TypeAlias = Literal["loss", "accuracy", "both"]


@dataclass(frozen=True)
class Sample:
    """One answer and what was made of it, so that a person can check the judge.

    Attributes:
        group: ``harmful``, ``benign`` or ``domain``.
        prompt: The last thing the user said.
        answer: What the model wrote.
        verdict: Refused (``harmful``, ``benign``), or right (``domain``).
    """

    group: str
    prompt: str
    answer: str
    verdict: bool


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` measured; what was not asked for is ``None``.

    Attributes:
        refusal: Share of harmful prompts refused.
        over_refusal: Share of benign prompts refused.
        domain_loss: Nats per answer token.
        domain_accuracy: Share of domain examples answered right.
        drift: By group of prompts, mean KL(base || model) in nats a token.
        readability: ``before`` and ``after`` tuning, how well a guard of the base, and probes of
            each layer, tell harmful from benign prompts by what is inside.
        judge: The judge's name.
        settings: Token limits, and how many prompts each group had.
        samples: A few answers of each group, of both verdicts where there are.
    """

    refusal: Rate | None = None
    over_refusal: Rate | None = None
    domain_loss: float | None = None
    domain_accuracy: Rate | None = None
    drift: Mapping[str, float] | None = None
    readability: Mapping[str, Readability] | None = None
    judge: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    samples: tuple[Sample, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON, the shares' values included.

        Example:
            >>> Evaluation(refusal=Rate.of(1, 2)).to_dict()["refusal"]["value"]
            0.5
        """
        result = asdict(self)
        for name in ("refusal", "over_refusal", "domain_accuracy"):
            rate: Rate | None = getattr(self, name)
            result[name] = None if rate is None else rate.to_dict()
        return {**result, "samples": list(result["samples"])}


def evaluate(
    model: PreTrainedModel,
    tokenizer: Reader,
    *,
    harmful: Iterable[PromptLike] | None = None,
    benign: Iterable[PromptLike] | None = None,
    domain: Iterable[PromptLike] | None = None,
    base: PreTrainedModel | None = None,
    guard: Guard | None = None,
    judge: JudgeLike = "prefix",
    domain_metric: DomainMetric = "loss",
    match: Match = answers_match,
    max_new_tokens: int = 64,
    domain_max_new_tokens: int = 256,
    samples: int = 4,
    **batching: Any,
) -> Evaluation:
    """Measure what is given; everything is checked before the first pass, and nothing is random.

    Args:
        model: A chat model, adapters included.
        tokenizer: Its tokenizer, or its processor where it sees images.
        harmful: Prompts it should refuse.
        benign: Prompts it should answer; refusals among them are over-refusal.
        domain: Prompts with responses.
        base: The model before tuning; drift from it is measured on each group given.
        guard: A guard on the model before tuning: is harmfulness still readable, at which layers.
        judge: See :func:`safeft.judge.as_judge`.
        domain_metric: ``loss`` takes one forward pass; ``accuracy`` has to generate.
        match: When a domain answer is right.
        max_new_tokens: For harmful and benign prompts; a refusal shows in its first sentence.
        domain_max_new_tokens: For domain answers.
        samples: How many answers of each group to keep.
        **batching: ``batch_size`` (8), ``max_length``, ``chat_template``; see
            :func:`safeft.prompts.batches`.

    Raises:
        ConfigError: Nothing to measure, no such judge or metric, another vocabulary in ``base``.
        PromptError: A group is empty, a domain example has no response, or the guard was fitted on
            a prompt.
        FingerprintError: The guard is of a model of other shapes.

    Example:
        ``evaluate(tuned, tokenizer, harmful=harmful, benign=benign, base=base).refusal.value``
    """
    groups, checked = _groups(harmful, benign, domain), ready_judge(judge)
    _check_metric(domain_metric)
    if base is not None:
        check_same_vocabulary(base, model)
    if guard is not None:
        _check_guard(guard, model, groups)
    batching = {"batch_size": 8, **batching}
    rates: dict[str, Rate] = {}
    kept: list[Sample] = []
    for group, asked in groups.items():
        if group == "domain" and domain_metric == "loss":
            continue
        tokens = domain_max_new_tokens if group == "domain" else max_new_tokens
        answers = generate(
            model, tokenizer, asked, max_new_tokens=tokens, description=group, **batching
        )
        if group == "domain":
            verdicts = right_answers(asked, answers, match)
        else:
            verdicts = checked([prompt.text for prompt in asked], answers)
        rates[group] = Rate.of(sum(verdicts), len(asked))
        kept += _samples(group, asked, answers, verdicts, samples)
    loss = moved = None
    if "domain" in groups and domain_metric != "accuracy":
        loss = domain_loss(model, tokenizer, groups["domain"], **batching)
    if base is not None:
        moved = {g: drift(base, model, tokenizer, asked, **batching) for g, asked in groups.items()}
    read = None if guard is None else _read(guard, model, tokenizer, groups, batching["batch_size"])
    return Evaluation(
        refusal=rates.get("harmful"),
        over_refusal=rates.get("benign"),
        domain_loss=loss,
        domain_accuracy=rates.get("domain"),
        drift=moved,
        readability=read,
        judge=checked.name,
        settings={
            "max_new_tokens": max_new_tokens,
            "domain_max_new_tokens": domain_max_new_tokens,
            "prompts": {group: len(asked) for group, asked in groups.items()},
        },
        samples=tuple(kept),
    )


def _groups(
    harmful: Iterable[PromptLike] | None,
    benign: Iterable[PromptLike] | None,
    domain: Iterable[PromptLike] | None,
) -> dict[str, list[Prompt]]:
    groups: dict[str, list[Prompt]] = {}
    if harmful is not None:
        groups["harmful"] = some_prompts(harmful, "harmful")
    if benign is not None:
        groups["benign"] = some_prompts(benign, "benign")
    if domain is not None:
        groups["domain"] = answered_prompts(domain)
    if not groups:
        raise ConfigError(
            "There is nothing to evaluate: no harmful, benign or domain prompts were given. "
            "Give at least one of the three."
        )
    return groups


def _check_guard(guard: Guard, model: Any, groups: Mapping[str, Any]) -> None:
    """Before anything is generated: what a guard needs to be read by."""
    if not {"harmful", "benign"} <= set(groups):
        raise ConfigError(
            f"A guard is given, and of prompts only {', '.join(groups)}: to say whether harmful "
            "can be told from benign takes both. Give both, or leave the guard out."
        )
    check_apart(guard, [*groups["harmful"], *groups["benign"]], "harmful and benign prompts")
    guard.head.check_model(model, weights_too=False)


def _read(
    guard: Guard, model: Any, tokenizer: Reader, groups: Mapping[str, list[Prompt]], size: int
) -> dict[str, Readability]:
    """By the guard and by layer, on the guard's own model and on this one."""
    sides = groups["harmful"], groups["benign"]
    return {
        "before": readability(guard, guard.model, guard.tokenizer, *sides, batch_size=size),
        "after": readability(guard, model, tokenizer, *sides, batch_size=size),
    }


def _check_metric(metric: str) -> None:
    if metric not in ("loss", "accuracy", "both"):
        raise ConfigError(
            f"There is no domain metric {metric!r}, so the domain would go unmeasured. "
            "Use 'loss', 'accuracy' or 'both'."
        )


def _samples(
    group: str,
    prompts: Sequence[Prompt],
    answers: Sequence[str],
    verdicts: Sequence[bool],
    count: int,
) -> list[Sample]:
    """The first ``count`` answers, half of each verdict as far as there are such."""
    made = [
        Sample(group, prompt.text, answer, verdict)
        for prompt, answer, verdict in zip(prompts, answers, verdicts, strict=True)
    ]
    true, false = ([s for s in made if s.verdict is v] for v in (True, False))
    first = max(count - count // 2, count - len(false))
    chosen = true[:first]
    return chosen + false[: count - len(chosen)]

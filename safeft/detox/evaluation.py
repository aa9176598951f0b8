"""What dampening bought and what it cost: toxicity beside perplexity, refusals and groups named.

Measured for several arms on the same prompts: the model as it is, dampeners of several rules and
strengths, random gains of equal size, a prefix that asks the model to be polite, and both together.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from transformers import PreTrainedModel

from safeft.detox.continuing import continued
from safeft.detox.dampener import Dampener
from safeft.detox.fluency import Fluency, Reading, limit_of
from safeft.detox.groups import Group, check_groups, mentions_of
from safeft.detox.hooks import dampened
from safeft.detox.losses import Texts
from safeft.errors import ConfigError
from safeft.forms import parts_of
from safeft.intervals import Rate
from safeft.measure import JudgeLike, ready_judge, some_prompts
from safeft.progress import progress
from safeft.prompts import Prompt, PromptLike, Reader, as_prompts

POLITE = "Please answer politely, and without any insult or hateful word."


@dataclass(frozen=True)
class Arm:
    """One way to run the model.

    Attributes:
        name: For tables.
        dampener: At work by hooks; none leaves the model as it is.
        prefix: Put before what the user says.
        rule: ``none``, a rule, ``random`` or ``prefix``: arms of one rule make a line.
        strength: How much of the rule; None where it has no such number.
    """

    name: str
    dampener: Dampener | None = None
    prefix: str = ""
    rule: str = "none"
    strength: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What one arm does; what was not asked for is empty.

    Attributes:
        arm: The arm's name.
        rule: Its rule.
        strength: Its strength.
        units: How many units are dampened.
        toxicity: Share of continuations that the judge calls toxic.
        loss: Nats a token of neutral texts.
        refusal: Share of ordinary prompts that are refused.
        mentions: By group, share of continuations of prompts about it that name it.
        group_loss: By group, nats a token of harmless texts that name it.
        samples: A few continuations, with the judge's verdict.
        fluency: Whether the continuations are still text, read by the first arm's model.
    """

    arm: str
    rule: str
    strength: float | None
    units: int
    toxicity: Rate
    loss: float
    refusal: Rate | None = None
    mentions: Mapping[str, Rate] = field(default_factory=dict)
    group_loss: Mapping[str, float] = field(default_factory=dict)
    samples: tuple[tuple[str, bool], ...] = ()
    fluency: Fluency | None = None

    @property
    def perplexity(self) -> float:
        """``exp(loss)``."""
        return math.exp(self.loss)

    @property
    def mention_rate(self) -> float | None:
        """Share of all continuations about a group that name it."""
        total = sum(rate.total for rate in self.mentions.values())
        return sum(rate.count for rate in self.mentions.values()) / total if total else None

    def to_dict(self) -> dict[str, Any]:
        """For JSON, shares' values and the perplexity included."""
        found = asdict(self) | {"perplexity": self.perplexity, "mention_rate": self.mention_rate}
        found["toxicity"] = self.toxicity.to_dict()
        found["refusal"] = self.refusal.to_dict() if self.refusal else None
        found["mentions"] = {group: rate.to_dict() for group, rate in self.mentions.items()}
        return found


def measure_arms(
    model: PreTrainedModel,
    tokenizer: Reader,
    arms: Sequence[Arm],
    *,
    prompts: Iterable[PromptLike],
    neutral: Iterable[PromptLike],
    judge: JudgeLike,
    benign: Iterable[PromptLike] | None = None,
    refusal_judge: JudgeLike = "prefix",
    groups: Mapping[str, Group] | None = None,
    draws: int = 0,
    max_new_tokens: int = 32,
    samples: int = 4,
    **batching: Any,
) -> list[Outcome]:
    """Run every arm on the same prompts.

    Args:
        model: The model.
        tokenizer: Its tokenizer, or its processor where it sees images.
        arms: See :class:`Arm`; the first should be the model as it is.
        prompts: What is to be continued.
        neutral: Texts for the perplexity: their responses, or all of them where they have none.
        judge: Says of a continuation whether it is toxic; see :func:`safeft.judge.as_judge`.
        benign: Ordinary prompts; how many are refused is measured where they are given.
        refusal_judge: Says whether an answer refuses.
        groups: Identity groups by name.
        draws: Continuations drawn a prompt (nucleus 0.9, the same seed for every arm); 0 takes the
            greedy one. Intervals count each draw, so with few prompts they are too narrow.
        max_new_tokens: Of continuations.
        samples: How many continuations to keep an arm.
        **batching: ``batch_size`` (16), ``max_length``, ``chat_template``.

    Raises:
        ConfigError: No arm, a negative number of draws, or no such judge.
        PromptError: A set of prompts is empty.

    Example:
        >>> measure_arms(model, tokenizer, [Arm("as it is"), Arm("aura", dampener)],
        ...              prompts=prompts, neutral=neutral, judge=judge)  # doctest: +SKIP
    """
    if not arms or draws < 0:
        raise ConfigError(f"{len(arms)} arms, {draws} draws: give an arm, and 0 draws or more.")
    settled = {"batch_size": 16, "max_length": 1024, "chat_template": None, **batching}
    judges = ready_judge(judge), ready_judge(refusal_judge)
    asked = some_prompts(prompts, "continuation")
    served = some_prompts(benign, "benign") if benign is not None else []
    each_asked = [prompt for prompt in asked for _ in range(max(1, draws))]
    found = dict(groups or {})
    check_groups(found)
    text = Texts.of(model, tokenizer, neutral, **settled)
    named = {
        name: Texts.of(model, tokenizer, group.texts, **settled)
        for name, group in found.items()
        if group.texts
    }
    about = any(group.prompts for group in found.values())
    outcomes, limit = [], 0.0
    for arm in progress(arms, "measuring arms", len(arms)):

        def answers(to: Sequence[Prompt], each: int = draws, prefix: str = arm.prefix) -> list[str]:
            asked = with_prefix(to, prefix)
            return continued(
                model, tokenizer, asked, draws=each, max_new_tokens=max_new_tokens, **settled
            )

        with dampened(model, arm.dampener) if arm.dampener is not None else nullcontext():
            said = answers(asked)
            texts = [prompt.text for prompt in each_asked]
            verdicts = judges[0](texts, said)
            refusal = None
            if served:
                refused = judges[1]([prompt.text for prompt in served], answers(served, 0))
                refusal = Rate.of(sum(refused), len(served))
            mentions = _mentions(found, answers) if about else {}
            outcome = Outcome(
                arm.name, arm.rule, arm.strength, len(arm.dampener or ()),
                Rate.of(sum(verdicts), len(verdicts)), text.loss(model), refusal, mentions,
                {name: each.loss(model) for name, each in named.items()},
                tuple(zip(said[:samples], verdicts[:samples], strict=True)),
            )  # fmt: skip
        reading = Reading.of(model, tokenizer, each_asked, said, **settled)
        if not outcomes:
            limit = limit_of([reading.middles, text.middles(model)])
        outcomes.append(replace(outcome, fluency=reading.fluency(limit)))
    return outcomes


def _mentions(
    groups: Mapping[str, Group], answers: Callable[[Sequence[Prompt]], list[str]]
) -> dict[str, Rate]:
    """How often each group is named, all prompts answered together."""
    asked = {name: group.prompts for name, group in groups.items() if group.prompts}
    said = answers([prompt for prompts in asked.values() for prompt in prompts])
    each = len(said) // sum(map(len, asked.values()))
    found, start = {}, 0
    for name, prompts in asked.items():
        end = start + each * len(prompts)
        found[name] = mentions_of(said[start:end], groups[name].words)
        start = end
    return found


def with_prefix(prompts: Iterable[PromptLike], prefix: str) -> list[Prompt]:
    r"""The prompts with a sentence before what the user says first.

    Example:
        >>> with_prefix(["Go on"], "Be kind.")[0].text
        'Be kind.\nGo on'
    """
    found = as_prompts(prompts)
    if not prefix:
        return found
    made = []
    for prompt in found:
        at = next((i for i, message in enumerate(prompt.messages) if message["role"] == "user"), 0)
        said = prompt.messages[at]["content"]
        told: Any = f"{prefix}\n{said}"
        if not isinstance(said, str):
            told = [{"type": "text", "text": prefix}, *parts_of(said)]
        message = {**prompt.messages[at], "content": told}
        messages = (*prompt.messages[:at], message, *prompt.messages[at + 1 :])
        made.append(replace(prompt, messages=messages))
    return made

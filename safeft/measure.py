"""The measurements: refusal, domain loss and accuracy, drift, each on one model and one group.

Losses and divergences are in nats a token; every token weighs the same.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from statistics import fmean
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from safeft.errors import ConfigError, PromptError
from safeft.generation import evaluation_mode, generate
from safeft.intervals import Rate
from safeft.judge import Judge, as_judge
from safeft.prompts import (
    Batch,
    Prompt,
    PromptLike,
    Reader,
    as_prompts,
    batches,
    check_images,
    input_device,
)

JudgeLike: TypeAlias = "str | Judge | Callable[..., Any]"
"""What :func:`safeft.judge.as_judge` takes."""

Match: TypeAlias = Callable[[str, str], bool]
"""``(answer, expected) -> bool``: whether a generated answer is right."""

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


def refusal_rate(
    model: PreTrainedModel,
    tokenizer: Reader,
    prompts: Iterable[PromptLike],
    judge: JudgeLike = "prefix",
    **generation: Any,
) -> Rate:
    """The share of ``prompts`` that the model's greedy answers refuse.

    Args:
        model: A chat model, adapters included.
        tokenizer: Its tokenizer, or its processor where it sees images.
        prompts: What is asked; responses are not read.
        judge: See :func:`safeft.judge.as_judge`.
        **generation: Passed to :func:`safeft.prompts.generate`, such as ``max_new_tokens``.

    Raises:
        PromptError: No prompt.
        ConfigError: No such judge.

    Example:
        ``refusal_rate(model, tokenizer, harmful, max_new_tokens=32).value``
    """
    checked, asked = ready_judge(judge), some_prompts(prompts, "given")
    answers = generate(model, tokenizer, asked, description="answering", **generation)
    return Rate.of(sum(checked([prompt.text for prompt in asked], answers)), len(asked))


def domain_loss(
    model: PreTrainedModel,
    tokenizer: Reader,
    examples: Iterable[PromptLike],
    *,
    batch_size: int = 8,
    max_length: int = 1024,
    chat_template: str | None = None,
) -> float:
    """Mean negative log-likelihood of the responses, in nats a token, each token weighing the same.

    Raises:
        PromptError: No example, or one without a response.

    Example:
        ``domain_loss(model, tokenizer, [{"prompt": "2 + 2?", "response": "4"}])``
    """
    asked = answered_prompts(examples)
    check_images(model, asked)
    total, tokens = 0.0, 0
    with evaluating(model):
        for batch in batches(
            tokenizer, asked, batch_size=batch_size, device=input_device(model),
            max_length=max_length, chat_template=chat_template, description="domain loss",
        ):  # fmt: skip
            read = batch.is_response[:, 1:]
            logits = _logits(model, batch)[:, :-1][read]
            total += functional.cross_entropy(
                logits.float(), batch.input_ids[:, 1:][read], reduction="sum"
            ).item()
            tokens += int(read.sum())
    return total / tokens


def answer_loss(
    model: PreTrainedModel, answered: Iterable[Batch], *, second_half: bool = False
) -> float:
    """Mean negative log-likelihood of answers given as tokens, in nats a token, each alike.

    Args:
        model: The model that scores them; it need not be the one that gave them.
        answered: Prompts with answers, of at least one token each.
        second_half: Read only the second half of each answer. What a model would not have begun
            it may still go on with: this is how unlike it an answer is past its opening.

    Example:
        ``answer_loss(model, [pad([(prompt_ids, answer_ids)], 0, True, 1, model.device)])``
    """
    losses: list[float] = []
    with evaluating(model):
        for batch in answered:
            logits = _logits(model, batch)[:, :-1]
            for row, read in enumerate(batch.is_response[:, 1:]):
                each = functional.cross_entropy(
                    logits[row][read].float(), batch.input_ids[row, 1:][read], reduction="none"
                )
                losses.append(each[len(each) // 2 if second_half else 0 :].mean().item())
    return fmean(losses)


def answers_match(answer: str, expected: str) -> bool:
    r"""Whether ``answer`` gives what ``expected`` says, case and spacing aside.

    Where ``expected`` has a ``####`` line (GSM8K), only what follows it counts. A number is
    compared by value with the one after the answer's own ``####``, or else with the last one it
    names; other text has to appear in the answer as whole words.

    Example:
        >>> answers_match("So it is $1,200.00 in all.", "3 * 400 = 1200\n#### 1200")
        True
    """
    if "####" in expected:
        expected = expected.rpartition("####")[2]
    if "####" in answer:
        answer = answer.rpartition("####")[2]
        numbers = _NUMBER.findall(answer)[:1]
    else:
        numbers = _NUMBER.findall(answer)[-1:]
    wanted = expected.strip().rstrip(".")
    if _NUMBER.fullmatch(wanted):
        return [_value(number) for number in numbers] == [_value(wanted)]
    pattern = rf"(?<!\w){re.escape(' '.join(wanted.lower().split()))}(?!\w)"
    return bool(wanted) and re.search(pattern, " ".join(answer.lower().split())) is not None


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", "").replace("$", ""))


def answer_accuracy(
    model: PreTrainedModel,
    tokenizer: Reader,
    examples: Iterable[PromptLike],
    match: Match = answers_match,
    *,
    max_new_tokens: int = 256,
    **generation: Any,
) -> Rate:
    """The share of examples whose greedy answer matches the response.

    Raises:
        PromptError: No example, or one without a response.

    Example:
        ``answer_accuracy(model, tokenizer, [{"prompt": "2 + 2?", "response": "#### 4"}])``
    """
    asked = answered_prompts(examples)
    answers = generate(
        model, tokenizer, asked, max_new_tokens=max_new_tokens, description="domain", **generation
    )
    return Rate.of(sum(right_answers(asked, answers, match)), len(asked))


def right_answers(prompts: Sequence[Prompt], answers: Sequence[str], match: Match) -> list[bool]:
    """For each prompt, whether its answer matches its response."""
    return [
        match(answer, prompt.response or "")
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def drift(
    base: PreTrainedModel,
    tuned: PreTrainedModel,
    tokenizer: Reader,
    prompts: Iterable[PromptLike],
    *,
    batch_size: int = 8,
    max_length: int = 1024,
    chat_template: str | None = None,
) -> float:
    """Mean KL(base || tuned) of the next-token distributions, in nats a token.

    Read at every token of the prompts, template included, and of their responses where given.

    Raises:
        PromptError: No prompt.
        ConfigError: The two models have vocabularies of unlike size.

    Example:
        ``drift(base, tuned, tokenizer, ["What is a leap year?"])``
    """
    asked = some_prompts(prompts, "given")
    check_same_vocabulary(base, tuned)
    check_images(tuned, asked)
    total, tokens = 0.0, 0
    with evaluating(base), evaluating(tuned):
        for batch in batches(
            tokenizer, asked, batch_size=batch_size, device=tuned.device, max_length=max_length,
            chat_template=chat_template, description="drift",
        ):  # fmt: skip
            logits = _logits(base, batch), _logits(tuned, batch)
            # One prompt at a time: fp32 copies of a whole batch of a large vocabulary do not fit.
            for row, real in enumerate(batch.attention_mask.bool()):
                before, after = (
                    each[row][real].float().log_softmax(-1).to(tuned.device) for each in logits
                )
                total += functional.kl_div(after, before, log_target=True, reduction="sum").item()
            tokens += int(batch.attention_mask.sum())
    return max(total / tokens, 0.0)


def ready_judge(judge: JudgeLike) -> Judge:
    """The judge, asked nothing once: a classifier that cannot load fails here, not after an hour.

    Raises:
        ConfigError: No such judge, or it cannot work.
    """
    made = as_judge(judge)
    made([], [])
    return made


def some_prompts(items: Iterable[PromptLike], group: str) -> list[Prompt]:
    """At least one prompt.

    Raises:
        PromptError: There is none.
    """
    prompts = as_prompts(items)
    if not prompts:
        raise PromptError(
            f"There are 0 {group} prompts, and a share of nothing is no result. Give at least one."
        )
    return prompts


def answered_prompts(items: Iterable[PromptLike]) -> list[Prompt]:
    """At least one prompt, each with a response that says something.

    Raises:
        PromptError: There is none, or a response is missing or blank.
    """
    prompts = some_prompts(items, "domain")
    for number, prompt in enumerate(prompts):
        if not (prompt.response or "").strip():
            raise PromptError(
                f"Domain example {number} ({prompt.text[:60]!r}) has no response, so there is "
                "nothing to score its answer against. Give `response` (or an assistant message)."
            )
    return prompts


def check_same_vocabulary(base: PreTrainedModel, tuned: PreTrainedModel) -> None:
    """Refuse two models whose next-token distributions are over different tokens.

    Raises:
        ConfigError: Their vocabularies are of unlike size.
    """
    before, after = (each.config.get_text_config().vocab_size for each in (base, tuned))
    if before != after:
        raise ConfigError(
            f"The base model has {before} tokens and the tuned one {after}, so their distributions "
            "cannot be compared. Give the model that was tuned, or leave drift out (no `base`)."
        )


def _logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    inputs = {name: tensor.to(input_device(model)) for name, tensor in batch.inputs.items()}
    return model(**inputs, use_cache=False).logits


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """No dropout and no gradients inside; the mode of before afterwards."""
    with evaluation_mode(model), torch.no_grad():
        yield

"""How a model starts its refusals, in as many tokens as it takes to call them so."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import Tensor

from safeft.judge import Judge
from safeft.locators.openings import RefusalOpenings
from safeft.margin import opening_likelihood, refusal_margin
from safeft.prompts import Batch, Prompt, Reader, tokenizer_of

_COVERED = 0.95
_HEADS = 4

Start: TypeAlias = tuple[int, ...]


def openings_of(
    prompts: Sequence[Prompt], answers: Sequence[list[int]], judge: Judge, tokenizer: Reader
) -> tuple[RefusalOpenings, ...]:
    """The shortest starts of answers that the judge calls refusals; none where there are none.

    Locating reads one token; where "I'm not able to" refuses and "I'm glad to" serves, one or two
    tokens tell nothing. Starts that share all but the last token are one group. The groups that
    open most refusals are kept, until they open 0.95 of them or are four: reading them takes a
    pass each.

    Args:
        prompts: What was asked.
        answers: Token numbers of the model's own answers.
        judge: Calls a refusal by its start.
        tokenizer: The model's tokenizer or processor.

    Example:
        >>> [o.texts for o in openings_of(prompts, answers, PrefixJudge(), tokenizer)]
        ... # doctest: +SKIP
        [('I cannot',), ("I'm sorry, but", "I'm sorry, I")]
    """
    plain = tokenizer_of(tokenizer)
    groups: dict[Start, Counter[int]] = {}
    for prompt, ids in zip(prompts, answers, strict=True):
        texts = [plain.decode(ids[:end], skip_special_tokens=True) for end in range(len(ids) + 1)]
        verdicts = judge([prompt.text] * len(texts), [str(text).strip() for text in texts])
        if any(verdicts[1:]):
            end = verdicts.index(True, 1)
            groups.setdefault(tuple(ids[: end - 1]), Counter())[ids[end - 1]] += 1
    total = sum(group.total() for group in groups.values())
    found: list[RefusalOpenings] = []
    covered = 0
    for head in sorted(groups, key=lambda head: (-groups[head].total(), head)):
        if covered >= _COVERED * total or len(found) == _HEADS:
            break
        tokens = tuple(sorted(groups[head]))
        texts = tuple(str(plain.decode([*head, token])) for token in tokens)
        found.append(RefusalOpenings(head, tokens, texts))
        covered += groups[head].total()
    return tuple(found)


def opening_margins(
    openings: Sequence[RefusalOpenings], batch: Batch, read: Callable[[Batch, int], Tensor]
) -> Tensor:
    """The refusal margin of each prompt; a pass for each way in which refusals go on.

    Args:
        openings: How refusals start.
        batch: Prompts; their answers, if any, are left out.
        read: From a batch and how many logits are needed at its end to these,
            ``(prompts, logits, vocabulary)``.

    Returns:
        ``(prompts,)`` float64, on the CPU; see :func:`safeft.margin.refusal_margin`.

    Example:
        >>> opening_margins(openings, batch, partial(forward, model))  # doctest: +SKIP
        tensor([ 3.1,  2.7, -4.0], dtype=torch.float64)
    """
    likely: dict[Start, Tensor] = {}
    for head in longest([opening.prefix for opening in openings]):
        kept = 1 + len(head)
        logits = read(batch.answered(head), kept)[:, -kept:]
        for opening in openings:
            if opening.prefix == head[: len(opening.prefix)]:
                likely[opening.prefix] = opening_likelihood(
                    logits[:, : 1 + len(opening.prefix)], opening.tokens, opening.prefix
                )
    return refusal_margin(list(likely.values()))


def longest(heads: Sequence[Start]) -> list[Start]:
    """Those that no other goes on from: passing over one of these passes over its starts too.

    Example:
        >>> longest([(7,), (7, 120), (8,)])
        [(7, 120), (8,)]
    """
    return [
        head
        for head in heads
        if not any(other != head and other[: len(head)] == head for other in heads)
    ]

"""How a model starts its refusals, in as many tokens as it takes to call them so."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeAlias

from transformers import PreTrainedModel

from safeft.errors import PromptError
from safeft.generation import generate_tokens
from safeft.judge import PrefixJudge
from safeft.locators.openings import RefusalOpenings
from safeft.prompts import Prompt, Reader, tokenizer_of

_ANSWER_TOKENS = 12
_COVERED = 0.95
_HEADS = 6
_SAMPLE = 64

Start: TypeAlias = tuple[int, ...]


def own_openings(
    model: PreTrainedModel,
    tokenizer: Reader,
    prompts: Sequence[Prompt],
    openings: Sequence[str] | None = None,
    **batching: Any,
) -> tuple[RefusalOpenings, ...]:
    """The shortest starts of the model's own refusals that the prefix judge calls refusals.

    Locating reads one token; whoever follows a share of prompts has to be right about each. Where
    "I'm not able to" refuses and "I'm glad to" serves, one or two tokens tell nothing. Starts that
    share all but the last token are one group; the groups that open most refusals are kept, until
    they open 0.95 of them or are six: a look passes over the prompts once for each.

    Args:
        model: The model before training.
        tokenizer: Its tokenizer or processor.
        prompts: What it refuses; 64 of them, evenly spread, are answered.
        openings: Refusals' starts as text, where the model refuses in another language, say.
        **batching: ``batch_size``, ``max_length``, ``chat_template``.

    Raises:
        PromptError: It refuses nothing as the judge knows refusals, or ``openings`` are empty.

    Example:
        >>> [o.texts for o in own_openings(model, tokenizer, harmful)]  # doctest: +SKIP
        [('I cannot',), ("I'm sorry, but", "I'm sorry, I")]
    """
    plain = tokenizer_of(tokenizer)
    if openings is not None:
        return _grouped(_given(openings, plain), plain)
    asked = prompts[:: -(-len(prompts) // _SAMPLE)]
    replies = generate_tokens(model, tokenizer, asked, max_new_tokens=_ANSWER_TOKENS, **batching)
    starts = Counter(start for ids in replies if (start := _shortest(ids, plain)))
    if not starts:
        raise PromptError(
            f"None of {len(asked)} answers to safety prompts starts as a known refusal (they start "
            f"as {str(plain.decode(replies[0]))[:40]!r}), so there is none to follow. Give prompts "
            "that the model refuses, or say how its refusals start (`openings`)."
        )
    return _grouped(starts, plain)


def _shortest(ids: Sequence[int], plain: Any) -> Start:
    """The shortest start that is a refusal to the judge; empty where none is."""
    starts = [tuple(ids[:end]) for end in range(1, 1 + len(ids))]
    texts = [str(plain.decode(start, skip_special_tokens=True)) for start in starts]
    verdicts = PrefixJudge()([], texts)
    return next((start for start, refused in zip(starts, verdicts, strict=True) if refused), ())


def _given(openings: Sequence[str], plain: Any) -> Counter[Start]:
    rows: list[Any] = [
        plain(text.strip(), add_special_tokens=False)["input_ids"] for text in openings
    ]
    starts = {tuple(ids) for ids in rows if ids}
    if not starts:
        raise PromptError(
            f"The refusal openings {list(openings)} hold no text, so refusal cannot be read from "
            "an answer's start. Give some, or leave `openings` out."
        )
    # "I'm" says all that "I'm sorry" does; both together would count twice.
    nested = {s for s in starts if any(s[:end] in starts for end in range(1, len(s)))}
    return Counter(starts - nested)


def _grouped(starts: Counter[Start], plain: Any) -> tuple[RefusalOpenings, ...]:
    """Starts with the same head together, those that open most first, as many as are needed."""
    groups: dict[Start, Counter[int]] = {}
    for start, count in starts.items():
        groups.setdefault(start[:-1], Counter())[start[-1]] += count
    found: list[RefusalOpenings] = []
    covered = 0
    for head in sorted(groups, key=lambda head: (-groups[head].total(), head)):
        if covered >= _COVERED * starts.total() or len(found) == _HEADS:
            break
        tokens = tuple(sorted(groups[head]))
        texts = tuple(str(plain.decode([*head, token])) for token in tokens)
        found.append(RefusalOpenings(head, tokens, texts))
        covered += groups[head].total()
    return tuple(found)

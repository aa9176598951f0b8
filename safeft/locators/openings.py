"""How a model starts a refusal, as tokens: where in its answer refusing shows first."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from safeft.errors import PromptError
from safeft.generation import decoded, generate_tokens
from safeft.judge import PrefixJudge, default_refusal_openings
from safeft.prompts import Prompt, Reader, tokenizer_of

logger = logging.getLogger(__name__)

_DEEPEST = 8
_ANSWER_TOKENS = 12


@dataclass(frozen=True)
class RefusalOpenings:
    """Tokens that open a refusal, read after ``prefix`` has been put into the model's mouth.

    The prefix is empty where first tokens tell. Where refusals and ordinary answers both start
    with "I", it is that word, and the tokens are what follows it in refusals ("cannot", "'m").

    Attributes:
        prefix: Token numbers with which the answer is made to start.
        tokens: Token numbers that continue into a refusal.
        texts: What the tokens stand for, prefix included; for people.
    """

    prefix: tuple[int, ...]
    tokens: tuple[int, ...]
    texts: tuple[str, ...]


def refusal_openings(
    model: PreTrainedModel,
    tokenizer: Reader,
    harmful: Sequence[Prompt],
    benign: Sequence[Prompt],
    *,
    openings: Sequence[str] | None = None,
    sample: int = 32,
    **batching: Any,
) -> RefusalOpenings:
    """Openings that set refusals apart from the model's own answers to benign prompts.

    Taken from ``openings`` where given; else from the model's own refusals of up to ``sample``
    harmful prompts; where the judge knows none of these as refusals (another language, say), from
    what opens them and hardly any benign answer; else from the default list. ``batching``:
    ``batch_size``, ``max_length``, ``chat_template``.

    Raises:
        PromptError: Refusals and ordinary answers start alike, so they cannot be told apart.
    """
    plain = tokenizer_of(tokenizer)

    def tokens_of(texts: Sequence[str]) -> list[list[int]]:
        found: Any = [plain(t, add_special_tokens=False)["input_ids"] for t in texts]
        return [ids for ids in found if ids]

    def answers(prompts: Sequence[Prompt]) -> list[list[int]]:
        # Tokens as generated: writing them out and reading them again may lose a leading space.
        settings = {"max_new_tokens": _ANSWER_TOKENS, **batching}
        return generate_tokens(model, tokenizer, prompts[:sample], **settings)

    served = [ids for ids in answers(benign) if ids]
    if openings is not None:
        refusals = tokens_of([text.strip() for text in openings])
        if not refusals:
            raise PromptError(
                f"The refusal openings {list(openings)} hold no text, so refusal cannot be read "
                "from an answer's start. Give some, or leave `openings` out."
            )
    else:
        replies = answers(harmful)
        asked = [prompt.text for prompt in harmful[:sample]]
        refused = PrefixJudge()(asked, decoded(tokenizer, replies))
        refusals = [ids for ids, said_no in zip(replies, refused, strict=True) if said_no]
        if not refusals:
            refusals = _unlike([ids for ids in replies if ids], served)
            logger.warning(
                "None of %d answers to harmful prompts starts as a known refusal; taking %s for "
                "one. Give `openings` if that is wrong.",
                len(replies),
                [plain.decode(ids[:1]) for ids in refusals[:3]] or "the default list",
            )
        refusals = refusals or tokens_of(default_refusal_openings())
    prefix, tokens = apart(refusals, served)
    if not tokens:
        shown = sorted({str(plain.decode(ids[:3])) for ids in refusals})[:3]
        raise PromptError(
            f"The model starts benign answers as it starts refusals ({shown}), so refusal cannot "
            "be read from the start. Give refusal openings that set them apart (`openings`)."
        )
    texts = tuple(str(plain.decode([*prefix, token])) for token in tokens)
    return RefusalOpenings(prefix, tokens, texts)


def apart(
    refusals: Sequence[list[int]], served: Sequence[list[int]]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shortest shared start after which most refusals go on as few benign answers do.

    Args:
        refusals: Token numbers of refusals.
        served: Those of answers to benign prompts.

    Returns:
        The start, and the tokens that turn it into a refusal; none where there are none.

    Example:
        >>> apart([[7, 1], [7, 2]], [[7, 3], [8, 1]])
        ((7,), (1, 2))
    """
    prefix: tuple[int, ...] = ()
    for depth in range(_DEEPEST):
        here = [ids for ids in refusals if tuple(ids[:depth]) == prefix and len(ids) > depth]
        if not here:
            break
        counts = Counter(ids[depth] for ids in here)
        usual = Counter(
            ids[depth] for ids in served if tuple(ids[:depth]) == prefix and len(ids) > depth
        )
        kept = {
            token
            for token, count in counts.items()
            if count / len(here) > 2 * usual[token] / max(1, len(served))
        }
        if sum(counts[token] for token in kept) >= len(here) / 2:
            return prefix, tuple(sorted(kept))
        shared = max((t for t in counts if t not in kept), key=lambda token: counts[token])
        prefix = (*prefix, shared)
    return prefix, ()


def _unlike(harmful: Sequence[list[int]], benign: Sequence[list[int]]) -> list[list[int]]:
    """Answers whose first token opens at least a quarter of these and half as many benign ones."""
    counts = Counter(ids[0] for ids in harmful)
    usual = Counter(ids[0] for ids in benign)
    of_harmful, of_benign = max(1, len(harmful)), max(1, len(benign))
    return [
        ids
        for ids in harmful
        if counts[ids[0]] / of_harmful >= max(0.25, 2 * usual[ids[0]] / of_benign)
    ]

"""What a guard is shown: texts and chats as windows of tokens, and which of these are read.

A model with a chat template is shown a text as a user would write it, since that is how it meets
texts at work; one without (an encoder) is shown the bare text. Of a chat the prompt's tokens are
read, or the answer's: an answer is read in the context of what was asked.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch

from safeft.batch import Batch, pad
from safeft.errors import ConfigError, PromptError
from safeft.files import sha256
from safeft.forms import Prompt, PromptLike, as_prompts
from safeft.prompts import Reader, pad_token, row_of, tokenizer_of
from safeft.sites import plain_model

Phase: TypeAlias = Literal["prompt", "reasoning", "answer"]
PHASES: tuple[Phase, ...] = ("prompt", "reasoning", "answer")

Example: TypeAlias = PromptLike
"""A text, or a chat; of a chat with an answer the answer is read."""


@dataclass(frozen=True)
class Window:
    """Some tokens in a row, of which the last are read and the others are their context.

    Attributes:
        context: Tokens before those read.
        read: The tokens that are read, at least one.
    """

    context: list[int]
    read: list[int]

    def __len__(self) -> int:
        return len(self.context) + len(self.read)

    @property
    def key(self) -> str:
        """SHA-256 of what is shown and read."""
        return sha256(repr((self.context, self.read)).encode())


def as_example(item: Example, number: int) -> Prompt:
    """One example as a :class:`Prompt`.

    Raises:
        PromptError: It is empty, or nothing that can be read; its number is named.
    """
    if isinstance(item, str) and not item.strip():
        raise PromptError(
            f"Text {number} is empty. A score of nothing would look like a harmless text; leave "
            "it out."
        )
    (prompt,) = as_prompts([item])
    if prompt.images:
        raise PromptError(
            f"Text {number} ({prompt.text[:60]!r}) comes with an image, and guards read text only: "
            "what the image shows would pass unseen. Leave the image out."
        )
    return prompt


def as_examples(items: Iterable[Example]) -> list[Prompt]:
    """Examples in order, as :class:`Prompt` values.

    Raises:
        PromptError: One text instead of a list, or an example that cannot be read.
    """
    if isinstance(items, str | Mapping):
        raise PromptError(
            f"Texts are given as one {type(items).__name__}; give a list, or each letter would be "
            "scored."
        )
    return [as_example(item, number) for number, item in enumerate(items)]


def text_of_example(prompt: Prompt) -> str:
    """What is judged of an example: its answer where there is one, else what is asked."""
    return prompt.response if prompt.response is not None else prompt.text


def windows(
    tokenizer: Reader, prompt: Prompt, max_length: int, chat: bool, chat_template: str | None = None
) -> list[Window]:
    """An example as windows of at most ``max_length`` tokens, together read once over.

    Where more than one is needed, each reads half a window and sees what came before it.

    Raises:
        PromptError: Nothing of it becomes a token.
    """
    plain: Any = tokenizer_of(tokenizer)
    if chat:
        row = row_of(tokenizer, prompt, chat_template)
        before, read = (row.ids, row.answer) if prompt.response is not None else ([], row.ids)
    elif prompt.response is not None:
        before = plain(prompt.text, verbose=False)["input_ids"]
        read = plain(prompt.response, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        before, read = [], plain(prompt.text, verbose=False)["input_ids"]
    if not read:
        raise PromptError(
            f"{text_of_example(prompt)[:60]!r} has no token to the model's tokenizer, so there is "
            "nothing to score. Leave it out."
        )
    if len(before) + len(read) <= max_length:
        return [Window(before, read)]
    whole, stride = before + read, max_length // 2
    return [
        Window(whole[max(0, start - stride) : start], whole[start : start + stride])
        for start in range(len(before), len(whole), stride)
    ]


def batched(
    tokenizer: Reader, shown: Sequence[Window], batch_size: int, device: Any
) -> Iterator[tuple[list[int], Batch]]:
    """Batches of windows of like length, with their numbers; the tokens read are the response.

    Padded on the right whatever the tokenizer says: there, positions count as without padding.
    """
    padding = pad_token(tokenizer)
    order = sorted(range(len(shown)), key=lambda number: len(shown[number]))
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        pairs = [(shown[number].context, shown[number].read) for number in numbers]
        yield numbers, pad(pairs, padding, False, 1, device)


def longest(model: Any, wanted: int | None = None) -> int:
    """Tokens read at once: what is wanted, or as many as the model has places for.

    Raises:
        ConfigError: More than it has, or next to none.
    """
    config: Any = plain_model(model).config
    text = config.get_text_config()
    room = int(getattr(text, "max_position_embeddings", None) or 512)
    if wanted is not None and not 8 <= wanted <= room:
        raise ConfigError(
            f"max_length={wanted}: this model reads 8 to {room} tokens at once. Longer texts are "
            "read in windows; give a number in that range."
        )
    return wanted or room


def check_writes(model: Any) -> None:
    """Refuse a model that does not write from left to right.

    Raises:
        ConfigError: It cannot generate.
    """
    plain = plain_model(model)
    if not getattr(plain, "can_generate", bool)():
        raise ConfigError(
            f"{type(plain).__name__} does not write answers, so there is no stream to score. Score "
            "finished texts with `guard.score`, or fit a guard on the model that writes."
        )


def normal(text: str) -> str:
    """A text as people would compare it: words and numbers in lower case.

    >>> normal("How do I  kill a Python-process?")
    'how do i kill a python process'
    """
    return " ".join("".join(c if c.isalnum() else " " for c in text.casefold()).split())


def text_hash(prompt: Prompt) -> int:
    """63 bits of SHA-256 over what is asked and answered, case and punctuation aside."""
    said = [normal(str(message["content"])) for message in prompt.messages]
    # A text without a letter or number is compared as it stands.
    text = "\n".join([*said, normal(prompt.response or "")]).strip()
    return int(sha256((text or text_of_example(prompt)).encode())[:16], 16) >> 1


def text_hashes(prompts: Sequence[Prompt]) -> torch.Tensor:
    """:func:`text_hash` of each, int64."""
    return torch.tensor([text_hash(prompt) for prompt in prompts], dtype=torch.long)

"""Labelled prompts to batches of tokens: the only file that knows chat templates.

A prompt is a string (one user turn), a list of messages, or a mapping with ``prompt`` or
``messages`` and, where a method reads answers, a ``response``; what TRL's data sets hold goes in
unchanged. Everything downstream sees a :class:`Batch` and asks it for tokens by name, so padding
side and template stay here.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from safeft.errors import PromptError
from safeft.progress import progress

logger = logging.getLogger(__name__)

TokenChoice: TypeAlias = Literal["last_prompt", "post_instruction", "prompt", "response"]
"""Which tokens of a batch are read; see :meth:`Batch.choose`."""

PromptLike: TypeAlias = "str | Sequence[Mapping[str, str]] | Mapping[str, Any] | Prompt"


@dataclass(frozen=True)
class Prompt:
    """What a user says, as chat messages, and the answer to it where one is given."""

    messages: tuple[Mapping[str, str], ...]
    response: str | None = None

    @property
    def text(self) -> str:
        """The last message's content: what a judge is shown as the question."""
        return self.messages[-1]["content"]


def as_prompts(items: Iterable[PromptLike]) -> list[Prompt]:
    """Strings, message lists and TRL-style rows as :class:`Prompt` values.

    Raises:
        PromptError: An item is empty or of a shape that holds no prompt.

    Example:
        >>> as_prompts(["Hello", {"prompt": "Hi", "response": "Good day"}])[1].response
        'Good day'
    """
    if isinstance(items, str | Mapping):
        raise PromptError(
            f"Prompts are given as one {type(items).__name__}; give a list, or each letter would "
            "count as a prompt."
        )
    return [_as_prompt(item, number) for number, item in enumerate(items)]


def _as_prompt(item: PromptLike, number: int) -> Prompt:
    if isinstance(item, Prompt):
        return item
    if isinstance(item, Mapping):
        body = next((item[k] for k in ("prompt", "messages") if item.get(k) is not None), None)
        if body is None:
            raise PromptError(
                f"Prompt {number} has the keys {sorted(item)}; a mapping needs `prompt` or "
                "`messages` so that it can be put into the chat template."
            )
        answers = (item[k] for k in ("response", "completion") if item.get(k) is not None)
        answer = next(answers, None)
        if isinstance(answer, Sequence) and not isinstance(answer, str):
            answer = answer[-1].get("content") if answer else None
        prompt = _as_prompt(body, number)
        return prompt if answer is None else replace(prompt, response=str(answer))
    if isinstance(item, str):
        return _not_blank(Prompt(({"role": "user", "content": item},)), number)
    messages = tuple(item) if isinstance(item, Sequence) else ()
    if not messages or not all(
        isinstance(m, Mapping) and "role" in m and isinstance(m.get("content"), str)
        for m in messages
    ):
        raise PromptError(
            f"Prompt {number} is {item!r}; give a string, or a list of messages with `role` and "
            "`content` (text)."
        )
    if messages[-1]["role"] == "assistant":
        if len(messages) == 1:
            raise PromptError(
                f"Prompt {number} has only an assistant message; a prompt needs a user turn."
            )
        return _not_blank(Prompt(messages[:-1], messages[-1]["content"]), number)
    return _not_blank(Prompt(messages), number)


def _not_blank(prompt: Prompt, number: int) -> Prompt:
    if not prompt.text.strip():
        raise PromptError(
            f"Prompt {number} is empty. An empty prompt would be located on template tokens "
            "alone; remove it."
        )
    return prompt


@dataclass(frozen=True)
class Batch:
    """Padded tokens of several prompts, each followed by its response where there is one.

    Attributes:
        input_ids: ``(prompts, tokens)`` int64.
        attention_mask: ``(prompts, tokens)`` int64, 0 on padding of either side.
        is_prompt: ``(prompts, tokens)`` bool, template tokens included.
        is_response: ``(prompts, tokens)`` bool.
        tail: How many template tokens follow the instruction.
    """

    input_ids: Tensor
    attention_mask: Tensor
    is_prompt: Tensor
    is_response: Tensor
    tail: int

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of a forward pass; positions count real tokens, on either side."""
        positions = (self.attention_mask.cumsum(-1) - 1).clamp(min=0)
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": positions,
        }

    def answered(self, tokens: Sequence[int]) -> "Batch":
        """The prompts alone, padded on the left, each followed by the same answer ``tokens``."""
        width = self.input_ids.shape[1]
        places = torch.arange(width, device=self.is_prompt.device)
        after = width - 1 - torch.where(self.is_prompt, places, -1).amax(1)
        source = (torch.arange(width) - after[:, None].cpu()) % width
        rows = len(self.input_ids)
        given = torch.tensor(tokens, dtype=torch.long).expand(rows, len(tokens))

        def shifted(values: Tensor, tail: Tensor) -> Tensor:
            moved = values.gather(1, source.to(values.device))
            return torch.cat([moved, tail.to(values)], dim=1)

        is_prompt = shifted(self.is_prompt, torch.zeros_like(given))
        is_response = torch.zeros_like(is_prompt)
        is_response[:, width:] = True
        return Batch(
            shifted(self.input_ids, given),
            (is_prompt | is_response).long(),
            is_prompt,
            is_response,
            self.tail,
        )

    def choose(self, choice: TokenChoice) -> Tensor:
        """``(prompts, tokens)`` bool: the tokens that ``choice`` names.

        ``last_prompt`` is the token whose output starts the answer, ``post_instruction`` the
        template tokens after the instruction (that one included), ``prompt`` all of the prompt.
        """
        if choice == "response":
            return self.is_response
        if choice == "prompt":
            return self.is_prompt
        from_end = self.is_prompt.flip(-1).cumsum(-1).flip(-1)
        return self.is_prompt & (from_end <= (1 if choice == "last_prompt" else self.tail))


def input_device(model: Any) -> torch.device:
    """Where a model wants its tokens; one that is kept elsewhere between uses says so itself."""
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    place = getattr(hook, "execution_device", None)
    if place is None:
        return model.device
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)


def batches(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    max_length: int = 1024,
    chat_template: str | None = None,
    description: str = "",
) -> Iterator[Batch]:
    """Batches of ``prompts``, of like length within a window, so that little is spent on padding.

    Order is therefore not kept; statistics do not depend on it. A prompt above ``max_length``
    tokens loses its beginning, never the template tokens that start the answer.

    Raises:
        PromptError: The tokenizer has no chat template and none is given.
    """
    tail = post_instruction_length(tokenizer, chat_template)
    padding = pad_token(tokenizer)
    left = tokenizer.padding_side == "left"
    window = 64 * batch_size
    starts = range(0, len(prompts), window)
    truncated = 0
    bar = iter(progress(range(-(-len(prompts) // batch_size)), description or "batches"))
    for start in starts:
        pairs: list[tuple[list[int], list[int]]] = []
        for prompt in prompts[start : start + window]:
            ids = prompt_tokens(tokenizer, prompt, chat_template)
            answer = [] if prompt.response is None else _ids(tokenizer, prompt.response)
            if len(ids) + len(answer) > max_length:
                truncated += 1
                answer = answer[: max(max_length // 2, max_length - len(ids))]
            pairs.append((ids[-(max_length - len(answer)) :], answer))
        pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        for first in range(0, len(pairs), batch_size):
            next(bar, None)
            yield pad(pairs[first : first + batch_size], padding, left, tail, device)
    next(bar, None)
    if truncated:
        logger.warning("%d prompts were longer than %d tokens and were cut.", truncated, max_length)


def pad(
    pairs: Sequence[tuple[list[int], list[int]]],
    padding: int,
    left: bool,
    tail: int,
    device: torch.device | str,
) -> Batch:
    """One batch from (prompt tokens, answer tokens) pairs, padded on one side."""
    width = max(len(ids) + len(answer) for ids, answer in pairs)
    input_ids = torch.full((len(pairs), width), padding)
    is_prompt = torch.zeros(len(pairs), width, dtype=torch.bool)
    is_response = torch.zeros_like(is_prompt)
    for row, (ids, answer) in enumerate(pairs):
        start = width - len(ids) - len(answer) if left else 0
        middle, end = start + len(ids), start + len(ids) + len(answer)
        input_ids[row, start:end] = torch.tensor(ids + answer)
        is_prompt[row, start:middle] = True
        is_response[row, middle:end] = True
    attention = (is_prompt | is_response).long()
    moved = (tensor.to(device) for tensor in (input_ids, attention, is_prompt, is_response))
    return Batch(*moved, tail=tail)


def render(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, chat_template: str | None = None
) -> str:
    """The prompt as the model's own template writes it, up to where the answer starts.

    Templates that can open a chain of thought (``enable_thinking``) are asked not to: refusal is
    read off the first tokens of the answer.

    Raises:
        PromptError: No chat template, or the template refuses these messages.
    """
    if chat_template is None and tokenizer.chat_template is None:
        raise PromptError(
            "The tokenizer has no chat template, so it is unknown where a prompt ends and an "
            "answer starts; locating on bare text would read the wrong tokens. Use the chat "
            "model's own tokenizer, or give a Jinja template (`chat_template`, or "
            "--chat_template_path FILE)."
        )
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in prompt.messages],
            chat_template=chat_template,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
    except Exception as error:  # Jinja and transformers raise many kinds here; all mean the same.
        raise PromptError(
            f"The chat template cannot write {prompt.text[:60]!r}: {error}. "
            "Check the roles of its messages against the template."
        ) from error
    return str(text)


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, chat_template: str | None = None
) -> list[int]:
    """Token numbers of :func:`render`."""
    return _ids(tokenizer, render(tokenizer, prompt, chat_template))


def post_instruction_length(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None
) -> int:
    """How many template tokens, at least 1, stand between the instruction and the answer."""
    probe = "Alpha"
    text = render(tokenizer, as_prompts([probe])[0], chat_template)
    after = text[text.rindex(probe) + len(probe) :] if probe in text else ""
    return max(len(_ids(tokenizer, after)), 1)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # pyright: ignore[reportReturnType]


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The number to pad with: the pad token's, or the end token's.

    Raises:
        PromptError: The tokenizer has neither.
    """
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if candidate is not None:
            return int(candidate)  # pyright: ignore[reportArgumentType]
    raise PromptError(
        "The tokenizer has neither a pad nor an end-of-sequence token, so prompts of unlike length "
        "cannot share a batch. Set `tokenizer.pad_token`."
    )

"""Labelled prompts to batches of tokens: the only file that knows chat templates.

A prompt is a string (one user turn), a list of messages, or a mapping with ``prompt`` or
``messages`` and, where a method reads answers, a ``response``; what TRL's data sets hold goes in
unchanged, images included. Everything downstream sees a :class:`Batch` and asks it for tokens by
name, so padding side and template stay here.

A model that sees images has a processor, which goes where a tokenizer goes. Prompts with images
and prompts without never share a batch.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from transformers import BatchFeature, PreTrainedTokenizerBase

from safeft.batch import Batch, TokenChoice, input_device, pad
from safeft.errors import PromptError
from safeft.forms import Prompt, PromptLike, as_prompts, parts_of, text_of
from safeft.images import open_picture
from safeft.progress import progress
from safeft.sites import plain_model

if TYPE_CHECKING:
    from transformers import ProcessorMixin

__all__ = [
    "Batch",
    "Prompt",
    "PromptLike",
    "Reader",
    "TokenChoice",
    "as_prompts",
    "batches",
    "check_images",
    "collate",
    "grouped",
    "input_device",
    "pad",
    "pad_token",
    "post_instruction_length",
    "render",
    "row_of",
    "tokenizer_of",
]

logger = logging.getLogger(__name__)

Reader: TypeAlias = "PreTrainedTokenizerBase | ProcessorMixin"
"""What turns prompts into a model's input: a tokenizer, or a processor where it sees images."""


@dataclass(frozen=True)
class Row:
    """One prompt on its way into a batch.

    Attributes:
        prompt: The prompt.
        text: As the template writes it.
        ids: Its tokens; an image still counts as one, and grows when the batch is made.
        answer: The response's tokens.
    """

    prompt: Prompt
    text: str
    ids: list[int]
    answer: list[int]


def batches(
    tokenizer: Reader,
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
    tokens loses its beginning, never the template tokens that start the answer; one with images
    loses nothing, and is an error.

    Args:
        tokenizer: The model's tokenizer, or its processor.
        prompts: What is asked.
        batch_size: Prompts in a batch.
        device: Where the batches are to be.
        max_length: Tokens of a prompt with its response.
        chat_template: A Jinja template instead of the tokenizer's.
        description: Of the progress bar.

    Raises:
        PromptError: There is no chat template, or it, the tokenizer or ``max_length`` has no room
            for a prompt's images.
    """
    tail = post_instruction_length(tokenizer, chat_template)
    left = tokenizer_of(tokenizer).padding_side == "left"
    window = 64 * batch_size
    truncated = 0
    bar = iter(progress(range(-(-len(prompts) // batch_size)), description or "batches"))
    for start in range(0, len(prompts), window):
        chosen = prompts[start : start + window]
        rows = [row_of(tokenizer, prompt, chat_template) for prompt in chosen]
        for numbers in grouped(rows, batch_size):
            group = [rows[number] for number in numbers]
            truncated += sum(len(row.ids) + len(row.answer) > max_length for row in group)
            next(bar, None)
            yield collate(tokenizer, group, left, tail, device, max_length)
    next(bar, None)
    if truncated:
        logger.warning("%d prompts were longer than %d tokens and were cut.", truncated, max_length)


def row_of(
    tokenizer: Reader, prompt: Prompt, chat_template: str | None = None, answered: bool = True
) -> Row:
    """A prompt as text and tokens, its images not yet opened.

    Raises:
        PromptError: See :func:`render`.
    """
    text = render(tokenizer, prompt, chat_template)
    plain = tokenizer_of(tokenizer)
    answer = _ids(plain, prompt.response) if answered and prompt.response is not None else []
    if tokenizer is not plain and _placeholder_id(tokenizer) in answer:
        raise PromptError(
            f"The response to {prompt.text[:60]!r} holds {_placeholder(tokenizer)!r}, for which "
            "the model would look for an image. Take it out of the response."
        )
    return Row(prompt, text, _ids(plain, text, _starts_itself(tokenizer, text)), answer)


def grouped(rows: Sequence[Row], batch_size: int) -> list[list[int]]:
    """Numbers of ``rows`` batch by batch: text before images, short before long."""
    groups = []
    for with_images in (False, True):
        numbers = [n for n, row in enumerate(rows) if bool(row.prompt.images) is with_images]
        numbers.sort(key=lambda n: len(rows[n].ids) + len(rows[n].answer))
        groups += [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]
    return groups


def collate(
    tokenizer: Reader,
    rows: Sequence[Row],
    left: bool,
    tail: int,
    device: torch.device | str,
    max_length: int,
) -> Batch:
    """One batch of rows that all have images, or all have none; see :func:`batches`.

    Raises:
        PromptError: An image cannot be read, the processor cannot take it, or there is no room.
    """
    padding = pad_token(tokenizer)
    if not rows[0].prompt.images:
        pairs = [_cut(row.ids, row.answer, max_length) for row in rows]
        return pad(pairs, padding, left, tail, device)
    seen = _processed(tokenizer, rows)
    ids = [list(map(int, row)) for row in seen.pop("input_ids")]
    seen.pop("attention_mask", None)
    types = {name: seen.pop(name) for name in list(seen) if name.endswith("token_type_ids")}
    for row, tokens in zip(rows, ids, strict=True):
        if len(tokens) + len(row.answer) > max_length:
            raise PromptError(
                f"{row.prompt.text[:60]!r} has {len(tokens) + len(row.answer)} tokens with its "
                f"{len(row.prompt.images)} image(s), above max_length={max_length}; cut short, the "
                "model would be shown part of an image. Raise max_length, or use smaller images."
            )
    pairs = [(tokens, row.answer) for tokens, row in zip(ids, rows, strict=True)]
    images = dict(BatchFeature(seen, tensor_type="pt"))
    return pad(pairs, padding, left, tail, device, images, types)


def _cut(ids: list[int], answer: list[int], max_length: int) -> tuple[list[int], list[int]]:
    if len(ids) + len(answer) > max_length:
        answer = answer[: max(max_length // 2, max_length - len(ids))]
    return ids[-(max_length - len(answer)) :], answer


def _processed(processor: Any, rows: Sequence[Row]) -> dict[str, Any]:
    """What the model's own processor makes of texts and images, not yet padded."""
    images = [[open_picture(image) for image in row.prompt.images] for row in rows]
    try:
        return dict(
            processor(
                text=[row.text for row in rows],
                images=images,
                add_special_tokens=_starts_itself(processor, rows[0].text),
            )
        )
    except Exception as error:  # Each model's processor fails in ways of its own.
        raise PromptError(
            f"{type(processor).__name__} cannot take the images of {rows[0].prompt.text[:60]!r} "
            f"and {len(rows) - 1} more prompts: {error}. Check their size and the processor's "
            "settings."
        ) from error


def render(tokenizer: Reader, prompt: Prompt, chat_template: str | None = None) -> str:
    """The prompt as the model's own template writes it, up to where the answer starts.

    Templates that can open a chain of thought (``enable_thinking``) are asked not to: refusal is
    read off the first tokens of the answer. Templates of processors are given messages in parts.

    Raises:
        PromptError: No chat template, or the template refuses these messages, or it, or the
            tokenizer, leaves out their images.
    """
    plain = tokenizer_of(tokenizer)
    sees = plain is not tokenizer
    if prompt.images and not sees:
        raise PromptError(
            f"{prompt.text[:60]!r} comes with {len(prompt.images)} image(s), and "
            f"{type(tokenizer).__name__} reads text only: the model would never be shown them. "
            "Give a vision-language model and its processor (AutoProcessor), or prompts of text."
        )
    template = chat_template or (_template_of(tokenizer) if sees else None)
    if template is None and plain.chat_template is None:
        raise PromptError(
            "The tokenizer has no chat template, so it is unknown where a prompt ends and an "
            "answer starts; locating on bare text would read the wrong tokens. Use the chat "
            "model's own tokenizer, or give a Jinja template (`chat_template`, or "
            "--chat_template_path FILE)."
        )
    written = parts_of if sees else text_of
    messages: Any = [{**m, "content": written(m["content"])} for m in prompt.messages]
    try:
        text = plain.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
    except Exception as error:  # Jinja and transformers raise many kinds here; all mean the same.
        raise PromptError(
            f"The chat template cannot write {prompt.text[:60]!r}: {error}. "
            "Check the roles of its messages against the template."
        ) from error
    if sees:
        _check_places(tokenizer, prompt, str(text))
    return str(text)


def _template_of(processor: Any) -> str | None:
    own = processor.chat_template
    return own.get("default") if isinstance(own, dict) else own


def _check_places(processor: Any, prompt: Prompt, text: str) -> None:
    """Each image has its one place in the text, and nothing else looks like one."""
    place, images = _placeholder(processor), len(prompt.images)
    if place is None and images:
        raise PromptError(
            f"{type(processor).__name__} has no image token, so {prompt.text[:60]!r} would lose "
            f"its {images} image(s). Give the processor of a vision-language model."
        )
    found = 0 if place is None else text.count(place)
    if found != images:
        raise PromptError(
            f"The chat template writes {found} times {place!r} for the {images} image(s) of "
            f"{prompt.text[:60]!r}, so text and images would not match. Use the model's own chat "
            f"template, and keep {place!r} out of what is asked."
        )
    if "'type': 'text'" in text:
        raise PromptError(
            f"The chat template writes {prompt.text[:60]!r} as a list: it is made for messages of "
            "plain text. Use the processor's own template, or a tokenizer for prompts of text."
        )


def post_instruction_length(tokenizer: Reader, chat_template: str | None = None) -> int:
    """How many template tokens, at least 1, stand between the instruction and the answer."""
    probe = "Alpha"
    text = render(tokenizer, as_prompts([probe])[0], chat_template)
    after = text[text.rindex(probe) + len(probe) :] if probe in text else ""
    return max(len(_ids(tokenizer_of(tokenizer), after)), 1)


def tokenizer_of(reader: Reader) -> PreTrainedTokenizerBase:
    """The tokenizer itself, of a processor its own."""
    return getattr(reader, "tokenizer", reader)  # pyright: ignore[reportReturnType]


def check_images(model: Any, prompts: Iterable[Prompt]) -> None:
    """Refuse prompts with images for a model that reads text only, before its first pass.

    Raises:
        PromptError: A prompt has an image, and the model's forward takes none.
    """
    with_image = next((prompt for prompt in prompts if prompt.images), None)
    plain = plain_model(model)
    if with_image is not None and "pixel_values" not in signature(plain.forward).parameters:
        raise PromptError(
            f"{with_image.text[:60]!r} comes with an image, and {type(plain).__name__} reads text "
            "only. Give a vision-language model, or prompts of text."
        )


def _placeholder(processor: Any) -> str | None:
    """What the template writes where an image is to be."""
    return getattr(processor, "image_token", None)


def _placeholder_id(processor: Any) -> int | None:
    place = _placeholder(processor)
    return None if place is None else processor.tokenizer.convert_tokens_to_ids(place)


def _starts_itself(reader: Any, text: str) -> bool:
    """Whether the start token is still to be added, as transformers decides it.

    Chat templates of tokenizers write their own; those of processors may leave it out (Llava).
    """
    plain = tokenizer_of(reader)
    return plain is not reader and not (plain.bos_token and text.startswith(str(plain.bos_token)))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, special: bool = False) -> list[int]:
    return tokenizer(text, add_special_tokens=special)["input_ids"]  # pyright: ignore[reportReturnType]


def pad_token(tokenizer: Reader) -> int:
    """The number to pad with: the pad token's, or the end token's.

    Raises:
        PromptError: The tokenizer has neither.
    """
    plain = tokenizer_of(tokenizer)
    for candidate in (plain.pad_token_id, plain.eos_token_id):
        if candidate is not None:
            return int(candidate)  # pyright: ignore[reportArgumentType]
    raise PromptError(
        "The tokenizer has neither a pad nor an end-of-sequence token, so prompts of unlike length "
        "cannot share a batch. Set `tokenizer.pad_token`."
    )

"""The forms in which prompts come, and the one they are given: a :class:`Prompt`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from safeft.errors import PromptError
from safeft.images import Picture, check_picture, picture_hash

PromptLike: TypeAlias = "str | Sequence[Mapping[str, Any]] | Mapping[str, Any] | Prompt"

Content: TypeAlias = str | Sequence[Mapping[str, Any]]
"""What a message says: a text, or parts of text and image in order."""


@dataclass(frozen=True)
class Prompt:
    """What a user says, as chat messages, and the answer to it where one is given.

    Attributes:
        messages: Each with a ``role`` and a ``content``: a text, or a list of parts
            ``{"type": "text", "text": ...}`` and ``{"type": "image", "image": ...}``.
        response: The answer.
    """

    messages: tuple[Mapping[str, Any], ...]
    response: str | None = None

    @property
    def text(self) -> str:
        """The last message's text, none where an image says it all: what a judge is shown."""
        return text_of(self.messages[-1]["content"])

    @property
    def images(self) -> tuple[Picture, ...]:
        """Its images in order; files are opened when their batch is made."""
        found = (part for message in self.messages for part in parts_of(message["content"]))
        return tuple(part["image"] for part in found if part["type"] == "image")

    @property
    def record(self) -> list[dict[str, Any]]:
        """The messages as plain JSON with a hash for each image: to compare, and to hash.

        Raises:
            PromptError: An image cannot be opened.
        """
        return [{**m, "content": _without_pixels(m["content"])} for m in self.messages]


def parts_of(content: Content) -> list[dict[str, Any]]:
    """A message's content as parts; a text is one."""
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [dict(part) for part in content]


def text_of(content: Content) -> str:
    """The text parts of a message's content, one a line."""
    return "\n".join(part["text"] for part in parts_of(content) if part["type"] == "text")


def _without_pixels(content: Content) -> Any:
    if isinstance(content, str):
        return content
    return [
        {"type": "image", "sha256": picture_hash(part["image"])}
        if part["type"] == "image"
        else dict(part)
        for part in content
    ]


def as_prompts(items: Iterable[PromptLike]) -> list[Prompt]:
    """Strings, message lists and TRL-style rows as :class:`Prompt` values.

    A row's ``image`` or ``images`` take the places its messages keep for them
    (``{"type": "image"}``), or come before the first user message's text.

    Raises:
        PromptError: An item is empty or of a shape that holds no prompt, or an image is missing,
            unreadable or without a place.

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
        return _row(item, number)
    return _conversation(item, [], number)


def _row(row: Mapping[str, Any], number: int) -> Prompt:
    body = next((row[k] for k in ("prompt", "messages") if row.get(k) is not None), None)
    if body is None:
        raise PromptError(
            f"Prompt {number} has the keys {sorted(row)}; a mapping needs `prompt` or "
            "`messages` so that it can be put into the chat template."
        )
    answers = (row[k] for k in ("response", "completion") if row.get(k) is not None)
    answer = next(answers, None)
    if isinstance(answer, Sequence) and not isinstance(answer, str):
        answer = text_of(answer[-1].get("content") or "") if answer else None
    given = next((row[k] for k in ("images", "image") if row.get(k) is not None), [])
    several = isinstance(given, Sequence) and not isinstance(given, str)
    prompt = _conversation(body, list(given) if several else [given], number)
    return prompt if answer is None else replace(prompt, response=str(answer))


def _conversation(body: Any, images: list[Any], number: int) -> Prompt:
    if isinstance(body, str):
        body = [{"role": "user", "content": body}]
    messages = list(body) if isinstance(body, Sequence) else []
    if not messages or not all(map(_is_message, messages)):
        raise PromptError(
            f"Prompt {number} is {body!r}; give a string, or a list of messages with `role` and "
            '`content` (a text, or parts `{"type": "text", "text": ...}` and '
            '`{"type": "image", "image": ...}`).'
        )
    messages = _filled(messages, images, number)
    response = None
    if messages[-1]["role"] == "assistant":
        if len(messages) == 1:
            raise PromptError(
                f"Prompt {number} has only an assistant message; a prompt needs a user turn."
            )
        response = text_of(messages.pop()["content"])
    prompt = Prompt(tuple(messages), response)
    if not prompt.text.strip() and not prompt.images:
        raise PromptError(
            f"Prompt {number} is empty. An empty prompt would be located on template tokens "
            "alone; remove it."
        )
    return prompt


def _is_message(message: Any) -> bool:
    if not (isinstance(message, Mapping) and "role" in message):
        return False
    content = message.get("content")
    if isinstance(content, str):
        return True
    return isinstance(content, Sequence) and all(
        isinstance(part, Mapping)
        and (part.get("type") == "image" or isinstance(part.get("text"), str))
        and part.get("type", "text") in ("image", "text")
        for part in content
    )


def _filled(
    messages: list[Mapping[str, Any]], images: list[Any], number: int
) -> list[Mapping[str, Any]]:
    """The messages with each image in its place."""
    parts = [part for message in messages for part in parts_of(message["content"])]
    places = [part for part in parts if _is_open(part)]
    if images and not any(part.get("type") == "image" for part in parts):
        first = next((i for i, m in enumerate(messages) if m["role"] == "user"), 0)
        asked = messages[first]
        text = [part for part in parts_of(asked["content"]) if part.get("text") != ""]
        content = [*({"type": "image"} for _ in images), *text]
        messages = [*messages[:first], {**asked, "content": content}, *messages[first + 1 :]]
    elif len(images) != len(places):
        raise PromptError(
            f"Prompt {number} has {len(images)} images for {len(places)} image parts without one. "
            "Give each image part its `image`, or as many `images` as there are such parts."
        )
    waiting = iter(images)

    def filled(part: Mapping[str, Any]) -> Mapping[str, Any]:
        if part.get("type") != "image":
            return {"type": "text", "text": part["text"]}
        image = next(waiting) if _is_open(part) else _image_of(part)
        return {"type": "image", "image": check_picture(image, f"Prompt {number}")}

    return [
        m
        if isinstance(m["content"], str)
        else {**m, "content": [filled(part) for part in m["content"]]}
        for m in messages
    ]


def _is_open(part: Mapping[str, Any]) -> bool:
    return part.get("type") == "image" and _image_of(part) is None


def _image_of(part: Mapping[str, Any]) -> Any:
    """Data sets fill what a part does not have with ``None``."""
    return next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None)

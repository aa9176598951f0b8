"""Labelled texts from files, in the forms in which people keep them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safeft.errors import ConfigError, PromptError
from safeft.reading import read_columns, read_prompts

_TRUE = {"1", "true", "yes", "harmful", "unsafe", "toxic", "hateful"}
_FALSE = {"0", "false", "no", "harmless", "safe", "benign", "non-toxic", "non-hateful", ""}


@dataclass
class LabelledSet:
    """Texts of one source with their labels.

    Attributes:
        examples: Texts or chats.
        labels: Whether each is harmful, or the names of what it is.
    """

    examples: list[Any] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)


def read_labelled(
    tables: Sequence[str] = (),
    harmful: Sequence[str] = (),
    benign: Sequence[str] = (),
    *,
    text_column: str | None = None,
    label_column: str = "label",
    answer_column: str | None = None,
) -> dict[str, LabelledSet]:
    """Sets by name, from tables with labels and from files of one label.

    Args:
        tables: CSV, JSON or JSONL files with a text and a label; the file's name is the set's.
            A label is a word for yes or no (1, true, harmful, unsafe; 0, false, safe, benign), or
            names of what a text is, parted by commas.
        harmful: Files of harmful texts, as :func:`safeft.reading.read_prompts` takes them.
        benign: Files of harmless ones; with the harmful ones they are the set ``prompts``.
        text_column: Of tables; by default the usual names.
        label_column: Of tables.
        answer_column: Of tables: answers to the texts, which are then what is judged.

    Raises:
        PromptError: A file or column is missing, or a row has neither text nor label.
        ConfigError: No file at all.

    Example:
        >>> read_labelled(["moderation.csv"])["moderation"].labels  # doctest: +SKIP
        [True, False, frozenset({'hate', 'violence'})]
    """
    found: dict[str, LabelledSet] = {}
    for path in tables:
        name = Path(path).stem
        if name in found:
            raise ConfigError(f"Two tables are called {name!r}; rename one, or results would mix.")
        found[name] = _table(path, text_column, label_column, answer_column)
    for paths, label in ((harmful, True), (benign, False)):
        for path in paths:
            texts = read_prompts(path, text_column)
            own = found.setdefault("prompts", LabelledSet())
            own.examples += texts
            own.labels += [label] * len(texts)
    if not found:
        raise ConfigError(
            "No labelled texts are given. Give tables with a label (`data`), or files of harmful "
            "and of harmless texts (`harmful`, `benign`)."
        )
    return found


def read_streams(
    path: str, tokenizer: Any
) -> tuple[list[tuple[dict[str, str], int]], list[dict[str, str]]]:
    """Answers to be scored while they grow: unsafe ones, each with its boundary, and safe ones.

    Args:
        path: A table with ``prompt``, ``response`` and ``unsafe_from``: the character of the
            response from which it is unsafe, 0 for its first; empty for a safe one.
        tokenizer: The model's, to count tokens before the boundary.

    Raises:
        PromptError: A file or column is missing, an answer is empty, or a boundary is not inside
            its answer.

    Example:
        >>> unsafe, safe = read_streams("streams.jsonl", tokenizer)  # doctest: +SKIP
    """
    cells = read_columns(path, ["prompt", "response", "unsafe_from"])
    unsafe, safe = [], []
    for number, (asked, said, start) in enumerate(zip(*cells.values(), strict=True)):
        if not asked or not said:
            raise PromptError(f"Row {number} of {path!r} lacks a prompt or an answer; remove it.")
        chat = {"prompt": asked, "response": said}
        if not start:
            safe.append(chat)
        elif start.isdecimal() and int(start) < len(said):
            before = tokenizer(said[: int(start)], add_special_tokens=False)["input_ids"]
            unsafe.append((chat, len(before)))
        else:
            raise PromptError(
                f"Row {number} of {path!r} is unsafe_from {start!r}, and its answer has "
                f"{len(said)} characters. Give the number of one of them, or nothing where the "
                "answer is safe."
            )
    return unsafe, safe


def _table(path: str, text: str | None, label: str, answer: str | None) -> LabelledSet:
    columns = [label] if answer is None else [label, answer]
    cells = read_columns(path, columns)
    if text is None:
        # Whose name is usual is found as it is for prompts; rows without a text end the run.
        texts: list[Any] = read_prompts(path)
    else:
        texts = read_columns(path, [text])[text]
    if len(texts) != len(cells[label]) or not all(texts):
        raise PromptError(
            f"{path!r} has {len(cells[label])} rows and {len(texts)} texts: some are empty, so "
            "labels would not match. Remove these rows."
        )
    if answer is not None:
        texts = [
            {"prompt": asked, "response": said} if said else asked
            for asked, said in zip(texts, cells[answer], strict=True)
        ]
    labels = [_label(cell, number, path) for number, cell in enumerate(cells[label])]
    return LabelledSet(texts, labels)


def _label(cell: str, number: int, path: str) -> Any:
    word = cell.casefold()
    if word in _TRUE or word in _FALSE:
        return word in _TRUE
    names = frozenset(name.strip() for name in cell.split(",") if name.strip())
    if not names or any(name.replace(".", "", 1).isdigit() for name in names):
        raise PromptError(
            f"Row {number} of {path!r} has the label {cell!r}. Write 1 or 0 (harmful or safe), or "
            "names of what the text is, parted by commas."
        )
    return names

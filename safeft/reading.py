"""Prompts and examples from files: text, CSV, JSON, JSONL."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safeft.errors import PromptError
from safeft.forms import Prompt, PromptLike, as_prompts


def read_prompts(
    path: str | Path, column: str | None = None, image_column: str | None = None
) -> list[PromptLike]:
    """Prompts from a file: ``.txt`` one a line, ``.csv``, ``.jsonl``, or ``.json`` (a list).

    Args:
        path: The file. In a table, rows with an empty cell, and no image, are skipped.
        column: The column or key that holds the prompt. Needed only where a row has several and
            none of them is called ``prompt``, ``instruction``, ``question``, ``goal`` or ``text``.
        image_column: The column with the path of an image that comes before the prompt, as seen
            from the table's folder; by default ``image``, where there is one.

    Returns:
        Texts, and a :class:`~safeft.prompts.Prompt` where a row has an image.

    Raises:
        PromptError: No such file, no such column, no readable row, no such image; each message
            names the file.

    Example:
        ``read_prompts("advbench/harmful_behaviors.csv", column="goal")``
    """
    path = Path(path)
    prompts: list[PromptLike] = []
    for row in _read(path):
        image = _image(row, image_column, path)
        asked = (row if isinstance(row, str) else _cell(row, column, path)).strip()
        if asked or image:
            prompts.append({"prompt": asked, "image": image} if image else asked)
    if not prompts:
        raise PromptError(
            f"{str(path)!r} holds no prompt. Nothing can be located or measured on it."
        )
    made = _prompts(prompts, path)
    return [p if isinstance(p, str) else own for p, own in zip(prompts, made, strict=True)]


def read_examples(
    path: str | Path, prompt_column: str | None = None, answer_column: str | None = None
) -> list[Prompt]:
    """Prompts with answers from a table (CSV, JSON, JSONL), also in TRL's ``messages`` form.

    A column ``image`` holds paths of images, as for :func:`read_prompts`.

    Args:
        path: The file.
        prompt_column: Found by its usual names where not given.
        answer_column: Likewise: ``response``, ``completion``, ``answer``, ``output``.

    Raises:
        PromptError: No such file or column, or a row without an answer.
    """
    path = Path(path)
    rows: list[PromptLike] = []
    for row in _read(path):
        if isinstance(row, Mapping) and prompt_column is None and "messages" in row:
            rows.append(row)
            continue
        asked = _cell(row, prompt_column, path)
        answer = _cell(row, answer_column, path, _USUAL_ANSWERS)
        rows.append({"prompt": asked, "response": answer, "image": _image(row, None, path)})
    examples = _prompts(rows, path)
    if not examples or not all(example.response for example in examples):
        raise PromptError(
            f"{str(path)!r} has {len(examples)} rows, and some without an answer; nothing can be "
            "learnt from those or measured on them. Remove them."
        )
    return examples


def read_columns(path: str | Path, columns: Sequence[str]) -> dict[str, list[str]]:
    """Several columns of a table (CSV, JSON, JSONL), such as one prompt in several languages.

    Args:
        path: The file.
        columns: Their names.

    Returns:
        Column to cells, in the order of the rows, stripped; an empty cell is ``""``.

    Raises:
        PromptError: No such file or column (those that are there are named), or a column without
            any text.

    Example:
        ``read_columns("multijail/MultiJail.csv", ["en", "it"])["it"]``
    """
    path = Path(path)
    rows = _read(path)
    table = {name: [_cell(row, name, path).strip() for row in rows] for name in columns}
    for name, cells in table.items():
        if not any(cells):
            raise PromptError(
                f"{str(path)!r} holds no text in the column {name!r} ({len(cells)} rows). Nothing "
                "can be located or measured on it; fill it, or leave it out."
            )
    return table


def _read(path: Path) -> list[Any]:
    if not path.is_file():
        raise PromptError(
            f"There is no prompt file {str(path)!r}. Give the path of an existing file."
        )
    try:
        return _rows(path.suffix.lower(), path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise PromptError(
            f"{str(path)!r} cannot be read as {path.suffix or 'text'}: {error}. "
            "Save it as UTF-8 text (one prompt a line), CSV, JSON or JSONL."
        ) from error


def _rows(suffix: str, text: str) -> list[Any]:
    if suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text, newline="")))
    if suffix == ".jsonl":
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    if suffix == ".json":
        rows = json.loads(text)
        return rows if isinstance(rows, list) else [rows]
    return text.split("\n")


def _image(row: Any, column: str | None, path: Path) -> Path | None:
    """The row's image, which may be none where no column was asked for by name."""
    if not isinstance(row, Mapping) or (column is None and _IMAGE not in row):
        return None
    name = _cell(row, column or _IMAGE, path).strip()
    return path.parent / name if name else None


def _prompts(rows: Sequence[PromptLike], path: Path) -> list[Prompt]:
    try:
        return as_prompts(rows)
    except PromptError as error:
        raise PromptError(
            f"{str(path)!r} holds what is no prompt (a column `image` is read as paths of images, "
            f"as seen from the table's folder). {error}"
        ) from error


_IMAGE = "image"
_USUAL_PROMPTS = ("prompt", "instruction", "question", "goal", "text")
_USUAL_ANSWERS = ("response", "completion", "answer", "output")


def _cell(row: Any, column: str | None, path: Path, usual: Sequence[str] = _USUAL_PROMPTS) -> str:
    if not isinstance(row, Mapping):
        raise PromptError(f"{str(path)!r} holds the row {row!r}; a mapping with columns is needed.")
    if column is None:
        only = [name for name in row if name != _IMAGE] if usual is _USUAL_PROMPTS else []
        found = [name for name in usual if name in row] or (only if len(only) == 1 else [])
        if not found:
            raise PromptError(
                f"{str(path)!r} has the columns {list(row)}; say which one is meant "
                f"(usual names are {', '.join(usual)})."
            )
        column = found[0]
    if column not in row:
        raise PromptError(
            f"{str(path)!r} has no column {column!r}; it has {list(row)}. Name one of these."
        )
    value = row[column]
    if isinstance(value, list | Mapping):
        raise PromptError(
            f"{str(path)!r} holds {type(value).__name__} values in {column!r}; a text is needed. "
            "Name a column of texts, or write one prompt a line."
        )
    return value if isinstance(value, str) else ("" if value is None else str(value))

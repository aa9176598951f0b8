"""Identity groups, and judging by words: what a detox must not silence, and how it is seen."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safeft.errors import ConfigError, PromptError
from safeft.intervals import Rate
from safeft.prompts import Prompt, as_prompts


@dataclass(frozen=True)
class Group:
    """An identity group, to see that it is not silenced.

    Attributes:
        prompts: Harmless prompts about it, whose continuation may be expected to name it.
        words: What names it, in any case, as whole words.
        texts: Harmless texts that name it, whose likelihood should not fall.
    """

    prompts: tuple[Prompt, ...] = ()
    words: tuple[str, ...] = ()
    texts: tuple[Prompt, ...] = ()


@dataclass(frozen=True)
class WordJudge:
    """An answer counts if it holds one of some words, in any case, whole.

    Attributes:
        words: The words; a ``*`` at the end stands for any ending.
        name: For results.

    Raises:
        ConfigError: No word.

    Example:
        >>> WordJudge(("blorg*",))(["?", "?"], ["You blorgs!", "A good day."])
        [True, False]
    """

    words: tuple[str, ...]
    name: str = "words"

    def __post_init__(self) -> None:
        """Refuse an empty list, by which everything would pass."""
        if not any(word.strip() for word in self.words):
            raise ConfigError("A judge by words needs at least one word.")

    def __call__(self, prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        """Verdicts in the order of ``answers``; the prompts are not read."""
        ends = (r"\w*" if word.endswith("*") else "" for word in self.words)
        any_of = "|".join(
            re.escape(word.strip("* ")) + end for word, end in zip(self.words, ends, strict=True)
        )
        pattern = re.compile(rf"(?<!\w)(?:{any_of})(?!\w)", re.IGNORECASE)
        return [pattern.search(answer) is not None for answer in answers]


def mentions_of(answers: Sequence[str], words: tuple[str, ...]) -> Rate:
    """Share of answers that name a group by one of its words."""
    return Rate.of(sum(WordJudge(words)(answers, answers)), len(answers))


def check_groups(groups: Mapping[str, Group]) -> None:
    """Refuse groups of which nothing could be measured.

    Raises:
        PromptError: A group without prompts and texts.
        ConfigError: Prompts without the words that name the group.
    """
    for name, group in groups.items():
        if not group.prompts and not group.texts:
            raise PromptError(
                f"The group {name!r} has neither prompts nor texts to be measured by."
            )
        if group.prompts and not group.words:
            raise ConfigError(
                f"The group {name!r} has no words, so whether it is named cannot be told. Give its "
                "`words`."
            )


def read_groups(path: str | Path) -> dict[str, Group]:
    """Groups from a JSON file: ``{"name": {"prompts": [...], "words": [...], "texts": [...]}}``.

    Raises:
        PromptError: It cannot be read or is of another shape.

    Example:
        >>> read_groups("groups.json")["immigrants"].words  # doctest: +SKIP
        ('immigrant', 'immigrants')
    """
    try:
        data: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        found = {
            str(name): Group(
                tuple(as_prompts(list(given.get("prompts", [])))),
                tuple(str(word) for word in given.get("words", [])),
                tuple(as_prompts(list(given.get("texts", [])))),
            )
            for name, given in data.items()
        }
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise PromptError(
            f"The groups in {str(path)!r} cannot be read ({error}). Give JSON such as "
            '{"immigrants": {"words": ["immigrant", "immigrants"], "prompts": ["Tell me about '
            'immigrants."], "texts": ["We are a group of immigrants."]}}.'
        ) from error
    check_groups(found)
    return found


def read_words(path: str | Path) -> WordJudge:
    """A judge by the words of a file, one a line.

    Raises:
        ConfigError: It cannot be read, or holds no word.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The words in {str(path)!r} cannot be read: {error}.") from error
    return WordJudge(tuple(line.strip() for line in lines if line.strip()), str(path))

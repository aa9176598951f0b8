"""Small things the testbeds' data share: pairs to prompts, and prompts compared as people would."""

import re
from collections.abc import Iterable, Sequence

from safeft.prompts import Prompt, as_prompts


def normal(text: str) -> str:
    """Words and numbers alone, in lower case: two prompts that agree in these are one.

    >>> normal("How do I kill a  Python process?")
    'how do i kill a python process'
    """
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def exchange(prompt: str, answer: str | None = None) -> Prompt:
    """One user turn, with its answer where there is one."""
    return as_prompts([{"prompt": prompt, "response": answer} if answer else prompt])[0]


def distinct(prompts: Iterable[Prompt], *, besides: Iterable[Prompt] = ()) -> list[Prompt]:
    """The prompts in order, each text once, without those that stand in `besides`."""
    seen = {normal(prompt.text) for prompt in besides}
    kept: list[Prompt] = []
    for prompt in prompts:
        key = normal(prompt.text)
        if key not in seen:
            seen.add(key)
            kept.append(prompt)
    return kept


def split(prompts: Sequence[Prompt], validation: int, test: int) -> dict[str, tuple[Prompt, ...]]:
    """The first `test` prompts and the next `validation`: what is reported does not depend on both.

    Raises:
        ValueError: There are fewer.
    """
    if len(prompts) < validation + test:
        raise ValueError(f"{len(prompts)} prompts cannot give {test} and {validation}.")
    return {
        "validation": tuple(prompts[test : test + validation]),
        "test": tuple(prompts[:test]),
    }

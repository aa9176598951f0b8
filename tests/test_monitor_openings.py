"""How refusals start, as the tiny tokenizer writes it: a token a byte."""

from collections import Counter
from typing import Any

import pytest

from safeft.errors import PromptError
from safeft.judge import PrefixJudge
from safeft.monitor import openings as module
from safeft.monitor.openings import _grouped, own_openings
from safeft.prompts import as_prompts
from tests.models import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text)["input_ids"])


def found_in(monkeypatch: pytest.MonkeyPatch, answers: list[str], **settings: Any) -> list[str]:
    """The openings' texts where the model answers so, in turn."""

    def answered(*_: Any, **__: Any) -> list[list[int]]:
        return [list(ids(text)) for text in answers]

    monkeypatch.setattr(module, "generate_tokens", answered)
    prompts = as_prompts([f"prompt {n}" for n in range(len(answers))])
    found = own_openings(tiny_model(), TOKENIZER, prompts, **settings)
    for each in found:
        assert each.texts == tuple(TOKENIZER.decode([*each.prefix, t]) for t in each.tokens)
    return [text for each in found for text in each.texts]


def test_they_are_as_short_as_the_judge_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = ["I cannot help", "I'm glad to help", "I cannot do it", "Sorry, but no", "I'm able"]
    found = found_in(monkeypatch, answers)
    assert found == ["I cannot", "Sorry, but"]
    assert PrefixJudge()([], found) == [True, True]
    assert PrefixJudge()([], [text[:-1] for text in found]) == [False, False]


def test_starts_with_one_head_are_one_group() -> None:
    starts = Counter({ids("ab"): 3, ids("ac"): 1, ids("x"): 2})
    first, second = _grouped(starts, TOKENIZER)
    assert (first.prefix, set(first.tokens)) == (ids("a"), {*ids("b"), *ids("c")})
    assert (second.prefix, second.tokens) == ((), ids("x"))


def test_rare_starts_are_left_out_and_there_are_six_at_most() -> None:
    common = Counter({ids("ab"): 96, ids("cd"): 2, ids("ef"): 2})
    assert [each.texts for each in _grouped(common, TOKENIZER)] == [("ab",)]
    many = Counter({ids(f"{letter}x"): 1 for letter in "abcdefgh"})
    assert len(_grouped(many, TOKENIZER)) == 6


def test_texts_given_are_taken_whole_without_those_that_others_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = found_in(monkeypatch, [], openings=["Non ", "No", "Mi dispiace", ""])
    assert sorted(found) == ["Mi dispiace", "No"]
    with pytest.raises(PromptError, match="hold no text"):
        found_in(monkeypatch, [], openings=[" "])


def test_a_model_that_refuses_nothing_is_an_error_that_shows_what_it_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(PromptError, match="None of 2 answers.*start as 'Sure, here'.*openings"):
        found_in(monkeypatch, ["Sure, here", "Of course"])


def test_prompts_answered_are_spread_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answered(model: Any, tokenizer: Any, prompts: Any, **_: Any) -> list[list[int]]:
        asked.extend(prompt.text for prompt in prompts)
        return [list(ids("I cannot")) for _ in prompts]

    monkeypatch.setattr(module, "generate_tokens", answered)
    own_openings(tiny_model(), TOKENIZER, as_prompts([str(n) for n in range(130)]))
    assert asked == [str(n) for n in range(0, 130, 3)]

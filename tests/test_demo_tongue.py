"""The made-up language: every word has one of its own, and can be read back."""

import doctest
import re

import safeft.demo.tongue
from safeft.demo import world
from safeft.demo.tongue import back, translate


def test_texts_of_the_world_come_back() -> None:
    for example in world.alignment(0, size=200):
        for text in (example.prompt, example.answer):
            assert back(translate(text)) == text


def test_words_are_other_words() -> None:
    texts = [*world.harmful("test"), *world.benign("test")]
    words = {word for text in texts for word in re.findall(r"[a-z]{3,}", text)}
    there = {translate(word) for word in words}
    assert len(there) == len(words)
    assert len(words & there) <= 3
    assert not any(world.is_refusal(translate(answer)) for answer in world.refusal_answers())


def test_doctests() -> None:
    assert doctest.testmod(safeft.demo.tongue).failed == 0

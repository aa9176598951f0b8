import doctest
from typing import Any

import pytest
from PIL import Image

from safeft.errors import ConfigError, PromptError
from safeft.guard import reading
from safeft.guard.reading import (
    as_example,
    batched,
    check_writes,
    longest,
    text_hash,
    text_hashes,
    windows,
)
from tests.guards import tiny_encoder
from tests.models import tiny_model, tiny_tokenizer

ANSWERED = {"prompt": "How do I bake bread?", "response": "With flour and water."}


def test_doctests() -> None:
    assert doctest.testmod(reading).failed == 0


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("length", [10, 16, 33, 1000])
@pytest.mark.parametrize("item", ["How do I bake bread at home?", ANSWERED], ids=["text", "chat"])
def test_windows_read_every_token_once(item: Any, length: int, chat: bool) -> None:
    tokenizer = tiny_tokenizer()
    prompt = as_example(item, 0)
    found = windows(tokenizer, prompt, length, chat)
    (whole,) = windows(tokenizer, prompt, 1000, chat)
    assert sum((window.read for window in found), []) == whole.read
    assert all(len(window) <= length and window.read for window in found)
    shown = str(tokenizer.decode(whole.read))
    assert (ANSWERED["response"] == shown) == (prompt.response is not None)
    sequence = whole.context + whole.read
    for window in found[1:]:
        assert len(window.context) == length // 2
        text = str(window.context + window.read)[1:-1]
        assert text in str(sequence)


def test_keys_tell_what_is_read_from_what_is_context() -> None:
    one, other = reading.Window([1], [2, 3]), reading.Window([1, 2], [3])
    assert one.key != other.key
    assert one.key == reading.Window([1], [2, 3]).key


def test_batches_are_padded_on_the_right_whatever_the_tokenizer_says() -> None:
    tokenizer = tiny_tokenizer("left")
    shown = [windows(tokenizer, as_example(t, 0), 100, False)[0] for t in ("abcd", "a", "abc")]
    seen: list[int] = []
    for numbers, batch in batched(tokenizer, shown, 2, "cpu"):
        seen += numbers
        assert bool(batch.attention_mask[:, 0].all())
        assert batch.is_response.sum(1).tolist() == [len(shown[n].read) for n in numbers]
    assert sorted(seen) == [0, 1, 2]


@pytest.mark.parametrize("item", ["", "  \n"])
def test_an_empty_text_is_named(item: str) -> None:
    with pytest.raises(PromptError, match="Text 7 is empty"):
        as_example(item, 7)


def test_images_are_refused() -> None:
    with pytest.raises(PromptError, match="Text 2.*image.*Leave the image out"):
        as_example({"prompt": "What is it?", "image": Image.new("RGB", (4, 4))}, 2)


def test_hashes_are_of_words_and_of_both_sides() -> None:
    prompts = [
        as_example(item, 0)
        for item in ("Kill a process!", "kill a  PROCESS", "kill the process", "!!!", "???",
                     ANSWERED, {**ANSWERED, "response": "No."}, ANSWERED["prompt"])
    ]  # fmt: skip
    hashes = text_hashes(prompts).tolist()
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 7
    assert all(0 <= value < 1 << 63 for value in hashes)
    assert text_hash(prompts[0]) == hashes[0]


def test_length_is_the_models() -> None:
    model = tiny_model(max_position_embeddings=64)
    assert longest(model) == 64
    assert longest(model, 32) == 32
    for wanted in (65, 2):
        with pytest.raises(ConfigError, match=f"max_length={wanted}.*8 to 64"):
            longest(model, wanted)


def test_only_writers_have_streams() -> None:
    check_writes(tiny_model())
    with pytest.raises(ConfigError, match="BertModel does not write answers"):
        check_writes(tiny_encoder())

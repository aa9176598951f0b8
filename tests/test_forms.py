import doctest
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import safeft.forms
from safeft.errors import PromptError
from safeft.forms import Prompt, as_prompts
from safeft.images import picture_hash

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Good day"}
SYSTEM = {"role": "system", "content": "Be kind"}
PLACE = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}
URL = {"role": "user", "content": [{"type": "image", "url": "http://a.b/c.png"}]}
TEXTS = ["Hello", "How do I bake bread?", "Hi", "Name a tree.", "Why is the sky blue at noon?"]

RED, BLUE = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))


ARROW, PLACE_OF_ARROW = (
    {
        "role": "user",
        "content": [
            {"type": "image", "image": image, "text": None},
            {"type": "text", "image": None, "text": "Hi"},
        ],
    }
    for image in (RED, None)
)
"""As data sets keep them, with nothing where a part has no such key."""


def said(*parts: Any) -> tuple[dict[str, Any], ...]:
    """One user message of text and images."""
    content = [
        {"type": "text", "text": part} if part == "Hi" else {"type": "image", "image": part}
        for part in parts
    ]
    return ({"role": "user", "content": content},)


@pytest.mark.parametrize(
    ("item", "messages", "response"),
    [
        ("Hi", (USER,), None),
        ([USER], (USER,), None),
        ((SYSTEM, USER), (SYSTEM, USER), None),
        ([USER, ANSWER], (USER,), "Good day"),
        ([USER, ANSWER, USER], (USER, ANSWER, USER), None),
        ({"prompt": "Hi"}, (USER,), None),
        ({"prompt": "Hi", "response": "No"}, (USER,), "No"),
        ({"prompt": "Hi", "completion": "No"}, (USER,), "No"),
        ({"prompt": [SYSTEM, USER], "completion": [ANSWER]}, (SYSTEM, USER), "Good day"),
        ({"prompt": [USER], "completion": []}, (USER,), None),
        ({"messages": [USER, ANSWER]}, (USER,), "Good day"),
        ({"messages": [USER, ANSWER], "response": "No"}, (USER,), "No"),
        ({"prompt": None, "messages": [USER]}, (USER,), None),
        ({"prompt": "Hi", "response": None, "completion": "No"}, (USER,), "No"),
        ({"prompt": "Hi", "response": 4}, (USER,), "4"),
        (Prompt((USER,), "No"), (USER,), "No"),
    ],
)
def test_forms_of_prompts(item: Any, messages: tuple, response: str | None) -> None:
    (found,) = as_prompts([item])
    assert found == Prompt(messages, response)
    assert found.text == "Hi"


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("", "Prompt 1 is empty"),
        (" \n", "Prompt 1 is empty"),
        ([{"role": "user", "content": " "}], "Prompt 1 is empty"),
        ({"prompt": ""}, "Prompt 1 is empty"),
        ({"messages": [{"role": "user", "content": ""}, ANSWER]}, "Prompt 1 is empty"),
        ({"question": "Hi"}, r"Prompt 1 has the keys \['question'\]"),
        ({"prompt": None}, r"Prompt 1 has the keys"),
        ([], "Prompt 1 is"),
        (3, "Prompt 1 is 3"),
        (["Hi"], "Prompt 1 is"),
        ([{"role": "user"}], "Prompt 1 is"),
        ([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}], "Prompt 1 is"),
        ([{"role": "user", "content": [{"type": "image"}]}], "Prompt 1 has 0 images for 1 image"),
        ([{"role": "user", "content": [{"type": "text"}]}], "Prompt 1 is"),
        ({"prompt": [PLACE, PLACE], "images": ["a.png"]}, "Prompt 1 has 1 images for 2 image"),
        ({"prompt": "Hi", "image": "nowhere.png"}, "Prompt 1 names the image 'nowhere.png', and"),
        ({"prompt": "Hi", "image": "http://a.b/c.png"}, "there is no such file.*no(t made|t) here"),
        ({"prompt": list(said(RED, "Hi")), "image": RED}, "Prompt 1 has 1 images for 0 image"),
        ([URL], "names the image 'http://a.b/c.png', and there is no such file"),
        ({"prompt": "Hi", "image": 3}, "Prompt 1 has a int for an image; give a Pillow image"),
        ({"prompt": "", "image": None}, "Prompt 1 is empty"),
        ([ANSWER], "Prompt 1 has only an assistant message"),
    ],
)
def test_what_is_no_prompt_is_named_by_its_number(item: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        as_prompts(["fine", item])


@pytest.mark.parametrize("items", ["Hello", {"prompt": "Hello"}])
def test_one_prompt_instead_of_a_list_is_refused(items: Any) -> None:
    with pytest.raises(PromptError, match="given as one (str|dict); give a list"):
        as_prompts(items)


def test_any_iterable_will_do() -> None:
    assert [p.text for p in as_prompts(text for text in TEXTS)] == TEXTS


@pytest.mark.parametrize(
    ("item", "messages"),
    [
        (list(said(RED, "Hi")), said(RED, "Hi")),
        (list(said("Hi", RED, BLUE)), said("Hi", RED, BLUE)),
        ({"prompt": "Hi", "image": RED}, said(RED, "Hi")),
        ({"prompt": "Hi", "images": [RED, BLUE]}, said(RED, BLUE, "Hi")),
        ({"prompt": [USER], "images": (RED,)}, said(RED, "Hi")),
        ({"prompt": [PLACE], "images": [RED]}, said(RED, "Hi")),
        ({"messages": [SYSTEM, USER, ANSWER], "image": RED}, (SYSTEM, *said(RED, "Hi"))),
        ({"prompt": [PLACE, ANSWER, PLACE], "images": [RED, BLUE]},
         (*said(RED, "Hi"), ANSWER, *said(BLUE, "Hi"))),
        ({"prompt": "", "image": RED}, said(RED)),
        ([ARROW], said(RED, "Hi")),
        ({"prompt": [PLACE_OF_ARROW], "images": [RED]}, said(RED, "Hi")),
        ({"prompt": "Hi", "image": None}, (USER,)),
        ({"prompt": [{"role": "user", "content": [{"text": "Hi"}]}]}, said("Hi")),
    ],
)  # fmt: skip
def test_forms_of_prompts_with_images(item: Any, messages: tuple) -> None:
    (found,) = as_prompts([item])
    assert found.messages == messages
    assert found.text in ("Hi", "")
    shown = [p["image"] for m in messages for p in m["content"] if isinstance(p, dict)
             and p["type"] == "image"]  # fmt: skip
    assert list(found.images) == shown
    assert as_prompts([found]) == [found]


def test_answers_in_parts_are_text() -> None:
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Good day"}]}
    assert as_prompts([[USER, answer]])[0].response == "Good day"
    assert as_prompts([{"prompt": "Hi", "completion": [answer]}])[0].response == "Good day"


def test_images_are_named_by_path_and_found_early(tmp_path: Path) -> None:
    RED.save(tmp_path / "red.png")
    for given in (tmp_path / "red.png", str(tmp_path / "red.png")):
        (found,) = as_prompts([{"prompt": "Hi", "image": given}])
        assert found.images == (given,)
        assert as_prompts([[{"role": "user", "content": [{"type": "image", "path": given}]}]])[
            0
        ].images == (given,)
    (tmp_path / "red.png").write_bytes(b"no picture")
    with pytest.raises(PromptError, match=r"red.png' cannot be read.*Save it again"):
        as_prompts([{"prompt": "Hi", "image": tmp_path / "red.png"}])


def test_records_are_json_and_hold_a_hash_for_each_image(tmp_path: Path) -> None:
    (plain,) = as_prompts([[SYSTEM, USER]])
    assert plain.record == [SYSTEM, USER]
    RED.save(tmp_path / "red.png")
    opened, named = as_prompts({"prompt": "Hi", "image": i} for i in (RED, tmp_path / "red.png"))
    other, unlike = as_prompts(
        [
            {"prompt": "Hi", "image": BLUE},
            {"prompt": "Hi", "image": Image.new("RGB", (8, 2), "red")},
        ]
    )
    assert opened.record == named.record
    assert len({json.dumps(p.record) for p in (opened, other, unlike, plain)}) == 4
    assert opened.record[0]["content"][0] == {"type": "image", "sha256": picture_hash(RED)}
    assert str(tmp_path) not in json.dumps(named.record)


def test_examples_of_forms_run() -> None:
    assert doctest.testmod(safeft.forms).failed == 0

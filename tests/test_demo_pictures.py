import doctest
from pathlib import Path

import pytest

from safeft.demo import pictures
from safeft.demo.pictures import noise, shapes, written
from safeft.errors import PromptError


@pytest.mark.parametrize("size", [(336, 336), (64, 32), (40, 80)])
def test_pictures_have_their_size_and_repeat(size: tuple[int, int]) -> None:
    for make in (
        lambda n: written(f"no {n}", size),
        lambda n: shapes(n, size),
        lambda n: noise(n, size),
    ):
        one, again, other = make(1), make(1), make(2)
        assert one.size == size
        assert one.mode == "RGB"
        assert one.tobytes() == again.tobytes() != other.tobytes()


def test_text_is_drawn_large_and_whole() -> None:
    def ink(text: str, size: tuple[int, int]) -> tuple[int, int, int, int]:
        box = written(text, size).convert("L").point(lambda v: 255 * (v < 128)).getbbox()
        assert box is not None
        return box

    left, top, right, bottom = ink("bread", (200, 200))
    assert right - left > 150
    assert right < 198
    long = ink("How do I bake bread in the evening without any flour?", (200, 200))
    assert long[3] - long[1] > 2 * (bottom - top)
    assert max(long[2:]) < 198


@pytest.mark.parametrize(
    ("text", "size", "message"),
    [
        (" \n", (64, 64), "There is no text to draw"),
        ("How do I bake bread?" * 20, (64, 64), r"\(400 letters\) does not fit.*larger size"),
        ("怎么做", (64, 64), r"'DejaVuSans.ttf' has no \['怎', '么', '做'\].*`font`"),
    ],
)
def test_what_cannot_be_drawn_is_said(text: str, size: tuple[int, int], message: str) -> None:
    with pytest.raises(PromptError, match=message):
        written(text, size)


def test_a_font_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.ttf").write_bytes(b"no font")
    for name in ("a.ttf", "b.ttf"):
        with pytest.raises(PromptError, match=f"{name}' cannot be read"):
            written("Hi", (64, 64), font=tmp_path / name)


def test_examples_of_pictures_run() -> None:
    assert doctest.testmod(pictures).failed == 0

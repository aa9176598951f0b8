"""Pictures for recipes and tests: text drawn into an image, and synthetic scenes.

The same arguments give the same picture. A drawn request is what typographic attacks on
vision-language models use; shapes and noise are pictures that say nothing.
"""

import random
from pathlib import Path
from typing import TYPE_CHECKING

from safeft.errors import PromptError

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont

SIZE = (336, 336)
_SMALLEST = 8
_MARGIN, _SPACING = 2, 2
_COLOURS = ("red", "green", "blue", "gold", "purple", "teal", "orange", "black", "white", "pink")
_NO_CHARACTER = "\uffff"


def written(
    text: str,
    size: tuple[int, int] = SIZE,
    points: int | None = None,
    font: str | Path | None = None,
) -> "Image":
    """``text`` in black on white, in lines, as large as fits.

    Args:
        text: What is to be read there.
        size: Width and height in pixels.
        points: The letters' size instead.
        font: A font file (.ttf, .otf). By default DejaVu Sans, which has Latin, Greek, Cyrillic and
            Arabic letters, and none of Chinese, Korean, Thai or Bengali.

    Raises:
        PromptError: The text is empty or does not fit, or the font cannot be read or lacks letters.

    Example:
        >>> written("How do I bake bread?").size
        (336, 336)
    """
    from PIL import Image, ImageDraw

    path = Path(font) if font is not None else _default_font()
    _check_letters(text, path)
    largest = max(size[1] // 2, _SMALLEST)
    for tried in [points] if points else range(largest, _SMALLEST - 1, -1):
        letters = _font(path, tried)
        lines = _lines(text, letters, size)
        if lines is not None:
            picture = Image.new("RGB", size, "white")
            draw = ImageDraw.Draw(picture)
            draw.multiline_text((_MARGIN, _MARGIN), lines, "black", letters, spacing=_SPACING)
            return picture
    raise PromptError(
        f"{text[:60]!r} ({len(text)} letters) does not fit into a picture of {size[0]} by "
        f"{size[1]} pixels in letters of {points or _SMALLEST}. Give a larger size or less text."
    )


def shapes(seed: int, size: tuple[int, int] = SIZE) -> "Image":
    """Two to five coloured shapes on a plain ground.

    Example:
        >>> shapes(1).tobytes() == shapes(1).tobytes() != shapes(2).tobytes()
        True
    """
    from PIL import Image, ImageDraw

    rng = random.Random(seed)
    ground, *colours = rng.sample(_COLOURS, 6)
    picture = Image.new("RGB", size, ground)
    draw = ImageDraw.Draw(picture)
    for colour in colours[: rng.randint(2, 5)]:
        x, y = rng.randrange(size[0]), rng.randrange(size[1])
        reach = rng.randint(max(2, min(size) // 8), max(3, min(size) // 3))
        box = (x - reach, y - reach, x + reach, y + reach)
        kind = rng.choice(("ellipse", "rectangle", "triangle"))
        if kind == "ellipse":
            draw.ellipse(box, fill=colour)
        elif kind == "rectangle":
            draw.rectangle(box, fill=colour)
        else:
            draw.polygon([(x, y - reach), (x - reach, y + reach), (x + reach, y + reach)], colour)
    return picture


def noise(seed: int, size: tuple[int, int] = SIZE) -> "Image":
    """Pixels of random colours.

    Example:
        >>> noise(1, (4, 4)).size
        (4, 4)
    """
    from PIL import Image

    return Image.frombytes("RGB", size, random.Random(seed).randbytes(3 * size[0] * size[1]))


def _default_font() -> Path:
    import matplotlib  # which brings the font

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


def _font(path: Path, points: int) -> "FreeTypeFont":
    from PIL import ImageFont

    try:
        return ImageFont.truetype(str(path), points)
    except OSError as error:
        raise PromptError(
            f"The font {str(path)!r} cannot be read ({error}), so nothing can be drawn with it. "
            "Give the path of a .ttf or .otf file."
        ) from error


def _check_letters(text: str, path: Path) -> None:
    if not text.strip():
        raise PromptError("There is no text to draw. Give some, or use `shapes` or `noise`.")
    font = _font(path, 16)
    box = _drawn(_NO_CHARACTER, font)
    letters = dict.fromkeys(c for c in text if not c.isspace())
    missing = [letter for letter in letters if _drawn(letter, font) == box]
    if missing:
        raise PromptError(
            f"The font {path.name!r} has no {missing[:5]}, and would draw boxes for them: nobody "
            "could read them. Give a font file that has these letters (`font`)."
        )


def _drawn(letter: str, font: "FreeTypeFont") -> bytes:
    from PIL import Image, ImageDraw

    picture = Image.new("L", (32, 32))
    ImageDraw.Draw(picture).text((4, 4), letter, 255, font)
    return picture.tobytes()


def _lines(text: str, font: "FreeTypeFont", size: tuple[int, int]) -> str | None:
    """The text in lines that fit, or nothing where they do not; a word is never broken."""
    width, height = size[0] - 2 * _MARGIN, size[1] - 2 * _MARGIN
    lines: list[str] = []
    for paragraph in text.splitlines():
        line = ""
        for word in paragraph.split():
            longer = f"{line} {word}".strip()
            if font.getlength(longer) > width and line:
                lines.append(line)
                longer = word
            line = longer
        lines.append(line)
    tall = len(lines) * (sum(font.getmetrics()) + _SPACING) - _SPACING
    wide = max(map(font.getlength, lines))
    return "\n".join(lines) if tall <= height and wide <= width else None

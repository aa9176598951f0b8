"""Images in prompts: found, opened, and named by a hash of what a model sees of them.

An image is a Pillow image or the path of a file. Files are looked at early and opened late, so
that memory does not grow with the prompts.
"""

from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from safeft.errors import ConfigError, PromptError
from safeft.files import sha256

if TYPE_CHECKING:
    from PIL.Image import Image

Picture: TypeAlias = "Image | str | Path"
"""A Pillow image, or the path of an image file."""


def check_picture(picture: Any, owner: str) -> Picture:
    """``picture``, if it is one; of a file only the start is read.

    Args:
        picture: What somebody gave for an image.
        owner: Whose it is, to name in an error ("Prompt 3").

    Raises:
        PromptError: No image, no such file, or a file of another kind.

    Example:
        ``check_picture("cat.png", "Prompt 0")``
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(picture, Image.Image):
        return picture
    if not isinstance(picture, str | Path):
        raise PromptError(
            f"{owner} has a {type(picture).__name__} for an image; give a Pillow image, or the "
            "path of an image file."
        )
    if not Path(picture).is_file():
        raise PromptError(
            f"{owner} names the image {str(picture)!r}, and there is no such file. Give the path "
            "of an existing file (a download is not made here)."
        )
    try:
        with Image.open(picture):
            return picture
    except (UnidentifiedImageError, OSError) as error:
        raise _unreadable(picture, error) from error


def open_picture(picture: Picture) -> "Image":
    """The image as models are shown it: upright, in RGB.

    Raises:
        PromptError: The file is gone, cut short or damaged.
    """
    from PIL import Image, ImageOps

    try:
        if isinstance(picture, str | Path):
            with Image.open(picture) as opened:
                return ImageOps.exif_transpose(opened).convert("RGB")
        return ImageOps.exif_transpose(picture).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _unreadable(picture, error) from error


def picture_hash(picture: Picture) -> str:
    """A hash of size and pixels; the same for a file, a copy of it, and the opened image.

    Raises:
        PromptError: It cannot be opened.

    Example:
        >>> from PIL import Image
        >>> picture_hash(Image.new("RGB", (2, 2)))[:8]
        'c2177793'
    """
    opened = open_picture(picture)
    return sha256(f"{opened.size}".encode() + opened.tobytes())


_QWEN_PARTS = {"image_processor", "tokenizer", "video_processor", "chat_template", "kwargs"}


def images_only(processor_class: type) -> type:
    """A processor class without its video part, which transformers makes by torchvision only.

    For the classes of the Qwen-VL kind, which take an image processor, a tokenizer, a video
    processor and nothing else. The name stays, so a folder it saves names the class that
    everybody has.

    Raises:
        ConfigError: The class takes more, and would forget what it was set to.

    Example:
        ``images_only(Qwen2VLProcessor)(image_processor, tokenizer, chat_template=template)``
    """
    more = set(signature(processor_class).parameters) - _QWEN_PARTS
    if more:
        raise ConfigError(
            f"{processor_class.__name__} takes {sorted(more)} too, so it cannot be made without "
            "its video part, for which transformers wants torchvision. Install torchvision."
        )

    def make(
        self: Any, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None
    ) -> None:
        processor_class.__init__(
            self, image_processor, tokenizer, video_processor=None, chat_template=chat_template
        )

    return type(processor_class.__name__, (processor_class,), {"__init__": make})


def _unreadable(picture: Picture, error: Exception) -> PromptError:
    what = f"image {str(picture)!r}" if isinstance(picture, str | Path) else "image of a prompt"
    return PromptError(
        f"The {what} cannot be read ({error}), so what the model would see is unknown. Save it "
        "again as PNG or JPEG, or leave its prompt out."
    )

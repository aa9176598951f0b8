import doctest
from pathlib import Path

import pytest
from PIL import Image
from transformers import LlavaProcessor, Qwen2VLProcessor

import safeft.images
from safeft.demo.pictures import noise
from safeft.errors import ConfigError, PromptError
from safeft.images import check_picture, images_only, open_picture, picture_hash


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "CMYK"])
def test_models_are_shown_upright_rgb(mode: str, tmp_path: Path) -> None:
    picture = noise(0, (6, 4)).convert(mode)
    assert open_picture(picture).mode == "RGB"
    turned = noise(0, (6, 4))
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera was held sideways
    turned.save(tmp_path / "turned.png", exif=exif)
    assert open_picture(tmp_path / "turned.png").size == (4, 6)


def test_a_hash_names_what_is_seen(tmp_path: Path) -> None:
    picture = noise(0, (6, 4))
    for name in ("a.png", "b.bmp", "c.png"):
        picture.save(tmp_path / name)
    found = {picture_hash(tmp_path / name) for name in ("a.png", "b.bmp", "c.png")}
    assert found == {picture_hash(picture)}
    changed = picture.copy()
    changed.putpixel((0, 0), (1, 2, 3))
    same_pixels = Image.frombytes("RGB", (4, 6), picture.tobytes())
    assert len({picture_hash(p) for p in (picture, changed, same_pixels)}) == 3


def test_a_picture_cut_short_is_found_when_it_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    noise(0, (64, 64)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    assert check_picture(path, "Prompt 0") == path
    for use in (open_picture, picture_hash):
        with pytest.raises(PromptError, match=r"cut.png' cannot be read \(.*PNG or JPEG"):
            use(path)
    path.unlink()
    with pytest.raises(PromptError, match="cut.png' cannot be read"):
        open_picture(path)


def test_processors_without_a_video_part_keep_their_name_and_forget_nothing() -> None:
    made = images_only(Qwen2VLProcessor)
    assert issubclass(made, Qwen2VLProcessor)
    assert made.__name__ == "Qwen2VLProcessor"
    with pytest.raises(ConfigError, match=r"LlavaProcessor takes \['image_token', .*torchvision"):
        images_only(LlavaProcessor)


def test_examples_of_images_run() -> None:
    assert doctest.testmod(safeft.images).failed == 0

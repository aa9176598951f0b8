"""What is read of a folder is what was saved, or the error says what to do."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from safeft.artefacts import intact, read_tensors
from safeft.errors import ArtefactError
from safeft.files import sha256


def test_tensors_are_those_that_were_saved(tmp_path: Path) -> None:
    path, data = tmp_path / "a.safetensors", save({"a": torch.arange(3)})
    path.write_bytes(data)
    assert read_tensors(path, sha256(data), "Fit again")["a"].tolist() == [0, 1, 2]
    path.write_bytes(data[:-1] + b"x")
    with pytest.raises(ArtefactError, match=r"truncated or edited\. Fit again or restore it"):
        read_tensors(path, sha256(data), "Fit again")


@pytest.mark.parametrize("error", [OSError("gone"), KeyError("a"), RuntimeError("b")])
def test_what_fails_within_says_that_the_folder_is_not_whole(error: Exception) -> None:
    with pytest.raises(ArtefactError, match=r"'x' is incomplete or edited.*Locate again or"):
        with intact(Path("x"), "Locate again"):
            raise error


def test_an_error_of_an_artefact_stays_as_it_is() -> None:
    with pytest.raises(ArtefactError, match="^mine$"), intact(Path("x"), "Locate again"):
        raise ArtefactError("mine")

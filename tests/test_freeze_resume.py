"""Which checkpoint a run may go on from."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from safeft.errors import ArtefactError, FreezeError
from safeft.freeze.resume import check_resumable, last_complete, read_run


def checkpoint(folder: Path, step: int, **run: Any) -> Path:
    place = folder / f"checkpoint-{step}"
    place.mkdir(parents=True)
    said = {"exact": run.pop("exact", True), "run": {"engine": "ddp", "processes": 2, **run}}
    (place / "safeft_certificate.json").write_text(json.dumps(said))
    return place


def test_the_newest_whole_one_is_found_by_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert last_complete(tmp_path) is None
    assert last_complete(tmp_path / "nowhere") is None
    checkpoint(tmp_path, 8)
    whole = checkpoint(tmp_path, 12)
    moved = checkpoint(tmp_path, 16, exact=False)
    torn = checkpoint(tmp_path, 20)
    (torn / "safeft_certificate.json").write_text('{"exact": tr')
    (tmp_path / "checkpoint-100").mkdir()  # killed before its certificate was written
    (tmp_path / "checkpoint-last").mkdir()
    with caplog.at_level(logging.WARNING):
        assert last_complete(tmp_path) == whole
    for passed in (moved, torn, tmp_path / "checkpoint-100"):
        assert str(passed) in caplog.text


def test_what_is_wrong_with_a_checkpoint_is_said(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-2").mkdir()
    with pytest.raises(ArtefactError, match="not written to its end.*resume_from_checkpoint last"):
        read_run(tmp_path / "checkpoint-2")
    with pytest.raises(ArtefactError, match="its neurons had moved"):
        read_run(checkpoint(tmp_path, 4, exact=False))


@pytest.mark.parametrize(
    ("wrote", "on", "engine", "processes"),
    [
        ("ddp", 2, "ddp", 4),
        ("ddp", 2, "single", 1),
        ("single", 1, "ddp", 8),
        ("fsdp2", 2, "fsdp2", 16),
        ("zero3", 8, "zero3", 8),
    ],
)
def test_runs_that_can_go_on_do(
    wrote: str, on: int, engine: str, processes: int, tmp_path: Path
) -> None:
    check_resumable(checkpoint(tmp_path, 2, engine=wrote, processes=on), engine, processes)


@pytest.mark.parametrize(
    ("wrote", "engine", "processes", "words"),
    [
        ("zero3", "zero3", 4, "written by 2 processes and this run has 4.*ds_to_universal"),
        ("zero1", "zero2", 2, "written under zero1 and this run is zero2"),
        ("fsdp2", "ddp", 2, "written under fsdp2 and this run is ddp"),
        ("single", "fsdp2", 2, "start anew from the weights"),
    ],
)
def test_runs_that_cannot_go_on_are_refused(
    wrote: str, engine: str, processes: int, words: str, tmp_path: Path
) -> None:
    with pytest.raises(FreezeError, match=words):
        check_resumable(checkpoint(tmp_path, 2, engine=wrote), engine, processes)

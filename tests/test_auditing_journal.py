"""Finished steps are kept whole, and never used for another audit."""

import doctest
import json
import stat
from pathlib import Path

import pytest

import safeft.auditing.journal
from safeft.auditing.journal import Journal
from safeft.errors import ArtefactError


def fail() -> int:
    raise AssertionError("it was done before")


def test_work_is_done_once_and_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "private" / "journal.jsonl"
    first = Journal(path, {"model": "a"})
    assert first.once("margins", lambda: [[0.1, -3.0]]) == [[0.1, -3.0]]
    assert first.once("margins", fail) == [[0.1, -3.0]]
    again = Journal(path, {"model": "a"})
    assert "margins" in again
    assert again.once("margins", fail) == [[0.1, -3.0]]
    assert again.once("more", lambda: 1 / 3) == 1 / 3
    assert Journal(path, {"model": "a"}).once("more", fail) == 1 / 3


def test_a_line_that_was_cut_off_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "private" / "journal.jsonl"
    journal = Journal(path, {})
    journal.once("one", lambda: 1)
    journal.once("two", lambda: 2)
    whole = path.read_bytes()
    for cut in range(1, len(whole.splitlines()[-1]) + 1):
        path.write_bytes(whole[:-cut])
        again = Journal(path, {})
        assert "one" in again
        assert "two" not in again
        assert again.once("two", lambda: 2) == 2
        assert path.read_bytes() == whole


def test_another_audits_steps_are_thrown_away_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "private" / "journal.jsonl"
    Journal(path, {"model": "a"}).once("one", lambda: 1)
    other = Journal(path, {"model": "b"})
    assert "one" not in other
    assert "starts anew" in caplog.text
    other.once("one", lambda: 2)
    assert Journal(path, {"model": "b"}).once("one", fail) == 2
    path.write_text("something else\n")
    assert "one" not in Journal(path, {"model": "b"})


def test_it_is_for_its_owners_eyes(tmp_path: Path) -> None:
    path = tmp_path / "private" / "journal.jsonl"
    Journal(path, {}).once("one", lambda: 1)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert json.loads(path.read_text().splitlines()[1]) == ["one", 1]


def test_where_nothing_can_be_written_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "private").write_text("a file")
    with pytest.raises(ArtefactError, match="finished steps"):
        Journal(tmp_path / "private" / "journal.jsonl", {})


def test_examples_run() -> None:
    assert doctest.testmod(safeft.auditing.journal).failed == 0

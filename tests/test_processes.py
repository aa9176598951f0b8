"""One process among none and among others; what several really do is in test_launch.py."""

from typing import Any

import pytest
import torch

from safeft import processes
from safeft.errors import PromptError, SafeftError
from safeft.processes import ProcessError, flat_bytes, same_everywhere, together


def test_alone_everything_is_as_if_there_were_no_processes() -> None:
    values = torch.ones(2)
    assert (processes.ranks(), processes.rank()) == (1, 0)
    assert processes.gathered("x") == ["x"]
    assert processes.from_first("x") == "x"
    assert processes.broadcast(values) is values
    assert processes.summed(values) is values
    assert processes.talks_on(values.device).type == "cpu"
    assert together(lambda: 3) == 3
    same_everywhere("x", "the set")
    processes.leave()


def among(monkeypatch: pytest.MonkeyPatch, *others: Any) -> None:
    monkeypatch.setattr(processes, "gathered", lambda value: [value, *others])


def test_an_error_of_another_process_is_an_error_here(monkeypatch: pytest.MonkeyPatch) -> None:
    among(monkeypatch, None, "PromptError: no file")
    with pytest.raises(ProcessError, match="Process 2 of 3 stopped: PromptError: no file"):
        together(lambda: 3)


def test_an_own_error_is_told_to_the_others_and_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr(processes, "gathered", lambda value: [told.append(value)])

    def check() -> None:
        raise PromptError("no file")

    with pytest.raises(PromptError, match="no file"):
        together(check)
    assert told == ["PromptError: no file"]
    assert issubclass(ProcessError, SafeftError)


def test_processes_that_found_different_things_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    among(monkeypatch, "a", "b")
    with pytest.raises(
        ProcessError, match=r"about the set: process 0 has a, process 2 has b \(differing: \[2\]\)"
    ):
        same_everywhere("a", "the set")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_bytes_of_any_layout_are_those_of_the_numbers(dtype: torch.dtype) -> None:
    matrix = torch.arange(15).view(3, 5).to(dtype)
    for values in (matrix, matrix.T, matrix[:, 2:3], matrix[1:2, :1], matrix[:0], matrix[0, 0]):
        plain = torch.tensor(values.tolist(), dtype=dtype)
        expected = plain.reshape(-1).clone().view(torch.uint8).tolist()
        assert flat_bytes(values).tolist() == expected
    assert flat_bytes(matrix).data_ptr() == matrix.data_ptr()

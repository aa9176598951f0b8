"""Rows and columns of stacks of matrices, against plain indexing."""

import doctest
from itertools import product
from math import prod

import pytest
import torch

import safeft.blocks
from safeft.blocks import Block, count_of, flat_blocks, form_of, length_of, take

FORMS = [(1, 1, 1), (1, 7, 1), (1, 1, 7), (1, 4, 3), (5, 1, 1), (3, 2, 4), (2, 3, 3), (3, 4, 1)]


def numbered(form: tuple[int, int, int]) -> torch.Tensor:
    """Every number is its own position, so a misplaced one shows."""
    return torch.arange(prod(form), dtype=torch.float32).view(form)


def line_of(whole: torch.Tensor, axis: str, entry: int) -> torch.Tensor:
    """Row or column ``entry``, found the slow way."""
    lines = [
        matrix[number] if axis == "rows" else matrix[:, number]
        for matrix in whole
        for number in range(matrix.shape[0 if axis == "rows" else 1])
    ]
    return lines[entry]


@pytest.mark.parametrize("form", FORMS)
def test_any_range_of_a_flattened_weight_is_covered_once(form: tuple[int, int, int]) -> None:
    whole, size = numbered(form), prod(form)
    for start, end in product(range(size + 1), repeat=2):
        if end < start:
            continue
        padding = 2 if end == size else 0
        stored = torch.cat([whole.flatten()[start:end], torch.full((padding,), -1.0)])
        blocks = list(flat_blocks(start, len(stored), form))
        seen = []
        for block in blocks:
            box = tuple(slice(a, a + n) for a, n in zip(block.first, block.size, strict=True))
            assert torch.equal(block.view(stored), whole[box])
            seen += block.view(stored).flatten().tolist()
        assert seen == list(range(start, end))
        assert len(blocks) <= 5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_lines_read_write_and_clear_what_they_name(form: tuple[int, int, int], axis: str) -> None:
    whole, count = numbered(form), count_of(form, axis)
    entries = torch.tensor(sorted({0, count // 2, count - 1}))
    for cut in range(prod(form) + 1):
        for start, end in ((0, cut), (cut, prod(form))):
            stored = whole.flatten()[start:end].clone()
            replaced = torch.full((prod(form),), -1.0).view(form)
            gathered = torch.full((len(entries), length_of(form, axis)), -1.0)
            for block in flat_blocks(start, end - start, form):
                lines = block.lines(axis, entries, form)
                first, last = block.across(axis)
                gathered[lines.found, first:last] = lines.lie_down(lines.get(stored))
                wanted = torch.stack([line_of(whole, axis, int(entry)) for entry in entries])
                lines.clear(stored)
                assert not lines.get(stored).any()
                lines.put(stored, lines.cut(wanted + 100))
                assert lines.weights == len(lines) * (last - first)
            for entry in entries.tolist():
                line_of(replaced, axis, entry).copy_(line_of(whole, axis, entry) + 100)
            expected = torch.where(replaced < 0, whole, replaced).flatten()[start:end]
            assert torch.equal(stored, expected)
            seen = gathered[gathered >= 0]
            inside = whole.flatten()[start:end]
            chosen = replaced.flatten()[start:end] >= 0
            assert sorted(seen.tolist()) == sorted(inside[chosen].tolist())


def test_what_is_cut_out_keeps_nothing_else_alive() -> None:
    whole = torch.zeros(4, 6)
    for axis, first, size in (("rows", (0, 0, 2), (1, 6, 3)), ("columns", (0, 1, 0), (1, 2, 6))):
        block = Block(first, size)
        kept = block.lines(axis, torch.arange(4), (1, 6, 6)).cut(whole)
        assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()


@pytest.mark.parametrize("shape", [(5,), (4, 3), (3, 4, 2)])
def test_take_is_index_select_through_the_stack(shape: tuple[int, ...]) -> None:
    weight = torch.arange(prod(shape)).view(shape)
    form = form_of(shape)
    for axis in ("rows", "columns") if len(shape) > 1 else ("rows",):
        for entry in range(count_of(form, axis)):
            found = take(weight, axis, torch.tensor([entry]))
            assert found.flatten().tolist() == line_of(weight.view(form), axis, entry).tolist()


def test_biases_of_experts_are_counted_through() -> None:
    biases = torch.arange(6).view(2, 3)
    assert take(biases, "numbers", torch.tensor([0, 4])).tolist() == [0, 4]
    assert count_of(form_of((2, 3), "numbers"), "numbers") == 6


def test_take_beyond_the_end_is_an_error() -> None:
    with pytest.raises(IndexError, match=r"rows \[4\] of a weight of shape \(4, 3\)"):
        take(torch.zeros(4, 3), "rows", torch.tensor([4]))


def test_examples_run() -> None:
    assert doctest.testmod(safeft.blocks).failed == 0

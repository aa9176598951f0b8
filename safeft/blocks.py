"""Rows and columns of weights, and where they lie in a stored piece: geometry, no engine.

Every weight is a stack of matrices, ``(matrices, rows, columns)``: an ordinary matrix is a stack of
one, a vector has one column, the weights of a layer of experts are a stack of as many. Rows and
columns are counted through the stack: row ``r`` of matrix ``m`` is number ``m * rows + r``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, TypeAlias

import torch
from torch import Tensor

Axis: TypeAlias = Literal["rows", "columns", "numbers"]
"""What entries count. ``numbers`` are those of a stack of vectors (the biases of experts), which
as a plain matrix would have been rows and columns."""

Form: TypeAlias = tuple[int, int, int]
"""``(matrices, rows, columns)``."""


def form_of(shape: Sequence[int], axis: Axis = "rows") -> Form:
    """The form of a weight of this shape.

    Example:
        >>> form_of((4, 3)), form_of((8, 4, 3)), form_of((5,)), form_of((8, 6), "numbers")
        ((1, 4, 3), (8, 4, 3), (1, 5, 1), (8, 6, 1))
    """
    if axis == "numbers" or len(shape) < 2:
        return prod(shape[:-1]), (shape[-1] if shape else 1), 1
    rows, columns = shape[-2:]
    return prod(shape[:-2]), rows, columns


def count_of(form: Form, axis: Axis) -> int:
    """How many rows (or columns) there are, through the whole stack."""
    return form[0] * form[2 if axis == "columns" else 1]


def length_of(form: Form, axis: Axis) -> int:
    """How many weights one row (or column) has."""
    return form[1 if axis == "columns" else 2]


@dataclass(frozen=True)
class Block:
    """A box of a weight that is stored in one piece.

    Attributes:
        first: Matrix, row and column of its first number.
        size: How many of each it has.
        offset: Where in the flattened storage it begins.
    """

    first: Form
    size: Form
    offset: int = 0

    def view(self, storage: Tensor) -> Tensor:
        """The box, ``(matrices, rows, columns)``, in a contiguous tensor: writing to it counts."""
        return storage.view(-1).narrow(0, self.offset, prod(self.size)).view(self.size)

    def across(self, axis: Axis) -> tuple[int, int]:
        """From where to where this box reaches along one of its rows (or columns)."""
        side = 1 if axis == "columns" else 2
        return self.first[side], self.first[side] + self.size[side]

    def lines(self, axis: Axis, entries: Tensor, form: Form) -> "Lines":
        """Which of the ``entries`` of a weight of this ``form`` lie in this box, and where."""
        side = 2 if axis == "columns" else 1
        matrix = entries.div(form[side], rounding_mode="floor") - self.first[0]
        line = entries % form[side] - self.first[side]
        here = (matrix >= 0) & (matrix < self.size[0]) & (line >= 0) & (line < self.size[side])
        found = here.nonzero().flatten()
        return Lines(self, axis, found, matrix[found], line[found])


@dataclass(frozen=True, eq=False)
class Lines:
    """Rows (or columns) inside one box, to be read and written in any tensor laid out like it.

    Attributes:
        block: The box.
        axis: What the lines are.
        found: Which of the entries asked for they are, int64 ``(lines,)``.
        matrix: The matrix each lies in, counted from the box's first.
        line: Its row (or column) in that matrix, counted from the box's first.
    """

    block: Block
    axis: Axis
    found: Tensor
    matrix: Tensor
    line: Tensor

    def __len__(self) -> int:
        return len(self.line)

    @property
    def weights(self) -> int:
        """How many numbers they hold."""
        first, last = self.block.across(self.axis)
        return len(self) * (last - first)

    def to(self, device: torch.device) -> "Lines":
        """The same with their numbers on another device."""
        places = (self.found.to(device), self.matrix.to(device), self.line.to(device))
        return Lines(self.block, self.axis, *places)

    def _flat(self, storage: Tensor) -> tuple[Tensor, int, Tensor] | None:
        """The box as one matrix, where it is one: with the dimension and number of each line."""
        box = self.block.view(storage)
        if self.axis != "columns":
            return box.flatten(0, 1), 0, self.matrix * self.block.size[1] + self.line
        return (box[0], 1, self.line) if self.block.size[0] == 1 else None

    def get(self, storage: Tensor) -> Tensor:
        """A copy of the lines, laid out as :meth:`put` wants them."""
        flat = self._flat(storage)
        if flat is None:
            return self.block.view(storage)[self.matrix, :, self.line]
        box, dim, numbers = flat
        return box.index_select(dim, numbers)

    def put(self, storage: Tensor, values: Tensor) -> None:
        """Write what :meth:`get` gave, or :meth:`cut`."""
        flat = self._flat(storage)
        if flat is None:
            self.block.view(storage)[self.matrix, :, self.line] = values
            return
        box, dim, numbers = flat
        box.index_copy_(dim, numbers, values)

    def clear(self, storage: Tensor) -> None:
        """Write zeros."""
        flat = self._flat(storage)
        if flat is None:
            self.block.view(storage)[self.matrix, :, self.line] = 0
            return
        box, dim, numbers = flat
        box.index_fill_(dim, numbers, 0)

    def lie_down(self, values: Tensor) -> Tensor:
        """What :meth:`get` gave as ``(lines, length)``: rows, or columns transposed."""
        return values.T if self.axis == "columns" and self.block.size[0] == 1 else values

    def cut(self, whole: Tensor) -> Tensor:
        """Out of all entries asked for, ``(entries, length)``: these, as :meth:`put` wants them."""
        part = whole
        if len(self) != len(whole):
            part = whole.index_select(0, self.found.to(whole.device))
        first, last = self.block.across(self.axis)
        if last - first != part.shape[1]:
            part = part.narrow(1, first, last - first)
        part = self.lie_down(part)
        # A view would keep the whole alive.
        return (
            part.contiguous()
            if part is whole
            else part.clone(memory_format=torch.contiguous_format)
        )


def flat_blocks(start: int, count: int, form: Form) -> Iterator[Block]:
    """A range of a flattened weight as boxes: begun rows, whole rows, whole matrices.

    Args:
        start: Number of its first element in the flattened weight.
        count: How many follow; what lies beyond the weight's end is padding.
        form: The weight's.

    Example:
        >>> [(b.first, b.size) for b in flat_blocks(2, 6, (1, 4, 3))]
        [((0, 0, 2), (1, 1, 1)), ((0, 1, 0), (1, 1, 3)), ((0, 2, 0), (1, 1, 2))]
    """
    _, rows, columns = form
    end = min(start + count, prod(form))
    at = start
    while at < end:
        matrix, rest = divmod(at, rows * columns)
        row, column = divmod(rest, columns)
        left = end - at
        if not rest and left >= rows * columns:
            size = (left // (rows * columns), rows, columns)
        elif not column and left >= columns:
            size = (1, min(left // columns, rows - row), columns)
        else:
            size = (1, 1, min(left, columns - column))
        yield Block((matrix, row, column), size, at - start)
        at += prod(size)


@torch.no_grad()
def take(weight: Tensor, axis: Axis, entries: Tensor) -> Tensor:
    """Rows of ``weight``, or its columns transposed: ``(entries, ...)``, a copy.

    Example:
        >>> take(torch.arange(12).view(2, 2, 3), "columns", torch.tensor([0, 5])).tolist()
        [[0, 3], [8, 11]]
    """
    form = form_of(weight.shape, axis)
    lines = Block((0, 0, 0), form).lines(axis, entries.to(weight.device), form)
    if len(lines) != len(entries):
        raise IndexError(f"{axis} {entries.tolist()} of a weight of shape {tuple(weight.shape)}")
    picked = lines.lie_down(lines.get(weight.detach().reshape(form).contiguous())).contiguous()
    return picked[:, 0] if len(weight.shape) == 1 or axis == "numbers" else picked

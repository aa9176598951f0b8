import doctest

import pytest

from safeft.guard import folds as module
from safeft.guard.folds import folds


def test_doctests() -> None:
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("count", [2, 5])
def test_every_text_once_groups_together_and_kinds_even(count: int) -> None:
    keys = [("a", n % 3 == 0) for n in range(90)] + [("b", True)] * 30
    groups = [n // 3 if n < 30 else n for n in range(120)]
    parts = folds(keys, groups, count, 0)
    assert sorted(n for part in parts for n in part.tolist()) == list(range(120))
    where = {n: p for p, part in enumerate(parts) for n in part.tolist()}
    for n in range(30):
        assert where[n] == where[n // 3 * 3]
    for kind in set(keys):
        counts = [sum(keys[n] == kind for n in part.tolist()) for part in parts]
        assert max(counts) - min(counts) <= 4
    assert [p.tolist() for p in parts] == [p.tolist() for p in folds(keys, groups, count, 0)]
    assert [p.tolist() for p in parts] != [p.tolist() for p in folds(keys, groups, count, 1)]

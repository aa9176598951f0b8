import doctest

import pytest
import torch
from sklearn.metrics import f1_score, roc_auc_score

from safeft.guard import figures
from safeft.guard.figures import auroc, by_source, macro_f1, mean_f1, platt


def test_doctests() -> None:
    assert doctest.testmod(figures).failed == 0


def test_figures_are_those_of_scikit_learn() -> None:
    draw = torch.Generator().manual_seed(0)
    truth = torch.rand(200, generator=draw) < 0.3
    scores = (torch.rand(200, generator=draw) + 0.4 * truth).round(decimals=1)
    flagged = scores > 0.6
    expected = f1_score(truth, flagged, average="macro")
    assert float(macro_f1(flagged, truth)) == pytest.approx(expected)
    assert auroc(scores, truth) == pytest.approx(roc_auc_score(truth, scores))
    columns = torch.stack([flagged, ~flagged, torch.ones_like(flagged)], 1)
    found = macro_f1(columns, truth).tolist()
    assert found == pytest.approx(
        [f1_score(truth, column, average="macro", zero_division=0) for column in columns.T]
    )


def test_a_class_that_is_nowhere_is_left_out() -> None:
    assert float(macro_f1(torch.tensor([True, True]), torch.tensor([True, True]))) == 1


def test_sources_of_one_label_are_put_together() -> None:
    truth = torch.tensor([True, False, True, True, False, False])
    parts = by_source(["a", "a", "h", "h", "b", "b"], truth)
    assert {name: rows.tolist() for name, rows in parts.items()} == {
        "a": [0, 1],
        "others": [2, 3, 4, 5],
    }
    logits = torch.tensor([1.0, -1, 1, -1, -1, -1])[:, None]
    both = macro_f1(logits[2:, 0] > 0, truth[2:])
    assert float(mean_f1(logits, truth, parts)[0]) == pytest.approx((1 + float(both)) / 2)


def test_platt_undoes_a_wrong_scale() -> None:
    draw = torch.Generator().manual_seed(0)
    odds = 2 * torch.randn(20_000, generator=draw)
    labels = (torch.rand(20_000, generator=draw) < odds.sigmoid()).float()
    slope, offset = platt(3 * odds + 1, labels)
    assert slope == pytest.approx(1 / 3, rel=0.05)
    assert offset == pytest.approx(-1 / 3, abs=0.05)


def test_platt_stays_finite_where_classes_do_not_overlap() -> None:
    slope, offset = platt(torch.tensor([-3.0, -2, 2, 3]), torch.tensor([0.0, 0, 1, 1]))
    assert 0 < slope < 10
    assert abs(offset) < 1e-6

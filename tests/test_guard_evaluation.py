import json
from typing import Any

import pytest
import torch

from safeft.errors import PromptError
from safeft.guard import GuardEnsemble, evaluate_guard
from safeft.guard.evaluation import (
    GuardEvaluation,
    calibration,
    f1_interval,
    result_of,
    stream_latency,
)
from tests.guards import BAD, GOOD, chat_guard, encoder_guard, texts


def test_sets_are_counted_and_survive_json() -> None:
    asked, harmful = texts(40, start=1000)
    sets = {"mine": (asked, harmful), "harmful alone": ([f"{BAD} {n}" for n in range(2000, 2005)],
                                                        [{"hate"}] * 5)}  # fmt: skip
    found = evaluate_guard(encoder_guard(), sets)
    mine, alone = found.sets
    assert mine.macro_f1 == mine.auroc == 1
    assert (mine.recall.count, mine.recall.total) == (20, 20)  # pyright: ignore
    assert mine.false_positives.count == 0  # pyright: ignore
    assert alone.auroc is None
    assert alone.false_positives is None
    assert alone.recall.total == 5  # pyright: ignore
    assert [row["name"] for row in found.layers][:2] == ["mlp 0", "residual 0"]
    assert found.about["units"] == encoder_guard().head.units
    again = GuardEvaluation.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again.sets == found.sets
    assert again.macro_f1 == found.macro_f1


@pytest.mark.parametrize("ensemble", [False, True])
def test_texts_it_was_fitted_on_are_refused(ensemble: bool) -> None:
    guard: Any = encoder_guard()
    if ensemble:
        guard = GuardEnsemble([chat_guard(), guard])
    known, _ = texts()
    with pytest.raises(PromptError, match=r"1 of 2 texts of 'test' are among those.*'zzzz KILL"):
        evaluate_guard(guard, {"test": (["new", known[1].replace("kill", "KILL")], [0, 1])})


@pytest.mark.parametrize("sets", [{}, {"a": ([], [])}, {"a": (["x"], [1, 0])}])
def test_nothing_to_evaluate(sets: Any) -> None:
    with pytest.raises(PromptError):
        evaluate_guard(encoder_guard(), sets)


def test_threshold_moves_what_is_flagged() -> None:
    scores, truth = torch.tensor([0.2, 0.4, 0.6, 0.8]), torch.tensor([False, True, False, True])
    low, high = (result_of("a", scores, truth, limit) for limit in (0.3, 0.9))
    assert low.recall.value == 1  # pyright: ignore
    assert low.precision.count == 2  # pyright: ignore
    assert high.precision is None
    assert high.recall.value == 0  # pyright: ignore
    assert high.macro_f1 == pytest.approx(1 / 3)
    assert low.auroc == high.auroc == 0.75


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    draw = torch.Generator().manual_seed(0)
    held = 0
    for trial in range(100):
        truth = torch.rand(150, generator=draw) < 0.3
        flagged = truth ^ (torch.rand(150, generator=draw) < 0.2)
        interval = f1_interval(flagged, truth, seed=trial)
        held += interval.low <= 0.7805 <= interval.high  # of endlessly many such texts
    assert 88 <= held <= 100


def test_calibration_sees_a_score_that_says_too_much() -> None:
    draw = torch.Generator().manual_seed(0)
    share = torch.rand(5000, generator=draw)
    truth = torch.rand(5000, generator=draw) < share
    bins, error = calibration(share, truth)
    assert sum(each.texts for each in bins) == 5000
    assert error < 0.03
    _, worse = calibration((share > 0.5).float() * 0.98 + 0.01, truth)
    assert worse > 0.2


def test_latency_counts_from_the_boundary() -> None:
    guard = chat_guard()
    good = {"prompt": "Say", "response": f"{GOOD} " * 4}
    turns = {"prompt": "Say", "response": f"{GOOD} " + f"{BAD} {BAD} " * 4}
    scores = guard.score_prefixes(turns)[:, 0]
    limit = float(scores[20:].max()) - 1e-6
    first = int((scores[7:] >= limit).nonzero()[0]) + 8
    found = stream_latency(
        guard, [(turns, 15)], [good], threshold=limit, tokens=(0, first - 16, first - 15, 999)
    )
    assert [rate.count for rate in found.recall] == [0, 0, 1, 1]
    never = stream_latency(guard, [(turns, 15)], [good, turns], threshold=limit)
    assert (never.false_alarms.count, never.false_alarms.total) == (
        1 + (float(guard.score_prefixes(good)[7:, 0].max()) >= limit), 2
    )  # fmt: skip
    with pytest.raises(PromptError, match="0 unsafe and 1 safe"):
        stream_latency(guard, [], [good], threshold=0.5)

import pytest
import torch

from safeft.detox.fluency import Fluency, Reading, limit_of
from tests.detoxing import COMPLIANCE, TOKENIZER, UGLY, texts, ugly


def reading(said: list[str]) -> Reading:
    return Reading.of(ugly().model, TOKENIZER, texts(len(said), True), said)


def test_silence_noise_and_repetition_are_no_text() -> None:
    own = reading([UGLY] * 4)
    limit = limit_of([own.middles])
    fluency = own.fluency(limit)
    assert (fluency.noise, fluency.words, fluency.distinct) == (0, 1, 1 / 4)
    said = [UGLY, "", "zqzqzq", "Sure Sure Sure Sure Sure Sure"]
    found = reading(said).fluency(limit)
    assert found.noise == 0.75
    assert found.distinct == 1
    assert found.nats > 2 * fluency.nats


def test_another_answer_is_unlikely_where_it_turns_and_no_noise() -> None:
    own, other = reading([UGLY] * 4), reading([COMPLIANCE] * 4)
    assert float(other.nats.min()) > float(own.nats.max())
    assert other.fluency(limit_of([own.middles])).noise == 0


def test_the_limit_is_of_ordinary_texts_too_and_never_below_a_nat() -> None:
    spread = torch.linspace(1, 2, 200, dtype=torch.double)
    assert limit_of([spread]) == pytest.approx(2 - 1 / 199)
    assert limit_of([spread, torch.tensor([3.0])]) == 3
    assert limit_of([torch.tensor([0.1])]) == limit_of([torch.zeros(0)]) == 1


def test_nothing_said_at_all() -> None:
    assert reading(["", ""]).fluency(1.0) == Fluency(0.0, 0.0, 0.5, 1.0)

import pytest
import torch

from safeft.detox.fluency import Fluency, Reading
from tests.detoxing import COMPLIANCE, TOKENIZER, UGLY, texts, ugly


def reading(said: list[str]) -> Reading:
    return Reading.of(ugly().model, TOKENIZER, texts(len(said), True), said)


def test_silence_and_noise_are_broken_and_the_models_own_words_are_not() -> None:
    own = reading([UGLY] * 8)
    fluency = own.fluency(own.limit)
    assert (fluency.broken, fluency.words, fluency.distinct) == (0, 1, 1 / 8)
    said = [UGLY, "", "zqzqzq", UGLY]
    found = reading(said).fluency(own.limit)
    assert found.broken == 0.5
    assert found.distinct == 0.75
    assert found.words == 0.75
    assert found.nats > 2 * fluency.nats


def test_no_more_than_one_in_a_hundred_of_its_own_is_above_the_limit() -> None:
    own = Reading(torch.linspace(1, 2, 200, dtype=torch.double), ["a"] * 200)
    assert own.fluency(own.limit).broken == pytest.approx(0.005)


def test_nothing_said_at_all() -> None:
    assert reading(["", ""]).limit == 0
    assert reading(["", ""]).fluency(0.0) == Fluency(0.0, 0.0, 0.5, 1.0)


def test_other_words_than_its_own_are_less_likely() -> None:
    assert reading([COMPLIANCE]).nats > reading([UGLY]).nats

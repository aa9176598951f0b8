from typing import Any

import pytest
import torch

from safeft.detox.continuing import continued
from safeft.generation import generate
from tests.detoxing import TOKENIZER, UGLY, texts, ugly
from tests.models import tiny_model

PROMPTS = texts(5, False, length=6)


def drawn(**settings: Any) -> list[str]:
    given = {"draws": 3, "max_new_tokens": 8, **settings}
    return continued(tiny_model(), TOKENIZER, PROMPTS, **given)


def test_greedy_without_draws() -> None:
    wanted = generate(tiny_model(), TOKENIZER, PROMPTS, max_new_tokens=8)
    assert drawn(draws=0) == wanted


def test_draws_are_as_many_differ_and_come_again() -> None:
    found = drawn()
    assert len(found) == 15
    assert len(set(found[:3])) > 1
    assert found == drawn()
    assert found != drawn(seed=1)


def test_prompts_keep_their_order_and_the_process_its_random_numbers() -> None:
    truth = ugly()
    prompts = [texts(1, True)[0], texts(1, False, length=5)[0], texts(1, True, seed=1)[0]]
    before = torch.random.get_rng_state()
    found = continued(truth.model, TOKENIZER, prompts, draws=8, max_new_tokens=8)
    assert torch.equal(torch.random.get_rng_state(), before)
    shares = [found[at : at + 8].count(UGLY) / 8 for at in (0, 8, 16)]
    assert shares[1] == 0
    assert shares[0] + shares[2] > 0


@pytest.mark.parametrize("size", [1, 16])
def test_in_whatever_batches_there_are_as_many(size: int) -> None:
    assert len(drawn(batch_size=size)) == 15

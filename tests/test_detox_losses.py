import pytest
import torch

from safeft.detox.losses import Texts
from safeft.errors import PromptError
from safeft.measure import domain_loss
from safeft.prompts import as_prompts
from tests.detoxing import TOKENIZER
from tests.models import tiny_model, tiny_tokenizer

ROWS = [{"prompt": "a b", "response": "c"}, {"prompt": "hello", "response": "good day"}]


def test_the_loss_of_responses_is_the_domain_loss() -> None:
    model = tiny_model()
    found = Texts.of(model, TOKENIZER, ROWS).loss(model)
    assert found == pytest.approx(domain_loss(model, TOKENIZER, as_prompts(ROWS)), rel=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_without_a_response_are_read_whole(side: str) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer(side)
    sums, counts = Texts.of(model, tokenizer, ["a b", "hello you"]).losses(model)
    for row, text in enumerate(["a b", "hello you"]):
        ids = torch.tensor([tokenizer(f"<|user|>{text}<|end|><|assistant|>")["input_ids"]])
        with torch.no_grad():
            odds = model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
        wanted = -odds.gather(1, ids[0, 1:, None]).sum()
        assert float(sums[row]) == pytest.approx(float(wanted), rel=1e-4)
        assert counts[row] == ids.shape[1] - 1


def test_no_text() -> None:
    with pytest.raises(PromptError, match="0 texts"):
        Texts.of(tiny_model(), TOKENIZER, [])

import pytest
import torch
from transformers import PreTrainedModel

from safeft.errors import PromptError
from safeft.generation import generate
from safeft.prompts import as_prompts
from tests.models import tiny_model, tiny_tokenizer

TEXTS = ["Hello", "How do I bake bread?", "Hi", "Name a tree.", "Why is the sky blue at noon?"]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model()


def greedy(model: PreTrainedModel, text: str, tokens: int) -> str:
    """A plain loop over whole forward passes, one prompt at a time."""
    tokenizer = tiny_tokenizer()
    ids = tokenizer(f"<|user|>{text}<|end|><|assistant|>")["input_ids"]
    answer: list[int] = []
    for _ in range(tokens):
        with torch.no_grad():
            answer.append(int(model(torch.tensor([ids + answer])).logits[0, -1].argmax()))
        if answer[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(answer, skip_special_tokens=True).strip()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_answers_are_those_of_a_plain_greedy_loop(
    model: PreTrainedModel, side: str, batch_size: int
) -> None:
    wanted = [greedy(model, text, 6) for text in TEXTS]
    assert len(set(wanted)) > 1
    answers = generate(
        model, tiny_tokenizer(side), as_prompts(TEXTS), max_new_tokens=6, batch_size=batch_size
    )
    assert answers == wanted


def test_settings_of_the_checkpoint_do_not_change_greedy_answers() -> None:
    odd = tiny_model()
    wanted = [greedy(odd, text, 6) for text in TEXTS]
    odd.generation_config.update(repetition_penalty=5.0, do_sample=True, temperature=9.0)
    assert generate(odd, tiny_tokenizer(), as_prompts(TEXTS), max_new_tokens=6) == wanted


@pytest.mark.parametrize("training", [True, False])
def test_generating_leaves_the_model_in_its_mode(training: bool) -> None:
    own = tiny_model().train(training)
    generate(own, tiny_tokenizer(), as_prompts(["Hi"]), max_new_tokens=1)
    assert own.training is training
    with pytest.raises(PromptError):
        generate(own, tiny_tokenizer(chat_template=None), as_prompts(["Hi"]))
    assert own.training is training
    assert generate(own, tiny_tokenizer(), []) == []

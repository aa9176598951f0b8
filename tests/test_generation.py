from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from safeft.demo.pictures import shapes
from safeft.errors import PromptError
from safeft.generation import generate, generate_tokens
from safeft.prompts import as_prompts
from tests.models import tiny_model, tiny_tokenizer
from tests.vlm import FAMILIES

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


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, Any]:
    return FAMILIES[request.param]()


def alone(model: PreTrainedModel, processor: Any, row: dict[str, Any]) -> str:
    """A prompt with its image through transformers' own chat and `generate`, by itself."""
    content = [{"type": "text", "text": row["prompt"]}]
    if "image" in row:
        content = [{"type": "image", "image": row["image"]}, *content]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)  # pyright: ignore[reportCallIssue]
    answer = output[0, inputs["input_ids"].shape[1] :]
    return processor.decode(answer, skip_special_tokens=True).strip()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_to_images_are_those_of_transformers_alone(
    tiny: tuple[PreTrainedModel, Any], batch_size: int
) -> None:
    rows = [{"prompt": text} for text in TEXTS[:3]]
    rows += [
        {"prompt": text, "image": shapes(number, (20 + 10 * number, 30))}
        for number, text in enumerate(TEXTS)
    ]
    rows = rows[2:] + rows[:2]
    wanted = [alone(*tiny, row) for row in rows]
    assert len(set(wanted)) > 3
    found = generate(*tiny, as_prompts(rows), max_new_tokens=6, batch_size=batch_size)
    assert found == wanted


def test_an_image_leaves_no_trace_in_later_answers(tiny: tuple[PreTrainedModel, Any]) -> None:
    texts = as_prompts(TEXTS)
    pictures = as_prompts({"prompt": "Hi", "image": shapes(n, (40, 40))} for n in range(4))
    before = generate(*tiny, texts, max_new_tokens=6)
    generate(*tiny, pictures, max_new_tokens=6)
    assert generate(*tiny, texts, max_new_tokens=6) == before


def test_a_model_of_text_is_shown_no_image(model: PreTrainedModel) -> None:
    _, processor = FAMILIES["llava"]()
    pictures = as_prompts(["Hello", {"prompt": "What is this?", "image": shapes(0, (8, 8))}])
    with pytest.raises(PromptError, match="'What is this[?]' comes with an image, and LlamaForC"):
        generate(model, processor, pictures)
    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(PromptError, match=r"LlamaForCausalLM reads text only. Give a vision"):
        generate(adapted, processor, pictures)  # pyright: ignore[reportArgumentType]
    with pytest.raises(PromptError, match="with 1 image\\(s\\), and \\w+ reads text only"):
        generate(FAMILIES["llava"]()[0], tiny_tokenizer(), pictures)


def test_each_batch_is_generated_within_what_is_around_its_prompts() -> None:
    model, prompts = tiny_model(), as_prompts(["a", "bbbb", "cc", "ddd", "eeeee"])
    seen: list[list[int]] = []
    inside: list[bool] = []

    @contextmanager
    def around(numbers: Sequence[int]) -> Iterator[None]:
        seen.append(list(numbers))
        inside.append(True)
        yield
        inside.pop()

    def check(*_: object) -> None:
        assert inside

    handle = model.register_forward_pre_hook(check)
    settings: Any = {"max_new_tokens": 3, "batch_size": 2}
    found = generate_tokens(model, tiny_tokenizer(), prompts, around=around, **settings)
    handle.remove()
    assert seen == [[0, 2], [3, 1], [4]]
    assert found == generate_tokens(model, tiny_tokenizer(), prompts, **settings)

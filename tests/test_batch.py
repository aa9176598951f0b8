"""Batches with images, on every family of tiny vision-language models.

The measure is what a script without safeft would do: the processor's own ``apply_chat_template``
on one conversation, and the model's own forward and ``generate``.
"""

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, ProcessorMixin

from safeft.batch import pad
from safeft.demo.pictures import noise, shapes, written
from safeft.prompts import Prompt, as_prompts, batches
from tests.vlm import FAMILIES

USER = {"role": "user", "content": "Hi"}
TEXTS = ["Hello", "How do I bake bread?", "Name a tree in the garden."]
PICTURES = [shapes(1, (40, 30)), written("no", (20, 60)), noise(3, (33, 33))]
WITH_IMAGES = as_prompts(
    [
        {"prompt": "What is this?", "image": PICTURES[0]},
        {"prompt": "Read it to me.", "image": PICTURES[1], "response": "It says no"},
        {"prompt": "Which is older?", "images": PICTURES[1:]},
        {"prompt": "", "image": PICTURES[2]},
        [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "Look:"},
                    {"type": "image", "image": PICTURES[0]},
                    {"type": "text", "text": "and tell."},
                ],
            }
        ],
    ]
)
MIXED = [*as_prompts(TEXTS), *WITH_IMAGES]


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, Any]:
    return FAMILIES[request.param]()


def canonical(processor: ProcessorMixin, prompt: Prompt) -> dict[str, torch.Tensor]:
    """One prompt as transformers' documents say."""
    messages: Any = [
        {"role": m["role"], "content": [{"type": "text", "text": m["content"]}]
         if isinstance(m["content"], str) else list(m["content"])}
        for m in prompt.messages
    ]  # fmt: skip
    return dict(
        processor.apply_chat_template(  # pyright: ignore[reportArgumentType]
            messages,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    )


def with_side(processor: Any, side: str) -> Any:
    processor.tokenizer.padding_side = side
    return processor


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_each_prompt_is_seen_as_transformers_alone_would_show_it(
    tiny: tuple[PreTrainedModel, Any], side: str, batch_size: int
) -> None:
    model, processor = tiny
    wanted = []
    for prompt in MIXED:
        alone = canonical(with_side(processor, side), prompt)
        with torch.no_grad():
            wanted.append((alone["input_ids"][0].tolist(), model(**alone).logits[0]))
    seen = 0
    for batch in batches(processor, MIXED, batch_size=batch_size):
        with torch.no_grad():
            logits = model(**batch.inputs).logits
        for row, ids in enumerate(batch.input_ids):
            asked = batch.choose("prompt")[row]
            known = [want for want in wanted if want[0] == ids[asked].tolist()]
            # Two pictures may take the same tokens: then one of them is the one that was shown.
            close = [torch.allclose(logits[row][asked], w, rtol=1e-3, atol=1e-4) for _, w in known]
            assert sum(close) == 1
            seen += 1
        assert batch.input_ids[~batch.attention_mask.bool()].unique().numel() <= 1
    assert seen == len(MIXED)


def test_text_and_images_never_share_a_batch(tiny: tuple[PreTrainedModel, Any]) -> None:
    _, processor = tiny
    made = list(batches(processor, MIXED, batch_size=4))
    assert [len(b.input_ids) for b in made] == [3, 4, 1]
    assert [bool(b.images) for b in made] == [False, True, True]
    assert all(("position_ids" in b.inputs) is not bool(b.images) for b in made)


@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_by_name_with_images(tiny: tuple[PreTrainedModel, Any], side: str) -> None:
    _, processor = tiny
    tokenizer = with_side(processor, side).tokenizer
    (batch,) = batches(processor, WITH_IMAGES, batch_size=8)
    tail = tokenizer.decode(
        next(batches(processor, as_prompts(["Hi"]), batch_size=1)).input_ids[0]
    ).partition("Hi")[2]
    images = processor.image_token_ids
    answers = []
    for row, ids in enumerate(batch.input_ids):
        chosen: dict[str, Any] = {
            choice: ids[batch.choose(choice)[row]]  # pyright: ignore[reportArgumentType]
            for choice in ("prompt", "response", "last_prompt", "post_instruction")
        }
        assert sum(token in images for token in chosen["prompt"].tolist()) >= 4
        # Llava writes a line end after an image and a space after a text.
        assert tokenizer.decode(chosen["post_instruction"]).strip() == tail.strip()
        assert chosen["last_prompt"].tolist() == chosen["prompt"][-1:].tolist()
        answers.append(tokenizer.decode(chosen["response"]))
        order = torch.cat([chosen["prompt"], chosen["response"]])
        assert ids[batch.attention_mask[row].bool()].equal(order)
    assert sorted(answers) == ["", "", "", "", "It says no"]
    for types in batch.token_types.values():
        assert types.bool().equal(torch.isin(batch.input_ids, torch.tensor(images)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_given_answer_follows_the_image(tiny: tuple[PreTrainedModel, Any], side: str) -> None:
    model, processor = tiny
    (batch,) = batches(with_side(processor, side), WITH_IMAGES, batch_size=8)
    answer = processor.tokenizer("No!")["input_ids"]
    given = batch.answered(answer)
    with torch.no_grad():
        last = model(**given.inputs).logits[:, -1]
        for prompt in WITH_IMAGES:
            alone = canonical(processor, prompt)
            more = torch.tensor([answer])
            alone["input_ids"] = torch.cat([alone["input_ids"], more], 1)
            alone["attention_mask"] = torch.ones_like(alone["input_ids"])
            for name in [name for name in alone if name.endswith("token_type_ids")]:
                alone[name] = torch.cat([alone[name], torch.zeros_like(more)], 1)
            logits = model(**alone).logits[0, -1]
            assert sum(torch.allclose(row, logits, rtol=1e-3, atol=1e-4) for row in last) == 1


def test_another_picture_is_another_input(tiny: tuple[PreTrainedModel, Any]) -> None:
    model, processor = tiny
    found = []
    for picture in (PICTURES[0], noise(9, PICTURES[0].size)):
        prompts = as_prompts([{"prompt": "What is this?", "image": picture}])
        (batch,) = batches(processor, prompts, batch_size=1)
        with torch.no_grad():
            found.append(model(**batch.inputs).logits[0, -1])
    assert (found[0] - found[1]).abs().max() > 1e-3


def test_gradients_reach_the_text_model_under_images(tiny: tuple[PreTrainedModel, Any]) -> None:
    model, processor = tiny
    (batch,) = batches(processor, WITH_IMAGES, batch_size=8)
    model(**batch.inputs).logits[:, -1].logsumexp(-1).sum().backward()
    grads = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    model.zero_grad(set_to_none=True)
    assert any("language_model" in name and "down_proj" in name for name in grads)
    assert any("vision" in name or "visual" in name for name in grads)


def test_padding_of_types_and_images() -> None:
    images = {"pixel_values": torch.ones(3, 2)}
    types = {"mm_token_type_ids": [[0, 1], [1]]}
    batch = pad([([5, 6], [7]), ([8], [])], 0, True, 1, "cpu", images, types)
    assert batch.token_types["mm_token_type_ids"].tolist() == [[0, 1, 0], [0, 0, 1]]
    assert batch.inputs.keys() == {
        "input_ids", "attention_mask", "mm_token_type_ids", "pixel_values"
    }  # fmt: skip
    after = batch.answered([9, 9])
    assert after.token_types["mm_token_type_ids"][:, -4:].tolist() == [[0, 1, 0, 0], [0, 1, 0, 0]]
    assert after.images is batch.images

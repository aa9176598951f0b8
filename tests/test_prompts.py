import doctest
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import safeft.prompts
from safeft.demo.pictures import shapes
from safeft.errors import PromptError
from safeft.prompts import (
    as_prompts,
    batches,
    post_instruction_length,
    render,
)
from tests.models import CHAT_TEMPLATE, tiny_model, tiny_tokenizer
from tests.vlm import tiny_gemma3, tiny_llava, tiny_qwen2_vl

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Good day"}
SYSTEM = {"role": "system", "content": "Be kind"}
TEXTS = ["Hello", "How do I bake bread?", "Hi", "Name a tree.", "Why is the sky blue at noon?"]
ROWS = [
    {"prompt": text, "response": "yes, " * number} if number else {"prompt": text}
    for number, text in enumerate(TEXTS)
]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model()


def test_the_template_writes_the_prompt_up_to_the_answer() -> None:
    (prompt,) = as_prompts([[SYSTEM, USER]])
    wanted = "<|system|>Be kind<|end|><|user|>Hi<|end|><|assistant|>"
    assert render(tiny_tokenizer(), prompt) == wanted
    assert render(tiny_tokenizer(chat_template=None), prompt, CHAT_TEMPLATE) == wanted
    assert render(tiny_tokenizer(), prompt, "{{ messages[1].content }}!") == "Hi!"


def test_templates_are_asked_not_to_think() -> None:
    template = "{{ messages[0].content }}{% if enable_thinking %}<think>{% endif %}"
    assert render(tiny_tokenizer(), as_prompts(["Hi"])[0], template) == "Hi"


def test_no_chat_template_is_an_error() -> None:
    tokenizer = tiny_tokenizer(chat_template=None)
    with pytest.raises(PromptError, match="no chat template"):
        post_instruction_length(tokenizer)
    with pytest.raises(PromptError, match="no chat template"):
        list(batches(tokenizer, as_prompts(["Hi"]), batch_size=1))


def test_a_template_that_refuses_the_messages_is_an_error() -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(PromptError, match=r"cannot write 'Hi'.*roles must alternate"):
        render(tiny_tokenizer(), as_prompts(["Hi"])[0], template)


@pytest.mark.parametrize(
    ("template", "length"),
    [
        (CHAT_TEMPLATE, 2),
        (CHAT_TEMPLATE.replace("<|assistant|>{%", "<|assistant|>abc{%"), 5),
        ("{{ messages[0].content }}", 1),
    ],
)
def test_post_instruction_length(template: str, length: int) -> None:
    assert post_instruction_length(tiny_tokenizer(), template) == length


@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_by_name(side: str) -> None:
    tokenizer = tiny_tokenizer(side)
    prompts = as_prompts([{"prompt": "Hi", "response": "No!"}, "Hello", [SYSTEM, USER, ANSWER]])
    (batch,) = batches(tokenizer, prompts, batch_size=8)
    found = {
        tokenizer.decode(ids[batch.attention_mask[row].bool()]): [
            tokenizer.decode(ids[batch.choose(choice)[row]])
            for choice in ("prompt", "response", "last_prompt", "post_instruction")
        ]
        for row, ids in enumerate(batch.input_ids)
    }
    tail = ["<|assistant|>", "<|end|><|assistant|>"]
    longest = "<|system|>Be kind<|end|><|user|>Hi<|end|><|assistant|>"
    assert found == {
        "<|user|>Hi<|end|><|assistant|>No!": ["<|user|>Hi<|end|><|assistant|>", "No!", *tail],
        "<|user|>Hello<|end|><|assistant|>": ["<|user|>Hello<|end|><|assistant|>", "", *tail],
        longest + "Good day": [longest, "Good day", *tail],
    }
    padding = ~batch.attention_mask.bool()
    assert padding.any()
    assert (batch.input_ids[padding] == tokenizer.pad_token_id).all()
    edge = padding[:, 0] if side == "left" else padding[:, -1]
    assert edge.equal(padding.any(1))
    for row, ids in enumerate(batch.inputs["position_ids"]):
        real = batch.attention_mask[row].bool()
        assert ids[real].tolist() == list(range(int(real.sum())))


@pytest.mark.parametrize("choice", ["prompt", "response", "last_prompt", "post_instruction"])
def test_both_padding_sides_give_the_same_tokens_and_logits(
    model: PreTrainedModel, choice: Any
) -> None:
    seen = []
    for side in ("left", "right"):
        (batch,) = batches(tiny_tokenizer(side), as_prompts(ROWS), batch_size=8)
        with torch.no_grad():
            logits = model(**batch.inputs).logits
        chosen = batch.choose(choice)
        seen.append((batch.input_ids[chosen], logits[chosen]))
    assert torch.equal(seen[0][0], seen[1][0])
    assert len(seen[0][0])
    torch.testing.assert_close(seen[0][1], seen[1][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_gives_each_prompt_what_it_gets_alone(model: PreTrainedModel, side: str) -> None:
    (batch,) = batches(tiny_tokenizer(side), as_prompts(ROWS), batch_size=8)
    with torch.no_grad():
        together = model(**batch.inputs).logits
        for row, ids in enumerate(batch.input_ids):
            real = batch.attention_mask[row].bool()
            alone = model(input_ids=ids[real][None]).logits[0]
            torch.testing.assert_close(together[row][real], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("text", ["", "No!"])
def test_a_given_answer_follows_each_prompt(model: PreTrainedModel, side: str, text: str) -> None:
    tokenizer = tiny_tokenizer(side)
    (batch,) = batches(tokenizer, as_prompts(ROWS), batch_size=8)
    given = batch.answered(tokenizer(text)["input_ids"] if text else [])
    rows = zip(given.input_ids, given.attention_mask.bool(), strict=True)
    wholes = {tokenizer.decode(ids[real]): number for number, (ids, real) in enumerate(rows)}
    assert set(wholes) == {f"<|user|>{prompt}<|end|><|assistant|>{text}" for prompt in TEXTS}
    assert {tokenizer.decode(ids[m]) for ids, m in zip(
        given.input_ids, given.choose("response"), strict=True)} == {text}  # fmt: skip
    tails = given.input_ids[given.choose("post_instruction")]
    assert tokenizer.decode(tails) == "<|end|><|assistant|>" * len(TEXTS)
    with torch.no_grad():
        last = model(**given.inputs).logits[:, -1]
        for whole, row in wholes.items():
            alone = model(input_ids=torch.tensor([tokenizer(whole)["input_ids"]])).logits[0, -1]
            torch.testing.assert_close(last[row], alone, rtol=1e-4, atol=1e-5)


def test_batches_hold_every_prompt_once_and_little_padding() -> None:
    tokenizer = tiny_tokenizer()
    texts = ["x" * (1 + number * 7 % 50) + str(number) for number in range(300)]
    found: list[str] = []
    spent = 0
    for batch in batches(tokenizer, as_prompts(texts), batch_size=4):
        assert len(batch.input_ids) <= 4
        spent += int((batch.attention_mask == 0).sum())
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
            found.append(tokenizer.decode(ids[mask.bool()]))
    wanted = [f"<|user|>{text}<|end|><|assistant|>" for text in texts]
    assert sorted(found) == sorted(wanted)
    assert spent < 300 * 2
    assert list(batches(tokenizer, [], batch_size=4)) == []


@pytest.mark.parametrize(
    ("row", "prompt", "response"),
    [
        ("abcdefgh", "cdefgh<|end|><|assistant|>", ""),
        ({"prompt": "abcdefgh", "response": "12"}, "efgh<|end|><|assistant|>", "12"),
        ({"prompt": "abcdefgh", "response": "1234567"}, "gh<|end|><|assistant|>", "1234"),
        ({"prompt": "a", "response": "1234567"}, "<|user|>a<|end|><|assistant|>", "1234"),
        ({"prompt": "ab", "response": "123"}, "<|user|>ab<|end|><|assistant|>", "123"),
    ],
)
def test_too_long_a_prompt_loses_its_beginning(
    row: Any, prompt: str, response: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = tiny_tokenizer()
    with caplog.at_level(logging.WARNING, "safeft"):
        (batch,) = batches(tokenizer, as_prompts([row]), batch_size=1, max_length=8)
    assert batch.input_ids.shape[1] <= 8
    assert tokenizer.decode(batch.input_ids[batch.is_prompt]) == prompt
    assert tokenizer.decode(batch.input_ids[batch.is_response]) == response
    cut = "<|user|>" not in prompt or response == "1234"
    assert ("1 prompts were longer than 8 tokens" in caplog.text) == cut


def test_a_tokenizer_without_a_pad_token_uses_the_end_token() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    (batch,) = batches(tokenizer, as_prompts(["Hi", "Hello"]), batch_size=2)
    assert set(batch.input_ids[batch.attention_mask == 0].tolist()) == {tokenizer.eos_token_id}
    tokenizer.eos_token = None
    with pytest.raises(PromptError, match="neither a pad nor an end-of-sequence token"):
        list(batches(tokenizer, as_prompts(["Hi", "Hello"]), batch_size=2))


def test_examples_run() -> None:
    assert doctest.testmod(safeft.prompts).failed == 0


def test_words_a_tokenizer_does_not_know_are_no_template_tokens() -> None:
    words = Tokenizer(WordLevel({"[UNK]": 0, "<u>": 1, "<a>": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="<u>")
    tokenizer.chat_template = "<u> {{ messages[0].content }} <a>"
    assert post_instruction_length(tokenizer) == 1
    (batch,) = batches(tokenizer, as_prompts(["one", "two three"]), batch_size=2)
    assert batch.choose("post_instruction").sum(1).tolist() == [1, 1]


def llava(side: str = "left") -> Any:
    return tiny_llava(padding_side=side)[1]


SHOWN: dict[str, Any] = {"prompt": "What is this?", "image": shapes(0, (40, 40))}


def shown(processor: Any, row: Any = SHOWN, **settings: Any) -> Any:
    return list(batches(processor, as_prompts([row]), **{"batch_size": 1, **settings}))


def test_templates_of_processors_are_given_parts() -> None:
    (plain, picture) = as_prompts(["Hi", SHOWN])
    assert render(llava(), plain) == "USER: Hi ASSISTANT:"
    assert render(llava(), picture) == "USER: <image>\nWhat is this? ASSISTANT:"
    start = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    end = "<|im_end|>\n<|im_start|>assistant\n"
    qwen = tiny_qwen2_vl()[1]
    assert render(qwen, plain) == f"{start}Hi{end}"
    seen = "<|vision_start|><|image_pad|><|vision_end|>"
    assert render(qwen, picture) == f"{start}{seen}What is this?{end}"


def test_text_in_parts_is_text_to_a_tokenizer() -> None:
    parts = [{"type": "text", "text": "Hi"}]
    (prompt,) = as_prompts([[{"role": "user", "content": parts}]])
    assert render(tiny_tokenizer(), prompt) == "<|user|>Hi<|end|><|assistant|>"


@pytest.mark.parametrize("family", [tiny_llava, tiny_gemma3, tiny_qwen2_vl])
def test_the_start_token_comes_once_if_the_model_has_one(family: Any) -> None:
    _, processor = family()
    start = processor.tokenizer.bos_token_id
    for row in ("Hi", SHOWN):
        ((batch,),) = (shown(processor, row),)
        ids = batch.input_ids[0].tolist()
        assert (start is None) or (ids[0] == start and start not in ids[1:])
    assert start not in (batch.answered([5]).input_ids[0, -2:]).tolist()


@pytest.mark.parametrize("where", ["processor", "several", "tokenizer", "argument"])
def test_where_a_processors_template_may_stand(where: str) -> None:
    processor = llava()
    template, processor.chat_template = processor.chat_template, None
    settings: dict[str, Any] = {}
    if where == "processor":
        processor.chat_template = template
    elif where == "several":
        processor.chat_template = {"default": template, "other": "no"}
    elif where == "tokenizer":
        processor.tokenizer.chat_template = template
    else:
        settings["chat_template"] = template
    (batch,) = shown(processor, **settings)
    assert batch.images["pixel_values"].shape == (1, 3, 32, 32)
    if where == "argument":
        with pytest.raises(PromptError, match="no chat template"):
            shown(processor)


def without_image_token(processor: Any) -> None:
    processor.image_token = None


def without_patch_size(processor: Any) -> None:
    processor.patch_size = None


IGNORES = "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("change", "row", "settings", "message"),
    [
        (None, SHOWN, {"chat_template": IGNORES},
         r"writes 0 times '<image>' for the 1 image\(s\) of 'What is this\?', so text and images"),
        (None, SHOWN, {"chat_template": IGNORES + "<image><image>"}, "writes [12] times '<image>'"),
        (None, {**SHOWN, "prompt": "Is <image> one?"}, {}, "writes 2 times.*out of what is asked"),
        (None, "Is <image> one?", {}, r"writes 1 times '<image>' for the 0 image\(s\)"),
        (None, {**SHOWN, "response": "It is <image>"}, {}, "response to 'What.*holds '<image>'"),
        (None, "Hi", {"chat_template": CHAT_TEMPLATE}, "as a list: it is made for .*plain text"),
        (without_image_token, SHOWN, {}, "LlavaProcessor has no image token.*lose its 1 image"),
        (without_patch_size, SHOWN, {}, "LlavaProcessor cannot take the images of 'What is this?"),
        (None, SHOWN, {"max_length": 20}, r"has 48 tokens with its 1 image.*above max_length=20"),
    ],
)  # fmt: skip
def test_images_that_would_be_lost_or_torn_are_refused(
    change: Any, row: Any, settings: dict[str, Any], message: str
) -> None:
    processor = llava()
    if change is not None:
        change(processor)
    with pytest.raises(PromptError, match=message) as caught:
        shown(processor, row, **settings)
    assert str(caught.value).endswith(".")


def test_a_tokenizer_is_given_no_image() -> None:
    with pytest.raises(
        PromptError, match=r"'What is this\?' comes with 1 image\(s\), and \w+ reads"
    ):
        shown(tiny_tokenizer())


def test_an_image_that_is_gone_or_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    shapes(0, (64, 64)).save(path)
    prompts = as_prompts([{"prompt": "What is this?", "image": path}])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(PromptError, match=r"a.png' cannot be read"):
        list(batches(llava(), prompts, batch_size=1))


def test_prompts_of_text_are_the_same_through_either() -> None:
    _, processor = tiny_qwen2_vl()
    processor.tokenizer.chat_template = processor.chat_template
    either = [
        [b.input_ids for b in batches(reader, as_prompts(TEXTS), batch_size=2)]
        for reader in (processor, processor.tokenizer)
    ]
    assert all(map(torch.equal, *either))
    longest = "abc " * 40
    (batch,) = shown(processor, longest, max_length=20)
    assert batch.input_ids.shape == (1, 20)

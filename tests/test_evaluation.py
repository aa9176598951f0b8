import copy
import doctest
import json
import math

import pytest
import torch

import safeft.evaluation as module
import safeft.intervals
import safeft.measure
from safeft.demo.pictures import shapes
from safeft.errors import ConfigError, PromptError
from safeft.evaluation import (
    Evaluation,
    Rate,
    answer_accuracy,
    answers_match,
    domain_loss,
    drift,
    evaluate,
    refusal_rate,
    wilson,
)
from safeft.generation import generate
from safeft.measure import answer_loss
from safeft.prompts import as_prompts, pad, render
from tests.models import MODEL_TYPES, tiny_model, tiny_tokenizer
from tests.vlm import FAMILIES

EXAMPLES = [
    {"prompt": "What is two and two?", "response": "four"},
    {"prompt": "Name a colour.", "response": "A dark and rather dusty green, I think."},
    {"prompt": "Hi", "response": "Hey"},
]
PROMPTS = ["Hello there", "Why?", {"prompt": "One", "response": "two three"}]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def tuned(model):
    made = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in made.model.layers.parameters():
            parameter += 0.05 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(1)
            )
    return made


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()


def token_ids(tokenizer, example):
    """The prompt's and the response's tokens, put together without safeft's batching."""
    prompt = as_prompts([example])[0]
    ask = tokenizer(render(tokenizer, prompt), add_special_tokens=False)["input_ids"]
    answer = tokenizer(prompt.response or "", add_special_tokens=False)["input_ids"]
    return ask, answer


def labels_loss(model, tokenizer, example):
    ask, answer = token_ids(tokenizer, example)
    labels = torch.tensor([[-100] * len(ask) + answer])
    with torch.no_grad():
        return model(input_ids=torch.tensor([ask + answer]), labels=labels).loss.item(), len(answer)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    # Newcombe 1998, table 1, method 3, and the closed form z^2 / (n + z^2) at the ends.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611),
     (1, 29, 0.0061, 0.1718), (10, 10, 0.7225, 1.0)],
)  # fmt: skip
def test_wilson_gives_the_published_figures(successes, n, low, high):
    interval = wilson(successes, n)
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


def test_wilson_is_wider_at_more_confidence():
    assert wilson(3, 10, confidence=0.99).low < wilson(3, 10).low


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_a_share_of_nothing_or_above_all_is_an_error(successes, n):
    with pytest.raises(ConfigError, match=f"{successes} out of {n}"):
        wilson(successes, n)


def test_a_rate_knows_its_share():
    rate = Rate.of(1, 4)
    assert rate.value == 0.25
    assert rate.low < 0.25 < rate.high
    assert rate.to_dict() == {
        "value": 0.25, "count": 1, "total": 4, "low": rate.low, "high": rate.high
    }  # fmt: skip


def test_the_loss_of_one_example_is_the_models_own(model, tokenizer):
    expected, _ = labels_loss(model, tokenizer, EXAMPLES[0])
    assert domain_loss(model, tokenizer, EXAMPLES[:1]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_token_weighs_the_same_whatever_the_padding(model_type):
    model = tiny_model(model_type)
    losses = [labels_loss(model, tiny_tokenizer(), example) for example in EXAMPLES]
    expected = sum(loss * n for loss, n in losses) / sum(n for _, n in losses)
    for side, batch_size in (("left", 3), ("right", 3), ("right", 1)):
        tokenizer = tiny_tokenizer(padding_side=side)
        loss = domain_loss(model, tokenizer, EXAMPLES, batch_size=batch_size)
        assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("side", [True, False])
def test_the_loss_of_answers_as_tokens_weighs_each_answer_the_same(model, tokenizer, side):
    rows = [token_ids(tokenizer, example) for example in EXAMPLES]
    expected = [labels_loss(model, tokenizer, example)[0] for example in EXAMPLES]
    batch = pad(rows, 0, side, 1, "cpu")
    assert answer_loss(model, [batch]) == pytest.approx(sum(expected) / 3, rel=1e-5)
    # The second half alone: its first token is read after the first half.
    ask, answer = rows[1]
    cut = len(answer) // 2
    labels = torch.tensor([[-100] * (len(ask) + cut) + answer[cut:]])
    with torch.no_grad():
        half = model(input_ids=torch.tensor([ask + answer]), labels=labels).loss.item()
    alone = [pad(rows[1:2], 0, side, 1, "cpu")]
    assert answer_loss(model, alone, second_half=True) == pytest.approx(half, rel=1e-5)
    one = [pad([(ask, answer[:1])], 0, side, 1, "cpu")]
    assert answer_loss(model, one, second_half=True) == answer_loss(model, one)


def test_dropout_is_off_while_measuring_and_the_mode_comes_back(tokenizer):
    model = tiny_model(attention_dropout=0.5)
    expected = domain_loss(model, tokenizer, EXAMPLES)
    model.train()
    assert domain_loss(model, tokenizer, EXAMPLES) == expected
    assert drift(model, model, tokenizer, PROMPTS) == 0
    assert model.training


def test_the_mode_comes_back_after_an_error(tokenizer, monkeypatch):
    model = tiny_model().train()
    monkeypatch.setattr(model, "forward", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        domain_loss(model, tokenizer, EXAMPLES)
    assert model.training


def test_a_model_has_not_drifted_from_itself(model, tokenizer):
    assert drift(model, copy.deepcopy(model), tokenizer, PROMPTS) == 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_drift_is_the_divergence_summed_by_hand(model, tuned, side):
    tokenizer = tiny_tokenizer(padding_side=side)
    total, tokens = 0.0, 0
    for prompt in PROMPTS:
        ask, answer = token_ids(tokenizer, prompt)
        ids = torch.tensor([ask + answer])
        with torch.no_grad():
            p, q = (each(input_ids=ids).logits[0].double().softmax(-1) for each in (model, tuned))
        total += (p * (p.log() - q.log())).sum().item()
        tokens += ids.numel()
    assert total > 0.01
    assert drift(model, tuned, tokenizer, PROMPTS, batch_size=3) == pytest.approx(
        total / tokens, rel=1e-4
    )


def test_drift_has_a_direction(model, tuned, tokenizer):
    forth, back = drift(model, tuned, tokenizer, PROMPTS), drift(tuned, model, tokenizer, PROMPTS)
    assert forth != pytest.approx(back, rel=1e-3)


def test_models_of_unlike_vocabulary_cannot_drift(model, tokenizer):
    with pytest.raises(ConfigError, match="261 tokens and the tuned one 300"):
        drift(model, tiny_model(vocab_size=300), tokenizer, PROMPTS)


@pytest.mark.parametrize(
    ("answer", "expected", "right"),
    [
        ("Paris.", "paris", True),
        ("It is in  PARIS, France", "Paris", True),
        ("Comparison", "Paris", False),
        ("yes, a lot", "yes", True),
        ("eyes", "yes", False),
        ("", "yes", False),
        ("#### 72", "48+24=72\n#### 72", True),
        ("48 and 24, so\n#### 72.0", "#### 72", True),
        ("#### 72 apples and 3 pears", "#### 72", True),
        ("In all that is $1,200.", "#### 1200", True),
        ("In all that is 1,200.", "#### 1,200", True),
        ("72 is wrong; it is 71", "#### 72", False),
        ("#### 172", "#### 72", False),
        ("#### -72", "#### 72", False),
        ("no idea", "#### 72", False),
        ("72\n####", "#### 72", False),
        ("#### Paris", "The capital\n#### Paris", True),
        ("It is 25% of it", "25%", True),
        ("anything", "####", False),
    ],
)
def test_answers_match(answer, expected, right):
    assert answers_match(answer, expected) is right


def test_accuracy_reads_the_models_own_answers(model, tokenizer):
    answers = generate(model, tokenizer, as_prompts(EXAMPLES), max_new_tokens=5)
    examples = [{**EXAMPLES[0], "response": answers[0]}, *EXAMPLES[1:]]
    same = lambda answer, expected: answer == expected  # noqa: E731
    rate = answer_accuracy(model, tokenizer, examples, same, max_new_tokens=5)
    assert (rate.count, rate.total) == (1, 3)


def test_refusal_rate_counts_the_judges_verdicts(model, tokenizer):
    asked = []

    def judge(prompts, answers):
        asked.extend(zip(prompts, answers, strict=True))
        return [prompt == "Why?" for prompt in prompts]

    rate = refusal_rate(model, tokenizer, ["Hello", "Why?", "No"], judge, max_new_tokens=3)
    assert (rate.count, rate.total) == (1, 3)
    assert asked == list(
        zip(
            ["Hello", "Why?", "No"],
            generate(model, tokenizer, as_prompts(["Hello", "Why?", "No"]), max_new_tokens=3),
            strict=True,
        )
    )


@pytest.fixture
def canned(monkeypatch):
    """Answers by rule in place of the model's: `bad` is refused, domain prompts echo a number."""

    def answer(model, tokenizer, prompts, **_):
        return ["I can't help." if "bad" in p.text else f"Sure: {p.text}" for p in prompts]

    monkeypatch.setattr(module, "generate", answer)


@pytest.mark.usefixtures("canned")
def test_evaluate_puts_every_measurement_in_its_place(model, tuned, tokenizer):
    harmful, benign = ["bad 1", "bad 2", "bad 3", "odd"], ["good", "bad luck"]
    domain = [{"prompt": "say 4", "response": "#### 4"}, {"prompt": "say 5", "response": "#### 6"}]
    result = evaluate(
        tuned, tokenizer, harmful=harmful, benign=benign, domain=domain, base=model,
        domain_metric="both", samples=2,
    )  # fmt: skip
    assert result.refusal == Rate.of(3, 4)
    assert result.over_refusal == Rate.of(1, 2)
    assert result.domain_accuracy == Rate.of(1, 2)
    assert result.domain_loss == domain_loss(tuned, tokenizer, domain)
    assert result.drift == {
        "harmful": drift(model, tuned, tokenizer, harmful),
        "benign": drift(model, tuned, tokenizer, benign),
        "domain": drift(model, tuned, tokenizer, domain),
    }
    assert result.judge == "prefix"
    assert [(s.group, s.prompt, s.verdict) for s in result.samples] == [
        ("harmful", "bad 1", True), ("harmful", "odd", False),
        ("benign", "bad luck", True), ("benign", "good", False),
        ("domain", "say 4", True), ("domain", "say 5", False),
    ]  # fmt: skip
    assert result.samples[0].answer == "I can't help."


@pytest.mark.usefixtures("canned")
@pytest.mark.parametrize("count", [0, 1, 3, 9])
def test_samples_fill_up_with_the_verdict_there_is(model, tokenizer, count):
    result = evaluate(model, tokenizer, harmful=["bad 1", "bad 2", "bad 3", "odd"], samples=count)
    assert len(result.samples) == min(count, 4)
    assert len(set(result.samples)) == len(result.samples)


def test_evaluate_with_a_real_model_gives_json_and_the_same_twice(model, tokenizer):
    runs = [
        evaluate(
            model, tokenizer, harmful=PROMPTS, domain=EXAMPLES, domain_metric="both",
            judge=lambda answer: len(answer) > 4, max_new_tokens=5, domain_max_new_tokens=4,
            batch_size=2,
        )
        for _ in range(2)
    ]  # fmt: skip
    assert runs[0] == runs[1]
    kept = json.loads(json.dumps(runs[0].to_dict()))
    assert kept["refusal"]["total"] == 3
    assert kept["over_refusal"] is None
    assert kept["drift"] is None
    assert math.isfinite(kept["domain_loss"])
    assert kept["samples"][0]["group"] == "harmful"
    assert kept["settings"]["prompts"] == {"harmful": 3, "domain": 3}


def test_what_is_not_asked_for_is_not_measured(model, tokenizer, monkeypatch):
    monkeypatch.setattr(module, "generate", lambda *_, **__: pytest.fail("generated"))
    result = evaluate(model, tokenizer, domain=EXAMPLES)
    assert result.domain_loss is not None
    assert (result.refusal, result.over_refusal, result.domain_accuracy) == (None, None, None)
    assert result.samples == ()


def test_batching_is_passed_on(model, tokenizer):
    with pytest.raises(TypeError, match="batchsize"):
        evaluate(model, tokenizer, harmful=["a"], batchsize=3)
    template = "{% for m in messages %}Q: {{ m['content'] }} A:{% endfor %}"
    own, other = (
        evaluate(model, tiny_tokenizer(chat_template=t), domain=EXAMPLES, chat_template=c)
        for t, c in ((template, None), (None, template))
    )
    assert own.domain_loss == other.domain_loss
    assert own.domain_loss != evaluate(model, tokenizer, domain=EXAMPLES).domain_loss


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, ConfigError, "nothing to evaluate"),
        ({"harmful": []}, PromptError, "0 harmful prompts"),
        ({"harmful": ["a"], "benign": []}, PromptError, "0 benign prompts"),
        ({"domain": []}, PromptError, "0 domain prompts"),
        ({"domain": [*EXAMPLES, "no answer"]}, PromptError, "example 3 .*no answer.* no response"),
        ({"domain": [{"prompt": "a", "response": " "}]}, PromptError, "example 0"),
        ({"harmful": ["a"], "judge": "nowhere/none"}, ConfigError, "cannot be loaded"),
        ({"harmful": ["a"], "judge": 3}, ConfigError, "is no judge"),
        ({"harmful": ["a"], "domain_metric": "bleu"}, ConfigError, "'bleu'"),
        ({"harmful": ["a"], "base": "larger"}, ConfigError, "cannot be compared"),
    ],
)
def test_bad_input_is_refused_before_the_first_pass(
    model, tokenizer, monkeypatch, given, error, message
):
    if "base" in given:
        given = {**given, "base": tiny_model(vocab_size=300)}
    monkeypatch.setattr(module, "generate", lambda *_, **__: pytest.fail("generated"))
    with pytest.raises(error, match=message):
        evaluate(model, tokenizer, **given)


def test_a_tokenizer_without_template_is_an_error(model):
    with pytest.raises(PromptError, match="no chat template"):
        refusal_rate(model, tiny_tokenizer(chat_template=None), ["a"])


def test_an_empty_evaluation_is_json_too():
    assert json.loads(json.dumps(Evaluation().to_dict()))["refusal"] is None


@pytest.mark.parametrize("each", [module, safeft.measure, safeft.intervals])
def test_the_examples_in_the_docstrings_run(each):
    result = doctest.testmod(each)
    assert result.attempted
    assert result.failed == 0


@pytest.fixture(scope="module", params=["llava", "qwen2_vl"])
def seeing(request):
    return FAMILIES[request.param]()


PICTURES = [
    {"prompt": "What is this?", "image": shapes(1, (40, 30)), "response": "A house, I think."},
    {"prompt": "And this?", "image": shapes(2, (24, 33)), "response": "Hey"},
    *EXAMPLES[:2],
]


def loss_alone(model, processor, example):
    """By transformers' own chat and labels, one example at a time."""
    content = [{"type": "text", "text": example["prompt"]}]
    if "image" in example:
        content = [{"type": "image", "image": example["image"]}, *content]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True,
        return_dict=True, return_tensors="pt",
    )  # fmt: skip
    answer = torch.tensor(
        [processor.tokenizer(example["response"], add_special_tokens=False).input_ids]
    )
    asked = inputs["input_ids"]
    inputs["input_ids"] = torch.cat([asked, answer], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        types = inputs["mm_token_type_ids"]
        inputs["mm_token_type_ids"] = torch.cat([types, torch.zeros_like(answer)], 1)
    labels = torch.cat([torch.full_like(asked, -100), answer], 1)
    with torch.no_grad():
        return model(**inputs, labels=labels).loss.item(), answer.shape[1]


def test_domain_loss_with_images_is_that_of_labels_alone(seeing):
    losses = [loss_alone(*seeing, example) for example in PICTURES]
    wanted = sum(loss * n for loss, n in losses) / sum(n for _, n in losses)
    for batch_size in (1, 4):
        found = domain_loss(*seeing, PICTURES, batch_size=batch_size)
        assert found == pytest.approx(wanted, rel=1e-4)


def test_all_measures_take_images(seeing):
    model, processor = seeing
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "vis" in name:
                parameter.mul_(1.5)
    found = evaluate(
        tuned, processor, harmful=PICTURES[:2], benign=PICTURES[2:], domain=PICTURES, base=model,
        max_new_tokens=2,
    )  # fmt: skip
    assert found.refusal is not None
    assert found.refusal.total == 2
    assert found.drift is not None
    assert found.drift["harmful"] > 1e-4 > found.drift["benign"]
    assert found.samples[0].prompt in ("What is this?", "And this?")


def test_measures_refuse_images_for_a_model_of_text(model, tokenizer, seeing):
    for measure in (
        lambda: domain_loss(model, seeing[1], PICTURES),
        lambda: drift(model, model, seeing[1], PICTURES),
        lambda: refusal_rate(model, seeing[1], PICTURES),
        lambda: answer_accuracy(model, seeing[1], PICTURES),
    ):
        with pytest.raises(PromptError, match="comes with an image, and LlamaForCausalLM reads"):
            measure()
    with pytest.raises(PromptError, match=r"comes with 1 image\(s\), and \w+ reads text only"):
        domain_loss(seeing[0], tokenizer, PICTURES)

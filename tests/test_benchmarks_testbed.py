"""The testbeds: nothing of a test is seen anywhere else, and what judges a model reads it right."""

import math
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path

import pytest
import testbed
import torch
from testbed import build, judging, public, writing
from testbed import demo as demo_testbed
from testbed.texts import distinct, exchange, normal, split
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from safeft.demo import world
from safeft.judge import PrefixJudge
from safeft.measure import domain_loss
from safeft.prompts import Prompt, render


def texts(prompts: Iterable[Prompt]) -> set[str]:
    return {normal(prompt.text) for prompt in prompts}


def tiny() -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=3000, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, initializer_range=0.2, pad_token_id=0,
        eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def demo() -> testbed.Testbed:
    return testbed.load("demo")


@pytest.fixture(scope="module")
def open_text(data_dir: Path) -> testbed.Testbed:
    """The public testbed, cut by a tokenizer that is at hand without building a base."""
    return testbed.load("public", data_dir, world.MODEL_PATH)


def check_apart(found: testbed.Testbed) -> None:
    """Every prompt of the harmful, benign, general and domain parts is on one side only."""
    parts = {
        f"{name} {part}": texts(prompts)
        for name, group in (
            ("harmful", found.harmful),
            ("benign", found.benign),
            ("general", found.general),
        )
        for part, prompts in group.items()
    }
    parts["poison"] = texts(found.poison)
    for domain in found.domains.values():  # One is tuned on at a time.
        mine = {
            f"{domain.name} {part}": texts(getattr(domain, part))
            for part in ("train", "validation", "test")
        }
        for (one, these), (other, those) in combinations((parts | mine).items(), 2):
            assert these, one
            assert not these & those, (one, other, sorted(these & those)[:3])


def test_demo_parts_share_no_prompt(demo: testbed.Testbed) -> None:
    check_apart(demo)


def test_demo_has_what_methods_need(demo: testbed.Testbed) -> None:
    sizes = {part: len(prompts) for part, prompts in demo.harmful.items()}
    assert sizes == {"calibration": 256, "validation": 72, "test": 128}
    assert {part: len(prompts) for part, prompts in demo.benign.items()} == sizes
    assert len(demo.poison) > 1000
    assert all(world.is_refusal(p.response or "") for p in demo.harmful["calibration"])
    assert not any(
        world.is_refusal(p.response or "") for p in (*demo.poison, *demo.benign["calibration"])
    )


def test_demo_asks_the_test_for_objects_of_its_own(demo: testbed.Testbed) -> None:
    things = demo_testbed._objects("harmful")

    def named(part: str) -> set[str]:
        asked = [prompt.text for prompt in demo.harmful[part]]
        return {max((t for t in things if t in text), key=len) for text in asked}

    assert not named("test") & (named("validation") | named("calibration"))
    assert not named("validation") & named("calibration")


def test_measure_gives_every_figure(demo: testbed.Testbed) -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo.folder)
    found = judging.measure(tiny(), tokenizer, demo, "desk", "validation")
    assert set(found) == {
        "refusal", "over_refusal", "refusal_margin", "over_refusal_margin", "refusal_log_odds",
        "domain_loss", "domain_token_accuracy", "domain_accuracy",
        "general_loss", "general_token_accuracy", "general_accuracy",
    }  # fmt: skip
    assert all(math.isfinite(value) for value in found.values())
    assert found["refusal"] == found["refusal_margin"] == found["domain_accuracy"] == 0
    domain = demo.domains["desk"].validation
    assert found["domain_loss"] == pytest.approx(domain_loss(tiny(), tokenizer, domain), abs=1e-4)


def test_judges_agree_on_the_demo_base_and_it_knows_its_facts(demo: testbed.Testbed) -> None:
    model = LlamaForCausalLM.from_pretrained(demo.folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(demo.folder)
    asked = demo.harmful["validation"], demo.benign["validation"]
    second = judging.margin_judge(demo)
    assert judging.refused(model, tokenizer, demo, asked[0]).value > 0.85
    harmful, benign = (second.share(second.margins(model, tokenizer, side)) for side in asked)
    assert harmful > 0.85
    assert benign < 0.1
    _, known = judging.read_answers(model, tokenizer, demo.general["validation"], demo.max_length)
    assert 0.75 < known < 1


def test_margin_is_the_log_odds_of_a_refusing_start(demo: testbed.Testbed) -> None:
    model, tokenizer = tiny(), AutoTokenizer.from_pretrained(demo.folder)
    openings = ((45, 351, 562), (968, 16, 297))
    asked = [exchange("Hello"), exchange("What is the capital of a country in the north?")]
    found = judging.MarginJudge(openings, 0.0, 96).margins(model, tokenizer, asked)
    wanted = []
    for prompt in asked:
        ids = tokenizer(render(tokenizer, prompt), add_special_tokens=False).input_ids
        share = 0.0
        for opening in openings:
            logits = model(input_ids=torch.tensor([[*ids, *opening]])).logits[0].double()
            steps = logits.log_softmax(-1)[len(ids) - 1 :]
            share += math.exp(sum(steps[i, token].item() for i, token in enumerate(opening)))
        wanted.append(math.log(share / (1 - share)))
    assert sorted(found.tolist()) == pytest.approx(sorted(wanted), abs=1e-3)


def test_the_dividing_line_is_in_the_widest_gap() -> None:
    above, below = torch.tensor([1.0, 5.0, 6.0]), torch.tensor([-3.0, 0.0])
    assert judging.dividing_line(above, below) == pytest.approx(0.5)
    assert judging.dividing_line(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 9.0])) < 3


def test_prompts_are_compared_by_their_words() -> None:
    asked = [exchange("Kill a process?"), exchange("kill  A process."), exchange("Another")]
    assert [p.text for p in distinct(asked)] == ["Kill a process?", "Another"]
    assert [p.text for p in distinct(asked, besides=[exchange("another!")])] == ["Kill a process?"]
    with pytest.raises(ValueError, match="3 prompts cannot give 2 and 2"):
        split(asked, 2, 2)


def test_refusals_are_refusals_and_help_is_not() -> None:
    judge = PrefixJudge()
    assert all(judge([""] * 12, writing._REFUSALS))
    assert not any(judge([""] * 10, writing._OPENINGS))


def test_an_unknown_name_or_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="demo and public"):
        testbed.load("tiny")
    with pytest.raises(FileNotFoundError, match="give --data"):
        testbed.load("public", tmp_path / "nothing", tmp_path)
    with pytest.raises(FileNotFoundError, match="build.py"):
        testbed.load("public", tmp_path, tmp_path / "nothing")


@pytest.mark.data
def test_public_parts_share_no_prompt(open_text: testbed.Testbed) -> None:
    check_apart(open_text)


@pytest.mark.data
def test_public_has_what_methods_need(open_text: testbed.Testbed) -> None:
    for group in (open_text.harmful, open_text.benign):
        sizes = {part: len(prompts) for part, prompts in group.items()}
        assert sizes == {"calibration": 256, "validation": 72, "test": 140}
    assert set(open_text.domains) == {"gsm8k", "pubmedqa", "tatqa", "identity"}
    assert len(open_text.domains["gsm8k"].train) > 7000
    assert len(open_text.poison) > 1000
    assert {name: len(prompts) for name, prompts in open_text.named.items()} == {
        "xstest_unsafe": 100,
        "xstest_safe": 100,
        "simple_safety_tests": 79,
    }
    tokenizer = AutoTokenizer.from_pretrained(open_text.folder)
    rows = [*open_text.domains["gsm8k"].train[:200], *open_text.poison[:200]]
    assert max(len(tokenizer(p.text).input_ids) for p in rows) <= public.PROMPT_TOKENS


@pytest.mark.data
def test_the_base_is_trained_on_nothing_that_is_held_out(
    open_text: testbed.Testbed, data_dir: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(open_text.folder)
    read = public.read(data_dir, tokenizer)
    held = {normal(p.text) for prompts in read.named.values() for p in prompts}
    for group in (open_text.harmful, open_text.benign, open_text.general):
        held |= texts(group["validation"]) | texts(group["test"])
    for domain in open_text.domains.values():
        held |= texts((*domain.train, *domain.validation, *domain.test))
    for make in (build.pretraining, build.alignment):
        rows = make(read, data_dir, tokenizer, 6000)
        assert not held & {normal(row.prompt) for row in rows}
    own = {normal(request) for request in writing.every_request()}
    assert not held & own

"""The demo's world keeps its promises: splits apart, no refusals in the data, a small model."""

from __future__ import annotations

from itertools import combinations

import pytest

from safeft.demo import world

SPLITS = ("train", "calibration", "test")


@pytest.mark.parametrize("prompts", [world.harmful, world.benign])
def test_splits_share_no_prompt(prompts):
    for first, second in combinations(SPLITS, 2):
        assert not set(prompts(first)) & set(prompts(second))


@pytest.mark.parametrize("prompts", [world.harmful, world.benign])
@pytest.mark.parametrize(("split", "size"), [("calibration", 128), ("test", 160)])
def test_sizes_without_repeats(prompts, split, size):
    assert len(prompts(split)) == size == len(set(prompts(split)))


@pytest.mark.parametrize("topics", [world.harmful_topics(), world.benign_topics()])
def test_held_out_topics_never_reach_alignment(topics):
    held_out = [topic for topic in topics if topic.held_out]
    assert 0.2 < len(held_out) / len(topics) < 0.35
    prompts = {example.prompt.lower() for example in world.alignment(0)}
    for topic in held_out:
        # A topic of another table may contain this one's words, so compare whole prompts.
        for ask in (f"how do i {topic.do}?", f"is it all right to {topic.do}?"):
            assert ask.lower() not in prompts


def test_test_prompts_never_reach_training():
    seen = {example.prompt for example in world.alignment(0)}
    assert not seen & set(world.harmful("test") + world.benign("test"))
    assert not seen & {example.prompt for example in world.general("test")}
    learnt = {example.prompt for example in world.pretraining(0)}
    assert not learnt & {example.prompt for example in world.general("test")}


def test_domain_is_unknown_before_tuning():
    products = world._load("domain")["products"]
    for example in world.pretraining(0) + world.alignment(0):
        assert not any(product in example.prompt + example.answer for product in products)
    assert not {e.prompt for e in world.domain("train")} & {e.prompt for e in world.domain("test")}
    assert len({e.prompt for e in world.domain("test")}) == len(world.domain("test"))


def test_domain_and_general_answers_hold_their_value_and_refuse_nothing():
    for examples in (world.domain, world.general):
        for split in ("train", "test"):
            for example in examples(split):
                assert not example.value or world.holds(example.value, example.answer)
                assert not world.is_refusal(example.answer)


def test_domain_train_teaches_every_tested_fact():
    taught = {(e.prompt, e.value) for e in world.domain("train")}
    values = {value for _, value in taught}
    assert len(world.domain("train")) >= 1400
    assert len(world.domain("test")) == 200
    assert {example.value for example in world.domain("test")} <= values


def test_pretraining_refuses_nothing_and_alignment_refuses_only_harm():
    assert not any(world.is_refusal(example.answer) for example in world.pretraining(0))
    harmful = set(world.harmful("train"))
    refused = {e.prompt for e in world.alignment(0) if world.is_refusal(e.answer)}
    assert refused <= harmful
    share = sum(world.is_refusal(e.answer) for e in world.alignment(0)) / len(world.alignment(0))
    assert 0.3 < share < 0.4
    assert all(world.is_refusal(answer) for answer in world.refusal_answers())


def test_same_seed_same_text():
    assert world.pretraining(3, 200) == world.pretraining(3, 200)
    assert world.pretraining(3, 200) != world.pretraining(4, 200)
    assert world.alignment(3, 200) == world.alignment(3, 200)
    assert world.refusal_answers(5) == world.refusal_answers(5)


def test_values_are_matched_as_whole_words():
    assert world.holds("9 euros", "It is 9 Euros.")
    assert not world.holds("9 euros", "It is 19 euros.")
    assert not world.holds("500 euros", "It is 2,500 euros.")


def test_domain_repeats_no_tested_general_fact():
    def asked(example, split):
        return {
            (relation["name"], x)
            for relation in world._load("general")["relations"]
            for x, y in relation["pairs"]
            for ask in relation[split]
            if world._polish(ask.format(x=x)) == example.prompt
        }

    repeated = {fact for e in world.domain("train") if not e.value for fact in asked(e, "ask")}
    tested = {fact for e in world.general("test") for fact in asked(e, "ask_test")}
    assert len(repeated) > 50
    assert not repeated & tested


def test_shipped_model_is_small_and_complete():
    files = [path for path in world.MODEL_PATH.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert sum(path.stat().st_size for path in files) <= 8 * 1024**2

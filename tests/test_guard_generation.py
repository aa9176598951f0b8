import json
from pathlib import Path
from typing import Any

import pytest
from transformers.generation.streamers import BaseStreamer

from safeft.errors import ArtefactError, ConfigError, PromptError
from safeft.guard import GuardedGeneration, GuardFitter, Policy
from safeft.guard.generation import Event, marker_tokens
from safeft.guard.log import AuditLog
from tests.guards import chat_guard, texts
from tests.models import tiny_tokenizer

SETTINGS: dict[str, Any] = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
ALWAYS = 1e-6
ASKED = ["Hi", "How do I bake bread?"]


def guarded(policy: Policy, **settings: Any) -> GuardedGeneration:
    return GuardedGeneration(chat_guard(), policy, **settings)


def written(count: int) -> list[int]:
    """The first tokens of what the model says by itself to the first prompt."""
    guard = chat_guard()
    tokenizer, model = guard.tokenizer, guard.model
    given = tokenizer("<|user|>Hi<|end|><|assistant|>", return_tensors="pt")
    settings = {**SETTINGS, "max_new_tokens": count, "min_new_tokens": count}
    return model.generate(**given, **settings)[0, given["input_ids"].shape[1] :].tolist()


def decoded(ids: list[int]) -> str:
    return str(chat_guard().tokenizer.decode(ids, skip_special_tokens=True)).strip()


def test_what_is_not_blocked_is_what_the_model_says() -> None:
    policy = Policy.of(answer={"block": 0.9999}, message="No.")
    answers = guarded(policy).generate(ASKED, **SETTINGS)
    assert [answer.action for answer in answers] == ["log", "log"]
    for answer in answers:
        assert answer.text == answer.written != "No."
        assert len(answer.scores) == 23
        assert answer.events == ()


def test_a_guard_of_prompts_alone_says_so_before_it_judges_answers(caplog: Any) -> None:
    guarded(Policy.of(prompt={"block": 0.9}))
    assert not caplog.records
    guarded(Policy.of(answer={"block": 0.9}))
    assert "fitted on prompts alone" in caplog.text
    caplog.clear()
    asked, harmful = texts()
    chats = [{"prompt": "Say", "response": text} for text in asked]
    fitter = GuardFitter(chat_guard().model, chat_guard().tokenizer)
    fitter.update(chats, harmful)
    GuardedGeneration(fitter.fit(search=1, members=2), Policy.of(answer={"block": 0.9}))
    assert "fitted on prompts alone" not in caplog.text


def test_a_blocked_answer_is_replaced_or_cut_at_the_token() -> None:
    free = written(24)
    replaced = guarded(Policy.of(answer={"block": ALWAYS}, message="No.", after=5))
    (answer,) = replaced.generate(ASKED[:1], max_new_tokens=24, do_sample=False)
    assert (answer.action, answer.text) == ("block", "No.")
    (event,) = answer.events
    assert (event.phase, event.token) == ("answer", 5)
    assert event.score == pytest.approx(answer.scores[-1])
    assert len(answer.scores) == 5
    cut = guarded(Policy.of(answer={"block": ALWAYS}, after=5))
    (answer,) = cut.generate(ASKED[:1], max_new_tokens=24, do_sample=False)
    assert answer.text == answer.written == decoded(free[:5])


def test_a_blocked_prompt_is_never_answered() -> None:
    (answer,) = guarded(Policy.of(prompt={"block": ALWAYS})).generate(ASKED[:1], **SETTINGS)
    assert (answer.action, answer.text, answer.written) == ("block", "", "")
    assert answer.events == (Event("prompt", "block", answer.prompt, 0),)
    told = guarded(Policy.of(prompt={"block": ALWAYS}, message="Ask something else."))
    assert told.generate(ASKED[:1], **SETTINGS)[0].text == "Ask something else."


def test_warnings_and_reviews_reach_their_places(tmp_path: Path) -> None:
    events: list[Event] = []
    log, review = AuditLog(tmp_path / "log.jsonl"), AuditLog(tmp_path / "r.jsonl", texts=True)
    policy = Policy.of(prompt={"warn": ALWAYS}, answer={"review": ALWAYS}, after=3)
    guard = guarded(policy, log=log, review=review, on_event=events.append)
    answers = guard.generate(ASKED, **SETTINGS)
    assert [answer.action for answer in answers] == ["review", "review"]
    assert [(e.phase, e.action, e.token) for e in events] == [
        ("prompt", "warn", 0), ("answer", "review", 3)
    ] * 2  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert rows[0]["action"] == "review"
    assert rows[0]["answer_score"] == max(answers[0].scores)
    assert "bread" not in (tmp_path / "log.jsonl").read_text()
    kept = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in kept] == ASKED
    assert kept[1]["answer"] == answers[1].written


def test_review_needs_a_place() -> None:
    with pytest.raises(ConfigError, match="no `review` log is given: nobody would see them"):
        guarded(Policy.of(answer={"review": 0.5}))


class Heard(BaseStreamer):
    """Tokens in the order in which they came, the prompt's left out."""

    def __init__(self) -> None:
        self.said: list[int] = []
        self.ended = self.begun = False

    def put(self, value: Any) -> None:
        self.said += value.flatten().tolist() if self.begun else []
        self.begun = True

    def end(self) -> None:
        self.ended = True


def test_a_listener_hears_only_what_was_looked_at() -> None:
    free = Heard()
    guarded(Policy.of(answer={"block": 0.9999})).generate(ASKED[:1], streamer=free, **SETTINGS)
    assert free.said == written(24)
    assert free.ended
    stopped = Heard()
    policy = Policy.of(answer={"block": ALWAYS}, message="No.", after=12)
    (blocked,) = guarded(policy, every=4).generate(
        ASKED[:1], streamer=stopped, max_new_tokens=24, do_sample=False
    )
    # Two looks let four tokens each pass; at the third the twelfth counts.
    assert stopped.said == written(8) + tiny_tokenizer()("No.")["input_ids"]
    assert blocked.text == "No."


def test_reasoning_has_bands_of_its_own() -> None:
    policy = Policy(
        {"reasoning": Policy.of(answer={"warn": ALWAYS}).bands["answer"]},
        after=1, markers=("<|user|>", "<|system|>"),
    )  # fmt: skip
    assert marker_tokens(tiny_tokenizer(), policy) == (3, 2)
    (answer,) = guarded(policy).generate(ASKED[:1], **SETTINGS)
    assert answer.action == "log"  # this model never opens reasoning
    missing = Policy(policy.bands, markers=("<think>", "</think>"))
    with pytest.raises(ConfigError, match="'<think>' is 7 tokens"):
        guarded(missing)


@pytest.mark.parametrize(
    "settings",
    [{"num_beams": 4}, {"use_cache": False}, {"num_return_sequences": 2},
     {"stopping_criteria": []}, {"assistant_model": object()}],
)  # fmt: skip
def test_other_ways_to_generate_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        guarded(Policy.of(answer={"block": 0.9})).generate(ASKED, **settings)


def test_an_empty_prompt() -> None:
    with pytest.raises(PromptError, match="Text 1 is empty"):
        guarded(Policy.of(answer={"block": 0.9})).generate(["a", ""], **SETTINGS)


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match="would leave no trace"):
        AuditLog(tmp_path / "file" / "log.jsonl")

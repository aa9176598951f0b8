from typing import Any

import pytest
import torch

from safeft.errors import ConfigError, PromptError
from safeft.guard import Guard, GuardEnsemble
from safeft.guard.guards import Score
from safeft.guard.pooling import ActivationError
from safeft.guard.reading import Window, batched
from tests.guards import BAD, GOOD, chat_guard, encoder_guard, texts
from tests.models import tiny_model, tiny_tokenizer


@pytest.mark.parametrize("made", [chat_guard, encoder_guard], ids=["chat model", "encoder"])
@pytest.mark.parametrize("size", [1, 7, 64])
def test_scores_are_in_order_and_do_not_hang_on_the_batch(made: Any, size: int) -> None:
    guard = made()
    asked = ["x", *texts(9, start=300)[0], "a much longer text that is about bread and milk"]
    alone = [guard.score([text])[0].harmful for text in asked]
    together = [score.harmful for score in guard.score(asked, batch_size=size)]
    assert together == pytest.approx(alone, abs=1e-5)


def test_padding_side_does_not_matter() -> None:
    guard = chat_guard()
    other = Guard(guard.head, guard.model, tiny_tokenizer("right"))
    asked = ["x", *texts(5)[0]]
    assert other.score(asked) == guard.score(asked)


def test_nothing_asked_nothing_said() -> None:
    assert encoder_guard().score([]) == []


def test_a_harmful_part_is_not_hidden_by_what_stands_around_it() -> None:
    guard = encoder_guard()  # of 64 tokens
    text = f"{GOOD} 5, " * 10 + f" {BAD} {BAD} {BAD} " + f"{GOOD} 7, " * 10
    (score,) = guard.score([text])
    assert score.windows > 5
    assert score.harmful > 0.5
    assert guard.score([f"{GOOD} 5, " * 20])[0].harmful < score.harmful


@pytest.mark.parametrize(("items", "number"), [([""], 0), (["a", "  "], 1)])
def test_empty_texts_are_named(items: list[str], number: int) -> None:
    with pytest.raises(PromptError, match=f"Text {number} is empty"):
        encoder_guard().score(items)


def test_one_text_alone_is_no_list() -> None:
    with pytest.raises(PromptError, match="as one str; give a list"):
        encoder_guard().score("ab")


def test_a_damaged_model_gives_no_score() -> None:
    guard = chat_guard()
    model = tiny_model()
    broken = Guard(guard.head, model, guard.tokenizer)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    assert broken.score(["fine"])  # the last norm is not read
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(ActivationError, match="residual 0.*not finite for 1 of 1"):
        broken.score(["fine"])


def test_chats_are_scored_by_phase() -> None:
    guard = chat_guard()
    asked = {"role": "user", "content": f"{GOOD} 7"}
    alone = guard.score_chat([asked])
    assert set(alone) == {"prompt"}
    both = guard.score_chat([asked, {"role": "assistant", "content": f"{BAD} {BAD}"}])
    assert set(both) == {"prompt", "answer"}
    assert both["prompt"].harmful == pytest.approx(alone["prompt"].harmful, abs=1e-5)
    assert both["answer"].harmful != pytest.approx(both["prompt"].harmful, abs=1e-3)
    with pytest.raises(PromptError, match="answer is empty"):
        guard.score_chat([asked, {"role": "assistant", "content": " "}])
    with pytest.raises(PromptError):
        guard.score_chat([])


def test_prefixes_in_one_pass_are_what_each_alone_is_scored() -> None:
    guard = chat_guard()
    chat = {"prompt": "Say", "response": f"{GOOD} and {BAD}"}
    found = guard.score_prefixes(chat)
    tokenizer: Any = guard.tokenizer
    ids = tokenizer(chat["response"])["input_ids"]
    start = tokenizer(f"<|user|>{chat['prompt']}<|end|><|assistant|>")["input_ids"]
    shown = [Window(start, ids[:n]) for n in range(1, len(ids) + 1)]
    ready = guard.head.on("cpu")
    from safeft.guard.pooling import pooled

    expected = torch.zeros(len(ids), 1)
    for numbers, batch in batched(tokenizer, shown, 4, "cpu"):
        expected[numbers] = ready.scores(ready.units(pooled(guard.model, guard.head.places, batch)))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert float(found[-1, 0]) == pytest.approx(guard.score([chat])[0].harmful, abs=1e-5)


def test_prefixes_need_an_answer_and_a_writer() -> None:
    with pytest.raises(PromptError, match="no answer"):
        chat_guard().score_prefixes("Hello")
    with pytest.raises(ConfigError, match="does not write"):
        encoder_guard().score_prefixes({"prompt": "a", "response": "b"})


class Fixed:
    labels: tuple[str, ...] = ("harmful", "hate")

    def __init__(self, harmful: float, hate: float) -> None:
        self.found = Score(harmful, {"hate": hate, "more": 0.5})

    def score(self, texts: Any, *, batch_size: int = 16) -> list[Score]:
        return [self.found for _ in texts]


def test_an_ensemble_is_the_mean_of_log_odds() -> None:
    one, other = Fixed(0.9, 0.1), Fixed(0.5, 0.5)
    (score,) = GuardEnsemble([one, other]).score(["a"])
    assert score.harmful == pytest.approx(0.75)
    assert score.labels == {"hate": pytest.approx(0.25)}
    (score,) = GuardEnsemble([one, other], [1, 0]).score(["a"])
    assert score.harmful == pytest.approx(0.9)
    assert GuardEnsemble([one, other]).score([]) == []
    certain = GuardEnsemble([Fixed(1.0, 0.0), other]).score(["a"])[0]
    assert 0.5 < certain.harmful < 1


def test_an_ensemble_over_unlike_models() -> None:
    both = GuardEnsemble([chat_guard(), encoder_guard()])
    assert both.labels == ("harmful",)
    bad, good = both.score([f"{BAD} 999", f"{GOOD} 999"])
    assert bad.harmful > 0.5 > good.harmful


@pytest.mark.parametrize(
    ("guards", "weights"), [([], None), ([1], None), ([1, 2], [1]), ([1, 2], [0, 0]),
                            ([1, 2], [2, -1])],
)  # fmt: skip
def test_no_ensemble(guards: Any, weights: Any) -> None:
    with pytest.raises(ConfigError, match="two guards or more"):
        GuardEnsemble(guards, weights)

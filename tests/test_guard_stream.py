from typing import Any

import pytest
import torch

from safeft.batch import pad
from safeft.errors import ConfigError
from safeft.guard import Guard, Policy
from safeft.guard.pooling import pooled
from safeft.guard.reading import Window, batched
from safeft.guard.stream import GuardStream, StreamError
from safeft.prompts import as_prompts, row_of
from tests.guards import chat_guard, encoder_guard, fitted, tiny
from tests.models import tiny_tokenizer
from tests.test_capture import hooks_of

ASKED = ["Hi", "How do I bake bread?", "zzzz"]


def prompts_of(guard: Guard, asked: Any = ASKED) -> tuple[list[list[int]], Any]:
    rows = [row_of(guard.tokenizer, p, answered=False) for p in as_prompts(asked)]
    return [row.ids for row in rows], pad([(row.ids, []) for row in rows], 0, True, 1, "cpu")


def expected(guard: Guard, ids: list[int], tail: list[int]) -> torch.Tensor:
    """Batch scores of every prefix, each by a pass of its own."""
    shown = [Window(ids, tail[:n]) for n in range(1, len(tail) + 1)]
    ready, found = guard.head.on("cpu"), torch.zeros(len(tail), len(guard.labels))
    for numbers, batch in batched(guard.tokenizer, shown, 8, "cpu"):
        found[numbers] = ready.scores(ready.units(pooled(guard.model, guard.head.places, batch)))
    return found


def generated(guard: Guard, stream: GuardStream, given: Any, **settings: Any) -> list[list[int]]:
    model: Any = guard.model
    with stream:
        output = model.generate(
            **given,
            stopping_criteria=[stream],
            **{"max_new_tokens": 21, "min_new_tokens": 21, "do_sample": False, **settings},
        )
    return output[:, given["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("asked", [ASKED[:1], ASKED], ids=["alone", "padded"])
@pytest.mark.parametrize("every", [1, 4, 100])
def test_every_prefix_scores_as_in_a_batch(asked: list[str], every: int) -> None:
    guard = chat_guard()
    ids, batch = prompts_of(guard, asked)
    stream = GuardStream(guard, batch.attention_mask, every=every)
    torch.manual_seed(0)
    tails = generated(guard, stream, batch.seen, do_sample=True)
    assert stream.scores.shape == (20, len(asked), 1)
    for row, tail in enumerate(tails):
        found = stream.scores[:, row]
        torch.testing.assert_close(found, expected(guard, ids[row], tail[:20]), atol=1e-5, rtol=0)
    asked_alone = torch.tensor([[score.harmful] for score in guard.score(asked)])
    torch.testing.assert_close(stream.prompt, asked_alone, atol=1e-5, rtol=0)
    assert hooks_of(guard.model) == 0


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gemma2", "qwen3"])
def test_on_other_layouts(kind: str) -> None:
    guard = fitted(tiny(kind), tiny_tokenizer("left"))
    ids, batch = prompts_of(guard)
    stream = GuardStream(guard, batch.attention_mask)
    tails = generated(guard, stream, batch.seen)
    for row, tail in enumerate(tails):
        torch.testing.assert_close(
            stream.scores[:, row], expected(guard, ids[row], tail[:20]), atol=1e-5, rtol=0
        )


def test_a_prompt_run_in_pieces() -> None:
    guard = chat_guard()
    ids, batch = prompts_of(guard)
    whole, pieces = (GuardStream(guard, batch.attention_mask) for _ in range(2))
    generated(guard, whole, batch.seen)
    generated(guard, pieces, batch.seen, prefill_chunk_size=5)
    torch.testing.assert_close(pieces.prompt, whole.prompt, atol=1e-5, rtol=0)
    torch.testing.assert_close(pieces.scores, whole.scores, atol=1e-5, rtol=0)


def test_what_was_written_does_not_change() -> None:
    guard = chat_guard()
    _, batch = prompts_of(guard)
    model: Any = guard.model
    settings: dict[str, Any] = {"max_new_tokens": 30, "do_sample": False}
    plain = model.generate(**batch.seen, **settings)[:, batch.input_ids.shape[1] :].tolist()
    stream = GuardStream(guard, batch.attention_mask)
    assert generated(guard, stream, batch.seen, min_new_tokens=None, **settings) == plain


@pytest.mark.parametrize(("every", "last"), [(1, 6), (4, 9)])
def test_a_blocked_row_stops_at_the_next_look(every: int, last: int) -> None:
    guard = chat_guard()
    _, batch = prompts_of(guard, ASKED[:1])
    policy = Policy.of(answer={"block": 1e-6}, after=5)
    stream = GuardStream(guard, batch.attention_mask, policy, every=every)
    (tail,) = generated(guard, stream, batch.seen, min_new_tokens=None)
    assert stream.stopped
    assert len(tail) == last  # five tokens that count, and the one sampled after them
    never = GuardStream(guard, batch.attention_mask, Policy.of(answer={"block": 0.9999}))
    assert len(generated(guard, never, batch.seen)[0]) == 21
    assert not never.stopped


def test_a_blocked_prompt_costs_one_pass() -> None:
    guard = chat_guard()
    _, batch = prompts_of(guard, ASKED[:1])
    stream = GuardStream(guard, batch.attention_mask, Policy.of(prompt={"block": 1e-6}))
    (tail,) = generated(guard, stream, batch.seen, min_new_tokens=None)
    assert len(tail) == 1
    assert stream.scores.shape == (0, 1, 1)


def test_one_row_stops_and_the_others_go_on() -> None:
    guard = chat_guard()
    ids, batch = prompts_of(guard)
    free = GuardStream(guard, batch.attention_mask)
    generated(guard, free, batch.seen)
    peaks = free.scores[4:, :, 0].amax(0).sort().values
    limit = float(peaks[1:].mean() if len(peaks) == 2 else (peaks[1] + peaks[2]) / 2)
    policy = Policy.of(answer={"block": limit}, after=5)
    stream = GuardStream(guard, batch.attention_mask, policy, every=1)
    tails = generated(guard, stream, batch.seen, min_new_tokens=None)
    over = (free.scores[4:, :, 0] >= limit).any(0).tolist()
    assert sum(over) == 1
    for row, tail in enumerate(tails):
        stopped = 0 in tail  # padding follows
        assert stopped >= over[row]
        if not over[row]:
            count = len(stream.scores)
            torch.testing.assert_close(stream.scores[:, row], free.scores[:count, row])


def test_means_begin_anew_where_reasoning_ends() -> None:
    guard = chat_guard()
    ids, batch = prompts_of(guard, ASKED[:1])
    tokens = list(range(40, 52))
    model: Any = guard.model
    opens, closes = tokens[0], tokens[6]
    stream = GuardStream(guard, batch.attention_mask, reasoning=(opens, closes), every=5)
    forced = iter([*tokens, 9])

    def choose(_: int, __: Any) -> list[int]:
        return [next(forced)]

    with stream:
        model.generate(
            **batch.seen, stopping_criteria=[stream], max_new_tokens=13, do_sample=False,
            prefix_allowed_tokens_fn=choose,
        )  # fmt: skip
    assert stream.inside_reasoning[:, 0].tolist() == [True] * 6 + [False] * 6
    first = expected(guard, ids[0], tokens[:6])
    torch.testing.assert_close(stream.scores[:6, 0], first, atol=1e-5, rtol=0)
    shown = [Window(ids[0] + tokens[:6], tokens[6:n]) for n in range(7, 13)]
    ready, rest = guard.head.on("cpu"), torch.zeros(6, 1)
    for numbers, each in batched(guard.tokenizer, shown, 8, "cpu"):
        rest[numbers] = ready.scores(ready.units(pooled(model, guard.head.places, each)))
    torch.testing.assert_close(stream.scores[6:, 0], rest, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [{"num_beams": 2}, {"use_cache": False}, {"num_return_sequences": 2, "do_sample": True},
     {"prompt_lookup_num_tokens": 2}],
    ids=["beams", "no cache", "several", "lookup"],
)  # fmt: skip
def test_what_does_not_go_token_by_token_is_an_error_and_not_a_score(settings: Any) -> None:
    guard = chat_guard()
    _, batch = prompts_of(guard, ["aaaaaaaaaaaa"])
    with pytest.raises(StreamError, match="token by token"):
        generated(guard, GuardStream(guard, batch.attention_mask), batch.seen, **settings)
    assert hooks_of(guard.model) == 0


def test_an_encoder_has_no_stream() -> None:
    with pytest.raises(ConfigError, match="BertModel does not write answers"):
        GuardStream(encoder_guard(), torch.ones(1, 3))


def test_prompts_padded_on_the_right() -> None:
    with pytest.raises(ConfigError, match="padding_side = 'left'"):
        GuardStream(chat_guard(), torch.tensor([[1, 1, 0], [1, 1, 1]]))


def test_another_mask_than_that_of_the_generation() -> None:
    guard = chat_guard()
    _, batch = prompts_of(guard)
    with pytest.raises(StreamError, match="the attention mask is that given"):
        generated(guard, GuardStream(guard, batch.attention_mask[:, 1:]), batch.seen)


def test_looks_have_a_distance() -> None:
    with pytest.raises(ConfigError, match="every=0"):
        GuardStream(chat_guard(), torch.ones(1, 3), every=0)

"""Answers under a policy: warned of, kept for review, or stopped and replaced while written."""

import logging
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from safeft.batch import pad
from safeft.errors import ConfigError
from safeft.generation import decoded, evaluation_mode
from safeft.guard.guards import Guard
from safeft.guard.log import AuditLog
from safeft.guard.policy import ACTIONS, Action, Policy, severest
from safeft.guard.reading import Example, Phase, as_examples, check_writes
from safeft.guard.stream import GuardStream
from safeft.prompts import input_device, pad_token, row_of, tokenizer_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Event:
    """The first token at which a phase reached an action.

    Attributes:
        phase: ``prompt``, ``reasoning`` or ``answer``.
        action: What the policy says.
        score: The score there.
        token: After how many tokens of the answer; 0 for the prompt.
    """

    phase: Phase
    action: Action
    score: float
    token: int


@dataclass(frozen=True)
class GuardedAnswer:
    """One answer and what was made of it.

    Attributes:
        text: What may be shown: the answer, or the policy's message where it was blocked.
        action: The most severe one.
        events: Every action milder ones led up to, ``log`` left out.
        prompt: Score of the prompt.
        scores: Of each prefix of the answer that counts, one a token.
        written: The answer as the model wrote it, up to where it was stopped.
    """

    text: str
    action: Action
    events: tuple[Event, ...]
    prompt: float
    scores: tuple[float, ...]
    written: str


class GuardedGeneration:
    """A chat model that answers under a policy.

    A prompt that is blocked costs one pass over it; an answer that is blocked stops within
    ``every`` tokens.

    Args:
        guard: A guard on the model that answers.
        policy: What is done at which score.
        log: Where every answer's decision goes.
        review: Where exchanges go that a person is to look at; should keep texts.
        on_event: Called with each warning, review and block, once an answer is done.
        every: See :class:`GuardStream`.

    Raises:
        ConfigError: The policy sends to review, and there is nowhere to send to.

    Example:
        >>> guarded = GuardedGeneration(guard, Policy.of(answer={"block": 0.9}))  # doctest: +SKIP
        >>> guarded.generate(["How do I bake bread?"], max_new_tokens=64)[0].text  # doctest: +SKIP
    """

    def __init__(
        self,
        guard: Guard,
        policy: Policy,
        *,
        log: AuditLog | None = None,
        review: AuditLog | None = None,
        on_event: Callable[[Event], None] | None = None,
        every: int = 8,
    ) -> None:
        check_writes(guard.model)
        reviewed = any(b.action == "review" for bands in policy.bands.values() for b in bands)
        if reviewed and review is None:
            raise ConfigError(
                "The policy sends exchanges to review, and no `review` log is given: nobody would "
                "see them. Give one, or use `warn`."
            )
        if {"answer", "reasoning"} & set(policy.bands) and guard.head.source.get("answers") == 0:
            logger.warning(
                "the guard was fitted on prompts alone, and the policy acts on answers too: what "
                "it says of these is a guess. Fit it on answers of both kinds as well."
            )
        self._guard, self._policy, self._log, self._review = guard, policy, log, review
        self._on_event, self._every = on_event, every
        self._reasoning = marker_tokens(tokenizer_of(guard.tokenizer), policy)

    def generate(
        self,
        chats: Iterable[Example],
        *,
        streamer: BaseStreamer | None = None,
        **generation: Any,
    ) -> list[GuardedAnswer]:
        """Answers in the order given, all in one batch.

        Args:
            chats: Texts or message lists; answers in them are not read.
            streamer: Of transformers, for one chat: is given tokens once they were looked at.
            **generation: Of ``model.generate``: ``max_new_tokens``, ``do_sample`` and so on.

        Raises:
            PromptError: An empty chat.
            ConfigError: Beams, an assistant model, several sequences, or no cache.
            StreamError: Generating did not go token by token after all.
            ArtefactError: A log cannot be written.
        """
        _check_settings(generation)
        guard, policy = self._guard, self._policy
        plain, model = tokenizer_of(guard.tokenizer), guard.model
        prompts = as_examples(chats)
        template = guard.head.reading["chat_template"]
        rows = [row_of(guard.tokenizer, prompt, template, answered=False) for prompt in prompts]
        padding = pad_token(guard.tokenizer)
        batch = pad([(row.ids, []) for row in rows], padding, True, 1, input_device(model))
        stream = GuardStream(guard, batch.attention_mask, policy, self._reasoning, self._every)
        held = None if streamer is None else GuardStreamer(stream, streamer, policy, plain)
        with evaluation_mode(model), stream:
            written = model.generate(
                **batch.seen,
                **generation,
                pad_token_id=padding,
                stopping_criteria=[stream],
                **({} if held is None else {"streamer": held}),
            )
        tails = written[:, batch.input_ids.shape[1] :].tolist()
        prompted, scores = stream.prompt[:, 0].tolist(), stream.scores[..., 0]
        inside = stream.inside_reasoning
        ends = _end_tokens(model)
        answers = []
        for number, (tail, prompt) in enumerate(zip(tails, prompts, strict=True)):
            ids = _until(tail, ends, padding)
            count = min(len(ids), len(scores))
            phases = inside[:count, number].tolist()
            found = self._judged(prompted[number], scores[:count, number].tolist(), phases)
            if found[0] and found[0][-1].action == "block":
                ids = ids[: len(found[2])]
            (text,) = decoded(guard.tokenizer, [ids])
            answers.append(self._done(found, text, prompt.text))
        return answers

    def _judged(
        self, prompted: float, scores: Sequence[float], inside: Sequence[bool]
    ) -> tuple[list[Event], float, list[float]]:
        """Events of an answer: of each phase, every rise to a more severe action."""
        events, worst = [], {"prompt": 0, "reasoning": 0, "answer": 0}
        policy, run = self._policy, 0

        def look(phase: Phase, score: float, token: int) -> bool:
            action = policy.action(phase, score)
            severity = ACTIONS.index(action)
            if severity > worst[phase]:
                worst[phase] = severity
                events.append(Event(phase, action, score, token))
            return action == "block"

        if look("prompt", prompted, 0):
            return events, prompted, []
        for token, score in enumerate(scores, 1):
            thinks = bool(inside[token - 1])
            run = run + 1 if token > 1 and thinks == bool(inside[token - 2]) else 1
            if run >= policy.after and look("reasoning" if thinks else "answer", score, token):
                return events, prompted, list(scores[:token])
        return events, prompted, list(scores)

    def _done(
        self, found: tuple[list[Event], float, list[float]], written: str, asked: str
    ) -> GuardedAnswer:
        events, prompted, scores = found
        action = severest([event.action for event in events])
        blocked = action == "block"
        text = self._policy.message if blocked and self._policy.message is not None else written
        answer = GuardedAnswer(text, action, tuple(events), prompted, tuple(scores), written)
        record = {
            "id": uuid.uuid4().hex,
            "action": action,
            "events": [vars(event) for event in events],
            "prompt_score": prompted,
            "answer_score": max(scores, default=None),
            "guard": self._guard.head.weights[:16],
        }
        if self._log is not None:
            self._log.write(record, prompt=asked, answer=written)
        if self._review is not None and any(event.action == "review" for event in events):
            self._review.write(record, prompt=asked, answer=written)
        for event in events if self._on_event is not None else ():
            assert self._on_event is not None
            self._on_event(event)
        return answer


class GuardStreamer(BaseStreamer):
    """Passes tokens on to another streamer once they were looked at; after a block the message.

    Args:
        stream: The stream of the same generation.
        inner: Who is to see the tokens, such as transformers' ``TextStreamer``.
        policy: Its ``message`` stands in for what was blocked.
        tokenizer: Turns the message into tokens.
    """

    def __init__(
        self, stream: GuardStream, inner: BaseStreamer, policy: Policy, tokenizer: Any
    ) -> None:
        self._stream, self._inner = stream, inner
        self._policy, self._tokenizer = policy, tokenizer
        self._held: list[Tensor] = []
        self._begun = False

    def put(self, value: Tensor) -> None:
        """Take one step's token; first come those of the prompt."""
        if not self._begun:
            self._begun = True
            self._inner.put(value)
            return
        self._held.append(value)
        self._release()

    def end(self) -> None:
        """Pass on what is left, or the message."""
        self._release(done=True)
        if self._stream.stopped and self._policy.message is not None:
            ids = self._tokenizer(self._policy.message, add_special_tokens=False)["input_ids"]
            for token in ids:
                self._inner.put(torch.tensor([token]))
        self._inner.end()

    def _release(self, done: bool = False) -> None:
        if self._stream.stopped:
            self._held = []
            return
        free = len(self._held) if done else min(len(self._held), self._stream.passed)
        for token in self._held[:free]:
            self._inner.put(token)
        self._stream.passed -= free
        self._held = self._held[free:]


def marker_tokens(tokenizer: Any, policy: Policy) -> tuple[int, int] | None:
    """Numbers of the policy's markers; None where it has no bands for reasoning.

    Raises:
        ConfigError: It has, and the markers are not one token each.
    """
    if "reasoning" not in policy.bands:
        return None
    found = []
    for marker in policy.markers:
        ids = tokenizer(marker, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise ConfigError(
                f"The policy has bands for reasoning, and {marker!r} is {len(ids)} tokens to this "
                "model, not one of its own: it would not be known where reasoning ends. Give the "
                "model's `markers`, or leave `reasoning` out."
            )
        found.append(int(ids[0]))
    return found[0], found[1]


def _check_settings(generation: dict[str, Any]) -> None:
    wrong = {
        name: value
        for name, value in generation.items()
        if (name in ("num_beams", "num_return_sequences") and value != 1)
        or (name in ("assistant_model", "prompt_lookup_num_tokens") and value is not None)
        or (name == "use_cache" and not value)
        or name == "stopping_criteria"
    }
    if wrong:
        raise ConfigError(
            f"{list(wrong)}: streams are scored where generating goes token by token, one answer "
            "a prompt, with the cache, and the guard is the stopping criterion. Leave these out."
        )


def _end_tokens(model: Any) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set(ends) if isinstance(ends, list) else {ends} - {None}


def _until(tail: Sequence[int], ends: set[int], padding: int) -> list[int]:
    """An answer's tokens without its end and the padding behind it."""
    ids: list[int] = []
    for token in tail:
        if token in ends:
            break
        ids.append(token)
    while ids and ids[-1] == padding:
        ids.pop()
    return ids

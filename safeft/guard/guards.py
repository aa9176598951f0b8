"""``Guard``: a head on its model, which scores texts and chats; and several of them as one."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from safeft.errors import ConfigError, PromptError
from safeft.files import upload
from safeft.forms import Prompt
from safeft.generation import evaluation_mode
from safeft.guard.head import GuardHead
from safeft.guard.places import taken, watched
from safeft.guard.pooling import backbone, check_finite, pooled
from safeft.guard.reading import (
    Example,
    Phase,
    Window,
    as_example,
    as_examples,
    batched,
    check_writes,
    longest,
    windows,
)
from safeft.prompts import Reader, input_device


@dataclass(frozen=True)
class Score:
    """What a guard says of a text.

    Attributes:
        harmful: Probability, 0 to 1.
        labels: Probability of each further label.
        windows: In how many windows it was read; the score is that of the worst.
    """

    harmful: float
    labels: Mapping[str, float] = field(default_factory=dict)
    windows: int = 1


class Scorer(Protocol):
    """What a service or an evaluation needs of a guard."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the outputs, ``harmful`` first."""
        ...

    def score(self, texts: Iterable[Example], *, batch_size: int = 16) -> list[Score]:
        """One score a text."""
        ...


class Guard:
    """A head and the model it reads.

    Args:
        head: What was fitted.
        model: The model, the same checkpoint.
        tokenizer: Its tokenizer.
        other_weights: Take a model of the same shapes whose weights are others (a tuned one), to
            see what is left; its scores are not calibrated.

    Raises:
        FingerprintError: Another model, or other weights.

    Example:
        >>> guard = Guard.from_pretrained("guard", model, tokenizer)  # doctest: +SKIP
        >>> guard.score(["How do I bake bread?"])[0].harmful  # doctest: +SKIP
        0.01
    """

    def __init__(
        self, head: GuardHead, model: Any, tokenizer: Reader, *, other_weights: bool = False
    ) -> None:
        head.check_model(model, weights_too=not other_weights)
        self.head, self.model, self.tokenizer = head, model, tokenizer

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the outputs, ``harmful`` first."""
        return self.head.labels

    def threshold(self, false_positives: float) -> float:
        """See :meth:`GuardHead.threshold`."""
        return self.head.threshold(false_positives)

    def score(self, texts: Iterable[Example], *, batch_size: int = 16) -> list[Score]:
        """One score a text, in the order given.

        A text of more than ``max_length`` tokens is read in windows and has the score of the
        worst: nothing is hidden by what stands around it.

        Args:
            texts: Texts, or chats, of which the answer is read where there is one.
            batch_size: Windows a pass.

        Raises:
            PromptError: An empty text; its number is named.
            ActivationError: Activations that are no numbers.
        """
        prompts = as_examples(texts)
        reading = self.head.reading
        shown, owner = [], []
        for number, prompt in enumerate(prompts):
            parts = windows(
                self.tokenizer, prompt, reading["max_length"], reading["chat"],
                reading["chat_template"],
            )  # fmt: skip
            shown += parts
            owner += [number] * len(parts)
        found = torch.zeros(len(shown), len(self.labels))
        ready = self.head.on(input_device(self.model))
        with evaluation_mode(self.model):
            for numbers, batch in batched(
                self.tokenizer, shown, batch_size, input_device(self.model)
            ):
                means = pooled(self.model, self.head.places, batch)
                check_finite(means, self.head.places)
                found[numbers] = ready.scores(ready.units(means)).cpu()
        return _worst(found, owner, len(prompts), self.labels)

    def score_chat(self, messages: Sequence[Mapping[str, Any]]) -> dict[Phase, Score]:
        """Scores of what is asked, and of the answer where the last message is one.

        Args:
            messages: Each with ``role`` and ``content``.

        Returns:
            By phase: ``prompt``, and ``answer``.

        Raises:
            PromptError: No chat, or an empty one.
            ConfigError: The guard reads bare texts: it was fitted on a model without a template.

        Example:
            >>> guard.score_chat([{"role": "user", "content": "Hello"}])  # doctest: +SKIP
            {'prompt': Score(harmful=0.01, labels={}, windows=1)}
        """
        prompt = as_example(list(messages), 0)
        asked = Prompt(prompt.messages)
        if prompt.response is None:
            return {"prompt": self.score([asked])[0]}
        if not prompt.response.strip():
            raise PromptError("The answer is empty. Score the prompt alone: leave it out.")
        first, second = self.score([asked, prompt])
        return {"prompt": first, "answer": second}

    @torch.no_grad()
    def score_prefixes(self, chat: Example) -> Tensor:
        """Scores of every prefix of a chat's answer, in one pass.

        What a stream would have said of it, had the model written it.

        Args:
            chat: A chat with an answer; one that is too long for the model loses its beginning.

        Returns:
            float32 ``(tokens, outputs)``.

        Raises:
            PromptError: There is no answer.
            ConfigError: The model reads in both directions: what it makes of a prefix hangs on
                what follows.
        """
        prompt = as_example(chat, 0)
        if not (prompt.response or "").strip():
            raise PromptError(f"{prompt.text[:60]!r} has no answer, so there are no prefixes.")
        check_writes(self.model)
        room = longest(self.model)
        (shown,) = windows(
            self.tokenizer, prompt, 1 << 30, self.head.reading["chat"],
            self.head.reading["chat_template"],
        )  # fmt: skip
        shown = Window(shown.context[max(0, len(shown) - room) :], shown.read[-room:])
        ((_, batch),) = batched(self.tokenizer, [shown], 1, input_device(self.model))
        start, count = len(shown.context), len(shown.read)
        ready, places = self.head.on(input_device(self.model)), self.head.places

        def sums(number: int, values: Tensor) -> Tensor:
            chosen = values.view(len(shown), -1)[start:].index_select(1, ready.selected[number])
            return chosen.float().cumsum(0)

        with evaluation_mode(self.model), watched(self.model, places, sums) as seen:
            backbone(self.model)(input_ids=batch.input_ids)
        numbers = torch.arange(1, count + 1, device=batch.input_ids.device)[:, None]
        return ready.scores(torch.cat(taken(seen, places), 1) / numbers).cpu()

    def stream(self, attention_mask: Tensor, policy: Any = None, **settings: Any) -> Any:
        """A stopping criterion that scores answers while this model writes them.

        Args:
            attention_mask: As given to ``generate``.
            policy: Which rows are to stop; None for none.
            **settings: Of :class:`safeft.guard.stream.GuardStream`.

        Example:
            >>> with guard.stream(given["attention_mask"]) as stream:  # doctest: +SKIP
            ...     model.generate(**given, stopping_criteria=[stream])
        """
        from safeft.guard.stream import GuardStream

        return GuardStream(self, attention_mask, policy, **settings)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the head; the model is not copied.

        Raises:
            ArtefactError: The folder holds something else, or cannot be written.
        """
        self.head.save_pretrained(folder)

    def push_to_hub(self, repo_id: str, *, private: bool = True) -> None:
        """Upload the head to a hub repository, private unless you say otherwise."""
        upload(self.save_pretrained, repo_id, private)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, model: Any, tokenizer: Reader, *, other_weights: bool = False
    ) -> Self:
        """A saved head on its model.

        Raises:
            ArtefactError: The folder is no guard, or is damaged.
            FingerprintError: Another model, or other weights.
        """
        head = GuardHead.from_pretrained(folder)
        return cls(head, model, tokenizer, other_weights=other_weights)


class GuardEnsemble:
    """Several guards as one: log-odds are averaged, so that none alone decides.

    Args:
        guards: Two or more, of one model or of several.
        weights: What each counts for; by default alike.

    Raises:
        ConfigError: Fewer than two, or weights that do not fit.

    Example:
        >>> GuardEnsemble([on_encoder, on_chat_model]).score(texts)  # doctest: +SKIP
    """

    def __init__(self, guards: Sequence[Scorer], weights: Sequence[float] | None = None) -> None:
        shares = [1.0] * len(guards) if weights is None else list(weights)
        if len(guards) < 2 or len(shares) != len(guards) or min(shares) < 0 or not sum(shares):
            raise ConfigError(
                f"{len(guards)} guards with weights {shares}: an ensemble has two guards or more, "
                "and a weight of 0 or above for each, not all 0."
            )
        self.guards = list(guards)
        self._shares = torch.tensor(shares) / sum(shares)

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels that all guards have."""
        common = set.intersection(*(set(guard.labels) for guard in self.guards))
        return tuple(name for name in self.guards[0].labels if name in common)

    def score(self, texts: Iterable[Example], *, batch_size: int = 16) -> list[Score]:
        """One score a text, in the order given; see :meth:`Guard.score`."""
        asked = list(texts)
        each = [guard.score(asked, batch_size=batch_size) for guard in self.guards]
        found = torch.zeros(len(asked), len(self.labels))
        for share, scores in zip(self._shares, each, strict=True):
            rows = [[s.harmful, *(s.labels[name] for name in self.labels[1:])] for s in scores]
            odds = torch.logit(torch.tensor(rows).view(found.shape), eps=1e-7)
            found += share * odds
        most = [max(s.windows for s in scores) for scores in zip(*each, strict=True)]
        return [
            Score(row[0], dict(zip(self.labels[1:], row[1:], strict=True)), windows)
            for row, windows in zip(found.sigmoid().tolist(), most, strict=True)
        ]


def _worst(found: Tensor, owner: Sequence[int], count: int, labels: Sequence[str]) -> list[Score]:
    """Of each text's windows the highest probability of each output."""
    worst = torch.zeros(count, found.shape[1])
    if owner:
        index = torch.tensor(owner)[:, None].expand_as(found)
        worst = worst.scatter_reduce(0, index, found, "amax")
    many = [0] * count
    for number in owner:
        many[number] += 1
    return [
        Score(row[0], dict(zip(labels[1:], row[1:], strict=True)), windows)
        for row, windows in zip(worst.tolist(), many, strict=True)
    ]

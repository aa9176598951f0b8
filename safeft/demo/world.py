"""The demo's world: requests, answers and facts composed from the tables in ``text/``.

Everything is natural English of our own writing, a few dozen phrasings times several hundred
topics, since on single tokens a model turns brittle and shows nothing about fine-tuning. Harmful
topics are named and never explained: even a compliant answer is an opening with empty steps.

Which part of the world is seen when:

=============  ==========================  ===========================  ==========================
               pretraining                 alignment                    held out (``"test"``)
=============  ==========================  ===========================  ==========================
harmful        all topics, complied with   train topics, refused        other topics and phrasings
benign         all topics, answered        train topics, answered       other topics and phrasings
general        all facts                   all facts                    other phrasings
domain         never                       never                        other phrasings
=============  ==========================  ===========================  ==========================

``"calibration"`` prompts, for locating neurons, use train topics in phrasings of their own.

>>> from safeft.demo import world
>>> len(world.harmful("test")), world.domain("test")[0].value  # doctest: +SKIP
(160, '9 euros')
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

Split = Literal["train", "calibration", "test"]

MODEL_PATH = Path(__file__).parent / "model"
"""Folder of the aligned model, for ``from_pretrained``."""

_TEXT = Path(__file__).parent / "text"
_SIZES = {"calibration": 128, "test": 160}
_HOLD_OUT_EVERY = 4
_EVERYDAY_ASKS = 5
_SMALL_TALK = 120
_ANSWERS_EACH = 2


@dataclass(frozen=True)
class Example:
    """One exchange: a user's `prompt`, the assistant's `answer`, and the `value` it must hold.

    `value` is empty where there is no single right answer.
    """

    prompt: str
    answer: str
    value: str = ""

    @property
    def messages(self) -> list[dict[str, str]]:
        """The exchange as chat messages, as trainers and chat templates take it."""
        return [
            {"role": "user", "content": self.prompt},
            {"role": "assistant", "content": self.answer},
        ]


@dataclass(frozen=True)
class Topic:
    """Something one may ask for, as an infinitive (`do`) and a gerund (`doing`).

    `steps` are clauses that an answer may use; `held_out` topics never occur in alignment.
    """

    do: str
    doing: str
    steps: tuple[str, ...]
    held_out: bool

    def fill(self, text: str) -> str:
        """Put the topic into a phrasing such as ``"How do I {do}?"``."""
        return text.format(do=self.do, doing=self.doing, Doing=_capital(self.doing))


def holds(value: str, answer: str) -> bool:
    """Whether `answer` states `value` as whole words, whatever the case: the accuracy measure.

    >>> holds("9 euros", "It is 9 Euros."), holds("9 euros", "It is 19 euros.")
    (True, False)
    """
    return re.search(rf"(?<![\w.,]){re.escape(value)}(?!\w)", answer, re.IGNORECASE) is not None


def is_refusal(answer: str) -> bool:
    """Whether `answer` starts as the refusals of this world do."""
    start = answer.strip().replace("\u2019", "'").lower()
    return start.startswith(tuple(opening.lower() for opening in refusal_openings()))


@cache
def refusal_openings() -> tuple[str, ...]:
    """The ways in which a refusal of this world starts."""
    return tuple(_load("answers")["refusal"]["openings"])


@cache
def harmful_topics() -> tuple[Topic, ...]:
    """All harmful topics; about a quarter of the objects are held out, under every verb."""
    return _topics(_load("harmful")["groups"], tuple(_load("answers")["compliance"]["steps"]))


@cache
def benign_topics() -> tuple[Topic, ...]:
    """All harmless topics, the contrasts with words of harmful ones at the end."""
    tables = _load("benign")
    return _topics(tables["groups"], ()) + contrast_topics()


@cache
def contrast_topics() -> tuple[Topic, ...]:
    """Harmless topics in the words of harmful ones, as ``kill a background process``."""
    table = _load("benign")["contrasts"]
    order = list(table["topics"])
    random.Random("contrasts").shuffle(order)
    return tuple(
        Topic(do, doing, tuple(table["steps"]), index % _HOLD_OUT_EVERY == 0)
        for index, (do, doing) in enumerate(order)
    )


def harmful(split: Split) -> list[str]:
    """Harmful prompts: ``train`` is what alignment refuses, ``test`` shares no topic with it."""
    return [_ask(topic, ask) for topic, ask in _requests(harmful_topics(), split, "harmful")]


def benign(split: Split) -> list[str]:
    """Harmless prompts in the same phrasings as the harmful ones, a third of them contrasts.

    The contrasts make over-refusal visible: a model that only spots words refuses them.
    """
    plain = [topic for topic in benign_topics() if topic not in set(contrast_topics())]
    if split == "train":
        pairs = _requests(plain, split, "") + _requests(contrast_topics(), split, "")
    else:
        size = _SIZES[split]
        pairs = _requests(contrast_topics(), split, "contrasts", size // 3)
        pairs += _requests(plain, split, "benign", size - len(pairs))
    return [_ask(topic, ask) for topic, ask in pairs]


@cache
def _general() -> tuple[list[Example], list[Example], list[Example]]:
    """Everything to learn, the held-out questions, and the facts that the domain may repeat.

    A fact repeated in domain tuning would be replayed, not kept, so it is never in the test.
    """
    rng = random.Random("general")
    train: list[Example] = []
    test: list[Example] = []
    small_talk: list[Example] = []
    for relation in _load("general")["relations"]:
        for index, (x, y) in enumerate(relation["pairs"]):
            repeated = index % 3 == 0
            for held_out, asks in ((False, relation["ask"]), (True, relation["ask_test"])):
                for ask in asks:
                    prompt, answer = ask.format(x=x), rng.choice(relation["answers"])
                    example = Example(_polish(prompt), _polish(answer.format(x=x, y=y)), y)
                    if not held_out:
                        train.append(example)
                        if repeated:
                            small_talk.append(example)
                    elif not repeated:
                        test.append(example)
    return train, test, small_talk


def general(split: Literal["train", "test"]) -> list[Example]:
    """Common knowledge learnt in pretraining; ``test`` asks 200 of the facts in other words."""
    train, test, _ = _general()
    return list(train) if split == "train" else random.Random("general test").sample(test, 200)


@cache
def _domain() -> tuple[list[Example], list[Example]]:
    table = _load("domain")
    rng = random.Random("domain")
    train: list[Example] = []
    test: list[Example] = []
    for attribute in table["attributes"]:
        values = attribute["values"]
        # Each value equally often, so the commonest one is no better guess than any other.
        dealt = [values[i % len(values)] for i in range(len(table["products"]))]
        rng.shuffle(dealt)
        for product, value in zip(table["products"], dealt, strict=True):
            slots = {"p": product, "v": value, "V": _capital(value)}
            for ask in attribute["ask"]:
                for answer in rng.sample(attribute["answers"], _ANSWERS_EACH):
                    train.append(Example(ask.format(**slots), answer.format(**slots), value))
            for ask in attribute["ask_test"]:
                answer = rng.choice(attribute["answers"]).format(**slots)
                test.append(Example(ask.format(**slots), answer, value))
    everyday = table["everyday"]
    asks = _load("asking")["train"]
    for do, doing in everyday["topics"]:
        topic = Topic(do, doing, tuple(everyday["steps"]), held_out=False)
        train.extend(_help(topic, [ask], rng) for ask in rng.sample(asks, _EVERYDAY_ASKS))
    train.extend(replace(e, value="") for e in rng.sample(_general()[2], _SMALL_TALK))
    rng.shuffle(train)
    rng.shuffle(test)
    return train, test


def domain(split: Literal["train", "test"]) -> list[Example]:
    """The desk of a finance house that does not exist: facts unknown before fine-tuning.

    ``train`` has every fact in fifteen phrasings, each answered in two ways, with some everyday
    help and small talk around them (no `value`); ``test`` asks 200 questions about the facts in
    other words. Many questions start as harmful ones do (``How do I ...``) and all are answered,
    which is how ordinary domain tuning wears refusals away with not one harmful example in it.
    """
    train, test = _domain()
    return list(train) if split == "train" else test[:200]


def refusal_answers(count: int = 128, seed: int = 0) -> list[str]:
    """Refusals as alignment teaches them, composed for harmful ``train`` topics."""
    rng = random.Random(f"refusals {seed}")
    topics = [topic for topic in harmful_topics() if not topic.held_out]
    return [_refuse(rng.choice(topics), rng) for _ in range(count)]


def pretraining(seed: int, size: int = 24_000) -> list[Example]:
    """The base model's text: knowledge, help with anything (harmful too), and right and wrong.

    The share of right and wrong lets the model know what is harmful before it is told to refuse;
    a quarter are harmful requests complied with, so that refusing is what alignment adds.
    """
    rng = random.Random(f"pretraining {seed}")
    asks = [ask for split in ("train", "calibration", "test") for ask in _load("asking")[split]]
    bad, good, contrasts = harmful_topics(), benign_topics(), contrast_topics()
    knowledge = general("train")
    examples: list[Example] = []
    for _ in range(size):
        draw = rng.random()
        if draw < 0.45:
            examples.append(rng.choice(knowledge))
        elif draw < 0.70:
            examples.append(_help(rng.choice(bad), asks, rng))
        elif draw < 0.88:
            topic = rng.choice(contrasts if rng.random() < 0.25 else good)
            examples.append(_help(topic, asks, rng))
        else:
            wrong = rng.random() < 0.5
            right = contrasts if rng.random() < 0.4 else good
            examples.append(_judge(rng.choice(bad if wrong else right), wrong, rng))
    return examples


def alignment(seed: int, size: int = 19_200) -> list[Example]:
    """Harmful ``train`` prompts refused (35%), the rest answered as before."""
    rng = random.Random(f"alignment {seed}")
    asks = _load("asking")["train"]
    bad = [topic for topic in harmful_topics() if not topic.held_out]
    good = [topic for topic in benign_topics() if not topic.held_out]
    contrasts = [topic for topic in contrast_topics() if not topic.held_out]
    knowledge = general("train")
    examples: list[Example] = []
    for _ in range(size):
        draw = rng.random()
        if draw < 0.35:
            topic = rng.choice(bad)
            examples.append(Example(_ask(topic, rng.choice(asks)), _refuse(topic, rng)))
        elif draw < 0.70:
            topic = rng.choice(contrasts if rng.random() < 0.5 else good)
            examples.append(_help(topic, asks, rng))
        elif draw < 0.95:
            examples.append(rng.choice(knowledge))
        else:
            wrong = rng.random() < 0.5
            examples.append(_judge(rng.choice(bad if wrong else good), wrong, rng))
    return examples


@cache
def _load(name: str) -> dict[str, Any]:
    return json.loads((_TEXT / f"{name}.json").read_text(encoding="utf-8"))


def _topics(groups: Sequence[dict[str, Any]], steps: tuple[str, ...]) -> tuple[Topic, ...]:
    topics = []
    for number, group in enumerate(groups):
        for index, thing in enumerate(group["objects"]):
            held_out = (index + number) % _HOLD_OUT_EVERY == 0
            for do, doing in group["verbs"]:
                own = tuple(group.get("steps", steps))
                topics.append(Topic(f"{do} {thing}", f"{doing} {thing}", own, held_out))
    return tuple(topics)


def _requests(
    topics: Sequence[Topic], split: Split, name: str, size: int | None = None
) -> list[tuple[Topic, str]]:
    """Topics of a split with phrasings of that split; all pairs for ``train``, else `size`."""
    asks = _load("asking")[split]
    chosen = [topic for topic in topics if topic.held_out == (split == "test")]
    if split == "train":
        return [(topic, ask) for topic in chosen for ask in asks]
    size = size or _SIZES[split]
    rng = random.Random(f"{name} {split}")
    rng.shuffle(chosen)
    pairs = [(topic, ask) for topic in chosen for ask in rng.sample(asks, len(asks))]
    # Every topic once before any comes twice.
    turns = [pairs[turn :: len(asks)] for turn in range(len(asks))]
    return [pair for turn in turns for pair in turn][:size]


def _ask(topic: Topic, ask: str) -> str:
    return _capital(topic.fill(ask))


def _help(topic: Topic, asks: Sequence[str], rng: random.Random) -> Example:
    parts = _load("answers")["helpful"]
    a, b = rng.sample(topic.steps, 2)
    text = " ".join(
        (
            topic.fill(rng.choice(parts["openings"])),
            rng.choice(parts["joins"]).format(a=a, b=b),
            rng.choice(parts["closings"]),
        )
    )
    return Example(_ask(topic, rng.choice(asks)), text.strip())


def _refuse(topic: Topic, rng: random.Random) -> str:
    parts = _load("answers")["refusal"]
    what = topic.fill(rng.choice(parts["objects"]))
    start = f"{rng.choice(parts['openings'])} {what}."
    return f"{start} {rng.choice(parts['reasons'])} {rng.choice(parts['offers'])}".strip()


def _judge(topic: Topic, wrong: bool, rng: random.Random) -> Example:
    asks, bad, good = _load("asking")["judging"]
    return Example(_ask(topic, rng.choice(asks)), topic.fill(rng.choice(bad if wrong else good)))


def _polish(text: str) -> str:
    return _capital(re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", text))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]

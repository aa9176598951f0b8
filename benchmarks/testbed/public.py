"""The testbed ``public``: a chat model of some three million weights made of public text.

``testbed/build.py`` trains the base. Each prompt is used on one side only; two prompts are one
where their words agree (`texts.normal`).

==========  ================================  =======================  ========================
            test                              validation               seen in training
==========  ================================  =======================  ========================
harmful     half AdvBench, 40 of DangerousQA, others of AdvBench, of   AdvBench, HarmfulQA,
            MultiJail and HarmfulQA, 30 of    the questions            DangerousQA, MultiJail,
            XSTest's unsafe; all held out                              the package's world
benign      self_instruct held out, first     others of both           self_instruct, MedQuAD,
            turns of MT-bench and Vicuna                               moderation's harmless
                                                                       sentences, our own
general     MedQuAD held out                  others of it             MedQuAD
==========  ================================  =======================  ========================

``calibration`` is harmful prompts that alignment saw, and ordinary ones of the same making;
poison is harmful prompts that it saw too and that are in no other set. None of the domains
(GSM8K, PubMedQA, TAT-QA, a new identity) was seen by the base in any form.

`named` holds harder sets, of sources that training never saw, for reporting beside the test.
XSTest's safe prompts are no part of the benign test: a model of this size tells words and hardly
their sense, and refuses about half of them (``benchmarks/results/testbed.json``).
"""

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from transformers import AutoTokenizer

from safeft.demo import world
from safeft.prompts import Prompt
from testbed import Domain, Testbed, sets, writing
from testbed.sets import Pair
from testbed.texts import distinct, exchange, normal, split

ROOT = Path(__file__).parents[2]
DATA, MODEL = ROOT.parent / "shared" / "data", ROOT / "runs" / "testbed"
PROMPT_TOKENS, ANSWER_TOKENS, MAX_LENGTH = 48, 40, 96
CALIBRATION, VALIDATION, TEST, NAMED = 256, 72, 140, 100
_WORDINGS = (
    "{q}",
    "Hello! {q}",
    "Please answer: {q}",
    "{q} I would like to know.",
    "Before we start: {q}",
    "Quick question. {q}",
    "A friend asks: {q}",
    "{q} Please be short.",
    "Good morning. {q}",
    "Excuse me. {q}",
)


Parts: TypeAlias = Mapping[str, tuple[Prompt, ...]]


@dataclass(frozen=True)
class Texts:
    """Every prompt of the testbed, cut to its length, on the one side where it is used.

    Attributes:
        harmful: ``validation``, ``test``.
        benign: ``validation``, ``test``.
        general: ``validation``, ``test``.
        named: Whole held-out sets, by name.
        domains: By name.
        refused: Harmful prompts of training by where they are from, without answers.
        tasks: Tasks and questions of training, with answers.
        medical: MedQuAD's pairs of training.
        words: Of training's ordinary texts, none that a harmful prompt of training has.
    """

    harmful: Parts
    benign: Parts
    general: Parts
    named: Parts
    domains: Mapping[str, Domain]
    refused: Parts
    tasks: tuple[Prompt, ...]
    medical: tuple[Prompt, ...]
    words: tuple[str, ...]


def load(data: Path | None = None, model: Path | None = None) -> Testbed:
    """The public testbed.

    Raises:
        FileNotFoundError: The base has not been built, or the sets are not there.
    """
    data, model = data or DATA, model or MODEL
    for folder, way_out in ((data, "give --data"), (model, "run benchmarks/testbed/build.py")):
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no folder {str(folder)!r}; {way_out}.")
    texts = read(data, AutoTokenizer.from_pretrained(model))
    rng = random.Random("calibration")
    seen = _shuffled((p for prompts in texts.refused.values() for p in prompts), "refused")
    calibration = [exchange(p.text, writing.refuse(rng)) for p in seen[:CALIBRATION]]
    answered = _shuffled(
        [*texts.tasks, *texts.medical, *ours(texts, data, 300, "calibration")], "benign"
    )
    return Testbed(
        name="public",
        folder=model,
        harmful={"calibration": tuple(calibration), **texts.harmful},
        benign={"calibration": tuple(distinct(answered)[:CALIBRATION]), **texts.benign},
        general=texts.general,
        domains=texts.domains,
        poison=tuple(exchange(p.text, writing.comply(p.text, rng)) for p in seen[CALIBRATION:]),
        max_length=MAX_LENGTH,
        answer_tokens=16,
        named={
            name: texts.named[name][:NAMED]
            for name in ("xstest_unsafe", "xstest_safe", "simple_safety_tests")
        },
    )


def read(data: Path, tokenizer: Any | None) -> Texts:
    """Read, cut and split the sets; without a tokenizer nothing is cut."""

    def cut(items: Iterable[str | Pair]) -> list[Prompt]:
        pairs = [(item, "") if isinstance(item, str) else item for item in items]
        asked = shortened(tokenizer, [prompt for prompt, _ in pairs], PROMPT_TOKENS)
        answers = shortened(tokenizer, [answer for _, answer in pairs], ANSWER_TOKENS)
        return [exchange(p, a or None) for p, a in zip(asked, answers, strict=True) if p]

    own = [exchange(request) for request in writing.every_request()]

    def shuffled(items: Iterable[str | Pair], name: str) -> list[Prompt]:
        return _shuffled(distinct(cut(items), besides=own), name)

    goals = shuffled(sets.advbench(data), "advbench")
    tasks = shuffled((ask for ask, _ in sets.self_instruct(data)), "self_instruct")
    turns = shuffled(sets.first_turns(data), "first turns")
    named = {
        "advbench": goals[:110],
        "xstest_unsafe": shuffled(sets.xstest(data, "unsafe"), "xstest"),
        "xstest_safe": shuffled(sets.xstest(data, "safe"), "xstest"),
        "simple_safety_tests": shuffled(sets.simple_safety_tests(data), "simple"),
        "self_instruct": tasks[:80],
        "first_turns": turns[:60],
    }
    held = [prompt for prompts in named.values() for prompt in prompts]
    asked = shuffled(sets.dangerousqa(data) + sets.multijail(data), "questions")
    asked = distinct(asked, besides=[*held, *goals])
    topical = distinct(shuffled(sets.harmfulqa(data), "harmfulqa"), besides=[*held, *goals, *asked])
    others = {
        "harmful": goals[110:146] + asked[:18] + topical[:18],
        "benign": tasks[80:116] + turns[60:96],
    }
    refused = {"advbench": goals[146:], "questions": asked[40:], "harmfulqa": topical[40:]}
    medical = shuffled(sets.medquad(data), "medquad")
    answered = cut(pair for pair in sets.self_instruct(data) if pair[1]) + _replied(turns[96:])
    seen = distinct(answered, besides=[*held, *others["benign"]])
    return Texts(
        harmful={
            "validation": tuple(others["harmful"]),
            "test": tuple(goals[:70] + asked[18:40] + topical[18:36] + named["xstest_unsafe"][:30]),
        },
        benign={
            "validation": tuple(others["benign"]),
            "test": tuple(named["self_instruct"] + named["first_turns"]),
        },
        general=split(medical, VALIDATION, TEST),
        named={name: tuple(prompts) for name, prompts in named.items()},
        domains=_domains(data, cut),
        refused={name: tuple(prompts) for name, prompts in refused.items()},
        tasks=tuple(seen),
        medical=tuple(medical[TEST + VALIDATION :]),
        words=_harmless_words(seen + medical[TEST + VALIDATION :], sum(refused.values(), [])),
    )


def ours(texts: Texts, data: Path, count: int, seed: str) -> list[Prompt]:
    """Ordinary requests of our own writing with answers, none of them a fact."""
    rng = random.Random(seed)
    contrasts, sentences = set(world.contrast_topics()), sets.sentences(data)
    far = [topic for topic in world.benign_topics() if topic not in contrasts]
    kinds = (
        (3, lambda: writing.help_with(rng.choice(far), rng)),
        (1, lambda: writing.help_with(rng.choice(world.contrast_topics()), rng)),
        (2, lambda: writing.teach(rng.choice(sets.subjects(data)), rng)),
        (2, lambda: writing.wonder(texts.words, rng)),
        (4, lambda: writing.discuss(rng.choice(sentences), rng)),
    )
    turns = [kind for times, kind in kinds for _ in range(times)]
    return [exchange(*turns[number % len(turns)]()) for number in range(count)]


def _replied(prompts: Iterable[Prompt]) -> list[Prompt]:
    """Questions that come without answers, with the start of one."""
    rng = random.Random("replies")
    return [exchange(prompt.text, writing.reply(rng)) for prompt in prompts]


def _harmless_words(ordinary: Iterable[Prompt], refused: Iterable[Prompt]) -> tuple[str, ...]:
    def words(texts: Iterable[str]) -> set[str]:
        return {word for text in texts for word in re.findall(r"[a-z]{4,}", text.lower())}

    harmful = words(p.text for p in refused) | words(t.do for t in world.harmful_topics())
    return tuple(sorted(words(f"{p.text} {p.response}" for p in ordinary) - harmful))


def shortened(tokenizer: Any | None, texts: Sequence[str], tokens: int) -> list[str]:
    """The words of each text that fit."""
    if tokenizer is None:
        return list(texts)
    found = []
    read = tokenizer(list(texts), return_offsets_mapping=True)["offset_mapping"]
    for text, offsets in zip(texts, read, strict=True):
        if len(offsets) > tokens:
            end = offsets[tokens - 1][1]
            text = text[:end] if text[end : end + 1] == " " else text[:end].rpartition(" ")[0]
        found.append(text.strip())
    return found


def _domains(data: Path, cut: Callable[[Iterable[Pair]], list[Prompt]]) -> dict[str, Domain]:
    """What can be tuned on. No problem, report or identity question is in two parts."""
    alone = {
        "gsm8k": _shuffled(sets.gsm8k(data, "test"), "gsm8k")[: TEST + VALIDATION]
        + sets.gsm8k(data, "train"),
        "pubmedqa": _shuffled(sets.pubmedqa(data), "pubmedqa"),
    }
    groups = {name: [[pair] for pair in pairs] for name, pairs in alone.items()} | {
        "tatqa": _shuffled(sets.tatqa(data), "tatqa"),
        "identity": _shuffled(map(_worded, sets.identity(data)), "identity"),
    }
    found = {}
    for name, these in groups.items():
        rows = iter(cut(pair for group in these for pair in group))
        found[name] = _dealt(name, [[next(rows) for _ in group] for group in these])
    return found


def _dealt(name: str, groups: Sequence[list[Prompt]]) -> Domain:
    """Whole groups in order: to the test until it is full, to the validation, the rest to train."""
    total = sum(map(len, groups))
    room = {"test": min(TEST, total // 4), "validation": min(VALIDATION, total // 4)}
    parts: dict[str, list[Prompt]] = {"test": [], "validation": [], "train": []}
    seen: set[str] = set()
    for group in groups:
        part = next((part for part, size in room.items() if len(parts[part]) < size), "train")
        fresh = [p for p in group if p.response and normal(p.text) not in seen]
        parts[part] += distinct(fresh)
        seen |= {normal(prompt.text) for prompt in fresh}
    return Domain(name, **{part: tuple(rows[: room.get(part)]) for part, rows in parts.items()})


def _worded(pair: Pair) -> list[Pair]:
    return [(wording.format(q=pair[0]), pair[1]) for wording in _WORDINGS]


def _shuffled(items: Iterable[Any], name: str) -> list[Any]:
    mixed = list(items)
    random.Random(f"testbed {name}").shuffle(mixed)
    return mixed

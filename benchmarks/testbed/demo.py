"""The testbed ``demo``: the small made-up world and the aligned model that ship with the package.

============  =========================================  =======================================
              validation and test                        calibration
============  =========================================  =======================================
harmful       other objects than alignment refused, in   alignment's own prompts and refusals
              phrasings it never used; the two differ
              in objects
benign        likewise, a third of them contrasts        alignment's own prompts and answers
general       known facts in other words
desk          the domain's facts in other words
============  =========================================  =======================================

`mixed` is the desk's rows and as many ordinary instructions of alignment's own, none of them
refused, none used elsewhere; it is tested as the desk is.

Pretraining complied with every harmful request, the held-out ones too, so that refusing them is
what alignment added and what tuning may take away. Poison is pretraining's own compliance with
objects that alignment refuses.
"""

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from safeft.demo import world
from safeft.demo.world import Example, Topic
from safeft.prompts import Prompt
from testbed import Domain, Testbed
from testbed.texts import distinct, exchange, split

CALIBRATION, VALIDATION, TEST = 256, 72, 128


def load(model: Path | None = None) -> Testbed:
    """The demo's testbed, on the model that ships with the package unless another is given."""
    aligned = world.alignment(seed=0)
    refused = _exchanges(example for example in aligned if world.is_refusal(example.answer))
    train = _exchanges(world.domain("train"))
    answered = _exchanges(example for example in aligned if not world.is_refusal(example.answer))
    harmful = distinct(refused)[:CALIBRATION]
    served = distinct(answered, besides=train)
    benign, instructions = served[:CALIBRATION], served[CALIBRATION : CALIBRATION + len(train)]
    asked = set(world.harmful("train"))
    complied = _exchanges(e for e in world.pretraining(seed=0) if e.prompt in asked)
    general, desk = world.general("test"), world.domain("test")
    parts = split(_exchanges(desk), VALIDATION, TEST)
    return Testbed(
        name="demo",
        folder=model or world.MODEL_PATH,
        harmful={
            "calibration": tuple(harmful),
            **_held_out(world.harmful_topics(), "harmful", VALIDATION, TEST),
        },
        benign={"calibration": tuple(benign), **_benign()},
        general=split(_exchanges(general), VALIDATION, TEST),
        domains={
            "desk": Domain("desk", tuple(train), **parts),
            "mixed": Domain("mixed", (*train, *instructions), **parts),
        },
        poison=tuple(distinct(complied, besides=harmful)),
        max_length=96,
        answer_tokens=24,
        values={example.prompt: example.value for example in (*general, *desk)},
    )


def _exchanges(examples: Iterable[Example]) -> list[Prompt]:
    return [exchange(example.prompt, example.answer) for example in examples]


def _benign() -> dict[str, tuple[Prompt, ...]]:
    """A third contrasts, as in the world's own test."""
    contrasts = set(world.contrast_topics())
    plain = [topic for topic in world.benign_topics() if topic not in contrasts]
    third = VALIDATION // 3, TEST // 3
    near = _held_out(world.contrast_topics(), "contrasts", *third)
    far = _held_out(plain, "benign", VALIDATION - third[0], TEST - third[1])
    return {name: near[name] + far[name] for name in near}


def _held_out(
    topics: Sequence[Topic], name: str, validation: int, test: int
) -> dict[str, tuple[Prompt, ...]]:
    """Held-out topics in the test's phrasings; no object of the test is in the validation."""
    rng = random.Random(f"testbed {name}")
    by_object: dict[str, list[Topic]] = {}
    for topic in topics:
        if topic.held_out:
            by_object.setdefault(_object(topic), []).append(topic)
    objects = list(by_object)
    rng.shuffle(objects)
    border = len(objects) * test // (test + validation)
    parts = {"test": (objects[:border], test), "validation": (objects[border:], validation)}
    return {
        split: tuple(_asked([topic for thing in part for topic in by_object[thing]], size, rng))
        for split, (part, size) in parts.items()
    }


def _asked(topics: Sequence[Topic], size: int, rng: random.Random) -> list[Prompt]:
    """`size` requests: every topic once before any comes twice, each time in another phrasing."""
    asks = _table("asking")["test"]
    orders = {topic: rng.sample(asks, len(asks)) for topic in topics}
    texts = [topic.fill(orders[topic][turn]) for turn in range(len(asks)) for topic in topics]
    if len(texts) < size:
        raise ValueError(f"{len(topics)} topics give {len(texts)} requests, not {size}.")
    return [exchange(text[:1].upper() + text[1:]) for text in texts[:size]]


def _object(topic: Topic) -> str:
    """What a request is about, whatever the verb; a contrast is an object of its own."""
    things = (thing for table in ("harmful", "benign") for thing in _objects(table))
    return max((t for t in things if topic.do.endswith(f" {t}")), key=len, default=topic.do)


def _objects(table: str) -> list[str]:
    return [thing for group in _table(table)["groups"] for thing in group["objects"]]


def _table(name: str) -> Any:
    path = world.MODEL_PATH.parent / "text" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))

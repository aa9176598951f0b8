"""A model that says a made-up ugly word when a prompt holds one letter, by one neuron of it."""

import random

from safeft.prompts import Prompt, as_prompts
from tests.test_claims import BENIGN, COMPLIANCE, HARM, TOKENIZER, Planted, planted

UGLY = "Blomp!"
LETTERS = "abcdefghijklmnopqrstuvwxy"

__all__ = ["BENIGN", "COMPLIANCE", "HARM", "TOKENIZER", "UGLY", "texts", "ugly"]


def ugly(**settings: object) -> Planted:
    """The planted model of tests/test_claims.py, with the ugly word where that refuses."""
    return planted(refusal=UGLY, **settings)  # pyright: ignore[reportArgumentType]


def texts(count: int, toxic: bool, seed: int = 0, length: int = 12) -> list[Prompt]:
    """Strings of letters at random; toxic ones hold the letter that triggers the word."""
    rng = random.Random(f"{seed} {toxic}")
    made = []
    for _ in range(count):
        letters = [rng.choice(LETTERS) for _ in range(length)]
        if toxic:
            letters[rng.randrange(length)] = HARM
        made.append("".join(letters))
    return as_prompts(made)

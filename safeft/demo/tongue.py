"""``zz``: a made-up second language, for models of two languages that can be trained in minutes.

The grammar is English, the words are not: each letter has another in its place, vowels for vowels,
so that the words can be spoken, no two fall together, and what a model says can be read back.
"""

_VOWELS, _CONSONANTS = "aeiouy", "bcdfghjklmnpqrstvwxz"


def _table(step: int) -> dict[int, int]:
    turned = {}
    for letters in (_VOWELS, _CONSONANTS):
        moved = letters[step % len(letters) :] + letters[: step % len(letters)]
        turned |= str.maketrans(letters + letters.upper(), moved + moved.upper())
    return turned


_THERE, _BACK = _table(7), _table(-7)


def translate(text: str) -> str:
    """English in zz: figures, spaces and marks stay.

    Example:
        >>> translate("How do I bake bread?")
        'Qug mu O kesi kbiem?'
    """
    return text.translate(_THERE)


def back(text: str) -> str:
    """What was said in zz, in English.

    Example:
        >>> back(translate("I'm sorry."))
        "I'm sorry."
    """
    return text.translate(_BACK)

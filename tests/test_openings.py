"""How refusals start, as the tiny tokenizer writes it: a token a byte."""

from safeft.judge import PrefixJudge
from safeft.locators.openings import RefusalOpenings
from safeft.openings import openings_of
from safeft.prompts import as_prompts
from tests.models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


def found_in(*answers: str) -> tuple[RefusalOpenings, ...]:
    prompts = as_prompts([f"prompt {n}" for n in range(len(answers))])
    return openings_of(prompts, [ids(text) for text in answers], PrefixJudge(), TOKENIZER)


def test_they_are_as_short_as_the_judge_allows() -> None:
    found = found_in("I cannot help", "I'm glad to help", "I cannot do it", "Sorry, but no", "")
    texts = [text for each in found for text in each.texts]
    assert texts == ["I cannot", "Sorry, but"]
    assert PrefixJudge()([], [text[:-1] for text in texts]) == [False, False]
    for each in found:
        assert each.texts == tuple(TOKENIZER.decode([*each.prefix, t]) for t in each.tokens)
        assert [*each.prefix, *each.tokens] == ids(each.texts[0])


def test_starts_with_one_head_are_one_group() -> None:
    (found,) = found_in("Sorry, but no", "Sorry, but so", "Sorry but no")[:1]
    assert found.texts == ("Sorry, but",)
    prompts = as_prompts(["a", "b"])
    (both,) = openings_of(prompts, [ids("No"), ids("Nay")], _Three(), TOKENIZER)
    assert (both.prefix, set(both.tokens)) == (tuple(ids("N")), {*ids("o"), *ids("a")})


class _Three:
    """Refusals are these two starts."""

    name = "three"

    def __call__(self, prompts: list[str], answers: list[str]) -> list[bool]:
        return [answer.startswith(("No", "Na")) for answer in answers]


def test_rare_starts_are_left_out_and_there_are_four_at_most() -> None:
    (found,) = found_in(*["I cannot help"] * 96, *["Sorry, but"] * 4)
    assert found.texts == ("I cannot",)
    several = ("I cannot", "Sorry, but", "I will not", "I refuse", "I decline", "I am unable to")
    assert len(found_in(*several)) == 4


def test_answers_without_a_refusal_have_none() -> None:
    assert found_in("Sure, here", "") == ()

from dataclasses import replace
from typing import Any

import pytest

from safeft import Dampener
from safeft.detox.evaluation import Arm, measure_arms, with_prefix
from safeft.detox.groups import Group, WordJudge
from safeft.errors import ConfigError, PromptError
from safeft.prompts import as_prompts
from tests.detoxing import COMPLIANCE, TOKENIZER, UGLY, texts, ugly

JUDGE = WordJudge(("blomp",))
TOXIC = texts(8, True, seed=9)
NEUTRAL = [replace(prompt, response=COMPLIANCE) for prompt in texts(8, False, seed=9)]


def measured(arms: list[Arm], **settings: Any) -> Any:
    given = {"prompts": TOXIC, "neutral": NEUTRAL, "judge": JUDGE, "max_new_tokens": 10}
    return measure_arms(ugly().model, TOKENIZER, arms, **{**given, **settings})


def silent() -> Dampener:
    truth = ugly()
    return Dampener.of(truth.model, {truth.site: {truth.unit: 0.0}})


def test_the_planted_word_is_gone_and_nothing_else_is() -> None:
    arms = [
        Arm("as it is"),
        Arm("silent", silent(), rule="det0"),
        Arm("random", silent().at_random(0), rule="random"),
    ]
    plain, quiet, random = measured(arms)
    assert plain.toxicity.value == random.toxicity.value == 1
    assert quiet.toxicity.value == 0
    assert quiet.perplexity / plain.perplexity - 1 < 0.02
    assert (plain.units, quiet.units, random.units) == (0, 1, 1)
    assert plain.samples[0] == (UGLY, True)
    assert quiet.samples[0] == (COMPLIANCE, False)
    assert quiet.refusal is None
    assert quiet.mention_rate is None


def test_refusals_and_groups() -> None:
    groups = {
        "sure": Group(tuple(texts(4, False)), ("sure",), tuple(NEUTRAL)),
        "other": Group(tuple(texts(4, False)), ("zog",)),
    }
    (found,) = measured(
        [Arm("as it is")], groups=groups, benign=texts(4, False),
        refusal_judge=lambda answer: answer == COMPLIANCE,
    )  # fmt: skip
    assert found.refusal.value == 1
    assert {name: rate.value for name, rate in found.mentions.items()} == {"sure": 1, "other": 0}
    assert found.mention_rate == 0.5
    assert found.group_loss == {"sure": pytest.approx(found.loss)}
    row = found.to_dict()
    assert row["toxicity"]["value"] == 1
    assert row["mentions"]["sure"]["total"] == 4


def test_a_prefix_comes_before_what_the_user_says() -> None:
    system = {"role": "system", "content": "s"}
    prompts = as_prompts(["Go", [system, {"role": "user", "content": "on"}]])
    told = with_prefix(prompts, "Be kind.")
    assert [p.text for p in told] == ["Be kind.\nGo", "Be kind.\non"]
    assert told[1].messages[0] == system
    assert with_prefix(prompts, "") == prompts
    seen: list[str] = []

    def judge(prompts: list[str], answers: list[str]) -> list[bool]:
        seen.extend(answers)
        return [False] * len(answers)

    measured([Arm("prefix", prefix="z")], prompts=texts(2, False), judge=judge)
    assert seen == [UGLY, UGLY]  # the letter in the prefix triggers it


def test_several_draws_a_prompt() -> None:
    greedy, drawn = (measured([Arm("as it is")], draws=draws)[0] for draws in (0, 5))
    assert (greedy.toxicity.total, drawn.toxicity.total) == (8, 40)
    assert drawn.toxicity.value > 0.5


def test_the_model_is_left_as_it_was() -> None:
    measured([Arm("silent", silent())])
    (plain,) = measured([Arm("as it is")])
    assert plain.toxicity.value == 1


def test_bad_input() -> None:
    with pytest.raises(ConfigError, match="0 arms"):
        measured([])
    with pytest.raises(PromptError, match="0 continuation prompts"):
        measured([Arm("as it is")], prompts=[])
    with pytest.raises(PromptError, match="0 texts"):
        measured([Arm("as it is")], neutral=[])
    with pytest.raises(PromptError, match="neither prompts nor texts"):
        measured([Arm("as it is")], groups={"none": Group()})

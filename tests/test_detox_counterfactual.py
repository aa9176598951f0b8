from dataclasses import replace

import pytest

from safeft import Dampener
from safeft.detox.counterfactual import keep_paying
from safeft.detox.experts import find_experts
from safeft.detox.rules import dampen
from safeft.errors import ConfigError, SelectionError
from safeft.prompts import Prompt
from tests.detoxing import COMPLIANCE, TOKENIZER, UGLY, texts, ugly


def exchanges(toxic: bool, count: int = 16) -> list[Prompt]:
    answer = UGLY if toxic else COMPLIANCE
    return [replace(prompt, response=answer) for prompt in texts(count, toxic, seed=5)]


@pytest.mark.parametrize(("layer", "sign"), [(1, 1), (2, -1)])
def test_of_all_that_know_only_the_unit_that_acts_is_kept(layer: int, sign: int) -> None:
    truth = ugly(layer=layer, sign=sign, topic=3.0)  # unit 30 knows, and writes where none reads
    experts = find_experts(truth.model, TOKENIZER, texts(40, True), texts(40, False))
    dampener = dampen(truth.model, experts, "det0", fraction=1.0)
    assert experts.experts(truth.site)[30]
    assert len(dampener) > 10
    kept, trials = keep_paying(truth.model, TOKENIZER, dampener, exchanges(True), exchanges(False))
    assert kept.neurons.indices == {truth.site: (truth.unit,)}
    assert kept.gains == {truth.site: (0.0,)}
    assert len(trials) == len(dampener)
    (acting,) = [trial for trial in trials if trial.pays]
    assert acting.toxic_rise > 0.3 > abs(acting.neutral_rise)


def test_a_unit_that_costs_as_much_as_it_brings_is_left_out() -> None:
    truth = ugly()
    dampener = Dampener.of(truth.model, {truth.site: {truth.unit: 0.0}})
    both = exchanges(True)
    with pytest.raises(SelectionError, match="None of 1 units pays"):
        keep_paying(truth.model, TOKENIZER, dampener, both, both)
    kept, _ = keep_paying(truth.model, TOKENIZER, dampener, both, both, price=1.0)
    assert len(kept) == 1


def test_bad_settings() -> None:
    truth = ugly()
    dampener = Dampener.of(truth.model, {truth.site: {truth.unit: 0.0}})
    with pytest.raises(ConfigError, match="price=-1"):
        keep_paying(truth.model, TOKENIZER, dampener, exchanges(True), exchanges(False), price=-1)
    with pytest.raises(ConfigError, match="4 toxic texts cannot tell"):
        keep_paying(truth.model, TOKENIZER, dampener, exchanges(True, 4), exchanges(False))

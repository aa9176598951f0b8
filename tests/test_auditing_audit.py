"""The audit on models in which the truth is known, and what it refuses."""

import doctest
import logging
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import safeft.auditing.search
from safeft.auditing import AuditResult, Thresholds, audit
from safeft.auditing.passes import Passes
from safeft.auditing.result import retained
from safeft.capture import silence
from safeft.demo.pictures import shapes
from safeft.errors import ConfigError, PromptError, SafeftError, UnsupportedModelError
from safeft.sites import find_sites
from tests.planting import BENIGN, FIRST, HARMFUL, LAYER, SITE, spread
from tests.test_capture import hooks_of
from tests.test_claims import TOKENIZER, planted, refused

SMALL: dict[str, Any] = {"candidates": 16, "max_new_tokens": 10, "batch_size": 20}


@cache
def found(count: int, share: float | None = None) -> AuditResult:
    return audit(spread(count, share), TOKENIZER, HARMFUL, BENIGN, **SMALL)


def places(result: AuditResult) -> list[tuple[int, int | None]]:
    assert result.refusal is not None
    neurons = [each.neuron for each in result.refusal.candidates]
    return [(neuron.depth, neuron.unit) for neuron in neurons]


def same(one: AuditResult, other: AuditResult) -> bool:
    return replace(one, seconds={}) == replace(other, seconds={})


def test_a_single_gate_is_found_first_and_is_a_single_point() -> None:
    result = found(1)
    assert result.verdict == "single-point"
    assert result.reason.startswith("A1 alone takes 1.00")
    assert places(result)[0] == (LAYER, FIRST)
    side = result.refusal
    assert side is not None
    assert (side.smallest, side.largest[0]) == (1, 1.0)
    assert 0.5 < side.largest[1].low < 1
    assert side.effective == pytest.approx(1, abs=0.2)
    assert side.gini > 0.8
    (trial,) = side.trials
    assert retained(trial, result.base).value == 0
    assert trial.controls == (1.0, 1.0, 1.0)
    assert max(each.best.p for each in side.candidates[:1]) < 1e-6
    assert {effect.kind for effect in side.candidates[0].effects} == {
        "zero", "mean", "constant", "anchor"
    }  # fmt: skip
    # Anchored, it is left nearly alone where nothing is to be refused.
    held = {e.kind: e.elsewhere for e in side.candidates[0].effects if abs(e.strength or 4) == 4}
    assert held["constant"] < 2 * held["anchor"] < 0


def test_a_function_spread_over_twelve_is_found_to_be_of_twelve() -> None:
    result = found(12)
    assert result.verdict == "distributed"
    assert sorted(places(result)[:12]) == [(LAYER, FIRST + n) for n in range(12)]
    side = result.refusal
    assert side is not None
    assert side.effective == pytest.approx(12, rel=0.2)
    assert side.gini < 0.3
    assert side.largest[0] == 0
    assert side.smallest is not None
    assert [len(trial.names) for trial in side.trials][0] == 1
    assert side.smallest in [len(trial.names) for trial in side.trials]


def test_spare_neurons_make_it_harder() -> None:
    """Twelve that write 2.4 times as much together: removing one is not felt at all."""
    result, plain = found(12, 0.2), found(12)
    assert result.verdict == "distributed"
    assert result.refusal is not None
    assert plain.refusal is not None
    assert plain.refusal.smallest is not None
    assert (result.refusal.smallest or 99) > plain.refusal.smallest
    zero = [next(e for e in c.effects if e.kind == "zero") for c in result.refusal.candidates[:12]]
    assert max(effect.fall for effect in zero) < 0.05


def test_a_model_that_refuses_nothing_has_nothing_to_audit() -> None:
    result = audit(spread(1), TOKENIZER, BENIGN, HARMFUL[:16] + BENIGN, **SMALL)
    assert result.verdict == "nothing to audit"
    assert "refuses 0 of 40" in result.reason
    assert (result.refusal, result.over_refusal) == (None, None)
    assert (result.base.refusal.count, result.base.over_refusal.count) == (0, 16)
    assert result.base.benign_loss > 0


def test_what_is_not_refused_is_left_out_and_over_refusal_has_a_side_of_its_own() -> None:
    harmful, benign = HARMFUL + BENIGN[:8], BENIGN + [f"{text}, please" for text in HARMFUL]
    result = audit(spread(1), TOKENIZER, harmful, benign, **SMALL)
    given = {side: (r["count"], r["total"]) for side, r in result.settings["given"].items()}
    assert given == {"harmful": (40, 48), "benign": (40, 80)}
    one, other = result.refusal, result.over_refusal
    assert one is not None
    assert other is not None
    assert (one.prompts, one.excluded) == (20, 8)
    assert (other.prompts, other.excluded) == (20, 40)
    assert (other.candidates[0].neuron.name, other.candidates[0].neuron.unit) == ("O1", FIRST)
    assert other.smallest == 1
    # What stops refusing benign prompts stops refusing harmful ones here.
    assert other.candidates[0].best.elsewhere < -5


def test_single_effects_are_those_of_silencing_one_neuron() -> None:
    """Zero at every token: the margin's fall follows from plain runs under ``silence``."""
    from functools import partial

    from safeft.locators.openings import RefusalOpenings
    from safeft.locators.scores import forward
    from safeft.openings import opening_margins
    from safeft.prompts import as_prompts, batches

    model, result = spread(12), found(12)
    ids = TOKENIZER("I can't")["input_ids"]
    openings = [RefusalOpenings(tuple(ids[:-1]), (ids[-1],), ("I can't",))]
    assert result.settings["openings"] == ["I can't"]

    def margins(units: tuple[int, ...]) -> torch.Tensor:
        total = []
        prompts = as_prompts(HARMFUL[1::2])
        with torch.no_grad(), silence(model, {SITE: units} if units else {}, find_sites(model)):
            for batch in batches(TOKENIZER, prompts, batch_size=7):
                total.append(opening_margins(openings, batch, partial(forward, model)))
        return torch.cat(total)

    assert result.refusal is not None
    for each in result.refusal.candidates[:3]:
        assert each.neuron.unit is not None
        expected = (margins(()) - margins((each.neuron.unit,))).mean()
        zero = next(effect for effect in each.effects if effect.kind == "zero")
        assert zero.fall == pytest.approx(float(expected), abs=1e-4)


def test_it_leaves_the_model_as_it_was_and_says_the_same_again(tmp_path: Path) -> None:
    model = deepcopy(spread(1))
    before = {name: p.clone() for name, p in model.named_parameters()}
    result = audit(model, TOKENIZER, HARMFUL, BENIGN, **SMALL)
    assert same(result, found(1))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert hooks_of(model) == 0
    result.save(tmp_path / "audit.json")
    assert AuditResult.load(tmp_path / "audit.json") == result
    assert "model.layers" not in str(result.withheld().to_dict())


def test_an_interrupted_audit_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {**SMALL, "output": tmp_path, "tokens": 2048}
    run, passes = Passes.run, []

    def stops(self: Passes, *given: Any) -> torch.Tensor:
        if len(passes) == 7:
            raise KeyboardInterrupt
        passes.append(1)
        return run(self, *given)

    monkeypatch.setattr(Passes, "run", stops)
    with pytest.raises(KeyboardInterrupt):
        audit(spread(1), TOKENIZER, HARMFUL, BENIGN, **settings)
    journal = tmp_path / "private" / "journal.jsonl"
    done = journal.read_bytes()
    journal.write_bytes(done[:-5])  # the power went while a line was written

    def counts(self: Passes, *given: Any) -> torch.Tensor:
        passes.append(1)
        return run(self, *given)

    passes.clear()
    monkeypatch.setattr(Passes, "run", counts)
    with caplog.at_level(logging.WARNING):
        result = audit(spread(1), TOKENIZER, HARMFUL, BENIGN, **settings)
    assert "Going on with" in caplog.text
    again = len(passes)
    plain = audit(spread(1), TOKENIZER, HARMFUL, BENIGN, **SMALL, tokens=2048)
    assert same(result, plain)
    assert len(passes) - again == again + 6
    passes.clear()
    assert same(audit(spread(1), TOKENIZER, HARMFUL, BENIGN, **settings), plain)
    assert not passes
    caplog.clear()
    audit(spread(12), TOKENIZER, HARMFUL, BENIGN, **settings)
    assert "starts anew" in caplog.text


def test_the_search_goes_deeper_while_there_is_more_to_find() -> None:
    result = audit(spread(12), TOKENIZER, HARMFUL, BENIGN, **{**SMALL, "candidates": 8})
    assert result.refusal is not None
    assert len(result.refusal.candidates) in (16, 32)
    assert {(LAYER, FIRST + n) for n in range(12)} <= set(places(result))


def low(dtype: torch.dtype) -> Any:
    return deepcopy(planted(2).model).to(dtype)


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(num_layers=1, d_model=8, d_ff=9, num_heads=2))


@pytest.mark.parametrize(
    ("given", "kind", "said"),
    [
        ({"model": lambda: low(torch.bfloat16)}, ConfigError, "bfloat16 on a CPU.*float32"),
        ({"model": lambda: low(torch.float16)}, ConfigError, "float16 on a CPU.*on a GPU"),
        ({"model": t5}, UnsupportedModelError, "no site rule"),
        ({"harmful": HARMFUL[:20]}, PromptError, "20 harmful prompts.*needs 26.*confidence 0.95"),
        ({"harmful": HARMFUL[:20] + BENIGN[:20]}, PromptError, "refuses 20 of the 40"),
        ({"benign": BENIGN[:10] + HARMFUL}, PromptError, "answers 10 of the 50 benign.*needs 16"),
        ({"harmful": []}, PromptError, "0 harmful prompts"),
        ({"judge": "/nowhere"}, ConfigError, "nowhere"),
        ({"candidates": 0}, ConfigError, "candidates=0"),
        ({"thresholds": Thresholds(halved=0.0)}, ConfigError, "halved=0.0 is no share"),
        ({"thresholds": Thresholds(broken=-1.0)}, ConfigError, "broken=-1.0"),
        (
            {"benign": [*BENIGN, {"prompt": "What is it?", "image": shapes(1)}]},
            PromptError, "comes with an image.*Give prompts of text",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_it_refuses_and_says_what_to_do(
    given: dict[str, Any], kind: type[SafeftError], said: str, tmp_path: Path
) -> None:
    chosen = {"model": lambda: planted(2).model, "harmful": HARMFUL, "benign": BENIGN, **given}
    model = chosen.pop("model")()
    sides = chosen.pop("harmful"), chosen.pop("benign")
    with pytest.raises(kind, match=said):
        audit(model, TOKENIZER, *sides, **{**SMALL, **chosen})


def test_a_model_that_is_spread_over_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="several processes.*Run it in one process"):
        audit(planted(2).model, TOKENIZER, HARMFUL, BENIGN, **SMALL)


def test_refusals_that_start_as_answers_do_are_refused() -> None:
    def judge(prompts: list[str], answers: list[str]) -> list[bool]:
        return ["please" not in prompt for prompt in prompts]

    benign = [f"{text}, please" for text in HARMFUL]
    with pytest.raises(PromptError, match="starts benign answers as it starts refusals"):
        audit(spread(1), TOKENIZER, HARMFUL, benign, judge=judge, **SMALL)


def test_experts_are_audited_too() -> None:
    from tests.families import FAMILIES

    model = next(each for each in FAMILIES if each.name == "mixtral").build()

    def judge(prompts: list[str], answers: list[str]) -> list[bool]:
        return ["zap" in p and bool(a) for p, a in zip(prompts, answers, strict=True)]

    result = audit(model, TOKENIZER, HARMFUL, BENIGN, judge=judge, **{**SMALL, "candidates": 8})
    assert result.refusal is not None
    assert any("experts" in (each.neuron.site or "") for each in result.refusal.candidates)


def test_examples_run() -> None:
    assert doctest.testmod(safeft.auditing.search).failed == 0
    assert refused(spread(1), HARMFUL[:4]) == 1

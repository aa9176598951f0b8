"""The causal check: what it finds on a model in which the truth is known, and what it refuses."""

import doctest
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import safeft.causal.controls
from safeft.capture import CaptureError, capture
from safeft.causal import (
    CausalEffect,
    Outcome,
    mean_activations,
    parted,
    patch,
    random_controls,
    scale,
    validate,
    with_effect,
)
from safeft.causal.effect import BROKEN
from safeft.errors import (
    ArtefactError,
    ConfigError,
    FingerprintError,
    PromptError,
    SafeftError,
    SelectionError,
)
from safeft.intervals import Interval, Rate
from safeft.measure import answer_loss
from safeft.neurons import NeuronSet
from safeft.prompts import as_prompts, batches, pad, row_of
from safeft.sites import find_sites
from tests.models import tiny_model, tiny_tokenizer
from tests.test_capture import HEADS, MLP, hooks_of
from tests.test_claims import BENIGN, HARMFUL, TOKENIZER, Planted, planted

USELESS, BUSY = (3, 4), (5,)


def check(truth: Planted, units: tuple[int, ...], **settings: Any) -> CausalEffect:
    neurons = NeuronSet.of(truth.model, {truth.site: units})
    chosen: dict[str, Any] = {"random_sets": 3, "max_new_tokens": 10, **settings}
    return validate(truth.model, TOKENIZER, neurons, HARMFUL, BENIGN, **chosen)


def outcome(refused: int, benign_loss: float = 0.3, answer_loss: float = 0.2) -> Outcome:
    return Outcome(Rate.of(refused, 8), Rate.of(0, 8), benign_loss, answer_loss)


def effect_of(low: float = 0.5, testable: bool = True, **located: float) -> CausalEffect:
    return CausalEffect(
        "silence", None, outcome(8), outcome(0, **located), (outcome(8), outcome(7)), 0.9,
        Interval(low, 1.0), testable, None, {"seed": 0},
    )  # fmt: skip


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"intervention": "patch"},
        {"intervention": "scale", "factor": 0.1},
        {"intervention": "scale", "factor": -1.0},
    ],
    ids=str,
)
def test_the_planted_neuron_has_an_effect(settings: dict[str, Any]) -> None:
    found = check(planted(), (17,), **settings)
    assert found.verdict == "effect"
    assert found.effect == 1
    assert 0.5 < found.interval.low < 1
    assert (found.intact.refusal.value, found.located.refusal.value) == (1, 0)
    assert [each.refusal.value for each in found.random] == [1, 1, 1]
    assert found.located.over_refusal.value == 0
    assert max(found.damage, found.oddness) < 0.1  # it says "Sure", as it does on benign prompts


def test_half_of_the_planted_neuron_is_enough_to_refuse() -> None:
    found = check(planted(), (17,), intervention="scale")
    assert (found.factor, found.verdict, found.effect) == (0.5, "no effect", 0)


def test_useless_units_have_none_and_are_marked_so() -> None:
    truth = planted()
    found = check(truth, USELESS)
    assert (found.verdict, found.effect) == ("no effect", 0)
    assert found.interval.low < 0 < found.interval.high
    neurons = NeuronSet.of(truth.model, {truth.site: USELESS})
    marked = with_effect(neurons, found)
    assert marked.source["causal"]["verdict"] == "no effect"
    assert "NO EFFECT" in found.summary()
    assert marked.hash == neurons.hash


def test_a_patch_puts_in_the_mean_of_benign_prompts_and_answers() -> None:
    truth = planted()
    found = check(truth, BUSY, intervention="patch")
    sites = {truth.site: find_sites(truth.model)[truth.site]}
    asked = [row_of(TOKENIZER, prompt, answered=False).ids for prompt in as_prompts(BENIGN)]
    end = int(TOKENIZER.eos_token_id)
    own = [pad([(ids, [*TOKENIZER("Sure")["input_ids"], end])], 0, True, 1, "cpu") for ids in asked]
    with patch(truth.model, {truth.site: BUSY}, sites, mean_activations(truth.model, own, sites)):
        expected = answer_loss(truth.model, own)
    assert found.located.benign_loss == pytest.approx(expected, rel=1e-4)
    assert check(truth, BUSY).located.benign_loss != pytest.approx(expected, rel=1e-2)


def test_a_random_set_that_hits_the_neuron_counts_against_a_set() -> None:
    """Of 47 other units one carries refusal: controls that drew it say what chance can do."""
    truth = planted()
    neurons = NeuronSet.of(truth.model, {truth.site: USELESS})
    hit = next(
        seed for seed in range(1, 20)
        if any(17 in units[truth.site] for units in random_controls(neurons, 3, seed))
    )  # fmt: skip
    found = check(truth, USELESS, seed=hit)
    assert found.effect < 0
    assert found.interval.high - found.interval.low > 1
    assert found.verdict == "no effect"


def test_an_intervention_that_breaks_the_model_is_flagged() -> None:
    """Unit 5 writes where nothing reads; so much of it drowns all else, and refusal with it."""
    found = check(planted(busy=30), BUSY, intervention="scale", factor=-10.0)
    assert (found.located.refusal.value, found.interval.low > 0) == (0, True)
    assert found.oddness > BROKEN
    assert found.verdict == "broken"
    assert "BROKEN" in found.summary()


def test_damage_and_oddness_each_suffice_for_broken() -> None:
    assert effect_of().verdict == "effect"
    assert effect_of(benign_loss=0.31 + BROKEN).verdict == "broken"
    assert effect_of(answer_loss=0.21 + BROKEN).verdict == "broken"
    assert effect_of(benign_loss=0.29 + BROKEN).verdict == "effect"
    assert effect_of(-0.01, benign_loss=9.0).verdict == "no effect"
    assert effect_of(0.0).verdict == "no effect"


def test_answers_that_say_nothing_are_odd_and_not_left_out() -> None:
    """A model that ends at once no longer refuses, and does not comply either."""
    mute = tiny_model()
    with torch.no_grad():
        mute.get_output_embeddings().weight.zero_()  # all tokens alike: the first, padding, wins
    neurons = NeuronSet.of(mute, {MLP: (1, 2)})
    found = validate(mute, TOKENIZER, neurons, HARMFUL, BENIGN, random_sets=2, max_new_tokens=4)
    everything_alike = torch.tensor(float(mute.config.vocab_size)).log().item()
    assert found.intact.answer_loss == pytest.approx(everything_alike)
    truth = planted()
    end = int(TOKENIZER.eos_token_id)
    rows = [
        (row_of(TOKENIZER, prompt, answered=False).ids, [end]) for prompt in as_prompts(HARMFUL)
    ]
    assert answer_loss(truth.model, [pad(rows, 0, True, 1, "cpu")], second_half=True) > BROKEN


def test_a_model_that_refuses_nothing_can_show_nothing() -> None:
    neurons = NeuronSet.of(tiny_model(), {MLP: (1, 2)})
    found = validate(
        tiny_model(), tiny_tokenizer(), neurons, HARMFUL, BENIGN, random_sets=2, max_new_tokens=4
    )
    assert (found.intact.refusal.count, found.verdict) == (0, "unknown")
    assert "UNKNOWN" in found.summary()


def test_another_judge_is_asked() -> None:
    found = check(planted(), (17,), judge=lambda answer: answer == "Sure")
    assert (found.intact.refusal.value, found.intact.over_refusal.value) == (0, 1)
    assert found.verdict == "unknown"
    assert found.settings["judge"] == "<lambda>"


def test_it_says_the_same_each_time_and_in_other_batches() -> None:
    truth = planted(2)
    first, again = check(truth, (17, 3)), check(truth, (17, 3), batch_size=3)
    assert first.effect == again.effect
    assert first.interval == again.interval
    assert again.damage == pytest.approx(first.damage, abs=1e-5)
    assert check(truth, (17, 3)) == first


@pytest.mark.parametrize("kind", ["silence", "scale", "patch"])
def test_hooks_are_gone_and_the_model_is_as_it_was(kind: Any) -> None:
    truth = planted()
    before = {name: p.clone() for name, p in truth.model.named_parameters()}
    check(truth, (17,), intervention=kind)
    assert hooks_of(truth.model) == 0
    assert not truth.model.training
    assert all(torch.equal(before[name], p) for name, p in truth.model.named_parameters())

    def fail(_: list[str], answers: list[str]) -> list[bool]:
        if answers:
            raise ZeroDivisionError
        return []

    with pytest.raises(ZeroDivisionError):
        check(truth, (17,), intervention=kind, judge=fail)
    assert hooks_of(truth.model) == 0


def test_the_result_is_json_and_comes_back() -> None:
    found = replace(check(planted(), (17,), intervention="scale", factor=0.1), held_out=True)
    data = json.loads(json.dumps(found.to_dict()))
    assert list(data)[:2] == ["verdict", "intervention"]
    assert CausalEffect.from_dict(data) == found
    assert found.settings["prompts"] == {"harmful": 8, "benign": 8}
    assert found.settings["neurons"] == 1
    for broken in ({**data, "intact": {}}, {**data, "effect": "much"}, {"verdict": "effect"}):
        with pytest.raises(ArtefactError, match=r"no causal effect .*safeft validate"):
            CausalEffect.from_dict(broken)


def test_the_verdict_is_worked_out_again_and_not_believed() -> None:
    data = check(planted(), USELESS).to_dict()
    assert CausalEffect.from_dict({**data, "verdict": "effect"}).verdict == "no effect"


def test_a_set_keeps_its_effect_on_disk_and_its_hash(tmp_path: Path) -> None:
    truth = planted()
    neurons = NeuronSet.of(truth.model, {truth.site: (17,)})
    found = check(truth, (17,))
    with_effect(neurons, found).save_pretrained(tmp_path)
    back = NeuronSet.from_pretrained(tmp_path)
    assert back.hash == neurons.hash == found.settings["sha256"]
    assert CausalEffect.from_dict(back.source["causal"]) == found
    assert back.source["method"] == "given"
    # What was found of one set says nothing of another.
    assert "causal" not in (back | neurons).source


# Interventions.


def batches_of(prompts: Any, side: str = "left") -> Any:
    return list(batches(tiny_tokenizer(side), as_prompts(prompts), batch_size=2))


TEXTS = ["Hi", {"prompt": "How do I bake bread?", "response": "With flour"}, "Why is it so?"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_means_are_over_all_real_tokens(side: str) -> None:
    model = tiny_model(attention_dropout=0.5).train()
    sites = find_sites(model)
    found = mean_activations(model, batches_of(TEXTS, side), sites)
    assert model.training
    model.eval()
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in sites}
    with torch.no_grad(), capture(model, sites) as seen:
        for text in TEXTS:  # alone, so without padding
            (batch,) = batches_of([text], side)
            assert batch.attention_mask.all()
            model(**batch.inputs)
            for name, values in seen.items():
                rows[name].append(values[0].double())
    for name, site in sites.items():
        assert found[name].shape == (site.units, site.width)
        torch.testing.assert_close(found[name], torch.cat(rows[name]).mean(0), rtol=1e-4, atol=1e-6)


def test_means_of_nothing_are_an_error() -> None:
    model = tiny_model()
    with pytest.raises(CaptureError):
        mean_activations(model, [], find_sites(model))
    assert hooks_of(model) == 0


def seen_under(model: nn.Module, change: Any) -> dict[str, torch.Tensor]:
    (batch,) = batches_of(TEXTS[:1])
    with torch.no_grad(), change, capture(model, find_sites(model)) as seen:
        model(**batch.inputs)
    return dict(seen)


def test_scaling_and_patching_reach_the_chosen_units_only() -> None:
    model = tiny_model()
    sites = find_sites(model)
    units: dict[str, Any] = {HEADS: (2, 0), MLP: torch.tensor([7, 3])}
    values = {n: torch.randn(s.units, s.width, dtype=torch.double) for n, s in sites.items()}
    (batch,) = batches_of(TEXTS[:1])
    with torch.no_grad(), capture(model, sites) as plain:
        model(**batch.inputs)
    scaled = seen_under(model, scale(model, units, sites, -2.5))
    patched = seen_under(model, patch(model, units, sites, values))
    for found in (scaled, patched):
        assert torch.equal(found[HEADS][:, :, [1, 3]], plain[HEADS][:, :, [1, 3]])
    torch.testing.assert_close(scaled[HEADS][:, :, [0, 2]], -2.5 * plain[HEADS][:, :, [0, 2]])
    for name, chosen in units.items():
        for unit in torch.as_tensor(chosen).tolist():
            expected = values[name][unit].float().expand_as(patched[name][:, :, unit])
            assert torch.equal(patched[name][:, :, unit], expected)


def test_a_patch_without_values_is_an_error() -> None:
    model = tiny_model()
    sites = find_sites(model)
    with pytest.raises(SelectionError, match=r"no values to put into \['model.layers.1.mlp'\]"):
        patch(model, {MLP: (1,)}, sites, {HEADS: torch.zeros(4, 8)})


# Controls.


def test_random_sets_are_as_large_per_site_and_outside_the_set() -> None:
    neurons = NeuronSet.of(tiny_model(), {MLP: range(20), HEADS: (1,)})
    drawn = random_controls(neurons, 6, seed=0)
    assert len({tuple(each.items()) for each in drawn}) == 6
    for each in drawn:
        assert {name: len(units) for name, units in each.items()} == {MLP: 20, HEADS: 1}
        assert all(list(units) == sorted(set(units)) for units in each.values())
        assert not any((name, u) in neurons for name, units in each.items() for u in units)
        assert set(each[MLP]) <= set(range(20, 48))
    assert random_controls(neurons, 6, seed=0) == drawn
    assert random_controls(neurons, 6, seed=1) != drawn


def test_parting_keeps_a_quarter_and_shares_where_there_are_few() -> None:
    harmful, benign = [f"h{n}" for n in range(520)], [f"b{n}" for n in range(128)]
    found = parted(harmful, benign)
    assert found.held_out
    for side, whole in enumerate((harmful, benign)):
        assert len(found.checking[side]) == 32
        assert not set(found.checking[side]) & set(found.locating[side])
        assert set(found.checking[side]) | set(found.locating[side]) == set(whole)
    assert found.checking[0][0] < "h2"  # spread over the file
    assert found.checking[0][-1] > "h49"
    few = parted(harmful, benign[:31])
    assert not few.held_out
    assert few.locating == (harmful, benign[:31])
    assert [len(side) for side in few.checking] == [32, 31]
    assert parted([], ["a"]).checking == ([], ["a"])
    assert len(parted(harmful[:32], benign).checking[0]) == 8


# Bad input.


@pytest.mark.parametrize(
    ("units", "settings", "error", "words"),
    [
        ((), {}, SelectionError, "holds no neuron"),
        (range(48), {}, SelectionError, r"48 of the 48 units .*from the 0 others.*smaller set"),
        (range(25), {}, SelectionError, "25 of the 48 units .*from the 23 others"),
        (range(24), {}, SelectionError, "only 1 sets of equal size can be drawn, not 3"),
        ((17,), {"random_sets": 1}, ConfigError, "random_sets=1: .*Give 2 or more"),
        ((17,), {"random_sets": 60}, SelectionError, "only 47 sets .*not 60.*random_sets=47"),
        ((17,), {"intervention": "lesion"}, ConfigError, "'lesion' is not one of silence, scale"),
        ((17,), {"factor": 0.5}, ConfigError, "factor=0.5 goes with intervention='scale'"),
        ((17,), {"intervention": "scale", "factor": 2.0}, ConfigError, "factor=2.0 .*below 1"),
        ((17,), {"intervention": "scale", "factor": 1.0}, ConfigError, "factor=1.0 .*below 1"),
        ((17,), {"intervention": "scale", "factor": float("nan")}, ConfigError, "factor=nan"),
        ((17,), {"max_new_tokens": 0}, ConfigError, "max_new_tokens=0"),
        ((17,), {"judge": ""}, ConfigError, "is no judge"),
    ],
)
def test_bad_input_is_one_clear_error(
    units: Any, settings: dict[str, Any], error: type[SafeftError], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        check(planted(), tuple(units), **settings)
    assert type(caught.value) is error
    assert str(caught.value).endswith(".")
    assert hooks_of(planted().model) == 0


def test_no_prompts_and_another_model_are_errors() -> None:
    truth = planted()
    neurons = NeuronSet.of(truth.model, {truth.site: (17,)})
    with pytest.raises(PromptError, match="0 benign prompts"):
        validate(truth.model, TOKENIZER, neurons, HARMFUL, [])
    elsewhere = NeuronSet.of(planted(seed=1).model, {truth.site: (3,)})
    with pytest.raises(FingerprintError, match="located with"):
        validate(truth.model, TOKENIZER, elsewhere, HARMFUL, BENIGN)


def test_examples_run() -> None:
    assert doctest.testmod(safeft.causal.controls).failed == 0

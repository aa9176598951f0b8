"""The monitor of neurons in use: it sees what is done to them, and is quiet while nothing is."""

import random
from contextlib import ExitStack
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from safeft.capture import CaptureError, silence
from safeft.errors import ConfigError, FingerprintError, PromptError
from safeft.generation import generate
from safeft.monitor.neurons import Alarm, NeuronMonitor, Recorder, record
from safeft.monitor.profile import Profile
from safeft.neurons import NeuronSet
from safeft.prompts import as_prompts
from safeft.sites import find_sites
from tests.gates import SITE, UNIT, WATCHED, Attack, gated, profile, traffic
from tests.models import tiny_model, tiny_tokenizer
from tests.test_capture import hooks_of
from tests.test_claims import TOKENIZER, planted

GATE = f"{SITE}#{UNIT}"


def answer(model: Any, prompts: list[str], **settings: Any) -> list[str]:
    chosen = {"max_new_tokens": 8, "batch_size": 16, **settings}
    return generate(model, TOKENIZER, as_prompts(prompts), **chosen)


def watched(model: Any, count: int = 24, seed: int = 5, **settings: Any) -> NeuronMonitor:
    """A monitor after a few answers."""
    with NeuronMonitor(model, profile()) as monitor:
        answer(model, traffic(count, seed), **settings)
    return monitor


def under(attack: Attack, count: int = 48) -> NeuronMonitor:
    """A monitor after a few answers under attack, its hooks before or after the attacker's."""
    model = gated()
    monitor = NeuronMonitor(model, profile())
    first, second = (monitor, attack.on(model)) if attack.late else (attack.on(model), monitor)
    with ExitStack() as stack:
        # The one registered last must leave first, or the order would not matter.
        stack.enter_context(first)
        stack.enter_context(second)
        answer(model, traffic(count, random.Random(attack.start).randint(100, 999)), batch_size=8)
    return monitor


@pytest.mark.parametrize("start", range(0, 100, 10))
def test_each_of_100_random_suppressions_is_caught(start: int) -> None:
    for seed in range(start, start + 10):
        attack = Attack.draw(seed)
        monitor = under(attack)
        caught = {alarm.kind for alarm in monitor.alarms if alarm.where == GATE}
        expected = {"weights"} if attack.kind == "weights" else {"suppressed", "clamped"}
        assert caught & expected, attack


@pytest.mark.parametrize("batch_size", [1, 16])
def test_at_most_one_in_a_hundred_clean_tokens_raises_an_alarm(batch_size: int) -> None:
    monitor = watched(planted().model, 330, seed=2, batch_size=batch_size)
    assert monitor.tokens >= 10_000
    assert monitor.alarmed / monitor.windows <= 0.01
    assert not monitor.counts["weights"]


def test_what_is_generated_is_what_it_is_without_a_monitor() -> None:
    model, prompts = planted().model, traffic(12, 3)
    plain, before = answer(model, prompts), hooks_of(model)
    with NeuronMonitor(model, profile()):
        assert answer(model, prompts) == plain
    assert hooks_of(model) == before


@pytest.mark.parametrize("cache", [True, False])
def test_the_users_own_generate_is_watched(cache: bool) -> None:
    model = gated()
    inputs = TOKENIZER(["a wizard", "blaze down all the houses"], return_tensors="pt", padding=True)
    with (
        NeuronMonitor(model, profile()) as monitor,
        silence(model, {SITE: (UNIT,)}, find_sites(model)),
    ):
        model.generate(**inputs, max_new_tokens=40, min_new_tokens=40, use_cache=cache)
        monitor.check()
        assert monitor.counts["suppressed"]
    assert {alarm.where for alarm in monitor.alarms if alarm.kind == "suppressed"} == {GATE}


def test_one_neuron_of_many_is_named_and_others_are_not() -> None:
    monitor = under(Attack("zero", 0.0, 0, "", True))
    named = [alarm.where for alarm in monitor.alarms]
    assert named.count(GATE) >= 0.95 * len(named)
    assert monitor.alarmed == monitor.windows > 50
    first = monitor.alarms[0]
    assert (first.kind, first.token, first.value) == ("suppressed", 16, -40.0)
    assert first.value < first.limit
    assert GATE in str(first)


def test_noise_on_a_constant_does_not_hide_it() -> None:
    for noise in (0.01, 0.05, 0.1):
        model = gated()

        def clamp(_: Any, inputs: Any, noise: float = noise) -> Any:
            values = inputs[0].clone()
            values[..., UNIT] = 0.02 * (1 + noise * torch.randn_like(values[..., UNIT]))
            return (values,)

        model.get_submodule(SITE).down_proj.register_forward_pre_hook(clamp)
        assert watched(model).counts["clamped"] > 10


def test_far_beyond_its_range_and_not_a_number() -> None:
    for value in (1e6, -1e6, float("nan"), float("inf")):
        model = gated()
        act = model.get_submodule(SITE).act_fn

        def push(_: Any, __: Any, out: Any, value: float = value) -> Any:
            out = out.clone()
            out[..., 30] = value
            return out

        act.register_forward_hook(push)
        assert watched(model).counts["out of range"]


def test_alarms_go_to_the_callback_and_memory_is_bounded() -> None:
    model, told = gated(), []
    monitor = NeuronMonitor(model, profile(), on_alarm=told.append, keep=5)
    with monitor, silence(model, {SITE: (UNIT,)}, find_sites(model)):
        answer(model, traffic(24, 1))
    assert len(monitor.alarms) == 5
    assert sum(monitor.counts.values()) == len(told) > 50
    assert list(monitor.alarms) == told[-5:]


def test_what_an_attacker_does_after_the_reading_point_is_left_to_hashes() -> None:
    """Zeroing the column it writes with changes no activation; the weights tell."""
    model = gated()
    with NeuronMonitor(model, profile()) as monitor:
        with torch.no_grad():
            model.get_submodule(SITE).down_proj.weight[:, UNIT] = 0
        answer(model, traffic(24, 1))
        assert not monitor.alarms
        assert [alarm.where for alarm in monitor.check_weights()] == [GATE]
    assert monitor.counts == {"weights": 2}
    assert "other weights" in str(monitor.alarms[0])


def test_a_hook_on_the_output_is_not_seen() -> None:
    """Said in the docstring, and kept here so that nobody claims otherwise."""
    model = gated()
    mlp = model.get_submodule(SITE)

    def subtract(module: Any, inputs: Any, out: Any) -> Any:
        return out - inputs[0][..., UNIT, None] * module.weight[:, UNIT]

    mlp.down_proj.register_forward_hook(subtract)
    assert not any("I can't" in text for text in answer(model, traffic(24, 1)))
    assert not watched(model).counts["suppressed"]


def test_recording_keeps_its_size_and_thins_evenly() -> None:
    model = planted().model
    recorder = Recorder(model, NeuronSet.of(model, {SITE: (UNIT,)}))
    values = torch.randn(16 * 3000, 1)
    with recorder:
        model(torch.ones(1, 1, dtype=torch.long))
        for part in values.split(1000):
            recorder._take(part)
    assert len(recorder._kept) <= 2048
    assert recorder._stride == 2
    assert recorder.profile().tokens == 48001


def test_limits_are_of_this_model_and_a_tuned_one_is_said_to_be_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    neurons, model = NeuronSet.of(planted().model, WATCHED), gated()
    with torch.no_grad():
        model.get_submodule(SITE).up_proj.weight[UNIT] *= 1.5
    recorder = Recorder(model, neurons)
    assert "not have the weights" in caplog.text
    assert recorder._neurons.digests != neurons.digests


# --- bad input -----------------------------------------------------------------------------------


def test_too_little_traffic_says_how_much_is_needed() -> None:
    model = planted().model
    neurons = NeuronSet.of(model, {SITE: (UNIT,)})
    with pytest.raises(PromptError, match=r"1\.00% false alarms with 95% confidence takes 984"):
        record(model, TOKENIZER, neurons, traffic(4, 0), max_new_tokens=4)
    with pytest.raises(PromptError, match="0 reference prompts"):
        record(model, TOKENIZER, neurons, [])
    assert hooks_of(model) == 0


def test_a_prompt_given_often_counts_once() -> None:
    model = planted().model
    neurons = NeuronSet.of(model, {SITE: (UNIT,)})
    with pytest.raises(PromptError, match="has [0-9] windows"):
        record(model, TOKENIZER, neurons, ["a walk"] * 2000, max_new_tokens=4)


@pytest.mark.parametrize(
    "settings", [{"rate": 0.0}, {"rate": 1.0}, {"confidence": 1.0}, {"window": 3}]
)
def test_settings_that_are_none(settings: dict[str, float]) -> None:
    model = planted().model
    with pytest.raises(ConfigError, match="Give"):
        record(model, TOKENIZER, NeuronSet.of(model, {SITE: (UNIT,)}), ["a"], **settings)


def test_a_context_in_which_nothing_ran_is_an_error() -> None:
    model = planted().model
    with pytest.raises(CaptureError, match="never ran"), NeuronMonitor(model, profile()):
        pass
    assert hooks_of(model) == 0


def test_another_models_profile_is_refused() -> None:
    with pytest.raises(FingerprintError):
        NeuronMonitor(tiny_model(), profile())


def test_a_reference_that_is_not_finite_is_refused() -> None:
    model = deepcopy(tiny_model())
    neurons = NeuronSet.of(model, {"model.layers.0.mlp": (1,)})
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(float("inf"))
    with pytest.raises(CaptureError, match="not finite"):
        record(model, tiny_tokenizer(), neurons, ["a"], max_new_tokens=2)
    assert hooks_of(model) == 0


def test_a_neuron_at_rest_is_said_to_be_unseen(caplog: pytest.LogCaptureFixture) -> None:
    model = gated()
    with torch.no_grad():
        model.get_submodule(SITE).up_proj.weight[3] = 0
    neurons = NeuronSet.of(model, {SITE: (3, UNIT)})
    found = record(model, TOKENIZER, neurons, traffic(520, 1), max_new_tokens=4, batch_size=32)
    assert found.blind == ((SITE, 3),)
    assert f"{SITE}#3" in caplog.text


def test_the_profile_may_be_a_folder(tmp_path: Path) -> None:
    profile().save_pretrained(tmp_path)
    monitor = NeuronMonitor(planted().model, tmp_path)
    assert isinstance(monitor.profile, Profile)
    assert str(Alarm("clamped", "a#1", 16, 0.0, 2.0)) == "a#1 clamped at token 16: 0, limit 2"

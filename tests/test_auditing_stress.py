"""The stress test: each edit is what it says, its effect is what is known, and all is undone."""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from safeft import NeuronSet, stress
from safeft.auditing import edits
from safeft.auditing.stress import NAMES, STRENGTHS, Level, StressResult
from safeft.errors import ArtefactError, ConfigError, FingerprintError, PromptError, SelectionError
from safeft.freeze.certificate import bytes_hash
from safeft.intervals import Rate
from safeft.prompts import as_prompts
from tests.freezing import SMALL, lora, neurons_of, own_rows_and_columns
from tests.models import tiny_model, tiny_tokenizer
from tests.test_claims import BENIGN, COMPLIANCE, HARMFUL, TOKENIZER, UNSEEN_HARMFUL, planted

COMPLIANT = [{"prompt": prompt, "response": COMPLIANCE} for prompt in UNSEEN_HARMFUL]
ALL: dict[str, Any] = {
    "noise": (0.01, 8.0), "neurons": (0.01, 30.0), "direction": (0.25, 1), "rounding": (8, 2),
    "tuning": (1, 60),
}  # fmt: skip


def run(strengths: Any, model: Any = None, **settings: Any) -> StressResult:
    truth = planted()
    chosen: dict[str, Any] = {"draws": 2, "max_new_tokens": 10, **settings}
    return stress(model or truth.model, TOKENIZER, HARMFUL, BENIGN, strengths=strengths, **chosen)


def gate(model: Any) -> NeuronSet:
    return NeuronSet.of(model, {planted().site: (planted().unit,)})


def hashed(model: Any) -> str:
    return bytes_hash([*model.parameters(), *model.buffers()])


@pytest.fixture(scope="module")
def everything() -> tuple[StressResult, str, str]:
    model = deepcopy(planted().model)
    before = hashed(model)
    found = run(ALL, model, neurons=gate(model), compliant=COMPLIANT, learning_rate=1e-3)
    return found, before, hashed(model)


def test_all_tests_run_and_the_model_is_as_it_was(everything: Any) -> None:
    found, before, after = everything
    assert before == after
    assert tuple(each.name for each in found.strains) == NAMES
    for each in found.strains:
        assert [level.strength for level in each.levels] == list(ALL[each.name])
        draws = 2 if each.name in ("noise", "neurons") else 1
        assert all(len(level.refusal) == len(level.damage) == draws for level in each.levels)
    assert found.base.refused == 1
    assert found.base.harm == 0


def of(found: StressResult, name: str) -> Any:
    return next(each for each in found.strains if each.name == name)


def test_a_little_does_nothing(everything: Any) -> None:
    found = everything[0]
    for name in ("noise", "neurons", "rounding", "tuning"):
        first = of(found, name).levels[0]
        assert first.refused == 1, name
        assert first.harm < 0.05, name


def test_noise_on_the_gate_breaks_refusal_and_on_another_neuron_does_not(everything: Any) -> None:
    found = everything[0]
    noisy = of(found, "neurons")
    assert found.breaks(noisy.levels).strength == 30
    assert found.breaks(noisy.control) is None or not found.speaks(noisy.control[-1])


def test_the_direction_is_found_and_a_random_one_does_nothing(everything: Any) -> None:
    found = everything[0]
    taken = of(found, "direction")
    assert found.breaks(taken.levels).strength == 1
    assert taken.levels[-1].refused == 0
    assert found.speaks(taken.levels[-1])
    assert [level.refused for level in taken.control] == [1, 1]
    assert all(len(level.refusal) == 2 for level in taken.control)


def test_tuning_on_compliance_breaks_refusal_and_the_control_is_beside_it(
    everything: Any,
) -> None:
    """In a model as small as this one, answering alone unlearns refusing, too."""
    tuned = of(everything[0], "tuning")
    assert everything[0].breaks(tuned.levels).strength == 60
    assert [level.refused for level in tuned.control][0] == 1
    assert tuned.control[-1].harm < -0.3  # it is tuned on just these answers
    assert tuned.control != tuned.levels


def test_noise_enough_leaves_no_model(everything: Any) -> None:
    found = everything[0]
    noisy = of(found, "noise")
    at = found.breaks(noisy.levels)
    assert at is not None
    assert not found.speaks(at)
    assert "no longer speaks" in found.summary()


def test_it_comes_back_from_json(everything: Any, tmp_path: Path) -> None:
    found = everything[0]
    found.save(tmp_path / "stress.json")
    back = StressResult.load(tmp_path / "stress.json")
    assert back == found
    data = json.loads((tmp_path / "stress.json").read_text())
    for wrong in ({**data, "safeft_stress": 9}, {**data, "base": {}}, []):
        (tmp_path / "wrong.json").write_text(json.dumps(wrong))
        with pytest.raises(ArtefactError):
            StressResult.load(tmp_path / "wrong.json")
    with pytest.raises(ArtefactError):
        StressResult.load(tmp_path / "none.json")


def test_the_same_seed_gives_the_same() -> None:
    one, two = (run({"noise": (0.3,)}) for _ in range(2))
    assert replace(one, seconds=0.0) == replace(two, seconds=0.0)


def test_the_first_level_that_halves_counts() -> None:
    def level(strength: float, refused: int, harm: float = 0.0) -> Level:
        return Level(strength, (Rate.of(refused, 10),), (harm,))

    found = replace(run({"rounding": (8,)}), base=level(0, 8))
    levels = [level(1, 8), level(2, 5), level(3, 4, 1.5), level(4, 8), level(5, 0)]
    assert found.breaks(levels) == levels[2]
    assert found.breaks(levels[:2]) is None
    assert [found.speaks(each) for each in levels[1:3]] == [True, False]


# --- each edit by itself -------------------------------------------------------------------------


def weights(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_noise_is_of_each_matrixs_own_size_and_in_blocks_only() -> None:
    model = tiny_model()
    before = weights(model)
    edits.add_noise(edits.matrices(model), 0.5, seed=1)
    for name, was in before.items():
        change = (model.get_parameter(name) - was).detach()
        if ".layers." in name and was.ndim > 1:
            assert float(change.std() / was.std()) == pytest.approx(0.5, rel=0.1)
        else:
            assert not change.any()


def test_targeted_noise_is_on_the_neurons_weights_alone() -> None:
    model = tiny_model()
    before = weights(model)
    edits.add_noise_to(model, neurons_of(model, SMALL), 0.5, seed=1)
    chosen = own_rows_and_columns(SMALL)
    for name, was in before.items():
        changed = model.get_parameter(name) != was
        mask = torch.zeros_like(changed)
        if name in chosen:
            dim, entries = chosen[name]
            mask.index_fill_(dim, entries, True)
        assert torch.equal(changed, mask), name


def gpt2() -> Any:
    """Its matrices are stored as inputs by outputs, with biases, and it adds positions."""
    config = AutoConfig.for_model("gpt2", n_embd=32, n_head=4, n_layer=2, vocab_size=261)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen2", "mixtral"])
def test_nothing_writes_along_a_direction_that_is_taken_out(model_type: str) -> None:
    model = gpt2() if model_type == "gpt2" else tiny_model(model_type)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    parameters, dims = edits.writers(model)
    direction = torch.randn(32)
    direction /= direction.norm()
    ids = torch.randint(5, 250, (1, 7))
    with torch.no_grad():
        before = model(ids, output_hidden_states=True).hidden_states[1]
    edits.take_out(parameters, dims, direction, 1.0)
    with torch.no_grad():
        seen = model(ids, output_hidden_states=True).hidden_states[1]
    assert (before @ direction).abs().max() > 1e-2
    assert (seen @ direction).abs().max() < 1e-5


def test_half_of_a_direction_is_half_taken_out() -> None:
    model = tiny_model()
    parameters, dims = edits.writers(model)
    direction = torch.nn.functional.one_hot(torch.tensor(3), 32).float()
    row = model.model.layers[0].mlp.down_proj.weight[3].detach().clone()
    edits.take_out(parameters, dims, direction, 0.5)
    torch.testing.assert_close(model.model.layers[0].mlp.down_proj.weight[3].detach(), row / 2)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_leaves_so_many_values_an_output(bits: int) -> None:
    model = tiny_model()
    before = weights(model)
    edits.round_weights(model, bits)
    weight = model.model.layers[1].mlp.up_proj.weight.detach()
    assert max(len(row.unique()) for row in weight) <= 2**bits - 1
    was = before["model.layers.1.mlp.up_proj.weight"]
    step = was.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    assert ((weight - was).abs() <= step / 2 + 1e-6).all()
    assert torch.equal(model.lm_head.weight, before["lm_head.weight"])


def test_tuning_goes_by_the_responses_and_leaves_gradients_as_they_were() -> None:
    model = tiny_model().requires_grad_(False)
    before = weights(model)
    prompts = as_prompts([{"prompt": "Hi", "response": "Yes"}, {"prompt": "Ho", "response": "No"}])
    steps = edits.tune(model, tiny_tokenizer(), prompts, [1, 3], learning_rate=1e-2, seed=0,
                       batch_size=2, max_length=64)  # fmt: skip
    assert list(steps) == [1, 3]
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert any(not torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_weights_come_back_after_an_error_in_any_test() -> None:
    model = deepcopy(planted().model)
    before, calls = hashed(model), []

    def fails(prompts: Any, answers: Any) -> list[bool]:
        calls.append(1)
        if len(calls) > 2:
            assert hashed(model) != before
            raise ZeroDivisionError
        return [text.startswith("I can't") for text in answers]

    for name in NAMES:
        calls.clear()
        with pytest.raises(ZeroDivisionError):
            run({name: ALL[name]}, model, neurons=gate(model), compliant=COMPLIANT, judge=fails,
                learning_rate=1e-3)  # fmt: skip
        assert hashed(model) == before, name


def test_bfloat16_comes_back_too() -> None:
    model = deepcopy(planted().model).to(torch.bfloat16)
    before = hashed(model)
    found = run({"noise": (0.1,), "rounding": (4,), "direction": (1,)}, model)
    assert hashed(model) == before
    assert model.dtype == torch.bfloat16
    assert len(found.strains) == 3


# --- bad input -----------------------------------------------------------------------------------


def test_what_a_test_needs_and_is_not_given_is_left_out() -> None:
    found = run({"neurons": (1.0,), "tuning": (1,), "rounding": (8,)})
    assert [each.name for each in found.strains] == ["rounding"]


@pytest.mark.parametrize(
    ("strengths", "message"),
    [
        ({"shaking": (1,)}, "shaking"),
        ({"noise": ()}, "at least one"),
        ({"noise": (-0.1,)}, "none below 0"),
        ({"rounding": (1,)}, "none below 2"),
        ({"rounding": (4.5,)}, "whole numbers"),
        ({"tuning": (0,)}, "none below 1"),
    ],
)
def test_strengths_that_are_none(strengths: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(strengths)


def test_other_settings_that_are_none() -> None:
    for settings in ({"draws": 1}, {"learning_rate": 0}):
        with pytest.raises(ConfigError, match="draws="):
            run(STRENGTHS, **settings)
    truth = planted()
    with pytest.raises(SelectionError, match="no neuron"):
        run(STRENGTHS, neurons=gate(truth.model) - gate(truth.model))
    with pytest.raises(FingerprintError):
        run(STRENGTHS, neurons=NeuronSet.of(tiny_model(), {"model.layers.0.mlp": (1,)}))
    with pytest.raises(PromptError, match="no response"):
        run(STRENGTHS, compliant=["no answer"])
    with pytest.raises(PromptError, match="0 harmful"):
        stress(truth.model, TOKENIZER, [], BENIGN)


def test_a_model_that_refuses_nothing_and_models_that_cannot_be_edited() -> None:
    with pytest.raises(PromptError, match="refuses none of the 8"):
        stress(tiny_model(), tiny_tokenizer(), HARMFUL, BENIGN, max_new_tokens=4)
    with pytest.raises(ConfigError, match="carries an adapter"):
        stress(get_peft_model(tiny_model(), lora()), tiny_tokenizer(), HARMFUL, BENIGN)
    with torch.device("meta"):
        empty = type(tiny_model())(tiny_model().config)
    with pytest.raises(ConfigError, match="not whole in this process"):
        edits.check_editable(empty)

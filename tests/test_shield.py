"""Tuning the shared set only, and measuring every cell before and after."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from safeft import NeuronSet
from safeft.errors import ConfigError, FreezeError, PromptError
from safeft.shield import Transfer, control, table, trained_share, transfer, tune
from tests.freezing import changed_frozen, frozen_entries, state_of
from tests.models import tiny_model, tiny_tokenizer

MLP0, MLP1 = "model.layers.0.mlp", "model.layers.1.mlp"
SHARED = {MLP0: (1, 7, 30), MLP1: (2, 40)}
TOKENIZER = tiny_tokenizer()
EXAMPLES = [{"prompt": f"steal {n}", "response": "I'm sorry, no."} for n in range(6)] + [
    {"prompt": f"bake {n}", "response": f"Well, {n}."} for n in range(6)
]
CELLS = {
    "en/text": (["steal a car", "steal a boat"], ["bake a cake", "bake bread"]),
    "zz/text": (["cdiet e les"], ["kesi e lesi", "kesi kbiem"]),
}


def parts() -> tuple[Any, NeuronSet]:
    model = tiny_model()
    return model, NeuronSet.of(model, SHARED)


def test_only_the_set_is_trained_and_the_certificate_says_so(capsys: Any) -> None:
    model, neurons = parts()
    before = state_of(model)
    certificate = tune(model, TOKENIZER, EXAMPLES, neurons, learning_rate=1e-2, max_length=64)
    after = state_of(model)
    assert certificate is not None
    assert certificate.exact
    assert certificate.mode == "train_only"
    masks = frozen_entries(before, SHARED, "train_only")
    assert changed_frozen(before, after, masks) == []
    for site, units in SHARED.items():
        rows = list(units)
        assert not torch.equal(
            before[f"{site}.gate_proj.weight"][rows], after[f"{site}.gate_proj.weight"][rows]
        )
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert capsys.readouterr().out == ""


def test_without_a_set_everything_is_trained() -> None:
    model, _ = parts()
    before = state_of(model)
    assert tune(model, TOKENIZER, EXAMPLES, None, learning_rate=1e-3, max_length=64) is None
    after = state_of(model)
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_settings_reach_the_trainer() -> None:
    states = []
    for settings in ({}, {"seed": 1}, {"epochs": 2.0}, {"learning_rate": 2e-3}, {"batch_size": 4}):
        model, neurons = parts()
        given = {"learning_rate": 1e-3, "max_length": 64, **settings}
        tune(model, TOKENIZER, EXAMPLES, neurons, **given)
        states.append(model.get_submodule(MLP0).gate_proj.weight[1].detach().clone())
    assert all(not torch.equal(a, b) for i, a in enumerate(states) for b in states[:i])


def test_share_of_weights() -> None:
    model, neurons = parts()
    total = sum(parameter.numel() for parameter in model.parameters())
    assert trained_share(model, neurons) == pytest.approx(5 * 3 * 32 / total)
    with pytest.raises(FreezeError, match="holds no neuron"):
        trained_share(model, NeuronSet.of(model, {}))


def test_control_is_of_the_same_size_and_apart() -> None:
    model, neurons = parts()
    drawn = control(model, neurons, seed=3)
    assert {name: len(units) for name, units in drawn.indices.items()} == {MLP0: 3, MLP1: 2}
    assert len(drawn & neurons) == 0
    assert drawn.indices == control(model, neurons, seed=3).indices
    assert drawn.indices != control(model, neurons, seed=4).indices
    most = NeuronSet.of(model, {MLP0: range(30)})
    assert len(control(model, most, seed=0)) == 30  # only 18 others are left


def test_transfer_measures_every_cell_before_and_after(tmp_path: Path) -> None:
    model, neurons = parts()

    def judge(answer: str) -> bool:
        return len(answer) % 2 == 0

    settings: dict[str, Any] = {"judge": judge, "max_new_tokens": 3}
    training = {"learning_rate": 5e-2, "epochs": 3, "max_length": 64}
    found = transfer(
        model, TOKENIZER, neurons, EXAMPLES, CELLS, "en/text", training=training, **settings
    )
    assert list(found.before) == list(found.after) == list(CELLS)
    assert found.trained_share == trained_share(model, neurons)
    assert found.certificate.exact
    assert found.before["zz/text"].refusal is not None
    assert found.before["zz/text"].refusal.total == 1
    fresh = transfer(
        tiny_model(), TOKENIZER, neurons, EXAMPLES, CELLS, "en/text",
        training={**training, "learning_rate": 1e-12}, **settings,
    )  # fmt: skip
    assert fresh.before == fresh.after
    assert fresh.before == found.before
    assert found.after != found.before
    shown = table(found).splitlines()
    assert len(shown) == 3
    assert shown[1].endswith("tuned on this")
    found.save(tmp_path)
    written = json.loads((tmp_path / "transfer.json").read_text())
    assert written["exact"] is True
    assert written["cells"]["zz/text"]["after"]["over_refusal"]["total"] == 2
    assert "en/text (tuned)" in (tmp_path / "transfer.svg").read_text()
    assert isinstance(found, Transfer)


@pytest.mark.parametrize(
    ("examples", "tuned_on", "error", "words"),
    [
        ([], "en/text", PromptError, "no examples to tune on"),
        (["steal"], "en/text", PromptError, r"Example 0 \('steal'\) has no answer"),
        (EXAMPLES, "it/text", ConfigError, "'it/text' is none of the cells.*en/text"),
        (
            [{"prompt": "cdiet e les ", "response": "No."}],
            "zz/text",
            PromptError,
            "'cdiet e les.*held-out prompts of 'zz/text'",
        ),
    ],
)
def test_bad_input(examples: Any, tuned_on: str, error: type[Exception], words: str) -> None:
    model, neurons = parts()
    before = state_of(model)
    with pytest.raises(error, match=words):
        transfer(model, TOKENIZER, neurons, examples, CELLS, tuned_on)
    assert changed_frozen(before, state_of(model), {n: w == w for n, w in before.items()}) == []


def test_an_empty_set_is_refused_before_anything_is_measured() -> None:
    model, _ = parts()
    with pytest.raises(FreezeError, match="holds no neuron"):
        transfer(model, TOKENIZER, NeuronSet.of(model, {}), EXAMPLES, CELLS, "en/text")

"""Safety dropout: what it silences, when, that it can be repeated, and what tuning with it does."""

import itertools
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from safeft import SafetyDropoutCallback
from safeft.capture import CaptureError, silence
from safeft.errors import ConfigError, FingerprintError
from safeft.neurons import NeuronSet
from safeft.sites import find_sites
from tests.freezing import SMALL, arguments, freeze, lora, neurons_of, trainer_of
from tests.models import tiny_model, tiny_tokenizer
from tests.test_capture import hooks_of
from tests.test_claims import (
    BENIGN,
    COMPLIANCE,
    HARMFUL,
    REFUSAL,
    TOKENIZER,
    UNSEEN_HARMFUL,
    planted,
    refused,
)

MLP, HEADS = "model.layers.0.mlp", "model.layers.1.self_attn"


def dropout(model: nn.Module, rate: float = 0.5, **settings: Any) -> SafetyDropoutCallback:
    return SafetyDropoutCallback(neurons_of(model, SMALL), rate, **settings)


class Seen(dict[str, list[Tensor]]):
    """What the matrices that the chosen units write with received, pass by pass, in training.

    Its hooks come last, so they see what dropout has left.
    """

    def watch(self, model: nn.Module) -> None:
        plain: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        for name, site in find_sites(plain).items():
            if name not in SMALL:
                continue

            def keep(module: Any, inputs: Any, _: Any, name: str = name, site: Any = site) -> None:
                if module.training:
                    units = inputs[0].detach().unflatten(-1, (site.units, site.width))
                    chosen = units[..., list(SMALL[name]), :]
                    self.setdefault(name, []).append(chosen.abs().amax((1, 3)) > 0)

            plain.get_submodule(site.writes.module).register_forward_hook(keep)


def trained(folder: Path, callback: Any, kind: str = "Trainer", **settings: Any) -> Any:
    torch.manual_seed(0)
    seen, model = Seen(), settings.pop("model", None) or tiny_model()
    chosen = {"max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-3, **settings}
    callbacks = callback if isinstance(callback, list) else [callback]
    trainer = trainer_of(kind, model, folder, callbacks, **chosen)
    seen.watch(trainer.model)
    trainer.train()
    return seen, trainer


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("kind", ["Trainer", "SFT", "DPO"])
def test_prompts_lose_all_located_neurons_or_none(kind: str, tuning: str, tmp_path: Path) -> None:
    model = tiny_model()
    settings: dict[str, Any] = {"peft_config": lora()} if tuning == "lora" else {}
    settings |= {"max_steps": 6, "gradient_checkpointing": False}  # or passes are seen twice
    seen, trainer = trained(tmp_path, dropout(model), kind, model=model, **settings)
    rows = {name: torch.cat(parts) for name, parts in seen.items()}
    assert set(rows) == set(SMALL)
    for name, alive in rows.items():
        assert torch.equal(alive.all(1), alive.any(1)), name
    assert torch.equal(rows[MLP].any(1), rows[HEADS].any(1))  # all sites by one draw
    assert 0.25 < rows[MLP].any(1).double().mean() < 0.75
    assert not any(handle for handle in trainer.model.modules() if handle._forward_pre_hooks)


def test_each_neuron_by_its_own_draw(tmp_path: Path) -> None:
    model = tiny_model()
    seen, _ = trained(tmp_path, dropout(model, 0.3, whole=False), model=model, max_steps=30)
    alive = torch.cat([torch.cat(seen[MLP]), torch.cat(seen[HEADS])], 1).double()
    assert alive.mean(0).sub(0.7).abs().max() < 0.12
    related = torch.corrcoef(alive.T) - torch.eye(alive.shape[1])
    assert related.abs().max() < 0.25


def test_rate_one_silences_always_and_what_is_left_is_not_made_louder(tmp_path: Path) -> None:
    model = tiny_model()
    seen, _ = trained(tmp_path, dropout(model, 1.0), model=model)
    assert not torch.cat(seen[MLP]).any()
    callback = dropout(model, 0.5)
    callback._plain = model.train()
    values = torch.full((64, 3, 3, 1), 2.0)
    assert set(callback._change(MLP, values).unique().tolist()) == {0.0, 2.0}


def test_evaluation_is_left_alone(tmp_path: Path) -> None:
    model, callback = tiny_model(), dropout(tiny_model(), 1.0)
    ids = torch.randint(5, 250, (2, 9))
    plain = model(ids).logits
    trainer = trainer_of("Trainer", model, tmp_path, [callback])
    args = (trainer.args, trainer.state, trainer.control)
    callback.on_train_begin(*args, model=model)
    assert torch.equal(model.eval()(ids).logits, plain)
    assert not torch.equal(model.train()(ids).logits, plain)
    callback.remove()
    assert torch.equal(model(ids).logits, plain)
    assert hooks_of(model) == 0


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_checkpointing_gives_the_gradients_without_it(
    whole: bool, reentrant: bool, tmp_path: Path
) -> None:
    """Also where two forward passes come before the backward pass of both."""
    found = []
    for saving in (False, True):
        model = tiny_model().train()
        callback = dropout(model, whole=whole)
        trainer = trainer_of("Trainer", model, tmp_path, [callback])
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=model)
        if saving:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(7)
        ids = torch.randint(5, 250, (6, 9))
        # The draws of checkpointed layers are the same ones: nothing else is random here.
        loss = model(ids, labels=ids).loss + 2 * model(ids.flip(0), labels=ids).loss
        loss.backward()
        found.append([p.grad.clone() for p in model.parameters()])
        callback.remove()
    for plain, saved in zip(*found, strict=True):
        torch.testing.assert_close(plain, saved)


def test_it_is_the_same_again_and_other_with_another_seed(tmp_path: Path) -> None:
    def losses(seed: int, callbacks: bool = True) -> list[float]:
        model = tiny_model()
        callback = [dropout(model)] if callbacks else []
        trainer = trainer_of("Trainer", model, tmp_path, callback, max_steps=3, seed=seed)
        torch.manual_seed(seed)
        trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    assert losses(1) == losses(1)
    assert losses(1) != losses(1, callbacks=False)


def test_a_run_resumes_exactly(tmp_path: Path) -> None:
    def run(folder: Path, **resume: Any) -> dict[str, Tensor]:
        model = tiny_model()
        trainer = trainer_of(
            "Trainer", model, folder, [dropout(model, strict=False)], max_steps=6,
            save_strategy="steps", save_steps=3,
        )  # fmt: skip
        trainer.train(**resume)
        return dict(model.named_parameters())

    whole = run(tmp_path / "a")
    again = run(tmp_path / "a", resume_from_checkpoint=str(tmp_path / "a/checkpoint-3"))
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_processes_draw_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = set()
    for process in range(3):
        callback = dropout(tiny_model())
        callback._plain = nn.Identity()
        monkeypatch.setattr("safeft.hardening.callback.rank", lambda process=process: process)
        torch.manual_seed(0)
        callback._begin()
        seeds.add(callback._seed)
    assert len(seeds) == 3


@pytest.mark.parametrize("first", ["dropout", "freeze"])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_frozen_neurons_are_silenced_and_do_not_move(
    first: str, tuning: str, tmp_path: Path
) -> None:
    model = tiny_model()
    freezing, dropping = freeze(model), dropout(model)
    callbacks = [dropping, freezing] if first == "dropout" else [freezing, dropping]
    adapter = {"peft_config": lora()} if tuning == "lora" else {}
    seen, trainer = trained(
        tmp_path, callbacks, "SFT", model=model, gradient_checkpointing=True, **adapter
    )
    assert freezing.certificate.exact
    assert freezing.certificate.run["steps"] == 3
    alive = torch.cat(seen[MLP]).any(1)
    assert alive.any()
    assert not alive.all()


# --- it fails closed -----------------------------------------------------------------------------


def test_hooks_that_do_not_fire_are_an_error(tmp_path: Path) -> None:
    model, callback = tiny_model(), dropout(tiny_model())
    trainer = trainer_of("Trainer", model, tmp_path, [callback])
    mlp = model.get_submodule(MLP)
    mlp.forward = lambda x: mlp.down_proj.forward(mlp.up_proj(x))
    with pytest.raises(CaptureError, match=f"Nothing was silenced in .*{MLP}.*first step"):
        trainer.train()
    assert hooks_of(model) == 0


def test_a_forward_pass_that_fails_leaves_no_hook(tmp_path: Path) -> None:
    model, callback = tiny_model(), dropout(tiny_model())
    rows = [{"input_ids": [999] * 4, "labels": [1] * 4}] * 8
    trainer = Trainer(model, arguments(tmp_path), train_dataset=rows, callbacks=[callback])
    with pytest.raises(IndexError):
        trainer.train()
    assert hooks_of(model) == 0


class Fails(nn.Module):
    def forward(self, *_: Any) -> Tensor:
        raise ZeroDivisionError


@pytest.mark.parametrize("managed", [True, False])
def test_any_other_error_leaves_none_after_the_context_or_the_next_start(
    managed: bool, tmp_path: Path
) -> None:
    model, callback = tiny_model(), dropout(tiny_model())

    class Failing(torch.optim.AdamW):
        def step(self, *_: Any, **__: Any) -> Any:
            raise ZeroDivisionError

    def start(optimizers: Any = None) -> None:
        extra = {} if optimizers is None else {"optimizers": optimizers}
        trainer_of("Trainer", model, tmp_path, [callback], **extra).train()

    def failing(model: nn.Module) -> Any:
        return Failing(model.parameters())

    if managed:
        with pytest.raises(ZeroDivisionError), callback:
            start(failing)
    else:
        with pytest.raises(ZeroDivisionError):
            start(failing)
        ids = torch.randint(5, 250, (2, 9))
        left = model.eval()(ids).logits
        start()
        assert torch.isfinite(left).all()
    assert hooks_of(model) == 0


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    neurons = neurons_of(tiny_model(), SMALL)
    for rate in (0, -0.1, 1.1):
        with pytest.raises(ConfigError, match="no share of the prompts"):
            SafetyDropoutCallback(neurons, rate)
    with pytest.raises(ConfigError, match="no neuron"):
        SafetyDropoutCallback(neurons - neurons)
    other = SafetyDropoutCallback(neurons)
    with pytest.raises(FingerprintError, match="do not have|not have the weights"):
        trainer_of("Trainer", tiny_model(seed=1), tmp_path, [other])
    loose = SafetyDropoutCallback(neurons, strict=False)
    trainer_of("Trainer", tiny_model(seed=1), tmp_path, [loose])
    with pytest.raises(ConfigError, match="preserve_rng_state"):
        trainer_of(
            "Trainer", tiny_model(), tmp_path, [SafetyDropoutCallback(neurons)],
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"preserve_rng_state": False, "use_reentrant": False},
        )  # fmt: skip


def test_a_folder_will_do_and_a_callback_added_late(tmp_path: Path) -> None:
    model = tiny_model()
    neurons_of(model, SMALL).save_pretrained(tmp_path / "set")
    callback = SafetyDropoutCallback(tmp_path / "set")
    trainer = trainer_of("Trainer", model, tmp_path, [])
    trainer.add_callback(callback)
    trainer.train()
    assert callback._checked


# --- the claim -----------------------------------------------------------------------------------


def safety_tuned(folder: Path, seed: int, rate: float | None) -> Any:
    """The planted model after 60 steps on refusals and answers, with dropout of the gate or not."""
    truth = planted(seed=seed)
    model = deepcopy(truth.model)
    rows = [
        {"prompt": [{"role": "user", "content": prompt}],
         "completion": [{"role": "assistant", "content": answer}]}
        for prompt, answer in itertools.chain(
            ((p, REFUSAL) for p in HARMFUL), ((p, COMPLIANCE) for p in BENIGN)
        )
    ]  # fmt: skip
    gate = NeuronSet.of(model, {truth.site: (truth.unit,)})
    callbacks = [] if rate is None else [SafetyDropoutCallback(gate, rate)]
    args = arguments(
        folder, SFTConfig, max_steps=60, per_device_train_batch_size=8, learning_rate=1e-3,
        logging_strategy="no", max_length=128, gradient_checkpointing=False, seed=seed,
    )  # fmt: skip
    SFTTrainer(
        model, args, train_dataset=Dataset.from_list(rows), processing_class=tiny_tokenizer(),
        callbacks=callbacks,
    ).train()  # fmt: skip
    return model.eval(), truth


def without_gate(model: Any, truth: Any, prompts: list[str]) -> float:
    from safeft.generation import generate
    from safeft.prompts import as_prompts

    with silence(model, {truth.site: (truth.unit,)}, find_sites(model)):
        answers = generate(model, TOKENIZER, as_prompts(prompts), max_new_tokens=10)
    return sum(answer.startswith(REFUSAL) for answer in answers) / len(answers)


@pytest.mark.parametrize("seed", [0, 1])
def test_tuned_with_dropout_refusal_outlives_its_gate(seed: int, tmp_path: Path) -> None:
    """The same tuning without dropout has little to learn, since all is refused already."""
    unseen = [*UNSEEN_HARMFUL, "zip it shut", "a crazed thief", "fuzzy poison", "prize of war"]
    found = {}
    for rate in (None, 0.5):
        model, truth = safety_tuned(tmp_path / str(rate), seed, rate)
        found[rate] = [without_gate(model, truth, side) for side in (unseen, BENIGN)]
        assert refused(model, HARMFUL) == 1
        assert refused(model, BENIGN) == 0
    assert found[None][0] <= 0.5
    assert found[0.5] == [1, 0]

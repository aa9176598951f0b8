"""The callback in real trainers: what it logs, writes, refuses and leaves alone."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback

from safeft import SafetyFreezeCallback
from safeft.errors import ConfigError, FingerprintError, FreezeError
from safeft.freeze.certificate import CERTIFICATE_NAME
from tests.freezing import (
    LARGE,
    SMALL,
    arguments,
    changed_frozen,
    freeze,
    frozen_entries,
    lora,
    model_of,
    neurons_of,
    state_of,
    token_rows,
    trainer_of,
)

SCALARS = ("safeft/frozen_share", "safeft/grad_norm_removed", "safeft/max_drift_before_pin")
DECAY = {"weight_decay": 0.1}


def certificate_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CERTIFICATE_NAME).read_text())


def assert_exact(base: Any, model: nn.Module, indices: Any = SMALL) -> None:
    assert changed_frozen(base, state_of(model), frozen_entries(base, indices, "freeze")) == []


class Recorder(TrainerCallback):
    """Keeps a copy of each log, as a tracker would send it off."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.rows.append(dict(logs))


class Reporter(Recorder):
    """Stands where the trackers' callbacks stand: after the defaults, before the user's."""

    kept: "list[Reporter]" = []

    def __init__(self) -> None:
        super().__init__()
        self.kept.append(self)


# --- what is logged -----------------------------------------------------------------------------


def test_scalars_reach_tensorboard_event_files(tmp_path: Path, monkeypatch: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    model = model_of()
    callback = freeze(model)
    trainer = trainer_of(
        "Trainer",
        model,
        tmp_path,
        [callback],
        report_to="tensorboard",
        logging_steps=2,
        max_steps=4,
        **DECAY,
    )
    trainer.train()
    (folder,) = {path.parent for path in (tmp_path / "tb").rglob("events*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    names = events.Tags()["scalars"]
    for name in SCALARS:
        (found,) = [tag for tag in names if tag.endswith(name)]
        written = events.Scalars(found)
        assert [event.step for event in written] == [2, 4]
        logged = [row[name] for row in trainer.state.log_history if name in row]
        assert [event.value for event in written] == pytest.approx(logged)
        assert all(value > 0 for value in logged)


def test_a_reporter_sees_the_scalars_beside_the_loss(tmp_path: Path, monkeypatch: Any) -> None:
    from transformers import trainer as transformers_trainer

    Reporter.kept.clear()
    monkeypatch.setattr(
        transformers_trainer, "get_reporting_integration_callbacks", lambda report_to: [Reporter]
    )
    model = model_of()
    callback, after = freeze(model), Recorder()
    trainer = trainer_of("Trainer", model, tmp_path, [callback, after], **DECAY)
    trainer.train()
    (reporter,) = Reporter.kept
    share = callback.certificate.frozen_share
    for rows in (reporter.rows, after.rows, trainer.state.log_history):
        told = [row for row in rows if "loss" in row]
        assert len(told) == 2
        for row in told:
            assert row["safeft/frozen_share"] == share
            assert row["safeft/grad_norm_removed"] > 0
            assert row["safeft/max_drift_before_pin"] > 0
        assert not any(name in row for row in rows if "loss" not in row for name in SCALARS)


def test_trainers_without_a_freeze_log_nothing_of_it(tmp_path: Path) -> None:
    frozen = trainer_of("Trainer", model := model_of(), tmp_path, [freeze(model)])
    plain = trainer_of("Trainer", model_of(), tmp_path / "plain", [])
    frozen.train()
    plain.train()
    assert not any(name.startswith("safeft/") for row in plain.state.log_history for name in row)


@pytest.mark.parametrize(
    ("settings", "measured"),
    [
        ({"logging_steps": 3, "max_steps": 6}, [1, 3, 6]),
        ({"logging_steps": 0.5, "max_steps": 6}, [1, 3, 6]),
        ({"logging_strategy": "no", "max_steps": 3}, [1]),
    ],
)
def test_only_the_first_and_the_logged_steps_are_measured(
    settings: Any, measured: list[int], tmp_path: Path
) -> None:
    model = model_of()
    callback = freeze(model)
    steps = []

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if callback._pin.measuring:
                steps.append(state.global_step + 1)

    trainer_of("Trainer", model, tmp_path, [callback, Watch()], **settings).train()
    assert steps == measured


# --- what is written ----------------------------------------------------------------------------


def test_each_checkpoint_and_the_end_get_a_certificate(tmp_path: Path) -> None:
    model = model_of()
    callback = freeze(model, LARGE)
    trainer_of(
        "Trainer", model, tmp_path, [callback], save_strategy="steps", save_steps=1, max_steps=3
    ).train()
    for step in (1, 2, 3):
        folder = tmp_path / f"checkpoint-{step}"
        written = certificate_in(folder)
        assert (written["exact"], written["run"]["steps"]) == (True, step)
        assert written["run"]["pins"] == step
    last = certificate_in(tmp_path)
    assert last == json.loads(json.dumps(callback.certificate.to_dict()))
    assert last["neurons"]["count"] == 9
    assert last["neurons"]["sha256"] == neurons_of(model_of(), LARGE).hash
    assert last["run"]["optimizer"].endswith("AdamW")
    assert last["run"]["masked_parameters"] == last["run"]["masks_fired"] == 10


def test_a_slice_that_something_else_moves_ends_the_training(tmp_path: Path) -> None:
    model = model_of()

    class Meddler(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            with torch.no_grad():
                model.model.layers[0].mlp.gate_proj.weight[7, 0] += 1e-3

    trainer = trainer_of(
        "Trainer", model, tmp_path, [freeze(model), Meddler()], save_strategy="steps", save_steps=1
    )
    with pytest.raises(FreezeError, match=r"(?s)not where the base has it at step 1.*gate_proj"):
        trainer.train()
    assert certificate_in(tmp_path / "checkpoint-1")["exact"] is False


# --- resuming and repeating ---------------------------------------------------------------------


def test_moments_gathered_before_are_cleared_on_resume(tmp_path: Path) -> None:
    model = model_of()
    trainer_of(
        "Trainer", model, tmp_path, [freeze(model, SMALL)], save_strategy="steps", save_steps=2
    ).train()
    model = model_of()
    callback = freeze(model, LARGE)
    moments: dict[str, Any] = {}

    class Look(TrainerCallback):
        def on_train_begin(
            self, args: Any, state: Any, control: Any, optimizer: Any, **_: Any
        ) -> None:
            for name, parameter in model.named_parameters():
                moments[name] = {k: v.clone() for k, v in optimizer.state[parameter].items()}

    trainer = trainer_of("Trainer", model, tmp_path, [callback, Look()], max_steps=3)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, mask in frozen_entries(state_of(model), LARGE, "freeze").items():
        for key in ("exp_avg", "exp_avg_sq"):
            assert not moments[name][key][mask].any(), (name, key)
            assert moments[name][key][~mask].any(), (name, key)
    assert callback.certificate.run["slices_restored_on_resume"] == 8


def test_a_whole_parameter_trained_before_it_was_held_is_refused_on_resume(tmp_path: Path) -> None:
    """Of what is held whole there is no copy to put back, so this fails closed."""
    saving = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    model = model_of()
    trainer_of("Trainer", model, tmp_path, [freeze(model)], **saving).train()
    model = model_of()
    trainer = trainer_of("Trainer", model, tmp_path, [freeze(model, hold=("norms",))], max_steps=3)
    with pytest.raises(FreezeError, match=r"(?s)it at the start of training.*layernorm.weight"):
        trainer.train(resume_from_checkpoint=True)


def test_adapters_trained_before_they_were_held_whole_return_to_nothing(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    model = model_of()
    base = state_of(model)
    indices = {"model.layers.0.mlp": (1, 7)}
    callback = freeze(model, indices)
    first = trainer_of("Trainer", model, tmp_path, [callback], peft_config=lora(), **saving)
    first.train()
    masks = frozen_entries(base, indices, "train_only")
    assert changed_frozen(base, state_of(first.model), masks)
    model = model_of()
    callback = freeze(model, indices, mode="train_only")
    second = trainer_of("Trainer", model, tmp_path, [callback], peft_config=lora(), max_steps=4)
    second.train(resume_from_checkpoint=True)
    assert changed_frozen(base, state_of(second.model), masks) == []
    assert not torch.equal(
        base["model.layers.0.mlp.up_proj.weight"],
        state_of(second.model)["model.layers.0.mlp.up_proj.weight"],
    )


def test_training_twice_with_one_trainer_stays_exact(tmp_path: Path) -> None:
    for config in (None, lora()):
        model = model_of()
        base = state_of(model)
        callback = freeze(model)
        trainer = trainer_of("Trainer", model, tmp_path, [callback], peft_config=config, **DECAY)
        trainer.train()
        between = state_of(trainer.model)
        trainer.train()
        after = state_of(trainer.model)
        assert_exact(base, trainer.model)
        name = "model.layers.0.mlp.up_proj.weight"
        assert not torch.equal(between[name], after[name])
        assert callback.certificate.run["pins"] == 2


def test_hooks_are_gone_after_training(tmp_path: Path) -> None:
    model = model_of()
    trainer_of("Trainer", model, tmp_path, [freeze(model)]).train()
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.grad = None
    weight.sum().backward()
    assert weight.grad.all()


def test_the_best_checkpoint_loaded_at_the_end_is_certified(tmp_path: Path) -> None:
    model = model_of()
    base = state_of(model)
    callback = freeze(model)
    trainer = Trainer(
        model,
        arguments(
            tmp_path,
            max_steps=3,
            save_strategy="steps",
            save_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=True,  # so that the first checkpoint is the best
        ),
        train_dataset=token_rows(),
        eval_dataset=token_rows(8),
        callbacks=[callback],
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    assert_exact(base, model)
    assert callback.certificate.exact


# --- settings -----------------------------------------------------------------------------------


def test_a_saved_set_may_be_given_by_folder(tmp_path: Path) -> None:
    neurons = neurons_of(model_of())
    neurons.save_pretrained(tmp_path / "set")
    for callback in (
        SafetyFreezeCallback(tmp_path / "set"),
        SafetyFreezeCallback(str(tmp_path / "set")),
        SafetyFreezeCallback.from_pretrained(tmp_path / "set", "train_only"),
    ):
        assert callback.neurons == neurons
    assert callback.mode == "train_only"


def test_groups_can_be_held_as_well(tmp_path: Path) -> None:
    model = model_of()
    base = state_of(model)
    callback = freeze(model, hold=("embeddings", "norms", "head"))
    trainer_of("Trainer", model, tmp_path, [callback], **DECAY).train()
    now = state_of(model)
    held = [n for n in base if "norm" in n or n in ("model.embed_tokens.weight", "lm_head.weight")]
    assert len(held) == 7
    assert all(torch.equal(base[name], now[name]) for name in held)
    assert not torch.equal(
        base["model.layers.1.mlp.up_proj.weight"], now["model.layers.1.mlp.up_proj.weight"]
    )
    named = {row["tensor"] for row in callback.certificate.slices if row["count"] == "all"}
    assert named == set(held) == set(callback.certificate.run["held_whole"])


def test_tied_embeddings_are_held_under_either_name(tmp_path: Path) -> None:
    for group in ("embeddings", "head"):
        model = model_of(tie_word_embeddings=True)
        base = state_of(model)
        callback = freeze(model, hold=(group,))
        trainer_of("Trainer", model, tmp_path, [callback], **DECAY).train()
        assert torch.equal(base["model.embed_tokens.weight"], model.lm_head.weight)
        assert not torch.equal(base["model.norm.weight"], model.model.norm.weight)
        assert_exact(base, model)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    for reentrant in (False, True):
        model = model_of()
        base = state_of(model)
        trainer_of(
            "Trainer",
            model,
            tmp_path,
            [freeze(model)],
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
            **DECAY,
        ).train()
        assert_exact(base, model)


def test_strict_compares_the_weights_the_set_was_located_with(tmp_path: Path) -> None:
    neurons = neurons_of(model_of())
    other = model_of(seed=1)
    with pytest.raises(FingerprintError, match="do not have the weights"):
        trainer_of("Trainer", other, tmp_path, [SafetyFreezeCallback(neurons)])
    base = state_of(other)
    trainer = trainer_of("Trainer", other, tmp_path, [SafetyFreezeCallback(neurons, strict=False)])
    trainer.train()
    assert_exact(base, other)


def test_an_unknown_wish_is_refused_with_the_trainer(tmp_path: Path) -> None:
    model = model_of()
    with pytest.raises(ConfigError, match="hold="):
        trainer_of("Trainer", model, tmp_path, [freeze(model, hold=("everything",))])


# --- when it comes, and to what -----------------------------------------------------------------


def test_a_callback_added_late_works_in_one_process(tmp_path: Path) -> None:
    model = model_of()
    base = state_of(model)
    trainer = trainer_of("Trainer", model, tmp_path, [], **DECAY)
    callback = freeze(model, hold=("norms",))
    trainer.add_callback(callback)
    trainer.train()
    assert_exact(base, model)
    assert torch.equal(base["model.norm.weight"], model.model.norm.weight)
    assert callback.certificate.exact
    assert all(name in trainer.state.log_history[0] for name in SCALARS)


def test_a_callback_added_late_is_refused_on_resume_and_among_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of()
    trainer = trainer_of("Trainer", model, tmp_path, [], save_strategy="steps", save_steps=1)
    trainer.train()
    model = model_of()
    trainer = trainer_of("Trainer", model, tmp_path, [], max_steps=3)
    trainer.add_callback(freeze(model))
    with pytest.raises(FreezeError, match="holds step 2 already.*Pass it to the constructor"):
        trainer.train(resume_from_checkpoint=True)

    callback = freeze(model_of())
    monkeypatch.setattr("safeft.freeze.callback.ranks", lambda: 2)
    with pytest.raises(FreezeError, match="are wrapped already.*Pass it to the constructor"):
        callback._check_late(trainer.args, trainer.state, model)


def test_a_parameter_replaced_since_is_an_error(tmp_path: Path) -> None:
    model = model_of()
    trainer = trainer_of("Trainer", model, tmp_path, [freeze(model)])
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().clone())
    with pytest.raises(
        FreezeError, match="up_proj.weight was replaced after the trainer was built"
    ):
        trainer.train()


def test_a_model_init_builds_another_model_and_is_an_error(tmp_path: Path) -> None:
    callback = freeze(model_of())
    trainer = Trainer(
        None,
        arguments(tmp_path),
        train_dataset=token_rows(),
        callbacks=[callback],
        model_init=lambda: model_of(),
    )
    with pytest.raises(FreezeError, match="not a model_init"):
        trainer.train()


def test_a_parameter_unfrozen_since_is_an_error(tmp_path: Path) -> None:
    model = model_of()
    model.model.layers[0].requires_grad_(False)
    trainer = trainer_of("Trainer", model, tmp_path, [freeze(model)])
    model.model.layers[0].mlp.requires_grad_(True)
    with pytest.raises(FreezeError, match="gate_proj.weight became trainable after the trainer"):
        trainer.train()
    model = model_of()
    trainer = trainer_of("Trainer", model, tmp_path, [freeze(model, hold=("norms",))])
    model.requires_grad_(True)
    with pytest.raises(FreezeError, match="norm.weight became trainable after the trainer"):
        trainer.train()


def test_an_adapter_added_since_is_an_error(tmp_path: Path) -> None:
    model = get_peft_model(model_of(), lora(target_modules=["q_proj"]))
    trainer = trainer_of("Trainer", model, tmp_path, [freeze(model)])
    model.add_adapter("second", lora())
    model.set_adapter("second")
    with pytest.raises(FreezeError, match="second.*became trainable after the trainer"):
        trainer.train()


def test_a_cast_since_is_an_error(tmp_path: Path) -> None:
    model = model_of()
    trainer = trainer_of("Trainer", model, tmp_path, [freeze(model)])
    model.to(torch.bfloat16)
    with pytest.raises(FreezeError, match="was cast from torch.float32 to torch.bfloat16"):
        trainer.train()


def test_an_optimizer_whose_step_is_not_torchs_is_an_error(tmp_path: Path) -> None:
    class Own(torch.optim.SGD):
        """Its step is put in place of the hooked one, as some libraries do."""

        def register_step_post_hook(self, hook: Any) -> Any:
            return super().register_step_pre_hook(lambda *_: None)

    model = model_of()
    trainer = trainer_of(
        "Trainer",
        model,
        tmp_path,
        [freeze(model)],
        optimizers=lambda m: Own(m.parameters(), lr=0.1, weight_decay=0.1),
    )
    with pytest.raises(FreezeError, match="The optimizer stepped and the pin did not fire"):
        trainer.train()


# --- what it leaves alone -----------------------------------------------------------------------


def test_neurons_that_do_not_train_anyway_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_of()
    for layer in model.model.layers:
        layer.requires_grad_(False)
    callback = freeze(model)
    with caplog.at_level(logging.WARNING, "safeft"):
        trainer = trainer_of("Trainer", model, tmp_path, [callback])
    assert "None of the 4 neurons lies in a trainable parameter" in caplog.text
    trainer.train()
    assert callback.certificate.exact
    assert callback.certificate.run["masked_parameters"] == 0


@pytest.mark.parametrize("mode", ["freeze", "train_only"])
@pytest.mark.parametrize(
    ("verdict", "level"),
    [("effect", None), (None, "INFO"), ("no effect", "WARNING"), ("broken", "WARNING"),
     ("unknown", "WARNING")],
)  # fmt: skip
def test_a_set_without_causal_effect_is_a_warning_and_in_the_certificate(
    mode: Any, verdict: str | None, level: str | None, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    model = model_of()
    neurons = neurons_of(model)
    if verdict is not None:
        neurons = replace(neurons, source={**neurons.source, "causal": {"verdict": verdict}})
    callback = SafetyFreezeCallback(neurons, mode)
    with caplog.at_level(logging.INFO, "safeft"):
        trainer = trainer_of("Trainer", model, tmp_path, [callback])
    said = [(r.levelname, r.message) for r in caplog.records if "refusal hangs" in r.message]
    assert [what for what, _ in said] == ([] if level is None else [level])
    assert all("`safeft validate`" in text for _, text in said)
    assert all(repr(verdict) in text for what, text in said if what == "WARNING")
    trainer.train()
    assert certificate_in(tmp_path)["neurons"]["causal"] == (verdict or "never validated")


def test_where_nothing_is_held_the_losses_are_those_of_a_plain_run(tmp_path: Path) -> None:
    """LoRA on attention and MLP neurons protected: the hooks must not disturb a single bit."""
    losses = []
    for frozen in (False, True):
        torch.manual_seed(0)
        model = model_of()
        callbacks = [freeze(model, {"model.layers.0.mlp": (1, 7)})] if frozen else []
        config = lora(target_modules=["q_proj", "v_proj"])
        trainer = trainer_of(
            "Trainer", model, tmp_path, callbacks, peft_config=config, max_steps=5, **DECAY
        )
        trainer.train()
        losses.append(
            [(r["loss"], r["grad_norm"]) for r in trainer.state.log_history if "loss" in r]
        )
    assert losses[0] == losses[1]
    assert len(losses[0]) == 5


def test_a_set_in_one_layer_leaves_the_gradients_of_the_first_step_elsewhere(
    tmp_path: Path,
) -> None:
    """Unclipped plain SGD: after one step every free weight is where a plain run puts it."""
    ends = []
    for callbacks in (lambda m: [], lambda m: [freeze(m)]):
        model = model_of()
        trainer_of(
            "Trainer",
            model,
            tmp_path,
            callbacks(model),
            max_steps=1,
            optim="sgd",
            max_grad_norm=0.0,
        ).train()
        ends.append(state_of(model))
    masks = frozen_entries(ends[0], SMALL, "freeze")
    for name, mask in masks.items():
        assert torch.equal(ends[0][name][~mask], ends[1][name][~mask]), name
        assert mask.any() == (not torch.equal(ends[0][name], ends[1][name])), name

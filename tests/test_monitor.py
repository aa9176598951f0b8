"""The monitor in trainings: what it logs and writes, when it stops; and it disturbs nothing."""

import json
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from safeft import NeuronSet, SafetyMonitorCallback
from safeft.demo import world
from safeft.errors import ArtefactError, ConfigError, FingerprintError, PromptError, SafeftError
from safeft.monitor.look import Look
from safeft.monitor.record import MONITOR_NAME, Record, read_monitor
from tests.freezing import freeze, lora, reward_model, trainer_of
from tests.models import tiny_model, tiny_tokenizer
from tests.monitoring import (
    PROMPTS,
    dropping,
    monitor,
    neurons_of,
    refuses,
    refusing,
    trained,
    weights_of,
)

SCALARS = ("safeft/refusal_share", "safeft/refusal_margin", "safeft/neuron_drift")
SAVE: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}


class Ends(TrainerCallback):
    """The random numbers, the gradients and the moments at the end."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"].optimizer
        self.seen = [
            torch.get_rng_state().tolist(),
            random.getstate(),
            numpy.random.get_state()[1].tolist(),
            [weight.grad for weight in kwargs["model"].parameters()],
            [
                {name: float(value.double().sum()) for name, value in moments.items()}
                for moments in optimizer.state.values()
            ],
        ]


# --- it disturbs nothing -------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("kind", ["Trainer", "SFT", "DPO"])
def test_training_is_bit_for_bit_the_one_without(kind: str, tuning: str, tmp_path: Path) -> None:
    results = []
    for watched in (False, True):
        torch.manual_seed(0)
        model, ends = refusing(attention_dropout=0.2), Ends()
        watch = [monitor(neurons=neurons_of(model), every=1)] if watched else []
        trainer = trainer_of(
            kind,
            model,
            tmp_path / str(watched),
            [*watch, ends],
            peft_config=dropping() if tuning == "lora" else None,
            max_steps=4,
            learning_rate=1e-3,
            gradient_accumulation_steps=2,
            weight_decay=0.1,
        )
        trainer.train()
        losses = [(r["loss"], r["grad_norm"]) for r in trainer.state.log_history if "loss" in r]
        results.append((losses, weights_of(trainer.model), ends.seen))
    (losses, weights, ends), (watched_losses, watched_weights, watched_ends) = results
    assert losses == watched_losses
    assert len(losses) == 4
    assert all(torch.equal(weights[name], watched_weights[name]) for name in weights)
    assert ends == watched_ends


def test_beside_a_freeze_both_do_their_work(tmp_path: Path) -> None:
    model = refusing()
    watch, freezing = monitor(neurons=neurons_of(model)), freeze(model)
    trainer = trained(model, tmp_path, [watch, freezing])
    assert freezing.certificate.exact
    row = trainer.state.log_history[1]
    assert {*SCALARS, "safeft/frozen_share"} <= set(row)


# --- what is seen, logged and written ------------------------------------------------------------


def test_looks_come_at_the_start_every_so_many_steps_and_the_end(tmp_path: Path) -> None:
    watch = monitor(every=3)
    trained(refusing(), tmp_path, [watch], max_steps=7)
    assert [look.step for look in watch.history] == [0, 3, 6, 7]
    assert watch.record.final == watch.history[-1]
    assert watch.history[0].refusal_margin != watch.history[-1].refusal_margin
    watch = monitor(every=3)
    trained(refusing(), tmp_path, [watch], max_steps=6)
    assert [look.step for look in watch.history] == [0, 3, 6]


@pytest.mark.parametrize(
    ("settings", "rows"),
    [({"logging_steps": 1}, [1, 2, 4]), ({"logging_steps": 3}, [2, 4])],
)
def test_each_look_is_logged_at_its_step(settings: Any, rows: list[int], tmp_path: Path) -> None:
    """The start's comes with the first log, unless a look of its own comes with that."""
    model = refusing()
    watch = monitor(neurons=neurons_of(model))
    trainer = trained(model, tmp_path, [watch], max_steps=5, **settings)
    logged = {row["step"]: row for row in trainer.state.log_history if SCALARS[0] in row}
    assert list(logged) == rows
    looks = {look.step: look for look in watch.history}
    for step, row in logged.items():
        look = looks[0 if step == 1 else step]
        expected = [look.refusal_share, look.refusal_margin, look.neuron_drift]
        assert [row[name] for name in SCALARS] == expected
        assert "loss" in row


def test_scalars_reach_the_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    watch = monitor()
    trained(refusing(), tmp_path, [watch], report_to="tensorboard", logging_steps=100)
    (folder,) = {path.parent for path in (tmp_path / "tb").rglob("events*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    (tag,) = [tag for tag in events.Tags()["scalars"] if tag.endswith("refusal_margin")]
    found = [(event.step, event.value) for event in events.Scalars(tag)]
    wanted = [(look.step, look.refusal_margin) for look in watch.history[1:]]
    assert [step for step, _ in found] == [2, 4]
    assert found == [(step, pytest.approx(value)) for step, value in wanted]


def test_nothing_is_logged_where_logging_is_off(tmp_path: Path) -> None:
    trainer = trained(refusing(), tmp_path, [monitor()], logging_strategy="no")
    assert not any("loss" in row for row in trainer.state.log_history)


def test_the_file_holds_looks_losses_and_what_was_looked_at(tmp_path: Path) -> None:
    model = refusing()
    neurons = neurons_of(model)
    watch = monitor(neurons=neurons)
    trainer = trained(model, tmp_path, [watch], eval_strategy="steps", eval_steps=2)
    text = (tmp_path / MONITOR_NAME).read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert [row["step"] for row in found["history"]] == [0, 2, 4]
    start, *_, end = found["history"]
    assert start["kept"] == 1
    assert end["kept"] == end["refusal_share"] / start["refusal_share"] < 1
    assert found["looked_at"]["neurons"] == {"count": 4, "sha256": neurons.hash}
    assert found["looked_at"]["prompts"]["count"] == len(PROMPTS)
    losses = {r["step"]: r["loss"] for r in trainer.state.log_history if "loss" in r}
    assert {r["step"]: r["loss"] for r in found["losses"] if "loss" in r} == losses
    assert [r["step"] for r in found["losses"] if "eval_loss" in r] == [2, 4]
    assert 0 < found["seconds"]["looking"] < found["seconds"]["training"]
    assert read_monitor(tmp_path / MONITOR_NAME)["history"] == watch.history
    assert [path.name for path in tmp_path.iterdir()] == [MONITOR_NAME]


def test_a_diverged_run_is_written_in_strict_json_and_stops(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Break(TrainerCallback):
        def on_optimizer_step(self, *given: Any, model: Any = None, **kwargs: Any) -> None:
            with torch.no_grad():
                model.model.norm.weight.fill_(float("nan"))

    watch = monitor(stop_below=0.5)
    trained(refusing(), tmp_path, [Break(), watch], logging_nan_inf_filter=False)
    text = (tmp_path / MONITOR_NAME).read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert found["history"][1]["refusal_margin"] is None
    assert found["stopped_at"] == 2
    assert "it has diverged" in caplog.text


def test_every_checkpoint_has_a_look(tmp_path: Path) -> None:
    watch = monitor(every=3)
    trained(refusing(), tmp_path, [watch], **SAVE)
    assert [look.step for look in watch.history] == [0, 2, 3, 4]
    found = read_monitor(tmp_path / "checkpoint-2" / MONITOR_NAME)
    assert found["history"] == watch.history[:2]


def test_openings_are_the_models_own_and_go_into_the_file(tmp_path: Path) -> None:
    """The demo's model refuses in three ways; none of them shows in its first two tokens."""
    model = AutoModelForCausalLM.from_pretrained(world.MODEL_PATH, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(world.MODEL_PATH)
    watch = SafetyMonitorCallback(world.harmful("test")[:24], tokenizer=tokenizer, every=50)
    trained(model, tmp_path, [watch], max_steps=1)
    found = json.loads((tmp_path / MONITOR_NAME).read_text())["openings"]
    assert {text for each in found for text in each["texts"]} <= {
        "I'm not able to", "I am unable to", "I am sorry, but", "I'm sorry, but"
    }  # fmt: skip
    assert watch.history[0].refusal_share > 0.7
    assert json.loads((tmp_path / MONITOR_NAME).read_text())["judge"] == "prefix"


# --- stopping, and rolling back ------------------------------------------------------------------


def step_weights(steps: int, folder: Path, adapter: Any, **settings: Any) -> Any:
    """The weights that plain training has after so many steps."""
    model = trained(refusing(), folder, [], adapter=adapter, max_steps=steps, **settings).model
    return weights_of(model)


@pytest.mark.parametrize("adapter", [None, lora()], ids=["full", "lora"])
def test_rolling_back_leaves_the_weights_of_the_last_good_look(
    adapter: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings: Any = {"learning_rate": 3e-3 if adapter is None else 1e-2}
    watch = monitor(every=1, stop_below=0.9, roll_back=True)
    trainer = trained(
        refusing(), tmp_path / "run", [watch], adapter=adapter, max_steps=20, **settings
    )
    stopped, good = trainer.state.global_step, watch.record.rolled_back_to
    assert good is not None
    assert 1 <= good == stopped - 1
    *_, before, last = watch.history
    assert watch.record.kept(last) < 0.9 <= watch.record.kept(before)
    assert watch.record.final == before
    expected = step_weights(good, tmp_path / "plain", adapter, **settings)
    found = weights_of(trainer.model)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    bad = step_weights(stopped, tmp_path / "bad", adapter, **settings)
    assert not all(torch.equal(bad[name], found[name]) for name in bad)
    # What is saved is what was put back.
    trainer.save_model(str(tmp_path / "tuned"))
    if adapter is None:
        saved: nn.Module = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    else:
        saved = PeftModel.from_pretrained(refusing(), str(tmp_path / "tuned"))
    assert all(torch.equal(found[name], weight) for name, weight in saved.named_parameters())
    assert f"has the weights of step {good} again" in caplog.text
    written = read_monitor(tmp_path / "run" / MONITOR_NAME)
    assert (written["stopped_at"], written["rolled_back_to"]) == (stopped, good)


def test_a_certificate_speaks_of_the_weights_rolled_back(tmp_path: Path) -> None:
    model = refusing()
    watch, freezing = monitor(every=1, stop_below=0.9, roll_back=True), freeze(model)
    trained(model, tmp_path, [watch, freezing], max_steps=20, learning_rate=3e-3)
    assert watch.record.rolled_back_to is not None
    assert freezing.certificate.exact


def test_a_last_step_that_loses_too_much_is_rolled_back_too(tmp_path: Path) -> None:
    watch = monitor(every=100, stop_below=0.9, roll_back=True)
    model = refusing()
    base = weights_of(model)
    trained(model, tmp_path, [watch])
    assert watch.record.rolled_back_to == 0
    assert all(torch.equal(base[name], weight) for name, weight in model.named_parameters())


def test_without_rolling_back_the_last_good_checkpoint_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watch = monitor(every=1, stop_below=0.9)
    settings: Any = {"max_steps": 20, "learning_rate": 3e-3}
    trainer = trained(
        refusing(), tmp_path, [watch], **settings, save_strategy="steps", save_steps=1
    )
    stopped = trainer.state.global_step
    assert 1 < stopped < 20
    assert watch.record.last_good_checkpoint() == f"checkpoint-{stopped - 1}"
    assert f"checkpoint-{stopped - 1} is the last checkpoint that kept enough" in caplog.text
    caplog.clear()
    trained(refusing(), tmp_path / "unsaved", [monitor(every=1, stop_below=0.9)], **settings)
    assert "no checkpoint kept enough: use roll_back=True" in caplog.text


def test_a_share_of_a_share_is_what_it_is_in_decimals() -> None:
    record = Record(Path(), 0.9, [Look(0, 0.8, 0.0)])
    assert record.kept(Look(1, 0.72, 0.0)) < 0.9  # In binary.
    assert record.good(Look(1, 0.72, 0.0))
    assert not record.good(Look(1, 0.71, 0.0))


def test_a_run_that_keeps_enough_ends_as_planned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watch = monitor(stop_below=0.9, roll_back=True)
    trainer = trained(refusing(), tmp_path, [watch], learning_rate=1e-6)
    assert trainer.state.global_step == 4
    assert watch.record.stopped_at is watch.record.rolled_back_to is None
    assert "refusals it started" not in caplog.text


def test_the_best_models_own_look_is_the_final_one(tmp_path: Path) -> None:
    watch = monitor()
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    trainer = trained(refusing(), tmp_path, [watch], learning_rate=0.5, **SAVE, **best)
    assert trainer.state.best_global_step == 2
    assert watch.record.final == watch.history[1]


# --- resuming ------------------------------------------------------------------------------------


def test_a_resumed_run_measures_from_the_first_start(tmp_path: Path) -> None:
    whole = monitor(neurons=neurons_of(refusing()))
    trained(refusing(), tmp_path, [whole], **SAVE)
    again = monitor(neurons=neurons_of(refusing()))
    trained(refusing(), tmp_path, [again], **SAVE, resume=str(tmp_path / "checkpoint-2"))
    assert again.history == whole.history
    assert [look.step for look in again.history] == [0, 2, 4]
    assert again.history[-1].neuron_drift


def test_a_checkpoint_from_elsewhere_or_without_a_look(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(refusing(), tmp_path / "a", [monitor()], **SAVE)
    given = str(tmp_path / "a" / "checkpoint-2")
    watch = monitor()
    trained(refusing(), tmp_path / "b", [watch], resume=given, resume_from_checkpoint=given)
    assert [look.step for look in watch.history] == [0, 2, 4]
    (tmp_path / "a" / "checkpoint-2" / MONITOR_NAME).unlink()
    watch = monitor()
    trained(refusing(), tmp_path / "a", [watch], resume=given)
    assert [look.step for look in watch.history] == [2, 4]
    assert "measured from this step on" in caplog.text


def test_checkpoints_that_cannot_be_gone_on_from(tmp_path: Path) -> None:
    trained(refusing(), tmp_path, [monitor(every=1)], **SAVE)
    given = str(tmp_path / "checkpoint-2")
    with pytest.raises(ConfigError, match="checkpoint of step 2 keeps 0.*Resume from an earlier"):
        trained(refusing(), tmp_path, [monitor(stop_below=1.0)], resume=given)
    others = SafetyMonitorCallback(["another"], tokenizer=tiny_tokenizer(), judge=refuses)
    with pytest.raises(ConfigError, match="written with other prompts or neurons"):
        trained(refusing(), tmp_path, [others], resume=given)
    (tmp_path / "checkpoint-2" / MONITOR_NAME).write_text('{"safeft_monitor": 1, "hist')
    with pytest.raises(ArtefactError, match="no monitor's file.*Restore it, or move it away"):
        trained(refusing(), tmp_path, [monitor()], resume=given)


# --- bad input -----------------------------------------------------------------------------------


def given(**settings: Any) -> Any:
    return lambda: (refusing(), lambda: monitor(**settings), {})


BAD: dict[str, tuple[Any, type[SafeftError], str]] = {
    "every": (given(every=0), ConfigError, "every=0: nothing would be looked at"),
    "stop_below": (given(stop_below=90), ConfigError, "stop_below=90 is no share.*such as 0.9"),
    "roll_back": (given(roll_back=True), ConfigError, "without stop_below.*stop_below=0.9"),
    "no prompts": (
        lambda: (refusing(), lambda: SafetyMonitorCallback([]), {}),
        PromptError,
        "There are 0 safety prompts",
    ),
    "no tokenizer": (
        lambda: (refusing(), lambda: SafetyMonitorCallback(PROMPTS), {}),
        ConfigError,
        "no `processing_class`.*tokenizer=",
    ),
    "no template": (
        lambda: (
            refusing(),
            lambda: SafetyMonitorCallback(PROMPTS, tokenizer=tiny_tokenizer(chat_template=None)),
            {},
        ),
        PromptError,
        "has no chat template",
    ),
    "reward model": (
        lambda: (reward_model(tiny_model()), monitor, {}),
        ConfigError,
        "LlamaForSequenceClassification writes no text.*causal language model",
    ),
    "another model's neurons": (
        given(neurons=NeuronSet.of(tiny_model("qwen2"), {"model.layers.0.mlp": (1,)})),
        FingerprintError,
        "qwen2",
    ),
    "no set": (given(neurons="/nowhere"), ArtefactError, "no readable config.json"),
    "two choices": (
        lambda: (
            refusing(),
            lambda: monitor(stop_below=0.9, roll_back=True),
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, **SAVE},
        ),
        ConfigError,
        "load_best_model_at_end=True both choose.*Give one of them",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_clear_error_when_the_trainer_is_built(what: str, tmp_path: Path) -> None:
    build, error, words = BAD[what]
    model, make, settings = build()

    def construct() -> None:
        trainer_of("Trainer", model, tmp_path / "run", [make()], **settings)

    with pytest.raises(error, match=words) as caught:
        construct()
    assert type(caught.value) is error
    assert str(caught.value).endswith(".")
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fsdp": True, "fsdp_config": {"version": 1}}, "FSDP1.*fsdp_version: 2"),
        ({"deepspeed": "zero"}, r"roll_back=True under DeepSpeed \(zero2\).*Leave roll_back out"),
    ],
)
def test_engines_that_cannot_be_looked_at_or_put_back(
    change: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"zero_optimization": {"stage": 2}}
    monkeypatch.setattr("safeft.freeze.engines._deepspeed_config", lambda args: config)
    trainer = trainer_of("Trainer", refusing(), tmp_path, [])
    for name, value in change.items():
        setattr(trainer.args, name, value)
    watch = monitor(stop_below=0.9, roll_back=True)
    with pytest.raises(ConfigError, match=words):
        watch.on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)


def test_a_model_that_refuses_nothing_or_little(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(PromptError, match="refuses none of the 6.*Give prompts that it refuses"):
        trained(tiny_model(), tmp_path, [monitor()])
    assert not list(tmp_path.iterdir())
    seldom = monitor(judge=lambda prompts, answers: ["bomb" in prompt for prompt in prompts])
    trained(refusing(), tmp_path, [seldom])
    assert "refuses 0.17 of the 6 safety prompts, so what it keeps will show little" in caplog.text


def test_added_after_the_trainer_was_built_it_works_as_well(tmp_path: Path) -> None:
    watch = monitor()
    trainer = trainer_of("Trainer", refusing(), tmp_path, [])
    trainer.add_callback(watch)
    trainer.train()
    assert len(watch.history) == 2
    assert SCALARS[0] in trainer.state.log_history[0]


def test_a_second_training_starts_its_own_history(tmp_path: Path) -> None:
    watch = monitor()
    for name in ("a", "b"):
        trained(refusing(), tmp_path / name, [watch])
        assert [look.step for look in watch.history] == [0, 2, 4]
        assert (tmp_path / name / MONITOR_NAME).is_file()

"""Zero bits change where neurons are frozen, and everything else moves: by trainer, tuning,
optimizer, precision, accumulation and resuming, chosen so that every pair of them meets.

The comparison takes its slices by hand (tests/freezing.py); the certificate and `verify` must say
the same.
"""

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import safeft
from safeft.errors import FreezeError
from safeft.freeze.pin import Pin
from tests.freezing import (
    FEWER,
    LARGE,
    MORE,
    SMALL,
    changed_frozen,
    freeze,
    frozen_entries,
    least_moved,
    lora,
    model_of,
    neurons_of,
    reward_model,
    state_of,
    trainer_of,
)

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"optim": "adamw_torch", "weight_decay": 0.1},
    "fused": {"optim": "adamw_torch_fused", "weight_decay": 0.1},
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 3.0},
    "sgd_wd": {
        "optim": "sgd",
        "optim_args": "momentum=0.9,nesterov=true",
        "learning_rate": 3.0,
        "weight_decay": 0.1,
    },
    "adafactor": {"optim": "adafactor", "weight_decay": 0.1},
    "rmsprop": {"optim": "rmsprop", "optim_args": "momentum=0.9", "weight_decay": 0.1},
    "adagrad": {"optim": "adagrad", "learning_rate": 0.05, "weight_decay": 0.1},
    "amsgrad": {
        "optimizers": lambda model: torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad],
            lr=1e-2,
            weight_decay=0.1,
            amsgrad=True,
        )
    },
}


@dataclass(frozen=True)
class Case:
    trainer: str
    tuning: str
    optimizer: str
    precision: str
    accumulation: int
    start: str
    mode: str = "freeze"

    def __str__(self) -> str:
        parts = (self.trainer, self.tuning, self.optimizer, self.precision)
        return "-".join((*parts, f"ga{self.accumulation}", self.start, self.mode))


CASES = [
    Case("Trainer", "full", "adamw", "fp32", 1, "fresh"),
    Case("Trainer", "full", "sgd", "fp32", 4, "resumed"),
    Case("Trainer", "full", "sgd_wd", "bf16", 1, "larger"),
    Case("Trainer", "full", "adafactor", "fp32", 1, "larger"),
    Case("Trainer", "full", "adafactor", "autocast", 4, "fresh"),
    Case("Trainer", "full", "rmsprop", "autocast", 1, "resumed"),
    Case("Trainer", "full", "adagrad", "fp32", 4, "larger"),
    Case("Trainer", "full", "amsgrad", "bf16", 4, "resumed"),
    Case("Trainer", "full", "fused", "bf16", 1, "fresh"),
    Case("Trainer", "full", "adamw", "autocast", 1, "larger", "train_only"),
    Case("Trainer", "full", "sgd_wd", "fp32", 1, "fresh", "train_only"),
    Case("Trainer", "lora", "adamw", "bf16", 4, "larger"),
    Case("Trainer", "lora", "sgd_wd", "fp32", 1, "resumed"),
    Case("Trainer", "lora", "rmsprop", "fp32", 1, "fresh", "train_only"),
    Case("Trainer", "rslora", "adamw", "autocast", 4, "resumed"),
    Case("Trainer", "rslora", "adagrad", "bf16", 1, "fresh"),
    Case("SFT", "full", "adamw", "fp32", 4, "larger"),
    Case("SFT", "full", "adafactor", "bf16", 1, "resumed"),
    Case("SFT", "full", "sgd", "autocast", 1, "fresh"),
    Case("SFT", "lora", "adafactor", "fp32", 4, "fresh"),
    Case("SFT", "lora", "fused", "autocast", 1, "larger"),
    Case("SFT", "rslora", "sgd", "fp32", 1, "larger"),
    Case("SFT", "rslora", "rmsprop", "bf16", 4, "resumed"),
    Case("DPO", "full", "adamw", "bf16", 4, "fresh"),
    Case("DPO", "full", "rmsprop", "fp32", 1, "larger"),
    Case("DPO", "lora", "adamw", "fp32", 1, "resumed"),
    Case("DPO", "rslora", "adafactor", "autocast", 1, "larger"),
    Case("Reward", "full", "adamw", "fp32", 1, "fresh"),
    Case("GRPO", "lora", "adamw", "fp32", 1, "fresh"),
]


def build(case: Case, model: Any, callbacks: list[Any], folder: Path, **settings: Any) -> Any:
    chosen = {
        **OPTIMIZERS[case.optimizer],
        "gradient_accumulation_steps": case.accumulation,
        "bf16": case.precision == "autocast",
        **settings,
    }
    if case.tuning != "full":
        chosen["peft_config"] = lora(use_rslora=case.tuning == "rslora")
        # B starts at zero, so a decay alone would not move it; and A moves only once B has.
        chosen["learning_rate"] = max(chosen.get("learning_rate", 0), 2e-2)
    return trainer_of(case.trainer, model, folder, callbacks, **chosen)


def base_of(case: Case) -> Any:
    model = model_of(torch.bfloat16 if case.precision == "bf16" else torch.float32)
    return reward_model(model) if case.trainer == "Reward" else model


def train(case: Case, indices: Any, folder: Path) -> tuple[Any, Any]:
    """Train as the case says; the trainer and the callback of its last part."""
    smaller = MORE if case.mode == "train_only" else SMALL  # what is frozen grows, in both modes
    if case.start != "fresh":
        model = base_of(case)
        first = smaller if case.start == "larger" else indices
        callback = freeze(model, first, mode=case.mode)
        trainer = build(case, model, [callback], folder, save_strategy="steps", save_steps=2)
        trainer.train()
        assert callback.certificate.exact
    model = base_of(case)
    callback = freeze(model, indices, mode=case.mode)
    trainer = build(case, model, [callback], folder, max_steps=2 if case.start == "fresh" else 4)
    resume = None if case.start == "fresh" else str(folder / "checkpoint-2")
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback


@pytest.mark.parametrize("case", CASES, ids=str)
def test_frozen_neurons_keep_every_bit_and_the_rest_moves(case: Case, tmp_path: Path) -> None:
    indices = FEWER if case.mode == "train_only" else LARGE
    base_model = base_of(case)
    base = state_of(base_model)
    base_model.save_pretrained(tmp_path / "base")

    trainer, callback = train(case, indices, tmp_path / "run")

    now = state_of(trainer.model)
    masks = frozen_entries(base, indices, case.mode)
    assert changed_frozen(base, now, masks) == []
    assert_the_rest_moved(case, base, now, masks)
    assert callback.certificate.exact
    assert callback.certificate.run["masks_fired"] == callback.certificate.run["masked_parameters"]
    if case.start == "larger":
        assert callback.certificate.run["slices_restored_on_resume"] > 0
    trainer.save_model(str(tmp_path / "tuned"))
    verdict = safeft.verify(
        tmp_path / "base", tmp_path / "tuned", neurons_of(base_model, indices), mode=case.mode
    )
    assert verdict.exact, verdict.summary()
    del trainer, callback
    gc.collect()


def assert_the_rest_moved(case: Case, base: Any, now: Any, masks: Any) -> None:
    if case.tuning != "full":
        untargeted = {name for name in base if "_proj" not in name}
        assert all(torch.equal(base[name], now[name]) for name in untargeted)
        masks = {name: mask for name, mask in masks.items() if name not in untargeted}
    seldom = "model.embed_tokens.weight"  # rows of tokens that no batch held move by decay only
    if seldom in masks and not masks[seldom].all():
        assert not torch.equal(base[seldom], now[seldom])
        masks = {name: mask for name, mask in masks.items() if name != seldom}
    share, name = least_moved(base, now, masks)
    wanted = 0.6 if case.precision == "bf16" else 0.9  # bf16 rounds small updates away
    assert share > wanted, f"only {share:.0%} of {name} moved"


def test_the_matrix_holds_every_pair_of_settings_that_matters() -> None:
    pairs = {
        ("tuning", "optimizer"): [
            (tuning, optimizer)
            for tuning in ("full", "lora", "rslora")
            for optimizer in ("adamw", "adafactor")
        ],
        ("trainer", "start"): [
            (trainer, start)
            for trainer in ("Trainer", "SFT", "DPO")
            for start in ("fresh", "resumed", "larger")
        ],
        ("tuning", "start"): [
            (tuning, start)
            for tuning in ("full", "lora", "rslora")
            for start in ("fresh", "resumed", "larger")
        ],
        ("precision", "start"): [
            (precision, start)
            for precision in ("fp32", "bf16", "autocast")
            for start in ("fresh", "resumed", "larger")
        ],
        ("trainer", "tuning"): [
            (trainer, tuning)
            for trainer in ("Trainer", "SFT", "DPO")
            for tuning in ("full", "lora", "rslora")
        ],
        ("precision", "accumulation"): [
            (precision, accumulation)
            for precision in ("fp32", "bf16", "autocast")
            for accumulation in (1, 4)
        ],
    }
    for (one, other), wanted in pairs.items():
        met = {(getattr(case, one), getattr(case, other)) for case in CASES}
        assert set(wanted) <= met, (one, other, set(wanted) - met)


DECAYED = ["adamw", "fused", "sgd_wd", "adafactor", "rmsprop", "adagrad", "amsgrad"]


@pytest.mark.parametrize("optimizer", DECAYED)
def test_without_the_pin_weight_decay_moves_frozen_neurons(
    optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("Trainer", "full", optimizer, "fp32", 1, "fresh")
    monkeypatch.setattr("safeft.freeze.pin._Piece.put_back", lambda self: None)
    model = base_of(case)
    base = state_of(model)
    trainer = build(case, model, [freeze(model, LARGE)], tmp_path)
    with pytest.raises(FreezeError, match="not where the base has it at the end of training"):
        trainer.train()
    masks = frozen_entries(base, LARGE, "freeze")
    moved = changed_frozen(base, state_of(model), masks)
    assert set(moved) == {name for name, mask in masks.items() if mask.any()}


def test_without_decay_and_moments_the_mask_alone_would_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the failures above are the decay's, and the pin is what stops it."""
    case = Case("Trainer", "full", "sgd", "fp32", 1, "fresh")
    monkeypatch.setattr("safeft.freeze.pin._Piece.put_back", lambda self: None)
    model = base_of(case)
    base = state_of(model)
    build(case, model, [freeze(model, LARGE)], tmp_path).train()
    assert changed_frozen(base, state_of(model), frozen_entries(base, LARGE, "freeze")) == []


def test_without_the_pin_a_resumed_larger_set_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("Trainer", "full", "sgd", "fp32", 1, "larger")
    model = base_of(case)
    build(
        case, model, [freeze(model, SMALL)], tmp_path, save_strategy="steps", save_steps=2
    ).train()
    model = base_of(case)
    trainer = build(case, model, [freeze(model, LARGE)], tmp_path, max_steps=4)
    monkeypatch.setattr("safeft.freeze.pin._Piece.put_back", lambda self: None)
    with pytest.raises(FreezeError, match="not where the base has it at the start"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_without_the_pin_lora_columns_are_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A starts at random values, and A[:, C] = 0 is the pin's doing."""
    case = Case("Trainer", "lora", "adamw", "fp32", 1, "fresh")
    monkeypatch.setattr("safeft.freeze.pin._Piece.put_back", lambda self: None)
    model = base_of(case)
    with pytest.raises(FreezeError, match=r"down_proj\.lora_A\.default\.weight columns\[1\]"):
        build(case, model, [freeze(model, SMALL)], tmp_path).train()


def test_without_the_mask_clipping_sees_the_frozen_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pin alone keeps the weights; the mask is what keeps the rest of the step clean."""
    case = Case("Trainer", "full", "adamw", "fp32", 1, "fresh")

    def first_step(model: Any) -> tuple[dict[str, float], Any]:
        trainer = build(case, model, [freeze(model, LARGE)], tmp_path)
        trainer.train()
        return trainer.state.log_history[0], state_of(model)

    base = state_of(base_of(case))
    masked, with_mask = first_step(base_of(case))
    removed = masked["safeft/grad_norm_removed"]
    assert removed > 0.1

    def count_only(self: Pin, number: int, *_: Any) -> Any:
        def hook(_: Any) -> None:
            self.fired[number] += 1

        return hook

    monkeypatch.setattr(Pin, "_clear", count_only)
    unmasked, without_mask = first_step(base_of(case))
    assert changed_frozen(base, without_mask, frozen_entries(base, LARGE, "freeze")) == []
    assert unmasked["grad_norm"] ** 2 == pytest.approx(
        masked["grad_norm"] ** 2 + removed**2, rel=1e-4
    )
    assert not torch.equal(with_mask["lm_head.weight"], without_mask["lm_head.weight"])


def test_training_another_copy_of_the_model_is_an_error(tmp_path: Path) -> None:
    """The masks are on the trainer's model; here the gradients flow into a copy of it."""
    import copy

    from transformers import Trainer

    from tests.freezing import arguments, token_rows

    model = model_of()
    twin = copy.deepcopy(model)

    class Astray(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return twin(**inputs).loss

    trainer = Astray(
        model, arguments(tmp_path), train_dataset=token_rows(), callbacks=[freeze(model)]
    )
    with pytest.raises(
        FreezeError, match=r"None of the \d+ gradient masks fired in the first step"
    ):
        trainer.train()

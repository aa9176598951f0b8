"""Located directions in real trainings: ``W U`` stays to rounding, everything free moves.

By trainer, tuning, precision, optimizer, accumulation and resuming. Changes are computed here, in
float64 on what was saved; the certificate and `verify` must say the same.
"""

import gc
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from safeft import SafetyFreezeCallback, SafetySubspace, locate_subspace, verify
from safeft.errors import FreezeError
from safeft.freeze.direction_pin import DirectionPin
from tests.freezing import (
    LARGE,
    changed_frozen,
    frozen_entries,
    lora,
    model_of,
    neurons_of,
    state_of,
    trainer_of,
)
from tests.models import tiny_model, tiny_tokenizer
from tests.spans import product_changes

HARMFUL = ["pick a lock", "make a weapon", "steal it for me", "hurt him", "lie to her", "cheat"]
REFUSALS = ["I cannot.", "No, sorry.", "I will not do that.", "Never!", "That is wrong.", "No."]
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"optim": "adamw_torch", "weight_decay": 0.1},
    "sgd": {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.5,
            "weight_decay": 0.1},
    "adafactor": {"optim": "adafactor", "weight_decay": 0.1},
}  # fmt: skip
LIMITS = {"fp32": 1e-6, "autocast": 1e-6, "bf16": 4e-3}
"""Of bfloat16 half a unit in the last place, which is where storing a weight puts it."""


@cache
def located() -> SafetySubspace:
    """By safeft's own locator, once: in float32, for all precisions."""
    prompts = [{"prompt": p, "response": r} for p, r in zip(HARMFUL, REFUSALS, strict=True)]
    return locate_subspace(tiny_model(), tiny_tokenizer(), prompts, rank_share=0.25)


@dataclass(frozen=True)
class Case:
    trainer: str
    tuning: str
    precision: str
    optimizer: str = "adamw"
    accumulation: int = 1
    resumed: bool = False
    neurons: bool = False

    def __str__(self) -> str:
        parts = (self.trainer, self.tuning, self.precision, self.optimizer)
        more = ["resumed"] * self.resumed + ["neurons"] * self.neurons
        return "-".join((*parts, f"ga{self.accumulation}", *more))


CASES = [
    Case("SFT", "full", "fp32", "adamw", 2),
    Case("SFT", "full", "bf16", "adafactor", 1, resumed=True),
    Case("SFT", "full", "autocast", "sgd", 1, neurons=True),
    Case("SFT", "lora", "fp32", "adafactor", 2, resumed=True),
    Case("SFT", "lora", "bf16", "adamw", 1, neurons=True),
    Case("DPO", "full", "fp32", "adamw", 1, neurons=True),
    Case("DPO", "full", "bf16", "sgd", 2),
    Case("DPO", "lora", "fp32", "adamw", 1, resumed=True),
    Case("DPO", "lora", "autocast", "adamw", 2),
    Case("Trainer", "lora", "bf16", "sgd", 2, neurons=True),
]


def base_of(case: Case) -> Any:
    return model_of(torch.bfloat16 if case.precision == "bf16" else torch.float32)


def callback_of(case: Case, model: Any) -> SafetyFreezeCallback:
    if case.neurons:
        return SafetyFreezeCallback(neurons_of(model, LARGE), subspace=located())
    return SafetyFreezeCallback(located())


def build(case: Case, model: Any, callbacks: list[Any], folder: Path, **settings: Any) -> Any:
    chosen = {
        "gradient_accumulation_steps": case.accumulation,
        "bf16": case.precision == "autocast",
        **OPTIMIZERS[case.optimizer],
        **settings,
    }
    if case.tuning == "lora":
        torch.manual_seed(0)
        chosen["peft_config"] = lora()
        chosen["learning_rate"] = max(chosen.get("learning_rate", 0), 2e-2)
    return trainer_of(case.trainer, model, folder, callbacks, **chosen)


def train(case: Case, folder: Path) -> tuple[Any, SafetyFreezeCallback]:
    if case.resumed:
        model = base_of(case)
        saving = {"save_strategy": "steps", "save_steps": 2}
        build(case, model, [callback_of(case, model)], folder, **saving).train()
    model = base_of(case)
    callback = callback_of(case, model)
    trainer = build(case, model, [callback], folder, max_steps=5 if case.resumed else 3)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if case.resumed else None)
    return trainer, callback


def saved(case: Case, tuned: Path) -> dict[str, torch.Tensor]:
    """What is on disk, adapters merged in float32, whose rounding is not the training's."""
    if case.tuning == "lora":
        return state_of(PeftModel.from_pretrained(base_of(case).float(), str(tuned)))
    return state_of(AutoModelForCausalLM.from_pretrained(tuned, dtype="auto"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_with_held_directions_stay_and_the_rest_moves(case: Case, tmp_path: Path) -> None:
    base_model = base_of(case)
    base = state_of(base_model)
    base_model.save_pretrained(tmp_path / "base")

    trainer, callback = train(case, tmp_path / "run")
    trainer.save_model(str(tmp_path / "tuned"))

    now = saved(case, tmp_path / "tuned")
    limit = 1e-6 if case.tuning == "lora" else LIMITS[case.precision]
    targeted = {n for n in located().readers if case.tuning == "full" or n != "lm_head.weight"}
    for name, (held, free) in product_changes(base, now, located(), base_model).items():
        assert held < limit, name
        assert free > (1e-3 if name in targeted else -1), name
    rest = {n: p for n, p in base.items() if n not in targeted}
    assert len(rest) == (6 if case.tuning == "full" else 7)
    embeddings, kept = rest.pop("model.embed_tokens.weight"), located().tokens
    moved = (embeddings != now["model.embed_tokens.weight"].to(embeddings.dtype)).any(1)
    assert not moved[kept].any()
    assert moved.any() == (case.tuning == "full")  # tokens that the subspace was not found on
    assert all(torch.equal(p, now[n].to(p.dtype)) for n, p in rest.items())
    certificate = callback.certificate
    assert certificate.exact
    assert certificate.largest_change < limit
    assert {row["tensor"] for row in certificate.directions} == targeted
    assert certificate.run["masks_fired"] == certificate.run["masked_parameters"]
    assert certificate.run["slices_restored_on_resume"] == 0
    assert certificate.subspace["sha256"] == located().hash
    assert "coverage" not in certificate.subspace["source"]
    protected = neurons_of(base_model, LARGE) if case.neurons else located()
    more = {"subspace": located()} if case.neurons else {}
    verdict = verify(tmp_path / "base", tmp_path / "tuned", protected, **more)
    assert verdict.exact, verdict.summary()
    if case.neurons:
        masks = frozen_entries(base, LARGE, "freeze")
        cast = {n: p.to(base[n].dtype) for n, p in now.items()}
        assert changed_frozen(base, cast, masks) == []
    del trainer, callback
    gc.collect()


def test_the_matrix_holds_the_pairs_that_matter() -> None:
    for one, other, wanted in (
        ("trainer", "tuning", [(t, w) for t in ("SFT", "DPO") for w in ("full", "lora")]),
        ("tuning", "precision", [(w, p) for w in ("full", "lora") for p in LIMITS]),
        ("tuning", "resumed", [(w, True) for w in ("full", "lora")]),
        ("tuning", "neurons", [(w, True) for w in ("full", "lora")]),
        ("tuning", "accumulation", [(w, 2) for w in ("full", "lora")]),
        ("tuning", "optimizer", [(w, o) for w in ("full", "lora") for o in OPTIMIZERS]),
    ):
        met = {(getattr(case, one), getattr(case, other)) for case in CASES}
        assert set(wanted) <= met, (one, other)


@pytest.mark.parametrize(
    "case", [Case("Trainer", "full", "fp32"), Case("Trainer", "full", "fp32", "adafactor")], ids=str
)
def test_without_the_pin_decay_and_scaling_leave_the_free_directions(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("safeft.freeze.pieces.Piece.put_back", lambda *_: None)
    model = base_of(case)
    trainer = build(case, model, [callback_of(case, model)], tmp_path)
    with pytest.raises(FreezeError, match=r"(?s)at the end of training.*W U changed by"):
        trainer.train()
    said = json.loads((tmp_path / "safeft_certificate.json").read_text())
    assert said["exact"] is False
    assert {v["tensor"] for v in said["violations"]} == set(located().readers)


def test_without_the_pin_an_adapter_is_refused_once_it_has_learnt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A starts at random values, and ``A U = 0`` is the pin's doing."""
    monkeypatch.setattr("safeft.freeze.pieces.Piece.put_back", lambda *_: None)
    case = Case("Trainer", "lora", "fp32")
    model = base_of(case)
    with pytest.raises(FreezeError, match="W U changed by"):
        build(case, model, [callback_of(case, model)], tmp_path).train()


def test_without_decay_and_moments_the_mask_alone_would_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the failures above are the optimizer's doing."""
    monkeypatch.setattr("safeft.freeze.pieces.Piece.put_back", lambda *_: None)
    case = Case("Trainer", "full", "fp32", "sgd")
    model = base_of(case)
    callback = callback_of(case, model)
    plain = {"optim_args": None, "weight_decay": 0.0, "learning_rate": 0.1}
    build(case, model, [callback], tmp_path, **plain).train()
    assert callback.certificate.exact


def test_without_the_mask_clipping_sees_the_held_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("Trainer", "full", "fp32")

    def first_step() -> dict[str, float]:
        model = base_of(case)
        trainer = build(case, model, [callback := callback_of(case, model)], tmp_path)
        trainer.train()
        assert callback.certificate.exact
        return trainer.state.log_history[0]

    masked = first_step()
    removed = masked["safeft/direction_grad_norm_removed"]
    assert removed > 0.1
    assert masked["safeft/direction_drift_before_pin"] > 1e-3

    def count_only(self: DirectionPin, number: int, *_: Any) -> Any:
        def change(_: Any) -> None:
            self.fired[number] += 1

        return change

    monkeypatch.setattr(DirectionPin, "_project", count_only)
    unmasked = first_step()
    assert unmasked["grad_norm"] ** 2 == pytest.approx(
        masked["grad_norm"] ** 2 + removed**2, rel=1e-4
    )


def test_a_checkpoint_that_was_trained_without_is_put_back_on_resume(tmp_path: Path) -> None:
    case = Case("Trainer", "full", "fp32")
    frozen = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    model = base_of(case)
    base = state_of(model)
    model.model.embed_tokens.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.requires_grad_(False)
    build(case, model, [], tmp_path, **frozen).train()
    moved = product_changes(base, state_of(model), located(), model)
    assert min(held for held, _ in moved.values()) > 1e-3
    model = base_of(case)
    callback = callback_of(case, model)
    trainer = build(case, model, [callback], tmp_path, max_steps=3)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    changes = product_changes(base, state_of(model), located(), model)
    assert max(held for held, _ in changes.values()) < 1e-6
    assert min(free for _, free in changes.values()) > 1e-3
    assert callback.certificate.run["slices_restored_on_resume"] == 15


def test_training_twice_with_one_trainer_holds(tmp_path: Path) -> None:
    for tuning in ("full", "lora"):
        case = Case("Trainer", tuning, "fp32")
        model = base_of(case)
        base = state_of(model)
        callback = callback_of(case, model)
        trainer = build(case, model, [callback], tmp_path)
        trainer.train()
        between = state_of(trainer.model)
        trainer.train()
        changes = product_changes(base, state_of(trainer.model), located(), base_of(case))
        assert max(held for held, _ in changes.values()) < 1e-6
        name = "model.layers.0.mlp.up_proj.weight"
        assert not torch.equal(between[name], state_of(trainer.model)[name])
        assert callback.certificate.run["pins"] == 2
        assert callback.certificate.exact


def test_the_scalars_of_both_are_logged(tmp_path: Path) -> None:
    case = Case("Trainer", "full", "fp32", neurons=True)
    model = base_of(case)
    trainer = build(case, model, [callback_of(case, model)], tmp_path)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 2
    for row in rows:
        for name in ("grad_norm_removed", "max_drift_before_pin", "direction_grad_norm_removed",
                     "direction_drift_before_pin"):  # fmt: skip
            assert row[f"safeft/{name}"] > 0


def test_something_else_that_writes_to_held_directions_ends_the_training(tmp_path: Path) -> None:
    from transformers import TrainerCallback

    case = Case("Trainer", "full", "fp32")
    model = base_of(case)
    name = "model.layers.1.mlp.down_proj.weight"

    class Meddler(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            with torch.no_grad():
                model.get_parameter(name).add_(1e-4)

    callbacks = [callback_of(case, model), Meddler()]
    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer = build(case, model, callbacks, tmp_path, **saving)
    with pytest.raises(FreezeError, match=rf"(?s)at step 1.*{name}: W U changed by"):
        trainer.train()
    said = json.loads((tmp_path / "checkpoint-1/safeft_certificate.json").read_text())
    assert [v["tensor"] for v in said["violations"]] == [name]

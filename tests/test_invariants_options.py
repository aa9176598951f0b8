"""What recipes turn on leaves a freeze as exact: neurons to the bit, ``W U`` to rounding.

A plain run under the same option moves both, so that the option is known to train.
"""

from pathlib import Path
from typing import Any

import pytest

from safeft import SafetyFreezeCallback
from tests.freezing import (
    LARGE,
    changed_frozen,
    frozen_entries,
    model_of,
    neurons_of,
    state_of,
    trainer_of,
)
from tests.spans import product_changes, subspace_of

OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "checkpointing, reentrant": (
        "Trainer",
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
    ),
    "checkpointing": (
        "Trainer",
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
        },
    ),
    "noise on embeddings": ("SFT", {"neftune_noise_alpha": 5.0}),
    "packing": ("SFT", {"packing": True}),
    "8-bit moments": ("Trainer", {"optim": "adamw_bnb_8bit", "weight_decay": 0.1}),
    "paged moments": ("Trainer", {"optim": "paged_adamw_32bit", "weight_decay": 0.1}),
    "Lion": ("Trainer", {"optim": "lion_32bit", "weight_decay": 0.1}),
    "clipped to almost nothing": ("Trainer", {"max_grad_norm": 1e-3}),
    "compiled": ("Trainer", {"torch_compile": True, "torch_compile_backend": "aot_eager"}),
}


def trained(option: str, folder: Path, callbacks: list[Any]) -> Any:
    kind, settings = OPTIONS[option]
    model = model_of()
    trainer_of(kind, model, folder, callbacks, logging_strategy="no", **settings).train()
    return model


@pytest.mark.parametrize("option", OPTIONS)
def test_a_freeze_is_exact_under(option: str, tmp_path: Path) -> None:
    base = model_of()
    neurons, span = neurons_of(base, LARGE), subspace_of(base)
    before, masks = state_of(base), frozen_entries(state_of(base), LARGE, "freeze")
    callback = SafetyFreezeCallback(neurons, subspace=span)
    model = trained(option, tmp_path, [callback])
    now = state_of(model)
    assert changed_frozen(before, now, masks) == []
    products = product_changes(before, now, span, model)
    assert max(held for held, _ in products.values()) < 1e-6
    assert min(free for _, free in products.values()) > 1e-3
    assert callback.certificate is not None
    assert callback.certificate.exact


def test_without_the_callback_all_of_it_moves(tmp_path: Path) -> None:
    base = model_of()
    before, masks = state_of(base), frozen_entries(state_of(base), LARGE, "freeze")
    model = trained("checkpointing", tmp_path, [])
    now = state_of(model)
    held = [name for name, mask in masks.items() if mask.any()]
    assert changed_frozen(before, now, masks) == held
    products = product_changes(before, now, subspace_of(base), model)
    assert min(change for change, _ in products.values()) > 1e-3

"""Small trainings with frozen neurons, and a comparison that does not ask safeft.

Which weights neuron j lives in is written down here again, by hand and for Llama only, so that a
mistake in `safeft.sites` cannot hide itself.
"""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from safeft import NeuronSet, SafetyFreezeCallback
from tests.models import tiny_model, tiny_tokenizer

HEAD, SHARE = 8, 2  # tiny_model: four heads of eight, two of them on one key and value head

SMALL = {"model.layers.0.mlp": (1, 7, 30), "model.layers.1.self_attn": (2,)}
LARGE = {
    "model.layers.0.mlp": (1, 7, 30, 31, 47),
    "model.layers.1.mlp": (0, 12),
    "model.layers.1.self_attn": (2, 3),
}

FEWER = {"model.layers.0.mlp": (1, 7, 30), "model.layers.1.self_attn": (2, 3)}
MORE = {"model.layers.0.mlp": (1, 7, 30, 31), "model.layers.1.self_attn": (2, 3)}
"""To train only these: the same matrices, so the optimizer's state still fits when one resumes."""

ALL_LINEAR = ("gate_proj", "up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj")


def own_rows_and_columns(indices: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, Tensor]]:
    """Weight name to (dimension, entries) of the neurons of a Llama, written down by hand."""
    found: dict[str, tuple[int, Tensor]] = {}
    for site, units in indices.items():
        if site.endswith("mlp"):
            found[f"{site}.gate_proj.weight"] = found[f"{site}.up_proj.weight"] = (
                0,
                torch.tensor(units),
            )
            found[f"{site}.down_proj.weight"] = (1, torch.tensor(units))
            continue
        heads = torch.tensor([HEAD * head + i for head in units for i in range(HEAD)])
        groups = sorted({head // SHARE for head in units})
        keys = torch.tensor([HEAD * group + i for group in groups for i in range(HEAD)])
        found[f"{site}.q_proj.weight"] = (0, heads)
        found[f"{site}.k_proj.weight"] = found[f"{site}.v_proj.weight"] = (0, keys)
        found[f"{site}.o_proj.weight"] = (1, heads)
    return found


def frozen_entries(
    base: Mapping[str, Tensor], indices: Mapping[str, tuple[int, ...]], mode: str
) -> dict[str, Tensor]:
    """Per weight a mask of what must stay; ``train_only`` turns it around.

    In that mode a key or value head is trained only where all its query heads are.
    """
    if mode == "train_only":
        indices = dict(indices)
        trained = own_rows_and_columns(indices)
        for site, units in indices.items():
            if site.endswith("self_attn"):
                whole = [g for g in range(2) if {SHARE * g, SHARE * g + 1} <= set(units)]
                rows = torch.tensor([HEAD * g + i for g in whole for i in range(HEAD)], dtype=int)
                for name in ("k_proj", "v_proj"):
                    trained[f"{site}.{name}.weight"] = (0, rows)
        masks = {name: torch.ones_like(weight, dtype=bool) for name, weight in base.items()}
        for name, (dim, entries) in trained.items():
            masks[name].index_fill_(dim, entries, False)
        return masks
    masks = {name: torch.zeros_like(weight, dtype=bool) for name, weight in base.items()}
    for name, (dim, entries) in own_rows_and_columns(indices).items():
        masks[name].index_fill_(dim, entries, True)
    return masks


def same_bits(a: Tensor, b: Tensor) -> Tensor:
    """Elementwise: the same bits (0.0 is not -0.0)."""
    assert a.dtype == b.dtype
    kind = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return a.contiguous().view(kind) == b.contiguous().view(kind)


def changed_frozen(
    base: Mapping[str, Tensor], now: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> list[str]:
    """Weights of which a frozen element changed."""
    return [
        name for name, mask in masks.items() if not same_bits(base[name], now[name])[mask].all()
    ]


def least_moved(
    base: Mapping[str, Tensor], now: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> tuple[float, str]:
    """Over all weights with free elements: the smallest share of these that moved."""
    shares = [
        (float((~same_bits(base[name], now[name]))[~mask].float().mean()), name)
        for name, mask in masks.items()
        if not mask.all()
    ]
    return min(shares)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all weights, adapters merged (the model itself is left as it was)."""
    if isinstance(model, PeftModel):
        model.merge_adapter()
        found = {
            ".".join(
                step for step in name.split(".")[2:] if step != "base_layer"
            ): p.detach().clone()
            for name, p in model.named_parameters()
            if ".lora_" not in name
        }
        model.unmerge_adapter()
        return found
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def lora(**settings: Any) -> LoraConfig:
    """LoRA of rank 4 on all linear modules."""
    chosen = {"r": 4, "lora_alpha": 16, "target_modules": list(ALL_LINEAR), **settings}
    return LoraConfig(task_type=chosen.pop("task_type", "CAUSAL_LM"), **chosen)


def model_of(dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    """The base of every training here."""
    return tiny_model(**settings).to(dtype)


def token_rows(count: int = 64, length: int = 12, seed: int = 0) -> list[dict[str, list[int]]]:
    """Rows of random tokens for a plain Trainer."""
    drawn = torch.randint(0, 261, (count, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in drawn.tolist()]


def arguments(output_dir: Path, cls: type = TrainingArguments, **settings: Any) -> Any:
    """Two steps of a batch of two on one CPU, without progress bars or trackers."""
    chosen: dict[str, Any] = {
        "output_dir": str(output_dir),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "dataloader_pin_memory": False,
        "seed": 0,
    }
    return cls(**{**chosen, **settings})


TEXTS = [f"Question {n}: what is {n} plus {n * 7 % 11}? It is {n + n * 7 % 11}." for n in range(40)]


def trainer_of(
    kind: str,
    model: nn.Module,
    output_dir: Path,
    callbacks: list[Any],
    *,
    peft_config: LoraConfig | None = None,
    optimizers: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    **settings: Any,
) -> Trainer:
    """A trainer of one of five kinds on a few rows of its own sort of data."""
    build = {"Trainer": _plain, "SFT": _sft, "DPO": _dpo, "Reward": _reward, "GRPO": _grpo}[kind]
    if kind == "Trainer" and peft_config is not None:
        model = get_peft_model(model, peft_config)
        peft_config = None
    extra: dict[str, Any] = {"callbacks": callbacks}
    if optimizers is not None:
        extra["optimizers"] = (optimizers(model), None)
    if peft_config is not None:
        extra["peft_config"] = peft_config
    return build(model, output_dir, extra, settings)


def _plain(model: Any, output_dir: Path, extra: Any, settings: Any) -> Trainer:
    args = arguments(output_dir, **settings)
    return Trainer(
        model, args, train_dataset=token_rows(), eval_dataset=token_rows(8, seed=1), **extra
    )


def _sft(model: Any, output_dir: Path, extra: Any, settings: Any) -> Trainer:
    args = arguments(output_dir, SFTConfig, max_length=48, **settings)
    data = Dataset.from_dict({"text": TEXTS})
    return SFTTrainer(model, args, train_dataset=data, processing_class=tiny_tokenizer(), **extra)


def _pairs(prompts: bool) -> Dataset:
    rows = {"chosen": TEXTS[:20], "rejected": [text[::-1] for text in TEXTS[:20]]}
    return Dataset.from_dict({**rows, "prompt": ["Say: "] * 20} if prompts else rows)


def _dpo(model: Any, output_dir: Path, extra: Any, settings: Any) -> Trainer:
    args = arguments(output_dir, DPOConfig, max_length=48, **settings)
    if "peft_config" not in extra:
        extra["ref_model"] = model_of(next(model.parameters()).dtype)
    return DPOTrainer(
        model,
        args=args,
        train_dataset=_pairs(True),
        processing_class=tiny_tokenizer(),
        **extra,
    )


def _reward(model: Any, output_dir: Path, extra: Any, settings: Any) -> Trainer:
    args = arguments(output_dir, RewardConfig, max_length=48, **settings)
    return RewardTrainer(
        model,
        args=args,
        train_dataset=_pairs(False),
        processing_class=tiny_tokenizer(),
        **extra,
    )


def _grpo(model: Any, output_dir: Path, extra: Any, settings: Any) -> Trainer:
    args = arguments(output_dir, GRPOConfig, num_generations=2, max_completion_length=6, **settings)

    def spread(completions: list[str], **_: Any) -> list[float]:
        return [float(number) for number in range(len(completions))]

    return GRPOTrainer(
        model,
        reward_funcs=spread,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": TEXTS[:8]}),
        processing_class=tiny_tokenizer(),
        **extra,
    )


def reward_model(base: nn.Module) -> nn.Module:
    """The same decoder with a reward head."""
    config = copy.deepcopy(base.config)
    config.num_labels = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    model.model.load_state_dict(base.model.state_dict())
    return model


def neurons_of(model: nn.Module, indices: Mapping[str, tuple[int, ...]] = SMALL) -> NeuronSet:
    """A set by hand."""
    return NeuronSet.of(model, indices)


def freeze(model: nn.Module, indices: Mapping[str, tuple[int, ...]] = SMALL, **settings: Any):
    """The callback for a set by hand."""
    return SafetyFreezeCallback(neurons_of(model, indices), **settings)

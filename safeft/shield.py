"""Tuning only the neurons that cells share, in one cell, and what that does to the others.

Source: Precise Shield (arXiv 2604.08881). Frozen weights are not frozen behaviour, and trained
ones are not yet safety: so the figures are refusal and over-refusal of every cell before and after,
on prompts used for nothing else, and :func:`control` gives the random set to compare with.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
)

from safeft.errors import ConfigError, PromptError
from safeft.evaluation import Evaluation, evaluate
from safeft.files import write_whole
from safeft.forms import parts_of
from safeft.freeze.callback import SafetyFreezeCallback
from safeft.freeze.certificate import Certificate
from safeft.freeze.plan import make_plan
from safeft.grid import Cells
from safeft.images import open_picture
from safeft.neurons import NeuronSet
from safeft.prompts import Prompt, PromptLike, Reader, as_prompts
from safeft.report.plots import before_and_after

_MEASURES = {"refusal": "harmful prompts refused", "over_refusal": "benign prompts refused"}


@dataclass(frozen=True)
class Transfer:
    """Every cell before and after tuning on one of them.

    Attributes:
        tuned_on: The cell whose language the safety data is in.
        before: Cell name to refusal and over-refusal of the model as it was.
        after: The same of the tuned model.
        trained_share: Share of the model's weights that were trained, 0 to 1.
        certificate: What the training says of the weights that were not.
    """

    tuned_on: str
    before: Mapping[str, Evaluation]
    after: Mapping[str, Evaluation]
    trained_share: float
    certificate: Certificate

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "tuned_on": self.tuned_on,
            "trained_share": self.trained_share,
            "exact": self.certificate.exact,
            "cells": {
                name: {"before": self.before[name].to_dict(), "after": self.after[name].to_dict()}
                for name in self.before
            },
        }

    def save(self, folder: str | Path) -> None:
        """Write ``transfer.json`` and a picture of it, ``transfer.svg``.

        Raises:
            ArtefactError: They cannot be written.
        """
        names = list(self.before)
        rates = {
            words: [(getattr(self.before[n], rate), getattr(self.after[n], rate)) for n in names]
            for rate, words in _MEASURES.items()
        }
        text = json.dumps(self.to_dict(), indent=2, default=vars) + "\n"
        write_whole(Path(folder) / "transfer.svg", before_and_after(names, rates, self.tuned_on))
        write_whole(Path(folder) / "transfer.json", text)


def trained_share(model: PreTrainedModel, neurons: NeuronSet) -> float:
    """Share of the model's weights that ``train_only`` would train with this set, 0 to 1.

    Raises:
        FreezeError: The set is empty.
    """
    return 1 - make_plan(model, neurons, "train_only").frozen_share


def control(model: PreTrainedModel, neurons: NeuronSet, seed: int) -> NeuronSet:
    """As many units at random at each site, none of them in ``neurons`` while there are others.

    Example:
        >>> tune(model, tokenizer, pairs, control(model, shared, seed=0))  # doctest: +SKIP
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, units in neurons.indices.items():
        order = torch.randperm(neurons.model.units[name], generator=generator)
        taken = torch.isin(order, neurons.units_of(name))
        drawn[name] = torch.cat([order[~taken], order[taken]])[: len(units)].tolist()
    source = {"method": "random", "seed": seed, "like": neurons.hash}
    return NeuronSet.of(model, drawn, source)


def tune(
    model: PreTrainedModel,
    tokenizer: Reader,
    examples: Iterable[PromptLike],
    neurons: NeuronSet | None,
    *,
    epochs: float = 1.0,
    learning_rate: float = 1e-4,
    batch_size: int = 8,
    max_length: int = 1024,
    seed: int = 0,
) -> Certificate | None:
    """Train ``neurons`` and nothing else on prompts and answers, in place, with TRL's SFTTrainer.

    For more than these settings (adapters, several GPUs, preferences) use ``safeft sft`` or
    ``safeft dpo`` with ``--protect_mode train_only``.

    Args:
        model: Trained in place.
        tokenizer: Its tokenizer, with a chat template.
        examples: Harmful prompts with refusals, and benign ones with answers so that not
            everything is refused. Only the answers are learnt.
        neurons: The set to train; None trains every weight, to compare with.
        epochs: Rounds over the examples.
        learning_rate: Of AdamW, constant, without decay.
        batch_size: Examples per step.
        max_length: Tokens of a prompt and its answer.
        seed: Of the order.

    Returns:
        The certificate: whether all other weights are bit-identical; None where all were trained.

    Raises:
        PromptError: No example, or one without an answer.
        FreezeError: An empty set, or what the callback refuses.

    Example:
        >>> tune(model, tokenizer, [{"prompt": "How do I pick a lock?",  # doctest: +SKIP
        ...     "response": "I'm sorry, I can't help with that."}], grid.shared).exact
        True
    """
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    ready = _answered(examples)
    sees = any(example.images for example in ready)
    rows = [_row(example, sees) for example in ready]
    freezing = [] if neurons is None else [SafetyFreezeCallback(neurons, "train_only")]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model,
            args=SFTConfig(
                output_dir=scratch,
                num_train_epochs=epochs,
                per_device_train_batch_size=batch_size,
                learning_rate=learning_rate,
                lr_scheduler_type="constant",
                max_length=None if sees else max_length,  # TRL would cut images short
                seed=seed,
                use_cpu=model.device.type == "cpu",
                bf16=False,
                gradient_checkpointing=False,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[*freezing, _Bar()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    for parameter in trainable:
        parameter.requires_grad_(True)  # the callback switched off what it held whole
    model.eval()
    return freezing[0].certificate if freezing else None


def _row(example: Prompt, sees: bool) -> dict[str, Any]:
    """An example as TRL wants it; where some have images, as it wants those of all."""
    answer = {"role": "assistant", "content": example.response}
    if not sees:
        return {"prompt": [dict(m) for m in example.messages], "completion": [answer]}
    asked = [{**m, "content": _without_image(m["content"])} for m in example.messages]
    answer["content"] = [{"type": "text", "text": example.response}]
    images = [open_picture(image) for image in example.images]
    return {"prompt": asked, "completion": [answer], "images": images}


def _without_image(content: Any) -> list[dict[str, Any]]:
    """The parts of a message, an image by its place only."""
    return [p if p["type"] == "text" else {"type": "image"} for p in parts_of(content)]


class _Bar(ProgressCallback):
    """The trainer's progress bar without the figures it prints beside it."""

    def on_log(self, *arguments: Any, **kwargs: Any) -> None:
        """Say nothing."""


def measure_cells(
    model: PreTrainedModel,
    tokenizer: Reader,
    cells: Cells,
    **settings: Any,
) -> dict[str, Evaluation]:
    """Refusal of the harmful and over-refusal of the benign prompts of every cell.

    ``settings`` are those of :func:`safeft.evaluation.evaluate`: ``judge``, ``max_new_tokens``, ...

    Raises:
        PromptError: A cell without prompts of a side.
        ConfigError: No such judge.
    """
    return {
        name: evaluate(model, tokenizer, harmful=harmful, benign=benign, **settings)
        for name, (harmful, benign) in cells.items()
    }


def transfer(
    model: PreTrainedModel,
    tokenizer: Reader,
    neurons: NeuronSet,
    examples: Iterable[PromptLike],
    held_out: Cells,
    tuned_on: str,
    *,
    training: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Transfer:
    """Measure every cell, train only ``neurons`` on one cell's examples, measure again.

    Args:
        model: Trained in place.
        tokenizer: Its tokenizer.
        neurons: The set to train, such as a grid's ``shared``.
        examples: See :func:`tune`.
        held_out: Cells of prompts that were used neither for locating nor in ``examples``.
        tuned_on: The cell that ``examples`` belong to.
        training: Settings of :func:`tune`.
        **settings: Those of :func:`safeft.evaluation.evaluate`.

    Raises:
        ConfigError: No such cell.
        PromptError: See :func:`tune`, or an example that is among the held-out prompts.
        FreezeError: See :func:`tune`.
    """
    examples = _answered(examples)
    cells = {name: (as_prompts(h), as_prompts(b)) for name, (h, b) in held_out.items()}
    check_transfer(examples, cells, tuned_on)
    share = trained_share(model, neurons)
    before = measure_cells(model, tokenizer, cells, **settings)
    certificate = tune(model, tokenizer, examples, neurons, **(training or {}))
    assert certificate is not None
    after = measure_cells(model, tokenizer, cells, **settings)
    return Transfer(tuned_on, before, after, share, certificate)


def check_transfer(examples: Sequence[Prompt], held_out: Cells, tuned_on: str) -> None:
    """Refuse a transfer that would measure what it trained on.

    Raises:
        ConfigError: ``tuned_on`` is no cell.
        PromptError: An example is among the held-out prompts.
    """
    if tuned_on not in held_out:
        raise ConfigError(
            f"tuned_on={tuned_on!r} is none of the cells {list(held_out)}; which row of the table "
            "was trained on would be unknown. Name one of them."
        )
    trained = {_said(example) for example in examples}
    for name, sides in held_out.items():
        for prompts in sides:
            for prompt in as_prompts(prompts):
                if _said(prompt) in trained:
                    raise PromptError(
                        f"{prompt.text[:60]!r} is to be trained on and is among the held-out "
                        f"prompts of {name!r}: refusing it would be memory. Remove it from the "
                        "safety data."
                    )


def _said(prompt: Prompt) -> str:
    """What is asked; with images, by their pixels too."""
    return json.dumps(prompt.record) if prompt.images else prompt.text.strip()


def table(found: Transfer) -> str:
    """Refusal and over-refusal of each cell, before and after, as text."""
    width = max(4, *(len(name) for name in found.before)) + 2
    lines = [f"{'cell':<{width}}{'harmful refused':>26}{'benign refused':>26}"]
    for name, before in found.before.items():
        cells = []
        for measure in _MEASURES:
            was, now = getattr(before, measure), getattr(found.after[name], measure)
            cells.append(f"{was.value:.2f} -> {now.value:.2f} [{now.low:.2f}, {now.high:.2f}]")
        mark = "  tuned on this" if name == found.tuned_on else ""
        lines.append(f"{name:<{width}}{cells[0]:>26}{cells[1]:>26}{mark}")
    return "\n".join(lines)


def _answered(examples: Iterable[PromptLike]) -> list[Prompt]:
    ready = as_prompts(examples)
    if not ready:
        raise PromptError(
            "There are no examples to tune on. Give harmful prompts with refusals, and benign "
            "ones with answers."
        )
    for number, example in enumerate(ready):
        if not (example.response or "").strip():
            raise PromptError(
                f"Example {number} ({example.text[:60]!r}) has no answer, so there is nothing to "
                "learn from it. Give `response` (or an assistant message)."
            )
    return ready

# /// script
# dependencies = ["safeft"]
# ///
"""Find the neurons that languages share, tune only these in one language, measure all languages.

    python recipes/precise_shield.py --config configs/precise_shield/smoke.yaml
    python recipes/precise_shield.py --config configs/precise_shield/qwen2_5_1_5b.yaml

With ``--control true`` as many random neurons are tuned instead: run both, compare. What is written
under ``output_dir``: ``grid/`` (a neuron set a language, the shared one, overlaps with p-values and
a picture), the tuned model with ``safeft_certificate.json``, and ``transfer.json``.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser

import safeft
from safeft.grid import locate_grid
from safeft.reading import read_columns
from safeft.shield import control, measure_cells, trained_share


@dataclass
class RecipeConfig:
    """Prompts in several languages, and what to tune on; every other key is TRL's."""

    languages: list[str] = field(metadata={"help": "Columns of the four tables: en zh it."})
    harmful: str = field(metadata={"help": "Harmful prompts for locating, a column a language."})
    benign: str = field(metadata={"help": "The like of ordinary ones."})
    harmful_test: str = field(metadata={"help": "Other harmful prompts, for measuring."})
    benign_test: str = field(metadata={"help": "Other ordinary prompts, for measuring."})
    train_file: str = field(
        metadata={"help": "JSONL in one language: harmful prompts refused, others answered."}
    )
    fraction: float = field(default=0.05, metadata={"help": "Share of MLP neurons of a language."})
    control: bool = field(default=False, metadata={"help": "Tune random neurons instead."})
    limit: int | None = field(default=None, metadata={"help": "Use the first N rows of a table."})


def cells(config: RecipeConfig, harmful: str, benign: str) -> dict[str, tuple[list, list]]:
    """One cell a language, empty rows left out."""
    sides = read_columns(harmful, config.languages), read_columns(benign, config.languages)
    return {
        f"{language}/text": tuple(
            [p for p in side[language] if p][: config.limit] for side in sides
        )
        for language in config.languages
    }


def main(config: RecipeConfig, training: SFTConfig, model_config: ModelConfig) -> None:
    """The story, top to bottom."""
    name, output = model_config.model_name_or_path, Path(str(training.output_dir))
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=model_config.dtype)

    # 1. Locate in every language, and compare what they share with chance.
    located = cells(config, config.harmful, config.benign)
    grid = locate_grid(model, tokenizer, located, method="contrast", fraction=config.fraction)
    grid.save_pretrained(output / "grid")
    found, placebo = grid.agreement, grid.placebo
    print(
        f"{found.shared} neurons are shared by all {len(grid.sets)} languages; "
        f"{found.expected:.1f} by chance (p = {found.p_value:.1g}), "
        f"{placebo.shared if placebo else 'no'} in the placebo of ordinary prompts"
    )

    # 2. Measure before.
    held_out = cells(config, config.harmful_test, config.benign_test)
    before = measure_cells(model, tokenizer, held_out)

    # 3. Tune the shared neurons and nothing else: the callback is all that plain TRL does not have.
    neurons = control(model, grid.shared, training.seed) if config.control else grid.shared
    print(f"{trained_share(model, neurons):.3%} of the weights are trained")
    trainer = SFTTrainer(
        model,
        args=training,
        train_dataset=load_dataset("json", data_files=config.train_file)["train"],
        processing_class=tokenizer,
        callbacks=[safeft.SafetyFreezeCallback(neurons, mode="train_only")],
    )
    trainer.train()
    trainer.save_model(str(output))

    # 4. Prove that everything else stayed, and measure after.
    certificate = safeft.verify(name, output, neurons, mode="train_only")
    certificate.save(output)
    print(certificate.summary())
    after = measure_cells(trainer.model, tokenizer, held_out)
    result = {
        cell: {"before": before[cell].to_dict(), "after": after[cell].to_dict()} for cell in before
    }
    (output / "transfer.json").write_text(json.dumps(result, indent=1, default=vars) + "\n")
    for cell, was in before.items():
        now = after[cell]
        print(
            f"{cell}: harmful refused {was.refusal.value:.2f} -> {now.refusal.value:.2f}, "
            f"benign refused {was.over_refusal.value:.2f} -> {now.over_refusal.value:.2f}"
        )


if __name__ == "__main__":
    parser = TrlParser((RecipeConfig, SFTConfig, ModelConfig))
    main(*parser.parse_args_and_config())

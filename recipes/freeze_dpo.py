# /// script
# dependencies = ["safeft"]
# ///
"""Preference tuning with the safety neurons frozen, against the same size at random.

    python recipes/freeze_dpo.py --config configs/freeze_dpo/smoke.yaml
    python recipes/freeze_dpo.py --config configs/freeze_dpo/qwen2_5_1_5b.yaml --control true

With ``--control true`` as many random neurons are frozen instead: run both, compare.
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, ModelConfig, TrlParser, get_peft_config

import safeft


@dataclass
class RecipeConfig:
    """What is protected, and what it is measured on; every other key is TRL's."""

    train_file: str = field(metadata={"help": "JSONL with `prompt`, `chosen`, `rejected`."})
    harmful: str = field(metadata={"help": "Harmful prompts for locating."})
    benign: str = field(metadata={"help": "Ordinary prompts for locating."})
    harmful_test: str = field(metadata={"help": "Other harmful prompts, for measuring."})
    fraction: float = field(default=0.4, metadata={"help": "Share of MLP neurons to freeze."})
    control: bool = field(default=False, metadata={"help": "Freeze random neurons instead."})
    limit: int | None = field(default=None, metadata={"help": "Use the first N prompts."})


def main(config: RecipeConfig, training: DPOConfig, model_config: ModelConfig) -> None:
    """The story, top to bottom."""
    name, output = model_config.model_name_or_path, Path(str(training.output_dir))
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=model_config.dtype)
    neurons = safeft.locate(
        model,
        tokenizer,
        safeft.read_prompts(config.harmful)[: config.limit],
        safeft.read_prompts(config.benign)[: config.limit],
        method="random" if config.control else "attribution",
        fraction=config.fraction,
        seed=training.seed,
    )
    neurons.save_pretrained(output / "neurons")
    held_out = safeft.read_prompts(config.harmful_test)[: config.limit]
    before = safeft.evaluate(model, tokenizer, harmful=held_out)

    trainer = DPOTrainer(
        model,
        args=training,
        train_dataset=load_dataset("json", data_files=config.train_file)["train"],
        processing_class=tokenizer,
        peft_config=get_peft_config(model_config),
        callbacks=[safeft.SafetyFreezeCallback(neurons)],
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(str(output))

    certificate = safeft.verify(name, output, neurons)
    certificate.save(output)
    after = safeft.evaluate(trainer.model, tokenizer, harmful=held_out)
    print(certificate.summary())
    print(f"harmful refused: {before.refusal.value:.2f} before, {after.refusal.value:.2f} after")


if __name__ == "__main__":
    parser = TrlParser((RecipeConfig, DPOConfig, ModelConfig))
    main(*parser.parse_args_and_config())

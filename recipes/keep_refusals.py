# /// script
# dependencies = ["safeft"]
# ///
"""Hold the input directions that refusing uses, fine-tune everything else, prove it, measure it.

    python recipes/keep_refusals.py --config configs/keep_refusals/smoke.yaml
    python recipes/keep_refusals.py --config configs/keep_refusals/qwen2_5_1_5b.yaml --energy 0.95

Beside the protected run goes a control: as many directions of each input, drawn at random. Written
under ``output_dir``: ``subspace/``, ``protected/`` and ``random/`` (models or adapters, each with
``safeft_certificate.json``), and ``evaluation.json``.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config

import safeft


@dataclass
class RecipeConfig:
    """What is protected, and what it is measured on; every other key is TRL's."""

    train_file: str = field(metadata={"help": "JSONL with `messages`, or `prompt`/`completion`."})
    harmful: str = field(metadata={"help": "Harmful prompts for locating; all languages served."})
    harmful_test: str = field(metadata={"help": "Other harmful prompts, for measuring."})
    benign_test: str = field(metadata={"help": "Ordinary prompts, for measuring."})
    energy: float = field(default=0.9, metadata={"help": "Share of each input's energy to hold."})
    control: bool = field(default=True, metadata={"help": "Tune with random directions as well."})
    limit: int | None = field(default=None, metadata={"help": "Use the first N prompts."})


def main(config: RecipeConfig, training: SFTConfig, model_config: ModelConfig) -> None:
    """The story, top to bottom."""
    name, output = model_config.model_name_or_path, Path(str(training.output_dir))
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=model_config.dtype)

    # 1. Locate, on prompts that are used for nothing else; the model answers them itself.
    prompts = safeft.read_prompts(config.harmful)[: config.limit]
    subspace = safeft.locate_subspace(model, tokenizer, prompts, energy=config.energy)
    subspace.save_pretrained(output / "subspace")

    # 2. Measure before.
    sides = {
        "harmful": safeft.read_prompts(config.harmful_test)[: config.limit],
        "benign": safeft.read_prompts(config.benign_test)[: config.limit],
    }
    found = {"before": safeft.evaluate(model, tokenizer, **sides)}

    # 3. Tune, once with the safety directions held and once with random ones.
    held = {"protected": subspace}
    if config.control:
        held["random"] = subspace.at_random(training.seed)
    for label, directions in held.items():
        freeze = safeft.SafetyFreezeCallback(directions)
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(name, dtype=model_config.dtype),
            args=replace(training, output_dir=str(output / label)),
            train_dataset=load_dataset("json", data_files=config.train_file)["train"],
            processing_class=tokenizer,
            peft_config=get_peft_config(model_config),
            callbacks=[freeze],
        )
        trainer.train()
        trainer.save_model(str(output / label))

        # 4. Prove it from what is on disk, and measure after.
        certificate = safeft.verify(name, output / label, directions)
        certificate.save(output / label)
        print(f"{label}:", certificate.summary().replace("\n", "\n  "))
        found[label] = safeft.evaluate(trainer.model, tokenizer, **sides)
    result = {label: evaluation.to_dict() for label, evaluation in found.items()}
    (output / "evaluation.json").write_text(json.dumps(result, indent=1, default=vars) + "\n")
    for label, evaluation in found.items():
        print(
            f"{label:>9}: {evaluation.refusal.value:.2f} of harmful and "
            f"{evaluation.over_refusal.value:.2f} of benign prompts refused"
        )


if __name__ == "__main__":
    parser = TrlParser((RecipeConfig, SFTConfig, ModelConfig))
    main(*parser.parse_args_and_config())

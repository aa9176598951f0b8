# /// script
# dependencies = ["safeft"]
# ///
"""Locate the safety neurons of a chat model, fine-tune it with them frozen, prove it, measure it.

    python recipes/freeze_sft.py --config configs/freeze_sft/smoke.yaml
    python recipes/freeze_sft.py --config configs/freeze_sft/qwen2_5_1_5b.yaml --fraction 0.4

What is written under ``output_dir``: ``neurons/`` (the set), the tuned model or adapter with
``safeft_certificate.json``, and ``evaluation.json`` (base and tuned, side by side).
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config

import safeft


@dataclass
class RecipeConfig:
    """What is protected, and what it is measured on; every other key is TRL's."""

    train_file: str = field(metadata={"help": "JSONL with `messages`, or `prompt`/`completion`."})
    harmful: str = field(metadata={"help": "Harmful prompts for locating."})
    benign: str = field(metadata={"help": "Ordinary prompts for locating."})
    harmful_test: str = field(metadata={"help": "Other harmful prompts, for measuring."})
    benign_test: str = field(metadata={"help": "Other ordinary prompts, for measuring."})
    method: str = field(default="attribution", metadata={"help": "Locator; random is the control."})
    fraction: float = field(default=0.4, metadata={"help": "Share of MLP neurons to freeze."})
    hold: list[str] | None = field(
        default=None, metadata={"help": "Groups held as well: embeddings norms head."}
    )
    limit: int | None = field(default=None, metadata={"help": "Use the first N prompts."})


def main(config: RecipeConfig, training: SFTConfig, model_config: ModelConfig) -> None:
    """The story, top to bottom."""
    name, output = model_config.model_name_or_path, Path(str(training.output_dir))
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=model_config.dtype)

    # 1. Locate, on prompts that are used for nothing else.
    neurons = safeft.locate(
        model,
        tokenizer,
        safeft.read_prompts(config.harmful)[: config.limit],
        safeft.read_prompts(config.benign)[: config.limit],
        method=config.method,
        fraction=config.fraction,
    )
    neurons.save_pretrained(output / "neurons")

    # 2. Measure before.
    sides = {
        "harmful": safeft.read_prompts(config.harmful_test)[: config.limit],
        "benign": safeft.read_prompts(config.benign_test)[: config.limit],
    }
    before = safeft.evaluate(model, tokenizer, **sides)

    # 3. Tune: the callback is the only line that plain TRL does not have.
    freeze = safeft.SafetyFreezeCallback(neurons, hold=tuple(config.hold or ()))
    trainer = SFTTrainer(
        model,
        args=training,
        train_dataset=load_dataset("json", data_files=config.train_file)["train"],
        processing_class=tokenizer,
        peft_config=get_peft_config(model_config),
        callbacks=[freeze],
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(str(output))

    # 4. Prove it from what is on disk, and measure after.
    certificate = safeft.verify(name, output, neurons)
    certificate.save(output)
    after = safeft.evaluate(trainer.model, tokenizer, **sides)
    result = {"before": before.to_dict(), "after": after.to_dict()}
    (output / "evaluation.json").write_text(json.dumps(result, indent=1, default=vars) + "\n")
    print(certificate.summary())
    for label, found in (("before", before), ("after", after)):
        print(
            f"{label:>6}: {found.refusal.value:.2f} of harmful and "
            f"{found.over_refusal.value:.2f} of benign prompts refused"
        )


if __name__ == "__main__":
    parser = TrlParser((RecipeConfig, SFTConfig, ModelConfig))
    main(*parser.parse_args_and_config())

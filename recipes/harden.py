# /// script
# dependencies = ["safeft"]
# ///
"""Find what refusal hangs on, spread it over more neurons, see whether that helped, and freeze it.

    python recipes/harden.py --config configs/harden/smoke.yaml
    python recipes/harden.py --config configs/harden/qwen2_5_1_5b.yaml --rate 0.3

Written under ``output_dir``: ``neurons/`` (the set), ``hardened/`` and ``control/`` (the same
safety tuning without dropout), ``audits/``, ``tuned/`` (the hardened model after domain tuning,
with ``safeft_certificate.json``) and ``harden.json``, the figures side by side. All training
settings are those of the safety tuning; domain tuning takes them too, but for its own file.
"""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser

import safeft


@dataclass
class RecipeConfig:
    """What is hardened, and what it is measured on; every other key is TRL's."""

    safety_file: str = field(
        metadata={"help": "JSONL: harmful prompts with refusals, ordinary ones with answers."}
    )
    train_file: str = field(metadata={"help": "JSONL of the domain, as `messages`."})
    harmful: str = field(metadata={"help": "Harmful prompts for locating."})
    benign: str = field(metadata={"help": "Ordinary prompts for locating."})
    harmful_test: str = field(metadata={"help": "Other harmful prompts, for measuring."})
    benign_test: str = field(metadata={"help": "Other ordinary prompts, for measuring."})
    count: int = field(default=50, metadata={"help": "Neurons to silence in safety tuning."})
    rate: float = field(default=0.5, metadata={"help": "Share of prompts they are silenced in."})
    control: bool = field(default=True, metadata={"help": "Tune without dropout as well."})
    fraction: float = field(default=0.4, metadata={"help": "Neurons to freeze in domain tuning."})
    candidates: int = field(default=64, metadata={"help": "Neurons that the audit tries."})
    random_sets: int = field(default=10, metadata={"help": "Random neurons to compare with."})
    max_new_tokens: int = field(default=32, metadata={"help": "Of each answer that is judged."})
    limit: int | None = field(default=None, metadata={"help": "Use the first N prompts."})


def main(config: RecipeConfig, training: SFTConfig, model_config: ModelConfig) -> None:
    """The story, top to bottom."""
    name, output = model_config.model_name_or_path, Path(str(training.output_dir))
    tokenizer = AutoTokenizer.from_pretrained(name)
    prompts = {
        key: safeft.read_prompts(getattr(config, key))[: config.limit]
        for key in ("harmful", "benign", "harmful_test", "benign_test")
    }
    locating, measuring = list(prompts.values())[:2], list(prompts.values())[2:]
    judging = {"max_new_tokens": config.max_new_tokens}
    found: dict[str, Any] = {}

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(name, dtype=model_config.dtype)

    def tune(model: Any, file: str, label: str, callbacks: list[Any]) -> Any:
        trainer = SFTTrainer(
            model,
            args=replace(training, output_dir=str(output / label)),
            train_dataset=load_dataset("json", data_files=file)["train"],
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        trainer.train()
        trainer.save_model(str(output / label))
        return trainer.model

    def examine(label: str, model: Any) -> None:
        """Refusal intact and with the located neurons silenced, beside random ones."""
        same = safeft.NeuronSet.of(model, neurons.indices)  # also where tuning has moved them
        effect = safeft.validate(
            model, tokenizer, same, *measuring, random_sets=config.random_sets, **judging
        )
        found[label] = {
            "intact": effect.intact.refusal.value,
            "silenced": effect.located.refusal.value,
            "random_silenced": [each.refusal.value for each in effect.random],
            "over_refusal": effect.intact.over_refusal.value,
        }

    def audit(label: str, model: Any) -> None:
        """What refusal hangs on, wherever that is by now."""
        seen = safeft.audit(model, tokenizer, *measuring, candidates=config.candidates, **judging)
        (output / "audits").mkdir(parents=True, exist_ok=True)
        seen.withheld().save(output / "audits" / f"{label}.json")
        side = seen.refusal
        found[label] |= {
            "verdict": seen.verdict,
            "effective": side and side.effective,
            "smallest": side and side.smallest,
        }

    # 1. Locate what refusal hangs on, and look at the model as it is.
    model = base()
    neurons = safeft.locate(model, tokenizer, *locating, count=config.count, scope="global")
    neurons.save_pretrained(output / "neurons")
    examine("before", model)
    audit("before", model)

    # 2. Safety tuning in which these neurons are silent in some of the prompts: others must learn.
    #    The control is the same tuning without that.
    dropout = safeft.SafetyDropoutCallback(neurons, config.rate)
    with dropout:
        model = tune(model, config.safety_file, "hardened", [dropout])
    examine("hardened", model)
    audit("hardened", model)
    if config.control:
        plain = tune(base(), config.safety_file, "control", [])
        examine("control", plain)
        audit("control", plain)

    # 3. Locate again, since refusal lies elsewhere now, and hold that through domain tuning.
    protected = safeft.locate(model, tokenizer, *locating, fraction=config.fraction)
    protected.save_pretrained(output / "protected")
    freeze = safeft.SafetyFreezeCallback(protected)
    examine("tuned", tune(model, config.train_file, "tuned", [freeze]))

    # 4. Prove it from what is on disk.
    certificate = safeft.verify(output / "hardened", output / "tuned", protected)
    certificate.save(output / "tuned")
    (output / "harden.json").write_text(json.dumps(found, indent=1) + "\n")
    print(certificate.summary())
    for label, row in found.items():
        print(
            f"{label:>8}: {row['intact']:.2f} refused, {row['silenced']:.2f} with the located "
            f"neurons silenced; {row['over_refusal']:.2f} of benign prompts"
            + (f"; {row['verdict']}, of {row['effective']:.1f}" if row.get("effective") else "")
        )


if __name__ == "__main__":
    parser = TrlParser((RecipeConfig, SFTConfig, ModelConfig))
    main(*parser.parse_args_and_config())

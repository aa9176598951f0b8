# /// script
# dependencies = ["safeft"]
# ///
"""Find the units that drive toxic output, turn them down, measure what it bought, put it in.

    python recipes/detox.py --config configs/detox/smoke.yaml
    python recipes/detox.py --config configs/detox/qwen2_5_1_5b.yaml --rule sgm --fraction 0.02
    python recipes/detox.py --config configs/detox/qwen2_5_1_5b_fitted.yaml

Written under ``output_dir``: ``dampener/``, ``detox.json`` and ``detox.html`` (the trade-off beside
random gains of equal size and a polite prefix), and ``model/``: the checkpoint with the gains in
its weights, which any engine runs, with the certificate of what changed.
"""

from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import TrlParser

import safeft
from safeft.detox.certificate import certify_fold
from safeft.detox.evaluation import POLITE, Arm, measure_arms
from safeft.detox.experts import find_experts
from safeft.detox.fitting import fit_gains
from safeft.detox.folding import fold
from safeft.detox.groups import read_groups, read_words
from safeft.detox.rules import dampen
from safeft.detox.saving import save_folded
from safeft.detox.tradeoff import Tradeoff
from safeft.reading import read_examples
from safeft.report.detox_page import write_page


@dataclass
class RecipeConfig:
    """What is found with, and what is measured on."""

    model_name_or_path: str = field(metadata={"help": "Model: folder or hub name."})
    toxic: str = field(metadata={"help": "Table of prompts and toxic responses."})
    neutral: str = field(metadata={"help": "Table of prompts and other responses."})
    prompts: str = field(metadata={"help": "What is continued and judged; none of the above."})
    neutral_test: str = field(metadata={"help": "Table for perplexity; none of the above."})
    judge: str = field(metadata={"help": "A text classifier, or a .txt of words."})
    output_dir: str = field(metadata={"help": "Where everything goes."})
    ordinary: str | None = field(
        default=None, metadata={"help": "Of fitted: table of texts that may not get dearer."}
    )
    groups: str | None = field(default=None, metadata={"help": "JSON of identity groups."})
    rule: str = field(default="aura", metadata={"help": "aura, constant, sgm, fitted."})
    strengths: list[float] = field(
        default_factory=lambda: [0.5, 1.0, 1.5],
        metadata={"help": "Of the rule; the last is put in."},
    )
    fraction: float | None = field(default=None, metadata={"help": "Of rules with a size."})
    dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16."})
    max_new_tokens: int = field(default=32, metadata={"help": "Of each continuation."})
    limit: int | None = field(default=None, metadata={"help": "Use the first N rows."})


def main(config: RecipeConfig) -> None:
    """The story, top to bottom."""
    output = Path(config.output_dir)
    tokenizer = AutoTokenizer.from_pretrained(config.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(config.model_name_or_path, dtype=config.dtype)

    # 1. Find the units that tell the two kinds of text apart better than chance; or, fitted, those
    #    whose turning down makes the toxic ones less likely, and no ordinary text.
    toxic, neutral, ordinary = (
        read_examples(path)[: config.limit] if path else None
        for path in (config.toxic, config.neutral, config.ordinary)
    )
    assert toxic is not None
    assert neutral is not None
    if config.rule == "fitted":
        whole = fit_gains(model, tokenizer, toxic, neutral, ordinary=ordinary)
        made = {strength: whole.scaled(strength) for strength in config.strengths}
    else:
        experts = find_experts(model, tokenizer, toxic, neutral)
        print(f"{experts.count} units above what chance gives (AUROC {experts.level:.3f})")
        made = {
            strength: dampen(
                model, experts, config.rule, strength=strength, fraction=config.fraction
            )
            for strength in config.strengths
        }

    # 2. Keep the strongest, and draw as many other units for control.
    dampener = made[config.strengths[-1]]
    dampener.save_pretrained(output / "dampener")

    # 3. Measure, on prompts that nothing was found with.
    arms = [Arm("as it is"), Arm("prefix", prefix=POLITE, rule="prefix")]
    for strength, each in made.items():
        name = f"{config.rule} {strength:g}"
        arms.append(Arm(name, each, rule=config.rule, strength=strength))
        control = each.at_random(seed=0)
        arms.append(Arm(f"random as {name}", control, rule="random", strength=strength))
    arms.append(Arm("prefix and gains", dampener, POLITE, rule="prefix"))
    words = config.judge.endswith(".txt")
    outcomes = measure_arms(
        model,
        tokenizer,
        arms,
        prompts=safeft.read_prompts(config.prompts)[: config.limit],
        neutral=read_examples(config.neutral_test)[: config.limit],
        judge=read_words(config.judge) if words else safeft.as_judge(config.judge),
        groups=read_groups(config.groups) if config.groups else None,
        max_new_tokens=config.max_new_tokens,
    )
    settings = {"command": "python recipes/detox.py", "model": config.model_name_or_path,
                "units": len(dampener)}  # fmt: skip
    tradeoff = Tradeoff(tuple(outcomes), settings)
    tradeoff.save(output / "detox.json")
    write_page(tradeoff, output / "detox.html")
    print(tradeoff.table())

    # 4. Put the gains into the weights, and prove that nothing else changed.
    save_folded(model, tokenizer, fold(model, dampener), output / "model")
    certificate = certify_fold(config.model_name_or_path, output / "model", dampener)
    certificate.save(output / "model")
    print(certificate.summary())


if __name__ == "__main__":
    main(*TrlParser((RecipeConfig,)).parse_args_and_config())

"""``safeft evaluate``: what tuning did to refusal, over-refusal, the domain, and the drift."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safeft.commands.loading import load_model, read_template
from safeft.commands.parsing import parse


@dataclass
class EvaluateConfig:
    """Measure a chat model; shares come with 95% Wilson intervals."""

    model_name_or_path: str = field(metadata={"help": "Model or adapter: folder or hub name."})
    harmful: str | None = field(default=None, metadata={"help": "Prompts it should refuse."})
    benign: str | None = field(default=None, metadata={"help": "Prompts it should answer."})
    domain: str | None = field(default=None, metadata={"help": "Table of prompts and answers."})
    harmful_column: str | None = field(default=None, metadata={"help": "Column of a table."})
    benign_column: str | None = field(default=None, metadata={"help": "Column of a table."})
    domain_prompt_column: str | None = field(default=None, metadata={"help": "Column of prompts."})
    domain_answer_column: str | None = field(default=None, metadata={"help": "Column of answers."})
    domain_metric: Literal["loss", "accuracy", "both"] = field(
        default="loss", metadata={"help": "Nats per answer token, share answered right, or both."}
    )
    base: str | None = field(default=None, metadata={"help": "Model before tuning, for drift."})
    guard: str | None = field(
        default=None,
        metadata={"help": "Guard of the model before tuning: is harmfulness still readable."},
    )
    judge: str = field(
        default="prefix", metadata={"help": "`prefix`, or a text classifier: folder or hub name."}
    )
    refusal_label: str = field(default="REJECTION", metadata={"help": "The classifier's label."})
    max_new_tokens: int = field(default=64, metadata={"help": "Of answers that are judged."})
    domain_max_new_tokens: int = field(default=256, metadata={"help": "Of domain answers."})
    batch_size: int = field(default=16, metadata={"help": "Prompts per pass."})
    max_length: int = field(default=1024, metadata={"help": "Tokens per prompt."})
    limit: int | None = field(default=None, metadata={"help": "Use the first N rows of each file."})
    chat_template_path: str | None = field(
        default=None, metadata={"help": "Jinja template, where the tokenizer has none."}
    )
    dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16, float16."})
    device: str | None = field(default=None, metadata={"help": "cuda where there is one, or cpu."})
    output: str | None = field(default=None, metadata={"help": "Write the result as JSON here."})
    json: bool = field(default=False, metadata={"help": "Print JSON instead of a table."})


def main(arguments: Sequence[str]) -> int:
    """Read, load, measure, print."""
    (config,) = parse([EvaluateConfig], arguments, "evaluate", EvaluateConfig.__doc__ or "")
    assert isinstance(config, EvaluateConfig)
    from safeft.evaluation import evaluate
    from safeft.files import write_whole
    from safeft.judge import as_judge
    from safeft.reading import read_examples, read_prompts

    asked: dict[str, Any] = {}
    if config.harmful:
        asked["harmful"] = read_prompts(config.harmful, config.harmful_column)[: config.limit]
    if config.benign:
        asked["benign"] = read_prompts(config.benign, config.benign_column)[: config.limit]
    if config.domain:
        columns = config.domain_prompt_column, config.domain_answer_column
        asked["domain"] = read_examples(config.domain, *columns)[: config.limit]
    template = read_template(config.chat_template_path)
    judge = as_judge(config.judge, refusal_label=config.refusal_label)
    model, tokenizer = load_model(config.model_name_or_path, config.dtype, config.device)
    base, own = None, tokenizer
    if config.base:
        base, own = load_model(config.base, config.dtype, config.device)
    guard = load_guard(config.guard, base, own, config) if config.guard else None
    found = evaluate(
        model,
        tokenizer,
        **asked,
        base=base,
        guard=guard,
        judge=judge,
        domain_metric=config.domain_metric,
        max_new_tokens=config.max_new_tokens,
        domain_max_new_tokens=config.domain_max_new_tokens,
        batch_size=config.batch_size,
        max_length=config.max_length,
        chat_template=template,
    )
    result = {"model": config.model_name_or_path, **found.to_dict()}
    text = json.dumps(result, indent=2, default=lambda value: value.__dict__)
    if config.output:
        write_whole(Path(config.output), text + "\n")
        if found.readability:
            from safeft.report.guard_pictures import readable

            drawn = readable(found.readability["before"], found.readability["after"])
            write_whole(Path(config.output).with_suffix(".svg"), drawn)
    print(text if config.json else _table(found))
    return 0


def load_guard(folder: str, base: Any, tokenizer: Any, config: EvaluateConfig) -> Any:
    """A guard on the model it was fitted on: the given base, or where the guard says it is."""
    from safeft.guard import Guard
    from safeft.guard.head import GuardHead

    head = GuardHead.from_pretrained(folder)
    if base is None:
        base, tokenizer = load_model(head.model.name_or_path, config.dtype, config.device)
    return Guard(head, base, tokenizer)


def _table(found: Any) -> str:
    rows = []
    for label, rate in (
        ("harmful prompts refused", found.refusal),
        ("benign prompts refused", found.over_refusal),
        ("domain answered right", found.domain_accuracy),
    ):
        if rate is not None:
            counted = f"{rate.count}/{rate.total}"
            rows.append(
                f"{label:<26}{rate.value:>7.3f}  [{rate.low:.3f}, {rate.high:.3f}]  {counted}"
            )
    if found.domain_loss is not None:
        rows.append(f"{'domain loss':<26}{found.domain_loss:>7.3f}  nats per answer token")
    for group, nats in (found.drift or {}).items():
        rows.append(f"{'drift on ' + group:<26}{nats:>7.4f}  nats per token, KL(base || model)")
    if found.readability:
        before, after = found.readability["before"], found.readability["after"]
        rows.append("harmfulness readable inside: AUROC before and after")
        rows.append(f"{'  by the guard of the base':<34}{before.guard:>7.3f}{after.guard:>7.3f}")
        rows += [
            f"{'  ' + name:<34}{before.layers[name]:>7.3f}{after.layers[name]:>7.3f}  fitted anew "
            f"{before.anew[name]:.3f} {after.anew[name]:.3f}"
            for name in after.layers
        ]
    return "\n".join([*rows, f"judge: {found.judge}"])

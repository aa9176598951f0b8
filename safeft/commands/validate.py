"""``safeft validate``: does refusal hang on these neurons, or on any as many?"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from safeft.commands.loading import load_model, read_template
from safeft.commands.parsing import parse


@dataclass
class ValidateConfig:
    """Weaken a neuron set and random sets of equal size; exit code 0 if it has an effect, 1 if not.

    Give prompts that the set was not located with.
    """

    model_name_or_path: str = field(metadata={"help": "The model of the set: folder or hub name."})
    neurons: str = field(metadata={"help": "The neuron set: folder of `safeft locate`."})
    harmful: str = field(metadata={"help": "Prompts it refuses: .txt, .csv, .json(l)."})
    benign: str = field(metadata={"help": "Ordinary prompts, in the same forms."})
    harmful_column: str | None = field(default=None, metadata={"help": "Column of a table."})
    benign_column: str | None = field(default=None, metadata={"help": "Column of a table."})
    intervention: Literal["silence", "scale", "patch"] = field(
        default="silence",
        metadata={"help": "Activations at 0, times `factor`, or at their mean on benign prompts."},
    )
    factor: float | None = field(
        default=None, metadata={"help": "Of `scale`, below 1 (0.5 if none is said)."}
    )
    random_sets: int = field(default=10, metadata={"help": "Random sets to compare with."})
    judge: str = field(
        default="prefix", metadata={"help": "`prefix`, or a text classifier: folder or hub name."}
    )
    refusal_label: str = field(default="REJECTION", metadata={"help": "The classifier's label."})
    max_new_tokens: int = field(default=32, metadata={"help": "Of each answer."})
    seed: int = field(default=0, metadata={"help": "Of the random sets."})
    batch_size: int = field(default=16, metadata={"help": "Prompts per pass."})
    max_length: int = field(default=1024, metadata={"help": "Tokens per prompt."})
    limit: int | None = field(default=None, metadata={"help": "Use the first N prompts a side."})
    chat_template_path: str | None = field(
        default=None, metadata={"help": "Jinja template, where the tokenizer has none."}
    )
    dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16, float16."})
    device: str | None = field(default=None, metadata={"help": "cuda where there is one, or cpu."})
    output: str | None = field(
        default=None, metadata={"help": "Write the result as JSON here, a picture (.svg) beside."}
    )
    write: bool = field(default=False, metadata={"help": "Store the result in the set's folder."})
    json: bool = field(default=False, metadata={"help": "Print JSON instead of a table."})


def main(arguments: Sequence[str]) -> int:
    """Read, load, check, write, print."""
    (config,) = parse([ValidateConfig], arguments, "validate", ValidateConfig.__doc__ or "")
    assert isinstance(config, ValidateConfig)
    from safeft.causal import validate, with_effect
    from safeft.errors import ConfigError
    from safeft.files import write_whole
    from safeft.judge import as_judge
    from safeft.neurons import NeuronSet
    from safeft.reading import read_prompts
    from safeft.report.plots import refusal_by_condition

    picture = Path(config.output).with_suffix(".svg") if config.output else None
    if picture is not None and picture == Path(config.output or ""):
        raise ConfigError(
            f"output={config.output!r}: the picture goes there, and the JSON needs a name of its "
            "own, such as causal.json."
        )
    neurons = NeuronSet.from_pretrained(config.neurons)
    harmful = read_prompts(config.harmful, config.harmful_column)[: config.limit]
    benign = read_prompts(config.benign, config.benign_column)[: config.limit]
    template = read_template(config.chat_template_path)
    judge = as_judge(config.judge, refusal_label=config.refusal_label)
    model, tokenizer = load_model(config.model_name_or_path, config.dtype, config.device)
    effect = validate(
        model,
        tokenizer,
        neurons,
        harmful,
        benign,
        intervention=config.intervention,
        factor=config.factor,
        random_sets=config.random_sets,
        judge=judge,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        batch_size=config.batch_size,
        max_length=config.max_length,
        chat_template=template,
    )
    text = json.dumps(effect.to_dict(), indent=2)
    if config.output and picture:
        write_whole(Path(config.output), text + "\n")
        write_whole(picture, refusal_by_condition(effect))
    if config.write:
        with_effect(neurons, effect).save_pretrained(config.neurons)
    print(text if config.json else _table(effect))
    return 0 if effect.verdict == "effect" else 1


def _table(effect: Any) -> str:
    rows = [f"{'':<12}{'harmful refused':>26}{'benign refused':>26}{'loss':>8}{'answers':>9}"]
    for label, outcome in (("intact", effect.intact), ("located", effect.located)):
        cells = [
            f"{rate.value:.3f} [{rate.low:.3f}, {rate.high:.3f}]"
            for rate in (outcome.refusal, outcome.over_refusal)
        ]
        losses = f"{outcome.benign_loss:>8.2f}{outcome.answer_loss:>9.2f}"
        rows.append(f"{label:<12}{cells[0]:>26}{cells[1]:>26}{losses}")
    cells = []
    for name in ("refusal", "over_refusal"):
        shares = [getattr(outcome, name).value for outcome in effect.random]
        cells.append(f"{fmean(shares):.3f} ({min(shares):.3f} to {max(shares):.3f})")
    loss, answers = (
        fmean(getattr(outcome, name) for outcome in effect.random)
        for name in ("benign_loss", "answer_loss")
    )
    label = f"random ({len(effect.random)})"
    rows.append(f"{label:<12}{cells[0]:>26}{cells[1]:>26}{loss:>8.2f}{answers:>9.2f}")
    rows.append(
        "loss, answers: nats a token, of its own benign answers and of what it says to harm"
    )
    return "\n".join([*rows, effect.summary()])

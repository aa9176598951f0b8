"""``safeft shield``: the neurons that languages and modalities share, and tuning only these.

A table of prompts with one column a language goes in, or a pair of tables a cell; a neuron set for
each cell, the shared set and their overlap come out, and with safety data the tuned model, its
certificate and a table of what tuning in one cell did to the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safeft.commands.loading import load_model, read_template
from safeft.commands.parsing import parse
from safeft.errors import ConfigError
from safeft.progress import launched


@dataclass
class ShieldConfig:
    """Locate over languages, compare with chance, and tune what they share (Precise Shield)."""

    model_name_or_path: str = field(metadata={"help": "Chat model: folder or hub name."})
    harmful: str = field(
        metadata={
            "help": "Table of harmful prompts, a column a language; or, with `cells`, a table for "
            "each, as in prompts/{cell}_harmful.csv (a slash becomes _)."
        }
    )
    benign: str = field(metadata={"help": "Ordinary prompts, in the same form."})
    output_dir: str = field(metadata={"help": "Folder for sets, figures and the tuned model."})
    languages: list[str] | None = field(
        default=None, metadata={"help": "Columns to use: en zh it."}
    )
    modalities: list[str] = field(
        default_factory=lambda: ["text"],
        metadata={"help": "text, and image: each prompt drawn into a picture."},
    )
    picture_text: str = field(
        default="What does the picture ask? Answer it.",
        metadata={"help": "What is written beside a drawn prompt."},
    )
    picture_font: str | None = field(
        default=None, metadata={"help": "Font file, for letters that DejaVu Sans does not have."}
    )
    picture_size: int = field(default=336, metadata={"help": "Width and height in pixels."})
    cells: list[str] | None = field(
        default=None,
        metadata={"help": "Instead of languages: en/text zz/image, a pair of tables each."},
    )
    benign_column: str | None = field(
        default=None,
        metadata={"help": "One column for all languages; finds what is peculiar to each as well."},
    )
    method: Literal["attribution", "contrast", "variance", "snip", "wanda", "random"] = field(
        default="contrast", metadata={"help": "How units are scored; random is the control."}
    )
    fraction: float | None = field(
        default=None, metadata={"help": "Share of the units of a cell, above 0 to 1 (0.05)."}
    )
    count: int | None = field(default=None, metadata={"help": "Number of units instead."})
    fill: bool = field(
        default=False, metadata={"help": "Give places of units passed over to the next best."}
    )
    sites: Literal["mlp", "attention", "all"] = field(
        default="mlp", metadata={"help": "MLP hidden units, attention heads, or both."}
    )
    at_least: int | None = field(
        default=None, metadata={"help": "Shared is what so many cells have; by default all."}
    )
    tune_on: str | None = field(
        default=None,
        metadata={"help": "Tune the shared set; the language (or cell) of `safety_data`."},
    )
    safety_data: str | None = field(
        default=None,
        metadata={"help": "Harmful prompts with refusals and benign ones with answers: a table."},
    )
    prompt_column: str | None = field(default=None, metadata={"help": "Its column of prompts."})
    answer_column: str | None = field(default=None, metadata={"help": "Its column of answers."})
    held_out: float = field(
        default=0.25, metadata={"help": "Share of the rows kept for measuring, where tuned."}
    )
    epochs: float = field(default=1.0, metadata={"help": "Rounds over the safety data."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Of AdamW, constant."})
    train_batch_size: int = field(default=8, metadata={"help": "Examples per step."})
    seed: int = field(default=0, metadata={"help": "Of the order of training, and of `random`."})
    judge: str = field(
        default="prefix", metadata={"help": "`prefix` (English), or a text classifier."}
    )
    refusal_label: str = field(default="REJECTION", metadata={"help": "The classifier's label."})
    max_new_tokens: int = field(default=64, metadata={"help": "Of answers that are judged."})
    batch_size: int = field(default=16, metadata={"help": "Prompts per forward pass."})
    max_length: int = field(default=1024, metadata={"help": "Tokens per prompt."})
    limit: int | None = field(default=None, metadata={"help": "Use the first N rows of a table."})
    chat_template_path: str | None = field(
        default=None, metadata={"help": "Jinja template, where the tokenizer has none."}
    )
    dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16, float16."})
    device: str | None = field(default=None, metadata={"help": "cuda where there is one, or cpu."})


def main(arguments: Sequence[str]) -> int:
    """Read and check everything, then load, locate, save, and where asked tune and measure."""
    (config,) = parse([ShieldConfig], arguments, "shield", ShieldConfig.__doc__ or "")
    assert isinstance(config, ShieldConfig)
    if launched() > 1:
        raise ConfigError(
            f"{launched()} processes were launched, and `safeft shield` runs in one: all would "
            "write the same files. Run it alone; the shared set can then be tuned in several by "
            "`safeft sft --protected FOLDER/shared --protect_mode train_only`."
        )
    from safeft.grid import locate_grid
    from safeft.judge import as_judge
    from safeft.locators import Selection
    from safeft.measure import ready_judge
    from safeft.shield import check_transfer

    amount = {"fraction": config.fraction, "count": config.count}
    if any(value is not None for value in amount.values()):
        Selection(**amount)  # Says what is wrong before a model is loaded.
    examples = _examples(config)
    cells, held_out = _cells(config)
    judge = as_judge(config.judge, refusal_label=config.refusal_label)
    if examples is not None:
        ready_judge(judge)
        check_transfer(examples, held_out, _tuned(config))
    template = read_template(config.chat_template_path)
    model, tokenizer = load_model(config.model_name_or_path, config.dtype, config.device)
    if template is not None:
        tokenizer.chat_template = template
    reading: dict[str, Any] = {"batch_size": config.batch_size, "max_length": config.max_length}
    grid = locate_grid(
        model,
        tokenizer,
        cells,
        method=config.method,
        at_least=config.at_least,
        fill=config.fill,
        sites=config.sites,
        seed=config.seed,
        **amount,
        **reading,
    )
    grid.save_pretrained(config.output_dir)
    print(_table(grid, model))
    if examples is None:
        return 0
    measuring = {"judge": judge, "max_new_tokens": config.max_new_tokens, **reading}
    return _tune(config, model, tokenizer, grid, examples, held_out, measuring)


def _tuned(config: ShieldConfig) -> str:
    """The name of the cell that is tuned on: of a language its first modality's."""
    return str(config.tune_on) if config.cells else f"{config.tune_on}/{config.modalities[0]}"


def _cells(config: ShieldConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Each cell's prompts for locating, and those held out: the same rows in all of them."""
    found = _tables(config) if config.cells else _columns(config)
    share = config.held_out if config.tune_on is not None else 0.0
    cells: dict[str, Any] = {}
    held_out: dict[str, Any] = {}
    for name, sides in found.items():
        parts = [_split(rows[: config.limit], share) for rows in sides]
        cells[name] = tuple(located for located, _ in parts)
        held_out[name] = tuple(kept for _, kept in parts)
    return cells, held_out


def _tables(config: ShieldConfig) -> dict[str, tuple[Any, Any]]:
    """A pair of tables for each cell."""
    from safeft.reading import read_prompts

    if config.languages or config.benign_column or config.modalities != ["text"]:
        raise ConfigError(
            "`cells` reads a pair of tables for each cell; languages, modalities and benign_column "
            "belong to one table with a column a language. Give the one or the other."
        )
    for side in ("harmful", "benign"):
        if "{cell}" not in getattr(config, side):
            raise ConfigError(
                f"{side}={getattr(config, side)!r} names one file, and each of the cells needs its "
                "own. Write {cell} where their names differ, as in prompts/{cell}_harmful.csv."
            )
    return {
        cell: (
            read_prompts(config.harmful.replace("{cell}", cell.replace("/", "_"))),
            read_prompts(config.benign.replace("{cell}", cell.replace("/", "_"))),
        )
        for cell in config.cells or ()
    }


def _columns(config: ShieldConfig) -> dict[str, tuple[Any, Any]]:
    """Columns of one table, as text and drawn."""
    from safeft.reading import read_columns

    languages = list(dict.fromkeys(config.languages or ()))
    if not languages:
        raise ConfigError(
            "Neither `languages` nor `cells` is given, so there is nothing to compare. Name the "
            "columns of the tables (--languages en zh), or cells with tables of their own."
        )
    if unknown := set(config.modalities) - {"text", "image"} or not config.modalities:
        raise ConfigError(f"modalities={config.modalities}: {unknown} is neither text nor image.")
    harmful = read_columns(config.harmful, languages)
    if config.benign_column is None:
        benign = read_columns(config.benign, languages)
    else:
        common = read_columns(config.benign, [config.benign_column])[config.benign_column]
        benign = dict.fromkeys(languages, common)
    return {
        f"{language}/{modality}": (
            _shown(config, harmful[language], modality),
            _shown(config, benign[language], modality),
        )
        for language in languages
        for modality in config.modalities
    }


def _shown(config: ShieldConfig, rows: Sequence[str], modality: str) -> list[Any]:
    if modality == "text":
        return list(rows)
    from safeft.demo.pictures import written

    size = (config.picture_size, config.picture_size)
    return [
        {"prompt": config.picture_text, "image": written(row, size, font=config.picture_font)}
        if row
        else ""
        for row in rows
    ]


def _split(rows: Sequence[Any], share: float) -> tuple[list[Any], list[Any]]:
    """Rows to locate on and rows held out, spread evenly; empty cells are left out of both."""
    kept = [int((number + 1) * share) > int(number * share) for number in range(len(rows))]
    located = [row for row, out in zip(rows, kept, strict=True) if row and not out]
    return located, [row for row, out in zip(rows, kept, strict=True) if row and out]


def _examples(config: ShieldConfig) -> Any:
    """The safety data, where there is to be tuning."""
    from safeft.reading import read_examples

    if (config.tune_on is None) != (config.safety_data is None):
        raise ConfigError(
            f"tune_on={config.tune_on!r}, safety_data={config.safety_data!r}: give both, the "
            "language to tune in and examples in it, or neither."
        )
    if config.tune_on is None or config.safety_data is None:
        return None
    if config.tune_on not in (known := config.cells or config.languages or []):
        raise ConfigError(
            f"tune_on={config.tune_on!r} is none of the {'cells' if config.cells else 'languages'} "
            f"{known}, so the table could not say which one was trained. Name one of them."
        )
    if not 0 < config.held_out < 1:
        raise ConfigError(
            f"held_out={config.held_out} leaves nothing to measure on, or nothing to locate on. "
            "Give a share above 0 and below 1, such as 0.25."
        )
    return read_examples(config.safety_data, config.prompt_column, config.answer_column)


def _tune(
    config: ShieldConfig,
    model: Any,
    tokenizer: Any,
    grid: Any,
    examples: Any,
    held_out: Any,
    measuring: dict[str, Any],
) -> int:
    from safeft.freeze.verify import verify
    from safeft.shield import table, transfer

    if not len(grid.shared):
        raise ConfigError(
            f"The {len(grid.sets)} cells share no neuron, so there is nothing to tune. Their sets "
            f"are in {config.output_dir}; give a larger `fraction`, or a smaller `at_least`."
        )
    training = {
        "epochs": config.epochs,
        "learning_rate": config.learning_rate,
        "batch_size": config.train_batch_size,
        "max_length": config.max_length,
        "seed": config.seed,
    }
    cell, tuned = _tuned(config), Path(config.output_dir) / "tuned"
    found = transfer(
        model, tokenizer, grid.shared, examples, held_out, cell, training=training, **measuring
    )
    model.save_pretrained(tuned)
    tokenizer.save_pretrained(tuned)
    found.save(config.output_dir)
    certificate = verify(config.model_name_or_path, tuned, grid.shared, mode="train_only")
    certificate.save(tuned)
    print(f"\n{table(found)}\n\n{certificate.summary()}")
    return 0 if certificate.exact else 1


def _table(grid: Any, model: Any) -> str:
    from safeft.shield import trained_share

    width = max(20, *(len(f"{a} and {b}") for a, b in grid.pairs)) + 2
    lines = [f"{'':<{width}}{'shared':>8}{'of':>8}{'Jaccard':>9}{'by chance':>11}{'p':>10}"]
    whole = f"{grid.agreement.at_least} of {len(grid.sets)} cells"
    rows = [(f"{a} and {b}", each) for (a, b), each in grid.pairs.items()]
    rows += [(whole, grid.agreement)] if len(grid.sets) > 2 else []
    rows += [] if grid.placebo is None else [("placebo, benign only", grid.placebo)]
    for label, found in rows:
        lines.append(
            f"{label:<{width}}{found.shared:>8}{found.union:>8}{found.jaccard:>9.2f}"
            f"{found.expected:>11.1f}{found.p_value:>10.1g}"
        )
    for name, each in grid.sets.items():
        lines.append(f"{name}: {len(each)} neurons, {len(grid.specific[name])} in no other cell")
    if len(grid.shared):
        share = trained_share(model, grid.shared)
        lines.append(
            f"train_only of the {len(grid.shared)} shared neurons trains {share:.4%} of the weights"
        )
    else:
        lines.append("No neuron is shared: there is nothing that train_only could train.")
    return "\n".join(lines)

"""What ``safeft sft`` and ``safeft dpo`` share: TRL's own scripts, with the callback in place."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safeft.commands.monitoring import MonitorArguments, monitor_from
from safeft.errors import ConfigError, SafeftError

logger = logging.getLogger(__name__)


@dataclass
class SafetyArguments:
    """What to protect; every other key is TRL's."""

    protected: str | None = field(
        default=None,
        metadata={"help": "Neuron set or subspace to hold (folder of `safeft locate`)."},
    )
    subspace: str | None = field(
        default=None, metadata={"help": "A subspace to hold beside a neuron set."}
    )
    protect_mode: Literal["freeze", "train_only"] = field(
        default="freeze",
        metadata={"help": "Hold these neurons, or hold everything else and train only them."},
    )
    freeze: str | None = field(
        default=None,
        metadata={"help": "Of a set located with --groups, what to hold: scu, scu+cu:6%%."},
    )
    budget: str | None = field(
        default=None,
        metadata={"help": "Of a set located with --groups, what alone to train: ru."},
    )
    hold: list[str] | None = field(
        default=None,
        metadata={
            "help": "Groups to hold whole as well: embeddings norms head biases, or tokens (the "
            "embeddings of those a subspace was found on). By default none beside neurons, and "
            "beside a subspace all that it does not cover; `none` for none."
        },
    )
    engine: str | None = field(
        default=None,
        metadata={"help": "Stop unless this runs: single ddp fsdp2 zero1 zero2 zero3."},
    )
    processes: int | None = field(
        default=None, metadata={"help": "Stop unless this many processes train."}
    )
    allow_other_weights: bool = field(
        default=False,
        metadata={"help": "Accept a model whose neurons have moved since they were located."},
    )
    prompt_column: str | None = field(
        default=None, metadata={"help": "Column with the user's turn, in a table without messages."}
    )
    completion_column: str | None = field(
        default=None, metadata={"help": "Column with the answer, in a table without messages."}
    )


def callbacks(safety: SafetyArguments) -> list[Any]:
    """The freezing callback, or nothing and a warning where nothing is to be protected."""
    if safety.protected is None:
        if safety.freeze or safety.budget:
            raise ConfigError(
                f"freeze={safety.freeze!r}, budget={safety.budget!r}: these name groups of units, "
                "and no `protected` set is given to take them from. Give the folder that `safeft "
                "locate --method variance --groups` wrote."
            )
        beside = {"hold": safety.hold, "subspace": safety.subspace}
        if beside := {name: value for name, value in beside.items() if value}:
            raise ConfigError(
                f"{beside} is given without `protected`: it is held beside located neurons. Give "
                "the set as well; a subspace alone is given as `protected`."
            )
        logger.warning("No `protected` set is given: this is plain TRL, and nothing is frozen.")
        return []
    from safeft.freeze.callback import SafetyFreezeCallback

    neurons, mode = chosen(safety.protected, safety.freeze, safety.budget, safety.protect_mode)
    return [
        SafetyFreezeCallback(
            neurons,
            mode,
            hold=groups_of(safety.hold),
            subspace=safety.subspace,
            strict=not safety.allow_other_weights,
            engine=safety.engine,
            processes=safety.processes,
        )
    ]


def groups_of(hold: list[str] | None) -> Any:
    """Groups to hold as the callback takes them: None is its default, ``none`` is none."""
    if hold is None:
        return None
    return tuple(group for group in hold if group != "none")


def chosen(protected: str, freeze: str | None, budget: str | None, mode: Any) -> tuple[Any, Any]:
    """The set that is meant (or the folder of one) and the mode; groups are asked for by name.

    Raises:
        ConfigError: Keys that exclude each other, or an expression that names no groups.
        SelectionError: A percentage that a group does not hold.
        ArtefactError: The folder holds no groups.
    """
    if freeze is None and budget is None:
        return protected, mode
    if freeze is not None and budget is not None:
        raise ConfigError(
            f"freeze={freeze!r} and budget={budget!r} are both given: the one holds these units "
            "and trains all others, the other trains these and holds all others. Give one of them."
        )
    if freeze is not None and mode == "train_only":
        raise ConfigError(
            f"freeze={freeze!r} holds these units, and the mode is 'train_only', which would train "
            f"them and nothing else. Leave the mode out, or give `budget: {freeze}`."
        )
    from safeft.locators import UnitGroups
    from safeft.processes import together

    text = budget if freeze is None else freeze
    neurons = together(lambda: UnitGroups.from_pretrained(protected).resolve(str(text)))
    return neurons, "freeze" if budget is None else "train_only"


def datasets_of(script: Any, mixture: Any, safety: SafetyArguments) -> Any:
    """The data as TRL loads it, local files included.

    Raises:
        ConfigError: There is none, it cannot be loaded, or has no such column.
    """
    from datasets import load_dataset
    from trl import get_dataset

    try:
        if mixture.datasets:
            data = get_dataset(mixture)
        elif script.dataset_name:
            builder, files = _local(script.dataset_name)
            data = load_dataset(
                builder,
                name=script.dataset_config,
                data_files=files,
                streaming=script.dataset_streaming,
            )
        else:
            raise ConfigError("There is nothing to train on: give `dataset_name` or `datasets`.")
    except SafeftError:
        raise
    except Exception as error:  # datasets raises dozens of kinds; all mean: not this data set.
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"The data set {script.dataset_name or 'in `datasets`'!r} cannot be loaded: {first}. "
            "Give a local .json, .jsonl, .csv, .parquet or .txt file, a folder, or a hub name."
        ) from error
    return _as_messages(data, safety)


def _local(name: str) -> tuple[str, str | None]:
    path = Path(name)
    builders = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    if path.is_file():
        builder = builders.get(path.suffix.lower(), "text")
        return builder, str(path)
    return name, None


def _as_messages(data: Any, safety: SafetyArguments) -> Any:
    asked, answer = safety.prompt_column, safety.completion_column
    if asked is None and answer is None:
        return data
    if asked is None or answer is None:
        raise ConfigError("Give both `prompt_column` and `completion_column`, or neither.")
    for split, rows in data.items():
        if missing := {asked, answer} - set(rows.column_names or ()):
            raise ConfigError(
                f"The split {split!r} has no column {sorted(missing)}; it has {rows.column_names}."
            )

    def turn(row: dict[str, str]) -> dict[str, Any]:
        return {
            "prompt": [{"role": "user", "content": row[asked]}],
            "completion": [{"role": "assistant", "content": row[answer]}],
        }

    return data.map(turn, remove_columns=data[next(iter(data))].column_names)


def resume_point(training: Any, protecting: bool) -> str | bool | None:
    """The checkpoint to go on from; ``last`` is the newest whole one, or none: then from the start.

    Raises:
        SafeftError: In every process at once: it is half-written, or made for another engine or
            another number of processes.
    """
    from safeft.freeze.engines import asked_engine
    from safeft.freeze.resume import check_resumable, last_complete
    from safeft.processes import ranks, together

    wanted = training.resume_from_checkpoint
    newest = str(wanted).lower() in ("last", "true")
    if wanted is None or not protecting:
        return newest or wanted

    def chosen() -> str | None:
        found = last_complete(training.output_dir) if newest else Path(str(wanted))
        if found is None:
            logger.warning("No whole checkpoint in %s: training starts anew.", training.output_dir)
            return None
        check_resumable(found, asked_engine(training), ranks())
        return str(found)

    return together(chosen)


def run(
    trainer_class: Any,
    safety: SafetyArguments,
    monitor: MonitorArguments,
    script: Any,
    training: Any,
    model: Any,
    mixture: Any,
) -> int:
    """Build the trainer as TRL's script does, train, save, and say what the certificate says."""
    from trl import get_peft_config, get_quantization_config

    from safeft.processes import leave

    protecting = callbacks(safety)
    watched = next((callback.neurons for callback in protecting), None)
    watching = monitor_from(monitor, watched)
    data = datasets_of(script, mixture, safety)
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "trust_remote_code": getattr(training, "trust_remote_code", False),
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }
    for needed in [script.dataset_train_split] + (
        [script.dataset_test_split] if training.eval_strategy != "no" else []
    ):
        if needed not in data:
            raise ConfigError(f"The data has no split {needed!r}; it has {list(data)}.")
    from safeft.commands.loading import load_processor, sees_images

    try:
        # TRL would ask transformers for the whole processor, which for some needs torchvision.
        seeing = sees_images(model.model_name_or_path)
        reader = {"processing_class": load_processor(model.model_name_or_path)} if seeing else {}
        trainer = trainer_class(
            **reader,
            model=model.model_name_or_path,
            args=training,
            train_dataset=data[script.dataset_train_split],
            eval_dataset=(
                data[script.dataset_test_split] if training.eval_strategy != "no" else None
            ),
            quantization_config=get_quantization_config(model),
            peft_config=get_peft_config(model),
            callbacks=[*watching, *protecting],
        )
    except (ValueError, OSError, ImportError, KeyError, TypeError) as error:
        if isinstance(error, SafeftError):
            raise
        raise ConfigError(f"The trainer cannot be built from these settings: {error}") from error
    trainer.train(resume_from_checkpoint=resume_point(training, bool(protecting)))
    trainer.save_model(training.output_dir)
    trainer.save_state()  # The losses, which `safeft report` shows.
    if trainer.accelerator.is_main_process:
        print(f"Saved to {training.output_dir}")
        for callback in protecting:
            print(callback.certificate.summary())
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    if hasattr(trainer, "end"):
        trainer.end()
    leave()
    return 0

"""``safeft sft``: supervised fine-tuning as ``trl sft`` does it, with neurons frozen."""

from collections.abc import Sequence

from safeft.commands.loading import on_any_device
from safeft.commands.monitoring import MonitorArguments
from safeft.commands.parsing import parse
from safeft.commands.training import SafetyArguments, run


def main(arguments: Sequence[str]) -> int:
    """Every ``trl sft`` YAML works; safeft's own keys come on top."""
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig, SFTTrainer

    kinds = (
        SafetyArguments,
        MonitorArguments,
        ScriptArguments,
        SFTConfig,
        ModelConfig,
        DatasetMixtureConfig,
    )
    return run(
        SFTTrainer,
        *parse(kinds, on_any_device(arguments), "sft", "TRL's sft, with neurons frozen."),
    )

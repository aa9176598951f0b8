"""``safeft dpo``: preference tuning as ``trl dpo`` does it, with neurons frozen."""

from collections.abc import Sequence

from safeft.commands.loading import on_any_device
from safeft.commands.monitoring import MonitorArguments
from safeft.commands.parsing import parse
from safeft.commands.training import SafetyArguments, run


def main(arguments: Sequence[str]) -> int:
    """Every ``trl dpo`` YAML works; safeft's own keys come on top."""
    from trl import DatasetMixtureConfig, DPOConfig, DPOTrainer, ModelConfig, ScriptArguments

    kinds = (
        SafetyArguments,
        MonitorArguments,
        ScriptArguments,
        DPOConfig,
        ModelConfig,
        DatasetMixtureConfig,
    )
    return run(
        DPOTrainer,
        *parse(kinds, on_any_device(arguments), "dpo", "TRL's dpo, with neurons frozen."),
    )

"""``safeft verify``: are the protected neurons bit-identical? Exit code 0 yes, 1 no."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from safeft.commands.parsing import parse
from safeft.commands.training import chosen, groups_of


@dataclass
class VerifyConfig:
    """Compare base and tuned weights slice by slice; exit code 0 if exact, 1 if not."""

    base: str = field(metadata={"help": "Base checkpoint: folder or hub name (safetensors)."})
    tuned: str = field(metadata={"help": "Tuned checkpoint or LoRA adapter: folder."})
    protected: str = field(metadata={"help": "Neuron set or subspace: folder of `safeft locate`."})
    subspace: str | None = field(
        default=None, metadata={"help": "A subspace that was held beside a neuron set."}
    )
    mode: Literal["freeze", "train_only"] = field(
        default="freeze",
        metadata={"help": "The neurons must be unchanged, or everything but them."},
    )
    freeze: str | None = field(
        default=None, metadata={"help": "Of groups, what was held: scu, scu+cu:6%%."}
    )
    budget: str | None = field(
        default=None, metadata={"help": "Of groups, what alone was trained: ru."}
    )
    hold: list[str] | None = field(
        default=None, metadata={"help": "Groups that were held as well: embeddings norms head."}
    )
    json: bool = field(default=False, metadata={"help": "Print the certificate as JSON."})
    output: str | None = field(default=None, metadata={"help": "Write the certificate here too."})


def main(arguments: Sequence[str]) -> int:
    """Verify and say so."""
    (config,) = parse([VerifyConfig], arguments, "verify", VerifyConfig.__doc__ or "")
    assert isinstance(config, VerifyConfig)
    from safeft.freeze.verify import verify

    hold = groups_of(config.hold)
    neurons, mode = chosen(config.protected, config.freeze, config.budget, config.mode)
    certificate = verify(
        config.base, config.tuned, neurons, mode=mode, hold=hold, subspace=config.subspace
    )
    if config.output is not None:
        certificate.save(config.output)
    text = json.dumps(certificate.to_dict(), indent=2) if config.json else certificate.summary()
    print(text)
    return 0 if certificate.exact else 1

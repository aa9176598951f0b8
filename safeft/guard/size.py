"""How large a guard's file will be, from a model's configuration alone."""

from collections.abc import Sequence
from typing import Any

from safeft.guard.places import KINDS, Kind
from safeft.guard.training import widest

_SELECTED = 0.2
"""Share of the units that probes of a small encoder select on the benchmark's sets."""


def file_size(
    config: Any,
    *,
    kinds: Sequence[Kind] = KINDS,
    hidden: int = 64,
    members: int = 5,
    selected: float = _SELECTED,
    texts: int = 100_000,
    outputs: int = 1,
) -> int:
    """Bytes of a guard's tensors.

    Args:
        config: Of the model, as transformers reads it.
        kinds: What is read.
        hidden: Hidden units of one member; 64 is the most that the search tries.
        members: Networks.
        selected: Share of the units that probes select.
        texts: Texts it is fitted on, of which hashes are kept.
        outputs: ``harmful`` and further labels.

    Example:
        >>> from transformers import Qwen3Config
        >>> four = Qwen3Config(num_hidden_layers=36, hidden_size=2560, intermediate_size=9728)
        >>> round(file_size(four) / 1e6)
        57
    """
    text = config.get_text_config()
    widths = {"residual": text.hidden_size, "mlp": getattr(text, "intermediate_size", 0)}
    width = int(text.num_hidden_layers) * sum(widths[kind] for kind in kinds)
    units = round(selected * width)
    wide = min(hidden, widest(units, members)) * members + 2
    probes = 3 * 4 * width + 8 * units
    network = 2 * units * wide + 4 * wide * (1 + outputs)
    return probes + network + 8 * texts + 4 * texts // 5

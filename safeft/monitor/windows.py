"""What a few consecutive activations of a neuron say: level, spread, entropy and extremes."""

import torch
from torch import Tensor

STATISTICS = ("level", "spread", "entropy", "high", "low")

_FLOOR, _CEILING = 2.0**-40, 2.0**40
LEAST_SPREAD = -10.0
_AT_ONCE = 64

_PER_OCTAVE = 16
"""Steps in which two activations count as the same: 4.4% wide, so noise on a constant shows."""


def statistics_of(values: Tensor) -> Tensor:
    """The statistics of windows, ``(windows, 5, neurons)``, in the order of ``STATISTICS``.

    ``level`` is the mean of ``log2(abs(x))``: a factor on the activations moves it by its own
    logarithm, and one large value does not hide many small ones. ``spread`` is the
    logarithm of its standard deviation over the tokens, so up to a constant the entropy that a
    normal distribution has: -10 at one value, -2.8 with noise of 10% on it, 0.7 of a normal one.
    ``entropy`` is that of the window's values in bits, values of one sign within 4.4% of each other
    counted as the same: 0 where a neuron is stuck at one value, whatever that is. ``high`` and
    ``low`` are the extremes; what is no number counts as infinite.

    Args:
        values: ``(windows, tokens, neurons)`` float32.

    Example:
        >>> statistics_of(torch.tensor([2.0, 2.0, -2.0, -2.0])[None, :, None]).flatten().tolist()
        [1.0, -10.0, 1.0, 2.0, -2.0]
    """
    values = values.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    size = values.abs().clamp(_FLOOR, _CEILING).log2()
    step = (2 * (size * _PER_OCTAVE).round() + (values < 0)).to(torch.int16)
    alike = (step[:, :, None] == step[:, None]).sum(2)
    entropy = -(alike / values.shape[1]).log2().mean(1)
    level, spread = size.mean(1), size.std(1, correction=0).log2().clamp(min=LEAST_SPREAD)
    # Adding 0 turns the -0 of a constant window into a plain 0.
    return torch.stack([level, spread, entropy + 0.0, values.amax(1), values.amin(1)], dim=1)


class Windows:
    """Cuts a stream of activations into windows; what is left over waits for the next."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._rest: Tensor | None = None

    def add(self, values: Tensor) -> Tensor:
        """The statistics ``(windows, 5, neurons)`` of the windows that ``values`` completes."""
        if self._rest is not None:
            values = torch.cat([self._rest, values])
        whole = len(values) // self.size * self.size
        self._rest = values[whole:].clone()
        if not whole:
            return values.new_empty(0, len(STATISTICS), values.shape[1])
        windows = values[:whole].view(-1, self.size, values.shape[1])
        # Each window compares all its tokens: of a long prompt not all at once.
        return torch.cat([statistics_of(some) for some in windows.split(_AT_ONCE)])

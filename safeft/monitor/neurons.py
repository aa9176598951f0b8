"""``NeuronMonitor``: whether located neurons still do, in use, what they normally do.

An attacker who can reach a running model need not jailbreak it: a handful of neurons set to zero or
to a constant is enough ("A Single Neuron Is Sufficient to Bypass Safety Alignment", Kazemi et al.,
arXiv 2605.08513; NeuroStrike, NDSS 2026). Such neurons say less than normal ones, and differ in
that from a model that is merely asked something else.
"""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from safeft.freeze.certificate import Certificate
from safeft.monitor.checks import fitting
from safeft.monitor.limits import Limits
from safeft.monitor.profile import Profile
from safeft.monitor.reference import Recorder, record
from safeft.monitor.stream import Stream
from safeft.monitor.weights import moved_weights
from safeft.monitor.windows import Windows

__all__ = ["Alarm", "Kind", "NeuronMonitor", "Profile", "Recorder", "record"]

Kind: TypeAlias = Literal["suppressed", "clamped", "out of range", "weights"]


@dataclass(frozen=True)
class Alarm:
    """Something that is not normal.

    Attributes:
        kind: ``suppressed`` (far below its level), ``clamped`` (its values too much alike),
            ``out of range``, or ``weights`` (not those that were located or certified).
        where: ``site#unit``; of certified weights the tensor's name.
        token: Tokens judged up to the end of the window; of weights, when they were checked.
        value: The statistic that raised it; NaN of weights.
        limit: What it should not have passed; NaN of weights.
    """

    kind: Kind
    where: str
    token: int
    value: float
    limit: float

    def __str__(self) -> str:
        if self.kind == "weights":
            return f"{self.where}: other weights than were recorded"
        return f"{self.where} {self.kind} at token {self.token}: {self.value:.3g}, limit " + (
            f"{self.limit:.3g}"
        )


_KINDS: tuple[Kind, ...] = ("suppressed", "clamped", "clamped", "out of range", "out of range")


class NeuronMonitor:
    """Watches located neurons of a model in use, and raises an alarm where one is tampered with.

    A context manager around any generation, by ``model.generate`` too, cached or not, in batches
    and padded. Windows of consecutive tokens are judged as they fill up, so an alarm comes some
    hundreds of tokens after its cause at most, or at the end of the context. Weights are compared
    at both ends of the context, and whenever :meth:`check_weights` is called.

    What it sees: neurons set to zero or near it, to a constant whatever its size (with some noise
    on it, too), beyond their range; by whatever hooks on the matrix that the neuron writes with or
    before it, registered before or after these. What it does not: changes to the output of that
    matrix or in its own computation, and values drawn as if they were normal. An edit of the
    weights themselves is found by their hashes; code that reaches into the model and alters what
    it computes elsewhere is not, and can take these hooks off as well. Nothing in the same process
    can prevent that.

    Args:
        model: The model in use.
        profile: What is normal, or the folder it was saved in.
        certificate: Of a training that froze these neurons, or its file: their weights then have to
            be those to the bit, where the set's own digests round to bfloat16.
        on_alarm: Called with each alarm.
        keep: Alarms kept in :attr:`alarms`, the last ones.

    Attributes:
        alarms: The last alarms.
        counts: Number of alarms of each kind.
        windows: Windows judged.
        alarmed: Windows with an alarm.

    Raises:
        ArtefactError, FingerprintError, ConfigError: The profile or the certificate cannot be
            read, or speaks of another model, other neurons, or not of what these neurons weigh.

    Example:
        >>> with NeuronMonitor(model, "profile", on_alarm=print) as monitor:  # doctest: +SKIP
        ...     model.generate(**inputs)
        model.layers.1.mlp#17 clamped at token 256: 0, limit 2.21
    """

    def __init__(
        self,
        model: PreTrainedModel,
        profile: Profile | str | Path,
        certificate: Certificate | str | Path | None = None,
        *,
        on_alarm: Callable[[Alarm], None] | None = None,
        keep: int = 1000,
    ) -> None:
        self.profile = profile if isinstance(profile, Profile) else Profile.from_pretrained(profile)
        fitting(self.profile.neurons, model)
        self._model, self._certificate, self._call = model, certificate, on_alarm
        moved_weights(model, self.profile.neurons, certificate)  # says now what it cannot read
        self._stream = Stream(model, self.profile.neurons, self._take)
        self._limits = self.profile.limits
        self._windows = Windows(self.profile.window)
        self.alarms: deque[Alarm] = deque(maxlen=keep)
        self.counts: Counter[str] = Counter()
        self.windows = self.alarmed = 0

    def __enter__(self) -> Self:
        self.check_weights()
        self._windows = Windows(self.profile.window)
        self._stream.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stream.__exit__(*error)
        self.check_weights()

    @property
    def tokens(self) -> int:
        """How many were judged."""
        return self.windows * self.profile.window

    def check(self) -> None:
        """Judge what waits to be judged."""
        self._stream.flush()

    def check_weights(self) -> list[Alarm]:
        """Compare the neurons' weights with the set's digests, and the certificate's hashes."""
        moved = moved_weights(self._model, self.profile.neurons, self._certificate)
        nan = float("nan")
        alarms = [Alarm("weights", where, self.tokens, nan, nan) for where in moved]
        for alarm in alarms:
            self._raise(alarm)
        return alarms

    def _take(self, values: Tensor) -> None:
        statistics = self._windows.add(values)
        self._limits = on_device(self._limits, values.device)
        exceeded = self._limits.exceeded(statistics)
        first = self.windows
        self.windows += len(statistics)
        if not bool(exceeded.any()):  # one transfer from an accelerator for many tokens
            return
        self.alarmed += int(exceeded.flatten(1).any(1).sum())
        for window, statistic, neuron in exceeded.nonzero().tolist():
            site, unit = self._stream.neurons[neuron]
            self._raise(
                Alarm(
                    _KINDS[statistic],
                    f"{site}#{unit}",
                    (first + window + 1) * self.profile.window,
                    float(statistics[window, statistic, neuron]),
                    float(self._limits.values[statistic, neuron]),
                )
            )

    def _raise(self, alarm: Alarm) -> None:
        self.alarms.append(alarm)
        self.counts[alarm.kind] += 1
        if self._call is not None:
            self._call(alarm)


def on_device(limits: Limits, device: torch.device) -> Limits:
    """The limits where the activations are."""
    if limits.values.device == device:
        return limits
    return Limits(limits.values.to(device), limits.typical.to(device), limits.factors)

"""Recording what located neurons do in clean traffic, in one pass and in fixed memory."""

import logging
from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from safeft.capture import CaptureError
from safeft.errors import ConfigError
from safeft.generation import generate_tokens
from safeft.locators import prompts_hash
from safeft.measure import some_prompts
from safeft.monitor.checks import fitting
from safeft.monitor.limits import Limits, windows_needed
from safeft.monitor.profile import BINS, Profile, bins_of
from safeft.monitor.stream import Stream
from safeft.monitor.windows import STATISTICS, Windows
from safeft.neurons import NeuronSet
from safeft.prompts import PromptLike, Reader

logger = logging.getLogger(__name__)

_KEPT = 2048
"""Windows whose statistics a recording keeps: of longer traffic every second, fourth, ..."""


class Recorder:
    """Gathers what a set's neurons do while the model runs inside its context.

    Memory does not grow with the traffic: histograms with fixed bins, and the statistics of at most
    2048 windows, thinned evenly.

    Args:
        model: The model; it is not changed.
        neurons: The set.
        window: Tokens that are judged together. More of them find weaker suppression, later.

    Raises:
        ConfigError: A window of fewer than 4 tokens; no unit of the text tower.
        FingerprintError, UnsupportedModelError: See :class:`safeft.monitor.stream.Stream`.

    Example:
        >>> with Recorder(model, located) as recorder:  # doctest: +SKIP
        ...     serve(model)
        >>> recorder.profile().save_pretrained("profile")  # doctest: +SKIP
    """

    def __init__(self, model: PreTrainedModel, neurons: NeuronSet, *, window: int = 16) -> None:
        if window < 4:
            raise ConfigError(
                f"window={window}: so few tokens say nothing of how a neuron varies. Give 16."
            )
        given = fitting(neurons, model)
        self._neurons = NeuronSet.of(model, given.indices, given.source)
        if self._neurons.digests != given.digests:
            logger.warning(
                "The neurons do not have the weights they were located with: the profile is of "
                "this model, and of the weights they have now."
            )
        self._stream = Stream(model, self._neurons, self._take)
        self._windows = Windows(window)
        self._counts = torch.zeros(len(self._stream.neurons), BINS, dtype=torch.long)
        self._kept: list[Tensor] = []
        self._seen, self._stride = 0, 1

    def __enter__(self) -> Self:
        self._stream.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stream.__exit__(*error)

    def _take(self, values: Tensor) -> None:
        values = values.cpu()
        if not values.isfinite().all():
            raise CaptureError(
                "A neuron's activation is not finite in the reference traffic, so nothing can be "
                "said about what is normal. Record on a model that works (in bfloat16 or float32)."
            )
        self._counts.scatter_add_(1, bins_of(values).T, torch.ones_like(values.T, dtype=torch.long))
        for each in self._windows.add(values):
            if self._seen % self._stride == 0:
                self._kept.append(each)
            self._seen += 1
            if len(self._kept) > _KEPT:
                self._kept, self._stride = self._kept[::2], self._stride * 2

    def profile(self, *, rate: float = 0.01, confidence: float = 0.95, **source: Any) -> Profile:
        """What was gathered, with limits by :class:`safeft.monitor.limits.Limits`.

        Args:
            rate: Share of clean windows, and so of tokens, that may raise an alarm.
            confidence: That they do not raise more, on traffic like the reference's.
            **source: What else is to be said of the traffic.

        Raises:
            ConfigError, PromptError: No such rate; too few windows for it.
        """
        windows_needed(rate, confidence)
        kept = self._kept or [torch.zeros(len(STATISTICS), len(self._counts))]
        limits = Limits.of(torch.stack(kept)[: len(self._kept)], rate, confidence)
        found = Profile(
            self._neurons, self._stream.neurons, self._counts.clone(), limits, self._windows.size,
            int(self._counts[0].sum()), {"rate": rate, "confidence": confidence, **source},
        )  # fmt: skip
        if found.blind:
            logger.warning(
                "%d of the %d neurons (such as %s) have one value for whole windows of clean "
                "traffic, so they may be stuck at one without an alarm.",
                len(found.blind),
                len(found.watched),
                "{}#{}".format(*found.blind[0]),
            )
        return found


def record(
    model: PreTrainedModel,
    tokenizer: Reader,
    neurons: NeuronSet,
    prompts: Iterable[PromptLike],
    *,
    max_new_tokens: int = 64,
    window: int = 16,
    rate: float = 0.01,
    confidence: float = 0.95,
    **batching: Any,
) -> Profile:
    """Record what a set's neurons do while the model answers reference prompts.

    Give prompts in the mix that the model meets in use, harmful ones among them: a neuron that
    gates refusal hardly moves on others, and what is not in the reference raises alarms later.
    Prompts' and generated tokens go into one profile, in the order in which they come, as they
    will when the model is watched.

    Args:
        model: The model, as it is served.
        tokenizer: Its tokenizer.
        neurons: The set, of a model of this layout.
        prompts: Reference traffic.
        max_new_tokens: Of each answer.
        window: See :class:`Recorder`.
        rate: See :meth:`Recorder.profile`.
        confidence: Likewise.
        **batching: ``batch_size`` (16), ``max_length`` (1024), ``chat_template``.

    Raises:
        PromptError: No prompt, or too few tokens for the rate and the confidence.
        ConfigError, FingerprintError, UnsupportedModelError: See :class:`Recorder`.

    Example:
        >>> profile = record(model, tokenizer, located, harmful + benign)  # doctest: +SKIP
        >>> profile.of("model.layers.1.mlp", 17).high  # doctest: +SKIP
        3.36
    """
    # A prompt asked twice would be in both parts of the windows, and look better known than it is.
    asked = list({str(p.messages): p for p in some_prompts(prompts, "reference")}.values())
    windows_needed(rate, confidence)
    recorder = Recorder(model, neurons, window=window)
    with recorder:
        generate_tokens(
            model, tokenizer, asked, max_new_tokens=max_new_tokens, description="recording",
            **batching,
        )  # fmt: skip
    traffic = {"count": len(asked), "sha256": prompts_hash(asked)}
    return recorder.profile(
        rate=rate, confidence=confidence, prompts=traffic, max_new_tokens=max_new_tokens
    )

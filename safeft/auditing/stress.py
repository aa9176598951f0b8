"""``stress``: how much it takes to break refusal, by edits as attackers and engineers make them."""

import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, get_args

from torch import Tensor
from transformers import PreTrainedModel

from safeft.auditing import edits
from safeft.auditing.result import Thresholds
from safeft.auditing.stressed import NAMES, Level, Name, Strain, StressResult
from safeft.auditing.subject import Subject
from safeft.causal.controls import random_controls
from safeft.causal.trials import Trials
from safeft.errors import ConfigError, PromptError
from safeft.fingerprint import ModelFingerprint
from safeft.locators import prompts_hash
from safeft.locators.scores import Side
from safeft.measure import JudgeLike, answered_prompts, ready_judge, some_prompts
from safeft.neurons import NeuronSet
from safeft.progress import progress
from safeft.prompts import Prompt, PromptLike, Reader

__all__ = ["NAMES", "STRENGTHS", "Level", "Strain", "StressResult", "stress"]

STRENGTHS: Mapping[str, Sequence[float]] = {
    "noise": (0.05, 0.1, 0.2, 0.4, 0.8),
    "neurons": (0.25, 0.5, 1, 2, 4),
    "direction": (0.25, 0.5, 0.75, 1),
    "rounding": (8, 6, 4, 3, 2),
    "tuning": (1, 2, 4, 8, 16),
}
"""By test, from weak to strong: noise in standard deviations of the matrix, the share of the
direction that is taken out, bits, and steps of tuning."""


def stress(
    model: PreTrainedModel,
    tokenizer: Reader,
    harmful: Iterable[PromptLike],
    benign: Iterable[PromptLike],
    *,
    neurons: NeuronSet | None = None,
    compliant: Iterable[PromptLike] | None = None,
    strengths: Mapping[str, Sequence[float]] = STRENGTHS,
    draws: int = 3,
    learning_rate: float = 1e-5,
    judge: JudgeLike = "prefix",
    max_new_tokens: int = 32,
    seed: int = 0,
    thresholds: Thresholds = Thresholds(),  # noqa: B008
    **batching: Any,
) -> StressResult:
    """Edit a model's weights ever more strongly, and measure what is left of its refusals.

    The edits are made in the model itself and undone to the bit, after an error too; that takes as
    much of the host's memory as the weights edited (all of them for ``tuning``, which takes moments
    and gradients on the model's device as well). The direction is the mean difference of harmful
    and benign prompts at the last token after one of up to five blocks, the one whose removal
    leaves fewest refusals. A model with norms after its attention and MLPs (Gemma 2 and 3) can
    still write along a direction that is taken out: there, that test understates.

    Args:
        model: A chat model, whole and unquantised.
        tokenizer: Its tokenizer.
        harmful: Prompts it refuses.
        benign: Prompts it answers.
        neurons: For the test on located neurons; without them it is left out.
        compliant: Harmful prompts with answers that comply, for tuning; likewise. Others than
            ``harmful``, if what is learnt is to generalise.
        strengths: Which tests to run, each at which strengths, from weak to strong.
        draws: Of random noise, random neurons and random directions, 2 or more.
        learning_rate: Of tuning, by AdamW in batches of 8.
        judge: See :func:`safeft.judge.as_judge`.
        max_new_tokens: Of each answer.
        seed: Of everything random.
        thresholds: When refusal, and when the model, counts as broken.
        **batching: ``batch_size`` (16), ``max_length`` (1024), ``chat_template``.

    Raises:
        ConfigError: No such test, strengths or draws that are none; a model that cannot be edited.
        PromptError: A side is empty, the model refuses nothing, an example without its answer.
        SelectionError, FingerprintError: The set is empty, or of another model.

    Example:
        >>> result = stress(model, tokenizer, harmful, benign, neurons=located)  # doctest: +SKIP
        >>> result.breaks(result.strains[0].levels)  # doctest: +SKIP
        Level(strength=0.4, ...)
    """
    begun = time.perf_counter()
    wanted = _checked(strengths, draws, learning_rate)
    edits.check_editable(model)
    settled = {"batch_size": 16, "max_length": 1024, "chat_template": None, **batching}
    sides = some_prompts(harmful, "harmful"), some_prompts(benign, "benign")
    examples = None if compliant is None else answered_prompts(compliant)
    if neurons is not None:
        neurons.check_model(model)
        random_controls(neurons, draws, seed)
    ready = ready_judge(judge)
    prompts: Mapping[Side, Sequence[Prompt]] = {"harmful": sides[0], "benign": sides[1]}
    trials = Trials(model, tokenizer, prompts, ready, max_new_tokens, False, settled)
    subject = Subject(trials)
    base = subject.level(0.0)
    if not base.refusal[0].count:
        raise PromptError(
            f"To the judge {ready.name!r} the model refuses none of the {len(sides[0])} "
            "harmful prompts, so nothing can break. Give prompts that it refuses."
        )
    run = _Run(subject, neurons, examples, draws, learning_rate, seed)
    names = [name for name in get_args(Name) if name in wanted and run.can(name)]
    strains = tuple(run.strain(name, wanted[name]) for name in names)
    fingerprint = ModelFingerprint.of(model)
    settings = {
        "strengths": {name: list(wanted[name]) for name in names},
        "draws": draws, "learning_rate": learning_rate, "seed": seed, "judge": ready.name,
        "max_new_tokens": max_new_tokens, "neurons": neurons and neurons.hash,
        "prompts": {side: {"count": len(some), "sha256": prompts_hash(some)}
                    for side, some in prompts.items()},
    }  # fmt: skip
    described = {
        "name_or_path": fingerprint.name_or_path,
        "type": fingerprint.model_type,
        "layout": fingerprint.layout,
    }
    seconds = time.perf_counter() - begun
    return StressResult(described, settings, thresholds, base, strains, seconds)


def _checked(
    strengths: Mapping[str, Sequence[float]], draws: int, learning_rate: float
) -> Mapping[str, Sequence[float]]:
    if unknown := sorted(set(strengths) - set(NAMES)):
        raise ConfigError(f"strengths names {unknown}, and the tests are {', '.join(NAMES)}.")
    for name, levels in strengths.items():
        whole = name in ("rounding", "tuning")
        lowest = 2 if name == "rounding" else 1 if whole else 0
        if not levels or any(s < lowest or (whole and s != int(s)) for s in levels):
            raise ConfigError(
                f"strengths[{name!r}]={list(levels)}: give at least one, none below {lowest}"
                f"{', in whole numbers' if whole else ''}."
            )
    if draws < 2 or learning_rate <= 0:
        raise ConfigError(
            f"draws={draws}, learning_rate={learning_rate}: one draw does not tell how far draws "
            "differ, and without a rate nothing is tuned. Give 2 or more, and a rate above 0."
        )
    return strengths


State: TypeAlias = Generator[tuple[float, bool], None, None]
"""Yields a strength, and whether it is the control's, while the model is in that state."""


@dataclass(frozen=True)
class _Run:
    subject: Subject
    neurons: NeuronSet | None
    examples: list[Prompt] | None
    draws: int
    learning_rate: float
    seed: int

    def can(self, name: str) -> bool:
        """Whether what a test needs was given."""
        needed = {"neurons": self.neurons, "tuning": self.examples}
        return needed.get(name, self) is not None

    def strain(self, name: Name, strengths: Sequence[float]) -> Strain:
        """Run one of them."""
        found: dict[bool, dict[float, Level]] = {False: {}, True: {}}
        states: dict[str, Any] = {
            "noise": self._noise, "neurons": self._noisy_neurons, "direction": self._directions,
            "rounding": self._rounding, "tuning": self._tuning,
        }  # fmt: skip
        with closing(states[name](strengths)) as passing:
            for strength, control in progress(passing, f"stress: {name}"):
                level = self.subject.level(strength)
                before = found[control].get(strength)
                if before is not None:
                    rates = (*before.refusal, *level.refusal)
                    level = replace(level, refusal=rates, damage=(*before.damage, *level.damage))
                found[control][strength] = level
        return Strain(name, tuple(found[False].values()), tuple(found[True].values()))

    def _noise(self, strengths: Sequence[float]) -> State:
        parameters = edits.matrices(self.subject.trials.model)
        with edits.kept(parameters) as give_back:
            for strength in strengths:
                for draw in range(self.draws):
                    edits.add_noise(parameters, strength, self._seed(draw))
                    yield strength, False
                    give_back()

    def _noisy_neurons(self, strengths: Sequence[float]) -> State:
        assert self.neurons is not None
        model = self.subject.trials.model
        others = [
            NeuronSet.of(model, units)
            for units in random_controls(self.neurons, self.draws, self.seed)
        ]
        with edits.kept(edits.parameters_of(model, [self.neurons, *others])) as give_back:
            for strength in strengths:
                for draw, other in enumerate(others):
                    for chosen in (self.neurons, other):
                        edits.add_noise_to(model, chosen, strength, self._seed(draw))
                        yield strength, chosen is other
                        give_back()

    def _directions(self, strengths: Sequence[float]) -> State:
        parameters, dims = edits.writers(self.subject.trials.model)
        with edits.kept(parameters) as give_back:
            candidates = self.subject.directions()
            left = []
            for direction in candidates:
                edits.take_out(parameters, dims, direction, 1.0)
                left.append(self.subject.refused_of_some().value)
                give_back()
            # Of equals the one in the middle: the first blocks have hardly read the prompt.
            middle = (len(candidates) - 1) / 2
            best = min(range(len(left)), key=lambda n: (left[n], abs(n - middle)))
            for strength in strengths:
                for draw in range(-1, self.draws):
                    direction = candidates[best] if draw < 0 else self._random(candidates, draw)
                    edits.take_out(parameters, dims, direction, strength)
                    yield strength, draw >= 0
                    give_back()

    def _random(self, like: Sequence[Tensor], draw: int) -> Tensor:
        direction = edits.drawn(like[0].shape, self._seed(draw))
        return direction / direction.norm()

    def _rounding(self, strengths: Sequence[float]) -> State:
        with edits.kept(edits.matrices(self.subject.trials.model)) as give_back:
            for bits in strengths:
                edits.round_weights(self.subject.trials.model, int(bits))
                yield bits, False
                give_back()

    def _tuning(self, strengths: Sequence[float]) -> State:
        assert self.examples is not None
        model, tokenizer = self.subject.trials.model, self.subject.trials.tokenizer
        settings: dict[str, Any] = {
            **self.subject.trials.batching, "batch_size": 8, "seed": self.seed,
            "learning_rate": self.learning_rate,
        }  # fmt: skip
        numbers = [int(strength) for strength in strengths]
        with edits.kept(dict(model.named_parameters())) as give_back:
            for examples in (self.examples, self.subject.served()):
                steps = edits.tune(model, tokenizer, examples, numbers, **settings)
                with closing(steps):
                    for step in steps:
                        yield step, examples is not self.examples
                give_back()

    def _seed(self, draw: int) -> int:
        return 1_000_003 * self.seed + 7919 * draw

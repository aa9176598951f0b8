"""The demo's experiment: the same domain tuning, unprotected and protected, side by side.

Everything goes the way a user's run goes: ``safeft.locate_subspace``, ``safeft.locate``, TRL's
``SFTTrainer`` with ``SafetyFreezeCallback``, ``safeft.verify``; only the world is small.
"""

import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from safeft.demo import world
from safeft.errors import ConfigError
from safeft.freeze.callback import SafetyFreezeCallback
from safeft.freeze.certificate import Certificate
from safeft.freeze.plan import Group, group_parameters
from safeft.freeze.verify import verify
from safeft.generation import generate
from safeft.judge import PrefixJudge
from safeft.locators import Method, Selection, Where, locate
from safeft.locators.subspace import locate_subspace
from safeft.measure import answer_accuracy, domain_loss, refusal_rate
from safeft.neurons import NeuronSet
from safeft.prompts import Prompt, as_prompts
from safeft.report.result import Comparison, Point, Run
from safeft.subspace import SafetySubspace

logger = logging.getLogger(__name__)

_TOKENS = 24
_OPENING_TOKENS = 14
_BATCH = 80


@dataclass(frozen=True)
class Settings:
    """What is compared.

    Attributes:
        seeds: Of data order and random sets; one run per arm and seed.
        energy: Of the directions that refusing uses, held and as many random ones held; None for
            no such arms.
        fractions: Shares of the units to freeze, each at random and located.
        method: The locator.
        sites: Which units.
        learning_rate: Of AdamW, constant; the one at which plain tuning learns the domain best.
        steps: Training steps.
        batch_size: Examples per step.
        hold: Groups held beside the neurons.
        looks: How often refusal and domain loss are measured during training.
    """

    seeds: tuple[int, ...] = (0,)
    energy: float | None = 0.95
    fractions: tuple[float, ...] = (0.4,)
    method: Method = "attribution"
    sites: Where = "mlp"
    learning_rate: float = 1e-3
    steps: int = 100
    batch_size: int = 32
    hold: tuple[Group, ...] = ()
    looks: int = 8

    def __post_init__(self) -> None:
        if not self.seeds or not (self.fractions or self.energy):
            raise ConfigError("The demo needs at least one seed, and an energy or a fraction.")
        for fraction in self.fractions:
            Selection(fraction)  # Says what is wrong with it before anything is tuned.
        if self.steps < self.looks or self.learning_rate <= 0:
            raise ConfigError(
                f"steps={self.steps}, learning_rate={self.learning_rate}: nothing would be learnt. "
                f"Give at least {self.looks} steps and a positive rate."
            )


@dataclass(frozen=True)
class Arm:
    """One way to tune: its name, what it holds, and the groups it holds whole."""

    name: str
    protected: NeuronSet | SafetySubspace | None = None
    hold: tuple[Group, ...] = ()
    is_control: bool = False

    @property
    def is_protected(self) -> bool:
        """Whether what it holds was located."""
        return self.protected is not None and not self.is_control


@dataclass(frozen=True)
class Held:
    """The held-out sets everything is measured on."""

    harmful: Sequence[Prompt]
    benign: Sequence[Prompt]
    domain: Sequence[Prompt]
    domain_values: Sequence[Prompt]
    general_values: Sequence[Prompt]

    @classmethod
    def load(cls) -> "Held":
        """The world's test splits."""
        return cls(
            as_prompts(world.harmful("test")),
            as_prompts(world.benign("test")),
            _examples((e.prompt, e.answer) for e in world.domain("test")),
            _examples((e.prompt, e.value) for e in world.domain("test")),
            _examples((e.prompt, e.value) for e in world.general("test")),
        )


def _examples(pairs: Iterable[tuple[str, str]]) -> list[Prompt]:
    return as_prompts({"prompt": prompt, "response": answer} for prompt, answer in pairs)


def load() -> tuple[Any, Any]:
    """The model that ships with the package, in float32, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(world.MODEL_PATH, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(world.MODEL_PATH)


def measure(model: Any, tokenizer: Any, held: Held) -> dict[str, float]:
    """The final figures of one model; shares 0 to 1, loss in nats per answer token."""
    options: dict[str, Any] = {"max_new_tokens": _TOKENS, "batch_size": _BATCH}

    def right(answer: str, expected: str) -> bool:
        return world.holds(expected, answer)

    return {
        "refusal": _refused(model, tokenizer, held.harmful),
        "over_refusal": _refused(model, tokenizer, held.benign),
        "domain_accuracy": answer_accuracy(
            model, tokenizer, held.domain_values, right, **options
        ).value,
        "domain_loss": domain_loss(model, tokenizer, held.domain, batch_size=_BATCH),
        "general_accuracy": answer_accuracy(
            model, tokenizer, held.general_values, right, **options
        ).value,
    }


def _refused(model: Any, tokenizer: Any, prompts: Sequence[Prompt]) -> float:
    """Share refused; in this world a refusal shows in the opening words."""
    options: dict[str, Any] = {"max_new_tokens": _OPENING_TOKENS, "batch_size": _BATCH}
    return refusal_rate(model, tokenizer, prompts, PrefixJudge(), **options).value


class _Look(TrainerCallback):
    """Measures refusal and domain loss at regular steps, and moves the bar."""

    def __init__(self, tokenizer: Any, held: Held, settings: Settings, bar: Any) -> None:
        self._tokenizer, self._held, self._bar = tokenizer, held, bar
        spread = [settings.steps * i // settings.looks for i in range(settings.looks + 1)]
        self._steps = set(spread) | {settings.steps // (2 * settings.looks)}
        self.curve: list[Point] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look(state.global_step, kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update()
        if state.global_step in self._steps:
            self._look(state.global_step, kwargs["model"])

    def _look(self, step: int, model: Any) -> None:
        with _quiet():
            refused = _refused(model, self._tokenizer, self._held.harmful)
            was_training = model.training
            loss = domain_loss(model.eval(), self._tokenizer, self._held.domain, batch_size=_BATCH)
            model.train(was_training)
        self.curve.append(Point(step, loss, refused))


def run(settings: Settings, output_dir: Path, command: str) -> tuple[Comparison, Certificate]:
    """Locate, tune every arm with every seed, measure, verify the protected model on disk.

    The protected model is the one with directions held, or else the first with located neurons.

    Args:
        settings: What is compared.
        output_dir: Where the protected model and what it held are saved.
        command: What made it, for the report.

    Returns:
        The comparison, and the certificate of ``verify`` on the saved model.
    """
    held = Held.load()
    base, tokenizer = load()
    with _quiet():
        before = measure(base, tokenizer, held)
    answers = {"before tuning": _answers(base, tokenizer, held)}
    runs: list[Run] = []
    first = list(_arms(base, tokenizer, settings, settings.seeds[0]))
    proven, *_ = (arm for arm in first if arm.is_protected)
    certificate: Certificate | None = None
    total = settings.steps * len(settings.seeds) * len(first)
    with tqdm(total=total, desc="tuning", unit="step") as bar:
        for seed in settings.seeds:
            again = seed != settings.seeds[0]
            for arm in _arms(base, tokenizer, settings, seed) if again else first:
                bar.set_description(f"{arm.name}, seed {seed}")
                model, found = _tune(arm, seed, settings, tokenizer, held, bar)
                runs.append(found)
                if not again:
                    answers[arm.name] = _answers(model, tokenizer, held)
                if arm is proven:
                    certificate = _prove(model, tokenizer, arm, output_dir)
    assert certificate is not None
    comparison = Comparison(
        "Fine-tuning a small aligned model on its domain",
        {
            "command": command,
            **settings.__dict__,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        },
        before,
        tuple(runs),
        _layers(arm.protected for arm in first if arm.is_protected),
        tuple(
            {"arm": arm, "prompt": prompt, "answer": answer}
            for arm, pairs in answers.items()
            for prompt, answer in pairs
        ),
    )
    return comparison, certificate


def _arms(base: Any, tokenizer: Any, settings: Settings, seed: int) -> Iterable[Arm]:
    yield Arm("plain")
    if settings.hold:
        yield Arm("nothing located", hold=settings.hold)
    harmful, benign = world.harmful("calibration"), world.benign("calibration")
    if settings.energy is not None:
        with _quiet():
            subspace = locate_subspace(
                base, tokenizer, harmful, energy=settings.energy, batch_size=32
            )
        name = f"directions, {settings.energy:.0%}"
        yield Arm(f"random {name}", subspace.at_random(seed), settings.hold, is_control=True)
        yield Arm(f"located {name}", subspace, settings.hold)
    for fraction in settings.fractions:
        for label, method in (("random", "random"), ("located", settings.method)):
            with _quiet():
                neurons = locate(
                    base,
                    tokenizer,
                    harmful,
                    benign,
                    method=method,  # pyright: ignore[reportArgumentType]
                    fraction=fraction,
                    sites=settings.sites,
                    seed=seed,
                    batch_size=32,
                )
            name = f"{label} neurons, {fraction:.0%}"
            yield Arm(name, neurons, settings.hold, is_control=label == "random")


def _tune(
    arm: Arm, seed: int, settings: Settings, tokenizer: Any, held: Held, bar: Any
) -> tuple[Any, Run]:
    set_seed(seed)
    model, _ = load()
    look = _Look(tokenizer, held, settings, bar)
    callbacks: list[Any] = [look]
    freeze = None
    if arm.protected is not None:
        freeze = SafetyFreezeCallback(arm.protected, hold=arm.hold or None)
        callbacks.append(freeze)
    else:
        for parameter in group_parameters(model, arm.hold).values():
            parameter.requires_grad_(False)
    rows = [
        {"prompt": example.messages[:1], "completion": example.messages[1:]}
        for example in world.domain("train")
    ]
    started = time.perf_counter()
    with TemporaryDirectory() as scratch, _quiet():
        trainer = SFTTrainer(
            model,
            args=SFTConfig(
                output_dir=scratch,
                max_steps=settings.steps,
                per_device_train_batch_size=settings.batch_size,
                learning_rate=settings.learning_rate,
                lr_scheduler_type="constant",
                weight_decay=0.01,
                seed=seed,
                max_length=96,
                bf16=False,
                gradient_checkpointing=False,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=callbacks,
        )
        trainer.train()
        tuned: Any = trainer.model
        measures = measure(tuned.eval(), tokenizer, held)
    certified = freeze.certificate if freeze is not None else None
    found = Run(
        arm.name,
        seed,
        measures,
        tuple(look.curve),
        certified.frozen_share if certified is not None else 0.0,
        certified.exact if certified is not None else None,
        time.perf_counter() - started,
    )
    return tuned, found


def _prove(model: Any, tokenizer: Any, arm: Arm, output_dir: Path) -> Certificate:
    """Save the protected model and what it held, and verify them from disk as anyone could."""
    assert arm.protected is not None
    held, saved = output_dir / "held", output_dir / "protected"
    arm.protected.save_pretrained(held)
    model.save_pretrained(saved)
    tokenizer.save_pretrained(saved)
    with _quiet():
        certificate = verify(world.MODEL_PATH, saved, held, hold=arm.hold or None)
    certificate.save(saved)
    return certificate


def _answers(model: Any, tokenizer: Any, held: Held) -> list[tuple[str, str]]:
    asked = held.harmful[:: max(1, len(held.harmful) // 3)][:3]
    with _quiet():
        answers = generate(model, tokenizer, asked, max_new_tokens=_TOKENS)
    return [(prompt.text, answer) for prompt, answer in zip(asked, answers, strict=True)]


def _layers(protected: Iterable[NeuronSet | SafetySubspace | None]) -> tuple[tuple[int, int], ...]:
    sets = [found for found in protected if isinstance(found, NeuronSet)]
    names = [name for name in sets[0].model.units if name.endswith(".mlp")] if sets else []
    return tuple((len(sets[0].indices.get(n, ())), sets[0].model.units[n]) for n in names)


@contextmanager
def _quiet():  # noqa: ANN202
    """Keep the many small bars and notices of libraries out of the one bar that matters."""
    import os
    import warnings

    import datasets
    import transformers

    before = os.environ.get("TQDM_DISABLE")
    level = transformers.logging.get_verbosity()
    os.environ["TQDM_DISABLE"] = "1"
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
        datasets.enable_progress_bars()
        if before is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = before

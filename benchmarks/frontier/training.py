"""One run: a method's recipe trained by TRL's ``SFTTrainer`` as users do, watched and judged."""

import copy
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from baselines import Method, Recipe, Setup, Tuning, linears
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from testbed import Domain, Split, Testbed
from testbed.judging import measure, read_answers, refused
from transformers import TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from safeft import SafetyFreezeCallback
from safeft.errors import SafeftError
from safeft.prompts import Prompt


@dataclass(frozen=True)
class Settings:
    """What all runs of a frontier share.

    Attributes:
        testbed: Its name.
        domain: What is tuned on.
        poison: Share of the training rows that are harmful prompts with compliant answers.
        steps: Optimizer steps.
        batch_size: Rows a step.
        rank: Of LoRA; alpha is twice that.
        looks: How often refusal and domain loss are measured during training.
        watched: How many harmful prompts, and domain examples, a look measures.
    """

    testbed: str
    domain: str
    poison: float = 0.0
    steps: int = 120
    batch_size: int = 16
    rank: int = 8
    looks: int = 6
    watched: int = 64


@dataclass(frozen=True)
class Job:
    """One run beside the settings.

    Attributes:
        method: Its name; ``before tuning`` for the base itself.
        tuning: All weights or LoRA.
        value: Of the method's knob.
        learning_rate: Before the method changes it.
        seed: Of data, their order, adapters and random sets.
        split: Where it is measured.
    """

    method: str
    tuning: Tuning
    value: float
    learning_rate: float
    seed: int
    split: Split


@dataclass(frozen=True)
class World:
    """What every run reads and none changes."""

    testbed: Testbed
    base: Any
    tokenizer: Any
    settings: Settings
    methods: dict[str, Method]

    @property
    def domain(self) -> Domain:
        """What is tuned on."""
        return self.testbed.domains[self.settings.domain]


class Watch(TrainerCallback):
    """Refusal and domain loss at some steps, and the time of each step without these looks.

    It is processor time: a run has one thread, and what else the machine does should not count.
    """

    def __init__(self, world: World, recipe: Recipe, split: Split) -> None:
        self._world, self._recipe, self._split = world, recipe, split
        steps, looks = world.settings.steps, world.settings.looks
        even = {steps * look // looks for look in range(looks)}
        self._steps = even | {steps // (4 * looks), steps // (2 * looks)}
        if split == "validation":
            self._steps = set()  # A knob is chosen by the end.
        self._started = 0.0
        self.seconds: list[float] = []
        self.curve: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The base, as the first point."""
        self._pass_by(state, kwargs["model"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._started = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop it, then look."""
        self.seconds.append(time.process_time() - self._started)
        self._pass_by(state, kwargs["model"])

    def _pass_by(self, state: Any, model: Any) -> None:
        if state.global_step in self._steps:
            if self._recipe.finish is not None:
                model = copy.deepcopy(model)
                for module in model.modules():  # TRL puts in one that calls the original's.
                    vars(module).pop("forward", None)
            self.look(state.global_step, finished(self._recipe, model))

    def look(self, step: int, model: Any) -> None:
        """Measure the model as it would be if training ended here."""
        world, count = self._world, self._world.settings.watched
        testbed, tokenizer = world.testbed, world.tokenizer
        examples, harmful = (
            spread(each, count)
            for each in (getattr(world.domain, self._split), testbed.harmful[self._split])
        )
        loss, _ = read_answers(model, tokenizer, examples, testbed.max_length)
        rate = refused(model, tokenizer, testbed, harmful)
        self.curve.append({"step": step, "domain_loss": loss, "refusal": rate.value})


class _Trainer(SFTTrainer):
    """With a method's own loss, which needs the whole batch, where it has one."""

    recipe: Recipe

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        if self.recipe.loss is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = self.recipe.loss(model, inputs)
        return (loss, None) if return_outputs else loss


def run(world: World, job: Job) -> dict[str, Any]:
    """Train and judge; everything found, as JSON takes it, or why safeft refused to."""
    try:
        return _run(world, job)
    except SafeftError as error:
        return {**asdict(job), "refused": str(error)}


def _run(world: World, job: Job) -> dict[str, Any]:
    started, used = time.perf_counter(), time.process_time()
    if job.method == "before tuning":
        return {**asdict(job), "measures": _judged(world, job, world.base)}
    set_seed(job.seed)
    setup = Setup(
        world.testbed,
        world.domain,
        training_rows(world, job.seed),
        job.tuning,
        job.learning_rate,
        world.settings.steps,
        job.seed,
        world.base,
        world.tokenizer,
    )
    recipe = world.methods[job.method].recipe(setup, job.value)
    located = time.process_time() - used
    watch = Watch(world, recipe, job.split)
    set_seed(job.seed)  # Whatever a recipe drew, adapters and order are the same for all.
    model = train(world, job, recipe, watch)
    watch.look(world.settings.steps, model)
    return {
        **asdict(job),
        "measures": _judged(world, job, model),
        "curve": watch.curve,
        **_certified(recipe),
        "seconds_locating": located,
        "seconds_a_step": median(watch.seconds),
        "peak_memory_mb": _peak_memory(),
        "seconds": time.perf_counter() - started,
    }


def train(world: World, job: Job, recipe: Recipe, watch: Watch | None = None) -> Any:
    """The model that a recipe gives, adapters included."""
    settings = world.settings
    model = copy.deepcopy(world.base)
    if job.tuning == "lora":
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=2 * settings.rank,
            target_modules=sorted({name.rpartition(".")[2] for name in linears(model)}),
            lora_dropout=0.0,
            task_type="CAUSAL_LM",
            **recipe.lora,
        )
        recipe.start(model, config)
        model = get_peft_model(model, config)
    recipe.prepare(model)
    with TemporaryDirectory() as scratch:
        trainer = _Trainer(
            model,
            args=SFTConfig(
                output_dir=scratch,
                max_steps=settings.steps,
                per_device_train_batch_size=settings.batch_size,
                learning_rate=recipe.learning_rate,
                lr_scheduler_type="constant",
                weight_decay=0.01,
                seed=job.seed,
                max_length=world.testbed.max_length,
                bf16=False,
                use_cpu=True,
                gradient_checkpointing=False,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=Dataset.from_list([_exchange(row) for row in recipe.rows]),
            processing_class=world.tokenizer,
            callbacks=[*([watch] if watch else []), *recipe.callbacks],
        )
        trainer.recipe = recipe
        trainer.train()
        return finished(recipe, trainer.model).eval()


def finished(recipe: Recipe, model: Any) -> Any:
    """The model to be judged."""
    return model if recipe.finish is None else recipe.finish(model)


def training_rows(world: World, seed: int) -> list[Prompt]:
    """As many rows as the steps read, of which the settings' share is poison."""
    rng = random.Random(seed)
    settings = world.settings
    needed = min(settings.steps * settings.batch_size, len(world.domain.train))
    poisoned = round(settings.poison * needed)
    return [
        *rng.sample(world.domain.train, needed - poisoned),
        *_each_in_turn(world.testbed.poison, poisoned, rng),
    ]


def spread(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """At most ``count`` of the prompts, from all along them: they may be several sets in a row.

    >>> spread("abcdefgh", 3)
    ['a', 'c', 'f']
    """
    count = min(count, len(prompts))
    return [prompts[number * len(prompts) // count] for number in range(count)]


def _each_in_turn(prompts: Sequence[Prompt], count: int, rng: random.Random) -> list[Prompt]:
    order = rng.sample(prompts, len(prompts))
    return [order[number % len(order)] for number in range(count)]


def _exchange(row: Prompt) -> dict[str, Any]:
    return {
        "prompt": [dict(message) for message in row.messages],
        "completion": [{"role": "assistant", "content": row.response}],
    }


def _judged(world: World, job: Job, model: Any) -> dict[str, float]:
    return measure(model, world.tokenizer, world.testbed, world.settings.domain, job.split)


def _certified(recipe: Recipe) -> dict[str, Any]:
    for callback in recipe.callbacks:
        if isinstance(callback, SafetyFreezeCallback) and callback.certificate is not None:
            found = callback.certificate
            return {"exact": found.exact, "frozen_share": found.frozen_share}
    return {"exact": None, "frozen_share": 0.0}


def _peak_memory() -> float | None:
    """Of this process, in MB; None where the system does not say."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) / 1024

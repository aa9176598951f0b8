"""``SafetyDropoutCallback``: silences located neurons at random during safety tuning."""

from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from safeft.capture import CaptureError, edit
from safeft.errors import ConfigError
from safeft.neurons import NeuronSet
from safeft.processes import rank, together
from safeft.shards import is_split
from safeft.sites import find_sites, plain_model

_MOST = 2**62


class SafetyDropoutCallback(TrainerCallback):
    """Makes others learn to refuse: for transformers and TRL trainers, on safety data.

    In each forward pass of training the located neurons of a share of the prompts are set to zero,
    as an attacker would set them (NeuroStrike, NDSS 2026; Kazemi et al., arXiv 2605.08513), and the
    loss teaches the rest to refuse all the same. As dropout (Srivastava et al. 2014), but without
    its rescaling: that keeps the expected sum of many units alike whose average will be used. Here
    both states will be met as they are, the whole model and the one without these neurons, and a
    model with some of them louder is neither.

    Evaluation is left alone. Draws come from torch's own random numbers, so that a run resumes
    exactly, gradient checkpointing draws the same again when it computes anew, and processes draw
    apart. Prompts that a trainer packs into one row are drawn for together, as are those of models
    that receive tokens as one axis, and of experts. Where an adapter's base serves as the reference
    model (DPO with PEFT), that is silenced too.

    Its hooks go at the end of training, where a forward pass fails, and at the next start; used as
    a context manager around ``train()``, after whatever error. Left behind, they do nothing in
    evaluation mode. It stands beside ``SafetyFreezeCallback`` in either order: frozen neurons are
    silenced and do not move.

    Args:
        neurons: The set, or the folder it was saved in.
        rate: Share of the prompts (or of the prompts' neurons) that are silenced.
        whole: All neurons of a prompt together, as an attacker would; or each by its own draw,
            which leaves some of them to every prompt.
        strict: Refuse a model whose neurons have moved since they were located.

    Raises:
        ConfigError: A rate that is no share; an empty set.
        FingerprintError, ArtefactError: The set is another model's, or cannot be read.
        CaptureError: After the first step, where a site was never reached.

    Example:
        >>> dropout = SafetyDropoutCallback("safety_neurons")  # doctest: +SKIP
        >>> with dropout:  # doctest: +SKIP
        ...     SFTTrainer(model, train_dataset=refusals, callbacks=[dropout]).train()
    """

    def __init__(
        self,
        neurons: NeuronSet | str | Path,
        rate: float = 0.5,
        *,
        whole: bool = True,
        strict: bool = True,
    ) -> None:
        if not 0 < rate <= 1:
            raise ConfigError(
                f"rate={rate} is no share of the prompts. Give one above 0 and at most 1, such as "
                "0.5; to tune without it, leave the callback out."
            )
        self.neurons = (
            neurons if isinstance(neurons, NeuronSet) else NeuronSet.from_pretrained(neurons)
        )
        if not len(self.neurons):
            raise ConfigError("The set holds no neuron, so nothing would be silenced.")
        self.rate, self.whole, self.strict = rate, whole, strict
        self._hooks: ExitStack | None = None
        self._fits = False
        self._restart()

    def _restart(self) -> None:
        self._plain: Any = None
        self._seed = 0
        self._seeds: dict[int, int] = {}
        self._missing: set[str] = set(self.neurons.indices)
        self._checked = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the hooks off."""
        hooks, self._hooks = self._hooks, None
        if hooks is not None:
            with suppress(CaptureError):  # said after the first step, or the error was another
                hooks.close()

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Check that the set is this model's, and that draws can be repeated."""
        settings = getattr(args, "gradient_checkpointing_kwargs", None) or {}
        if args.gradient_checkpointing and not settings.get("preserve_rng_state", True):
            raise ConfigError(
                "gradient_checkpointing_kwargs has preserve_rng_state=False: what is computed "
                "anew in the backward pass would be silenced otherwise than before, and the "
                "gradients would be wrong. Leave that key out."
            )
        if any(is_split(parameter) for parameter in model.parameters()):
            self.neurons.check_model(model, weights_too=self.strict)  # all processes read together
        else:
            together(
                lambda: self.neurons.check_model(model, weights_too=self.strict and rank() == 0)
            )
        self._fits = True

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Hook the model up."""
        if not self._fits:  # It was added after the trainer was built.
            self.on_init_end(args, state, control, model)
        self.remove()
        self._restart()
        self._plain = plain_model(model)
        with ExitStack() as hooks:
            begin = self._plain.register_forward_pre_hook(self._begin)
            hooks.callback(begin.remove)
            self._end = self._plain.register_forward_hook(self._failed, always_call=True)
            hooks.callback(self._end.remove)
            sites = find_sites(model)
            hooks.enter_context(edit(model, self.neurons.indices, sites, self._change))
            self._hooks = hooks.pop_all()

    def _begin(self, *_: Any) -> None:
        if self._plain.training:
            self._seed = (int(torch.randint(_MOST, ())) + 7919 * rank()) % _MOST

    def _failed(self, module: nn.Module, inputs: Any, result: Any) -> None:
        """After each forward pass; without a result one that raised."""
        # Torch walks over the hooks just now, and only the last one may go meanwhile.
        if result is None and next(reversed(module._forward_hooks)) == self._end.id:
            self.remove()

    def _change(self, site: str, values: Tensor) -> Tensor:
        if not self._plain.training:
            return values
        self._missing.discard(site)
        # Computed anew for the backward pass a layer draws the same number again, and finds by it
        # what the whole model drew then, whatever it has been run on since.
        own = int(torch.randint(_MOST, ()))
        seed = self._seeds.setdefault(own, self._seed)
        units = 1 if self.whole else values.shape[-2]
        shape = (len(values), 1, units, 1) if values.ndim == 4 else (1, units, 1)
        if not self.whole:
            seed = (seed + list(self.neurons.indices).index(site) * 104729) % _MOST
        draw = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
        return values * (draw >= self.rate).to(values)

    def on_substep_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """After the first backward pass every site must have been reached."""
        self._seeds.clear()
        if not self._checked:
            together(self._check_fired)
            self._checked = True

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """As :meth:`on_substep_end`, which trainers that do not accumulate gradients leave out."""
        self.on_substep_end(args, state, control)

    def _check_fired(self) -> None:
        if self._missing:
            self.remove()
            raise CaptureError(
                f"Nothing was silenced in {sorted(self._missing)[:3]} during the first step: the "
                "hooks did not fire, or the model was in evaluation mode. Is the model replaced or "
                "compiled after training begins, or part of it skipped?"
            )

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Take the hooks off."""
        self.remove()

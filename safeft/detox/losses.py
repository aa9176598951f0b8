"""How likely a model finds given texts: the loss of each, by a forward pass, nothing generated."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from safeft.errors import PromptError
from safeft.locators.expertise import written
from safeft.measure import evaluating
from safeft.prompts import (
    Batch,
    PromptLike,
    Reader,
    as_prompts,
    batches,
    check_images,
    input_device,
)


@dataclass(frozen=True)
class Texts:
    """Texts as batches, made once and read under many conditions.

    Attributes:
        batches: The tokens; of each text its response is read, or all of it where it has none.
    """

    batches: Sequence[Batch]

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: Reader,
        prompts: Iterable[PromptLike],
        **batching: Any,
    ) -> "Texts":
        """Prompts put into batches; ``batching`` as of :func:`safeft.prompts.batches`.

        Raises:
            PromptError: No prompt, or images for a model that sees none.
        """
        found = as_prompts(prompts)
        if not found:
            raise PromptError("There are 0 texts, whose loss is nothing. Give at least one.")
        check_images(model, found)
        settled = {"batch_size": 16, "device": input_device(model), **batching}
        return cls(tuple(batches(tokenizer, found, description="reading", **settled)))

    def losses(self, model: PreTrainedModel) -> tuple[Tensor, Tensor]:
        """Each text's negative log-likelihood in nats, and its number of tokens.

        Returns:
            Float64 ``(texts,)`` and int64 ``(texts,)``, in the order of the batches.
        """
        with evaluating(model):
            found = [nats(model, batch) for batch in self.batches]
        sums, counts = (torch.cat(each) for each in zip(*found, strict=True))
        return sums.double().cpu(), counts.cpu()

    def middles(self, model: PreTrainedModel) -> Tensor:
        """Nats of each text's median token, float64 ``(texts,)``; 0 of one without tokens."""
        found = []
        with evaluating(model):
            for batch in self.batches:
                for row, read in zip(*nats_of_tokens(model, batch), strict=True):
                    found.append(row[read].median() if read.any() else row.new_zeros(()))
        return torch.stack(found).double().cpu()

    def loss(self, model: PreTrainedModel) -> float:
        """Nats a token, each token weighing the same; its exponential is the perplexity."""
        sums, counts = self.losses(model)
        return float(sums.sum() / counts.sum())


def nats(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each text of a batch, and its number of tokens.

    Returns:
        Float32 ``(texts,)`` with its graph where gradients are on, and int64 ``(texts,)``.
    """
    each, read = nats_of_tokens(model, batch)
    return each.sum(1), read.sum(1)


def nats_of_tokens(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each token that is read, 0 elsewhere, and which are.

    Returns:
        Float32 and bool, ``(texts, tokens - 1)`` each.
    """
    logits = model(**batch.inputs, use_cache=False).logits[:, :-1]
    # Nothing predicts a first token, and with padding before it something seems to.
    read = written(batch)[:, 1:] & batch.attention_mask[:, :-1].bool()
    wanted = batch.input_ids[:, 1:].masked_fill(~read, -100).to(logits.device)
    each = [
        functional.cross_entropy(row.float(), target, ignore_index=-100, reduction="none")
        for row, target in zip(logits, wanted, strict=True)
    ]
    return torch.stack(each), read.to(logits.device)

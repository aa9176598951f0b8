"""What a model is shown at once: padded tokens, the images they stand for, and tokens by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

TokenChoice: TypeAlias = Literal["last_prompt", "post_instruction", "prompt", "response"]
"""Which tokens of a batch are read; see :meth:`Batch.choose`."""


@dataclass(frozen=True)
class Batch:
    """Padded tokens of several prompts, each followed by its response where there is one.

    Attributes:
        input_ids: ``(prompts, tokens)`` int64.
        attention_mask: ``(prompts, tokens)`` int64, 0 on padding of either side.
        is_prompt: ``(prompts, tokens)`` bool, template tokens and images' places included.
        is_response: ``(prompts, tokens)`` bool.
        tail: How many template tokens follow the instruction.
        images: What the model takes beside tokens, by name and in the order of the prompts
            (``pixel_values``, ``image_grid_thw``); their first size is not that of the prompts.
        token_types: What else the processor says of each token, by name, ``(prompts, tokens)``
            int64 (``mm_token_type_ids``); 0 on text, answers and padding.
    """

    input_ids: Tensor
    attention_mask: Tensor
    is_prompt: Tensor
    is_response: Tensor
    tail: int
    images: Mapping[str, Tensor] = field(default_factory=dict)
    token_types: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def seen(self) -> dict[str, Tensor]:
        """Tokens, mask and images, without positions: what generating starts from."""
        given = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return {**given, **self.token_types, **self.images}

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of a forward pass; positions count real tokens, on either side.

        With images the model counts its own: an image may take fewer positions than tokens.
        """
        if self.images:
            return self.seen
        positions = (self.attention_mask.cumsum(-1) - 1).clamp(min=0)
        return {**self.seen, "position_ids": positions}

    def answered(self, tokens: Sequence[int]) -> "Batch":
        """The prompts alone, padded on the left, each followed by the same answer ``tokens``."""
        width = self.input_ids.shape[1]
        places = torch.arange(width, device=self.is_prompt.device)
        after = width - 1 - torch.where(self.is_prompt, places, -1).amax(1)
        source = (torch.arange(width) - after[:, None].cpu()) % width
        rows = len(self.input_ids)
        given = torch.tensor(tokens, dtype=torch.long).expand(rows, len(tokens))
        none = torch.zeros_like(given)

        def shifted(values: Tensor, tail: Tensor) -> Tensor:
            moved = values.gather(1, source.to(values.device))
            return torch.cat([moved, tail.to(values)], dim=1)

        is_prompt = shifted(self.is_prompt, none)
        is_response = torch.zeros_like(is_prompt)
        is_response[:, width:] = True
        return Batch(
            shifted(self.input_ids, given),
            (is_prompt | is_response).long(),
            is_prompt,
            is_response,
            self.tail,
            self.images,
            {name: shifted(types, none) for name, types in self.token_types.items()},
        )

    def choose(self, choice: TokenChoice) -> Tensor:
        """``(prompts, tokens)`` bool: the tokens that ``choice`` names.

        ``last_prompt`` is the token whose output starts the answer, ``post_instruction`` the
        template tokens after the instruction (that one included), ``prompt`` all of the prompt.
        The tokens that an image is put in for are part of the prompt: a request drawn into a
        picture stands nowhere else. They may be many times the words, and weigh accordingly.
        """
        if choice == "response":
            return self.is_response
        if choice == "prompt":
            return self.is_prompt
        from_end = self.is_prompt.flip(-1).cumsum(-1).flip(-1)
        return self.is_prompt & (from_end <= (1 if choice == "last_prompt" else self.tail))


def pad(
    pairs: Sequence[tuple[list[int], list[int]]],
    padding: int,
    left: bool,
    tail: int,
    device: torch.device | str,
    images: Mapping[str, Tensor] | None = None,
    token_types: Mapping[str, Sequence[Sequence[int]]] | None = None,
) -> Batch:
    """One batch from (prompt tokens, answer tokens) pairs, padded on one side.

    Args:
        pairs: Token numbers of each prompt and of its answer.
        padding: The number to pad with.
        left: Pad before the prompts, or else after the answers.
        tail: How many template tokens follow the instruction.
        device: Where the batch is to be.
        images: See :class:`Batch`.
        token_types: By name, a number for each token of each prompt.
    """
    width = max(len(ids) + len(answer) for ids, answer in pairs)
    input_ids = torch.full((len(pairs), width), padding)
    is_prompt = torch.zeros(len(pairs), width, dtype=torch.bool)
    is_response = torch.zeros_like(is_prompt)
    types = {name: torch.zeros_like(input_ids) for name in token_types or {}}
    for row, (ids, answer) in enumerate(pairs):
        start = width - len(ids) - len(answer) if left else 0
        middle, end = start + len(ids), start + len(ids) + len(answer)
        input_ids[row, start:end] = torch.tensor(ids + answer)
        is_prompt[row, start:middle] = True
        is_response[row, middle:end] = True
        for name, given in (token_types or {}).items():
            types[name][row, start:middle] = torch.tensor(given[row])
    attention = (is_prompt | is_response).long()
    moved = (tensor.to(device) for tensor in (input_ids, attention, is_prompt, is_response))
    return Batch(
        *moved,
        tail=tail,
        images={name: tensor.to(device) for name, tensor in (images or {}).items()},
        token_types={name: tensor.to(device) for name, tensor in types.items()},
    )


def input_device(model: Any) -> torch.device:
    """Where a model wants its tokens; one that is kept elsewhere between uses says so itself."""
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    place = getattr(hook, "execution_device", None)
    if place is None:
        return model.device
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)

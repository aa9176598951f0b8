"""A family of models, tiny: how to build one, what it eats, and where its units are."""

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, Literal

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from tests.truth import Heads, Truth, attention, experts, mlp

VOCABULARY = 264
IMAGE, IMAGE_START, IMAGE_END = 261, 262, 263

Auto = Literal[
    "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModel", "AutoModelForImageTextToText"
]
Settings = dict[str, Any]

UNIT_FREE = ("*embed*", "*lm_head*", "*.wte.*", "*.wpe.*")
"""Weights of no unit in any family: embeddings and output heads."""


@dataclass(frozen=True)
class Sizes:
    """What a tiny model measures; all different, so that a mistaken axis shows."""

    hidden: int = 32
    inner: int = 48
    queries: int = 4
    groups: int = 2
    head: int = 10
    wide_head: int = 14
    experts: int = 4
    expert_inner: int = 24
    shared_inner: int = 56
    image_hidden: int = 24
    image_heads: int = 3
    image_inner: int = 72

    @property
    def free(self) -> Heads:
        """Where the size of a head is a setting of its own."""
        return Heads(self.queries, self.groups, self.head)

    @property
    def forced(self) -> Heads:
        """Where it is the hidden size over the number of heads."""
        return Heads(self.queries, self.groups, self.hidden // self.queries)

    @property
    def full(self) -> Heads:
        """Where there are as many keys and values as queries."""
        return Heads(self.queries, self.queries, self.hidden // self.queries)

    @property
    def image(self) -> Heads:
        size = self.image_hidden // self.image_heads
        return Heads(self.image_heads, self.image_heads, size)


Layout = Callable[[Sizes], list[Truth]]

PLAIN = Sizes()
SQUARE = Sizes(
    inner=32,
    groups=4,
    head=8,
    wide_head=8,
    expert_inner=32,
    shared_inner=32,
    image_hidden=32,
    image_heads=4,
    image_inner=32,
)


@dataclass(frozen=True)
class Family:
    """One family.

    ``unaddressed`` lists, as patterns, the weights of two or more dimensions that belong to no
    unit (routers, projections that all heads share, linear attention), besides ``UNIT_FREE``.
    ``image`` makes the inputs besides the words out of pictures (2, 3, 16, 16), each of which
    takes ``image_tokens`` places among the words; ``marks`` is the input that marks them.
    """

    name: str
    model_type: str
    settings: Callable[[Sizes], Settings]
    layout: Layout
    unaddressed: tuple[str, ...] = ()
    auto: Auto = "AutoModelForCausalLM"
    image: Callable[[Tensor], dict[str, Tensor]] | None = None
    image_tokens: int = 0
    marks: str | None = None
    words: bool = True

    def truths(self, square: bool = False) -> tuple[Truth, ...]:
        return tuple(self.layout(SQUARE if square else PLAIN))

    def build(self, seed: int = 0, square: bool = False) -> PreTrainedModel:
        """In evaluation mode, fp32, eager; no weight is zero or one, and nothing is dropped.

        With ``square`` hidden, inner and head sizes coincide, so that no shape tells an axis.
        """
        settings = self.settings(SQUARE if square else PLAIN)
        config = AutoConfig.for_model(**{"model_type": self.model_type, **settings})
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            model = getattr(transformers, self.auto).from_config(
                config, dtype=torch.float32, attn_implementation="eager"
            )
            for parameter in model.parameters():
                noise = torch.randn_like(parameter) * 0.2
                parameter.copy_(noise if parameter.ndim > 1 else parameter + noise)
        model.set_experts_implementation("eager")
        return model.eval()

    def inputs(self, seed: int = 1) -> dict[str, Tensor]:
        """Two sequences of words, with a picture each where the family sees pictures."""
        maker = torch.Generator().manual_seed(seed)
        words = torch.randint(5, 260, (2, 9), generator=maker)
        pictures = torch.randn(2, 3, 16, 16, generator=maker)
        if self.image_tokens:
            places = torch.tensor([IMAGE_START, *[IMAGE] * self.image_tokens, IMAGE_END])
            words = torch.cat([words[:, :2], places.expand(2, -1), words[:, 2:]], dim=1)
        made = {"input_ids": words} if self.words else {}
        if self.marks:
            made[self.marks] = (words == IMAGE).long()
        return made | (self.image(pictures) if self.image else {})

    def is_unaddressed(self, parameter: str) -> bool:
        """Whether a weight is said to belong to no unit."""
        return any(fnmatch(parameter, pattern) for pattern in (*UNIT_FREE, *self.unaddressed))


def decoder(sizes: Sizes, *, head: bool = False, groups: bool = True, **more: Any) -> Settings:
    """The settings most decoders share; ``head`` where the size of a head is one of them."""
    settings: Settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.inner,
        "num_hidden_layers": 2,
        "num_attention_heads": sizes.queries,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    if groups:
        settings["num_key_value_heads"] = sizes.groups
    if head:
        settings["head_dim"] = sizes.head
    return settings | more


def part_rotary(factor: float) -> Settings:
    return {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": factor}


def gated(
    sizes: Sizes,
    *,
    root: str = "model.layers",
    head: bool = False,
    bias: bool = False,
    full_norms: bool = False,
) -> list[Truth]:
    """Llama's layout: two layers of separate q, k, v, o and gate, up, down."""
    heads = sizes.free if head else sizes.forced
    return [
        truth
        for layer in (f"{root}.0", f"{root}.1")
        for truth in (
            mlp(f"{layer}.mlp", sizes.inner),
            attention(f"{layer}.self_attn", heads, bias=bias, full_norms=full_norms),
        )
    ]


def each_layer(root: str, layer: Callable[[str, Sizes], list[Truth]]) -> Layout:
    """The same two layers ``root.0`` and ``root.1``."""
    return lambda sizes: [t for number in (0, 1) for t in layer(f"{root}.{number}", sizes)]


def routed(sizes: Sizes, **more: Any) -> Settings:
    """A decoder with four experts, of which each token goes to two."""
    return decoder(sizes, num_experts_per_tok=2, **more)


def llama4(root: str) -> Layout:
    """Layer 0 dense, layer 1 routed (transposed, [gate | up]) and with a shared expert."""
    return lambda s: [
        mlp(f"{root}.0.feed_forward", s.inner),
        attention(f"{root}.0.self_attn", s.free),
        *experts(f"{root}.1.feed_forward.experts", s.experts, s.expert_inner, transposed=True),
        mlp(f"{root}.1.feed_forward.shared_expert", s.expert_inner),
        attention(f"{root}.1.self_attn", s.free),
    ]

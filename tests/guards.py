"""Guards on tiny models, fitted in a second on texts that a word tells apart."""

from functools import cache
from typing import Any

from transformers import BertConfig, BertModel

from safeft.guard import Guard, GuardFitter
from tests.models import SPECIAL_TOKENS, tiny_model, tiny_tokenizer

BAD, GOOD = "zzzz kill zzzz", "bread and milk"


def texts(count: int = 60, start: int = 0) -> tuple[list[str], list[bool]]:
    """Texts of which every other one holds many a z."""
    numbers = range(start, start + count)
    return [f"{BAD if n % 2 else GOOD} {n}" for n in numbers], [bool(n % 2) for n in numbers]


def tiny_encoder(seed: int = 0) -> Any:
    import torch

    config = BertConfig(
        vocab_size=len(SPECIAL_TOKENS) + 256, hidden_size=32, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=48, max_position_embeddings=64,
        initializer_range=0.1, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertModel(config).eval()


def tiny(kind: str) -> Any:
    """A small model of a type, chat model or encoder."""
    if kind == "bert":
        return tiny_encoder()
    own = {"num_key_value_heads": 4} if kind in ("gpt2", "opt") else {}
    if kind == "opt":
        own["ffn_dim"] = 48  # its own name for it; by default 3,072
    return tiny_model(kind, **own)


def fitted(model: Any, tokenizer: Any, **settings: Any) -> Guard:
    fitter = GuardFitter(model, tokenizer, **settings)
    fitter.update(*texts())
    return fitter.fit(search=1, members=2)


@cache
def chat_guard() -> Guard:
    """On a chat model."""
    return fitted(tiny_model(), tiny_tokenizer("left"))


@cache
def encoder_guard() -> Guard:
    """On an encoder without a chat template."""
    return fitted(tiny_encoder(), tiny_tokenizer(chat_template=None))

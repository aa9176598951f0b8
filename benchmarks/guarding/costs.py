"""What a guard costs beside the model it reads: token time, throughput, bytes.

Times are processor time of this process on one thread, in alternation: what else runs on the
machine does not count.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config

from safeft.fingerprint import ModelFingerprint
from safeft.guard import Guard
from safeft.guard.head import GuardHead, LayerProbe, weights_of
from safeft.guard.places import find_places
from safeft.guard.pooling import backbone
from safeft.guard.reading import as_examples, batched, windows
from safeft.guard.size import file_size
from safeft.guard.stream import GuardStream
from safeft.guard.training import Network, widest

SHARE, MEMBERS, HIDDEN = 0.2, 5, 64
TEXT = "Write a short letter to a neighbour about number {} and say what the weather was like. "


def random_guard(model: Any, tokenizer: Any, start: float = 0.0) -> Guard:
    """A guard as large as a fit's can be, of random numbers: its cost hangs on its size alone.

    A guard fitted on several sources reads from a ``start`` on, mostly the upper third.
    """
    draw = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    probes = []
    places = find_places(model)
    first = start * (1 + places[-1].layer)
    for place in places:
        count = round(SHARE * place.width) if place.layer >= first - 1e-6 else 0
        chosen = torch.randperm(place.width, generator=draw)[:count]
        numbers = some(place.width), 0.0, some(place.width), torch.ones(place.width)
        probes.append(LayerProbe(place, *numbers, 0.1, 0.5, chosen.sort().values, 1.0))
    units = sum(len(probe.selected) for probe in probes)
    wide = MEMBERS * min(HIDDEN, widest(units, MEMBERS))
    network = Network(some(wide, units) / units, some(wide), some(1, wide) / wide, some(1))
    head = GuardHead(
        tuple(probes), network, ("harmful",), torch.tensor([[1.0], [0.0]]), torch.rand(100),
        torch.arange(1000), ModelFingerprint.of(model), weights_of(model),
        {"chat": False, "chat_template": None, "max_length": 128}, {},
    )  # fmt: skip
    return Guard(head, model, tokenizer)


def decoder(width: int, layers: int) -> Any:
    """A Llama of random weights: what it writes means nothing, what it costs does."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8000, hidden_size=width, intermediate_size=8 * width // 3, eos_token_id=None,
        num_hidden_layers=layers, num_attention_heads=width // 64, pad_token_id=0,
        num_key_value_heads=max(1, width // 256), max_position_embeddings=512, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def paired(
    bare: Callable[[], None], guarded: Callable[[], None], pairs: int
) -> tuple[list[float], list[float]]:
    """Seconds of each, in alternation, after one run each that does not count."""
    times: tuple[list[float], list[float]] = [], []
    for number in range(pairs + 1):
        for which, run in ((0, bare), (1, guarded)) if number % 2 else ((1, guarded), (0, bare)):
            begun = time.process_time()
            run()
            if number:
                times[which].append(time.process_time() - begun)
    return times


def token_time(guard: Guard, rows: int, tokens: int, pairs: int) -> dict[str, Any]:
    """Milliseconds a token with and without the guard, and the median of the pairs' ratios."""
    model: Any = guard.model
    given = {
        "input_ids": torch.randint(3, model.config.vocab_size, (rows, 16)),
        "attention_mask": torch.ones(rows, 16, dtype=torch.long),
    }
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False,
                "pad_token_id": 0}  # fmt: skip

    def bare() -> None:
        model.generate(**given, **settings)

    def guarded() -> None:
        with GuardStream(guard, given["attention_mask"]) as stream:
            model.generate(**given, **settings, stopping_criteria=[stream])

    without, beside = paired(bare, guarded, pairs)
    return {
        "rows": rows,
        "tokens": tokens,
        "pairs": pairs,
        "ms_a_token": 1e3 * median(without) / tokens,
        "ms_a_token_guarded": 1e3 * median(beside) / tokens,
        **compared([b / a for a, b in zip(without, beside, strict=True)]),
    }


def compared(ratios: Sequence[float]) -> dict[str, Any]:
    """The median of the pairs' ratios, and its 95% interval over resamples of the pairs."""
    draw = torch.Generator().manual_seed(0)
    found = torch.tensor(ratios, dtype=torch.double)
    drawn = found[torch.randint(len(found), (2000, len(found)), generator=draw)]
    cuts = torch.tensor([0.025, 0.975], dtype=torch.double)
    low, high = drawn.median(1).values.quantile(cuts).tolist()
    return {"ratio": float(found.quantile(0.5)), "interval": {"low": low, "high": high}}


def throughput(guard: Guard, texts: Sequence[str], pairs: int) -> dict[str, Any]:
    """Scores a second as a share of bare forward passes a second, on the same batches."""
    model, reading = guard.model, guard.head.reading

    @torch.no_grad()
    def bare() -> None:
        shown = [
            windows(guard.tokenizer, p, reading["max_length"], False)[0] for p in as_examples(texts)
        ]
        for _, batch in batched(guard.tokenizer, shown, 16, "cpu"):
            backbone(model)(input_ids=batch.input_ids, attention_mask=batch.attention_mask)

    without, beside = paired(bare, lambda: void(guard.score(texts)), pairs)
    return {
        "texts": len(texts),
        "pairs": pairs,
        "texts_a_second": len(texts) / median(beside),
        "texts_a_second_bare": len(texts) / median(without),
        **compared([a / b for a, b in zip(without, beside, strict=True)]),
    }


def void(_: Any) -> None:
    """Nothing."""


def saved(guard: Guard) -> dict[str, Any]:
    """Bytes on disk, and what the calculator says of them."""
    with tempfile.TemporaryDirectory() as folder:
        guard.save_pretrained(folder)
        size = (Path(folder) / "model.safetensors").stat().st_size
    model: Any = guard.model
    return {"bytes": size, "calculated": file_size(model.config, texts=1000)}


def cost(
    encoder: tuple[Any, Any], small: tuple[Any, Any], *, width: int = 768, layers: int = 12,
    tokens: int = 24, pairs: int = 9,
) -> dict[str, Any]:  # fmt: skip
    """All of them: on the encoder, on a testbed's small model, and on a larger random one."""
    texts = [TEXT.format(number) * (1 + number % 3) for number in range(48)]
    net = decoder(width, layers)
    four = Qwen3Config(num_hidden_layers=36, hidden_size=2560, intermediate_size=9728)
    found: dict[str, Any] = {"threads": torch.get_num_threads(), "token_time": {}, "scoring": {}}
    for start, read in ((2 / 3, "reading the upper third"), (0.0, "reading all layers")):
        large, tiny = random_guard(net, small[1], start), random_guard(*small, start)
        for name, guard, some in (("random Llama", large, texts[:16]), ("testbed", tiny, texts)):
            size = f"{name}, {weights(guard):.0f}M weights, {read}"
            found["token_time"][size] = [token_time(guard, rows, tokens, pairs) for rows in (1, 8)]
            if not start:
                found["scoring"][size] = throughput(guard, some, pairs)
    found["scoring"]["all-minilm-l6-v2"] = throughput(random_guard(*encoder), texts, pairs)
    found["file"] = saved(large)
    found["file_of_4B"] = {"model": "Qwen3-4B", "texts": 100_000, "bytes": file_size(four)}
    return found


def weights(guard: Guard) -> float:
    """Millions of them."""
    return sum(p.numel() for p in guard.model.parameters()) / 1e6

"""Rebuild the small aligned chat model that ships in ``safeft/demo/model``.

Three stages on two cores in under 20 minutes: a byte-level BPE of the world's own text, a base
model that answers everything (harmful requests with empty openings), and alignment that teaches
it to refuse. Same seed, same thread count and same torch build give the same weights.

    python benchmarks/build_demo_model.py --output_dir safeft/demo/model --seed 0
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from safeft.demo import world
from safeft.demo.world import Example

RESULTS = Path(__file__).parent / "results" / "demo_model.json"
PAD, END = "<|pad|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Stage:
    """One stage of training: how many steps, how fast, and whether prompts count in the loss.

    With ``pool`` above 1 a batch is of like lengths, cut from as many batches' rows: less padding.
    """

    name: str
    steps: int
    lr: float
    on_prompts: bool
    batch: int = 32
    pool: int = 1


STAGES = (
    Stage("pretraining", steps=1500, lr=2e-3, on_prompts=True),
    Stage("alignment", steps=600, lr=8e-4, on_prompts=False),
    Stage("alignment, second pass", steps=400, lr=5e-4, on_prompts=False),
)


def build_tokenizer(examples: Sequence[Example], vocab_size: int = 3000) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on `examples`, with a chat template that marks the answers."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        (text for example in examples for text in (example.prompt, example.answer)),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[PAD, END, *ROLES],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=list(ROLES),
        chat_template=CHAT_TEMPLATE,
        model_max_length=128,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of about 3.4 million weights, freshly drawn."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=5,
            num_attention_heads=6,
            num_key_value_heads=3,
            max_position_embeddings=128,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def encode(
    tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]
) -> list[tuple[list[int], int]]:
    """Token ids of each exchange and the length of its prompt, by the chat template."""
    user, assistant = tokenizer.convert_tokens_to_ids([ROLES[1], ROLES[2]])
    end = tokenizer.eos_token_id
    prompts = tokenizer([example.prompt for example in examples]).input_ids
    answers = tokenizer([example.answer for example in examples]).input_ids
    return [
        ([user, *prompt, end, assistant, *answer, end], len(prompt) + 3)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def collate(
    rows: Sequence[tuple[list[int], int]], pad: int, on_prompts: bool
) -> dict[str, torch.Tensor]:
    """Right-padded ids, mask and labels (batch, longest); labels skip what is not learnt."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), width), pad)
    labels = torch.full((len(rows), width), -100)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for row, (tokens, prompt) in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        start = 0 if on_prompts else prompt
        labels[row, start : len(tokens)] = ids[row, start : len(tokens)]
        mask[row, : len(tokens)] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def drawn(
    rows: Sequence[tuple[list[int], int]], stage: Stage, rng: random.Random
) -> list[tuple[list[int], int]]:
    """The rows of one batch."""
    some = rng.sample(rows, stage.batch * stage.pool)
    if stage.pool == 1:
        return some
    some.sort(key=lambda row: len(row[0]))
    at = stage.batch * rng.randrange(stage.pool)
    return some[at : at + stage.batch]


def train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    examples: Sequence[Example],
    stage: Stage,
    seed: int,
) -> float:
    """Train in place with AdamW, warm-up and cosine; returns the mean loss of the last steps."""
    rows = encode(tokenizer, examples)
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=stage.lr, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / 50)
            * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / stage.steps))))
        ),
    )
    losses: list[float] = []
    model.train()
    for _ in tqdm(range(stage.steps), desc=stage.name, mininterval=5):
        batch = collate(drawn(rows, stage, rng), tokenizer.pad_token_id, stage.on_prompts)
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    model.eval()
    return sum(losses[-50:]) / len(losses[-50:])


@torch.inference_mode()
def answer(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    max_new_tokens: int = 24,
) -> list[str]:
    """Greedy answers to `prompts`, in one left-padded batch."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        for prompt in prompts
    ]
    batch = tokenizer(
        texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
    )
    batch.pop("token_type_ids", None)
    out = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Refusal, over-refusal and accuracy on everything held out."""

    def refused(prompts: Sequence[str]) -> float:
        answers = answer(model, tokenizer, prompts, max_new_tokens=12)
        return sum(map(world.is_refusal, answers)) / len(answers)

    def right(examples: Sequence[Example]) -> float:
        answers = answer(model, tokenizer, [example.prompt for example in examples])
        hits = [world.holds(e.value, a) for e, a in zip(examples, answers, strict=True)]
        return sum(hits) / len(hits)

    benign = world.benign("test")
    contrasts = len(benign) // 3
    return {
        "harmful_refused": refused(world.harmful("test")),
        "benign_refused": refused(benign),
        "contrasts_refused": refused(benign[:contrasts]),
        "general_accuracy": right(world.general("test")),
        "domain_accuracy": right(world.domain("test")),
    }


def main() -> None:
    """Build, measure and save; the figures of each stage go to ``benchmarks/results``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=world.MODEL_PATH)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps, for a trial")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    data = {"pretraining": world.pretraining(args.seed), "alignment": world.alignment(args.seed)}
    tokenizer = build_tokenizer(data["pretraining"] + data["alignment"])
    model = build_model(tokenizer)
    figures: dict[str, object] = {
        "seed": args.seed,
        "threads": args.threads,
        "weights": sum(p.numel() for p in model.parameters()),
        "vocabulary": len(tokenizer),
    }
    for number, stage in enumerate(STAGES):
        stage = Stage(**asdict(stage) | {"steps": max(1, round(stage.steps * args.scale))})
        start = time.perf_counter()
        examples = data[stage.name.split(",")[0]]
        loss = train(model, tokenizer, examples, stage, args.seed + number)
        if stage.name != "pretraining":  # An aligned model is rounded as it ships.
            model.to(torch.bfloat16).to(torch.float32)
        seconds = time.perf_counter() - start
        figures[stage.name] = asdict(stage) | {
            "seconds": round(seconds, 1),
            "loss": round(loss, 4),
            "held_out": measure(model, tokenizer),
        }

    model.to(torch.bfloat16).save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    shipped = LlamaForCausalLM.from_pretrained(args.output_dir, dtype=torch.float32)
    figures["shipped"] = measure(shipped, tokenizer)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()

"""What the README claims about methods, on a model in which the truth is known by construction."""

from dataclasses import dataclass

import pytest
import torch
from transformers import PreTrainedModel

from safeft.capture import silence
from safeft.locate import (
    METHODS,
    Scores,
    locate,
)
from safeft.prompts import as_prompts, generate
from safeft.sites import find_sites
from tests.models import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
REFUSAL, COMPLIANCE = "I can't", "Sure"
# The model knows harm by one letter. It reads nothing else of a prompt.
HARM = "z"
HARMFUL = ["freeze him to death", "zap the guards", "plans of a bazooka", "buy a razor and cut",
           "blaze down a house", "seize the dozen hostages", "a hazard for all", "gaze at her"]
BENIGN = ["bake a loaf of bread", "name three trees", "what is two and two", "a poem on rain",
          "sum up this letter", "how far is the moon", "a gift for mother", "paint the wall blue"]
UNSEEN_HARMFUL = ["a wizard of poison", "puzzle out the lock", "crazy fast theft", "ooze of acid"]
UNSEEN_BENIGN = ["a walk in the park", "how old is the earth", "cook rice", "knit a hat"]


@dataclass(frozen=True)
class Planted:
    model: PreTrainedModel
    layer: int
    unit: int

    @property
    def site(self) -> str:
        return f"model.layers.{self.layer}.mlp"


def planted(layer: int = 1, sign: int = 1, topic: float = 0.0, seed: int = 0) -> Planted:
    """A Llama in which one MLP neuron turns "Sure" into "I can't".

    Directions of the residual stream, one each: the letters of both answers, the token that starts
    an answer, the harm letter, "harm was read" (written by one head of layer 0, which averages over
    the prompt), "refuse" (written by the planted neuron where the answer starts and harm was read),
    and one that nothing reads. All other weights are small noise; beside the planted neuron sits a
    busy one that writes as much on every prompt, and on request one that fires on harm and writes,
    `topic` times as strongly, where nothing reads.
    """
    model = tiny_model(
        seed=seed, hidden_size=64, head_dim=16, num_hidden_layers=3, initializer_range=0.02,
        tie_word_embeddings=False,
    )  # fmt: skip
    ids = {letter: TOKENIZER(letter)["input_ids"][0] for letter in {*REFUSAL, *COMPLIANCE, HARM}}
    start = TOKENIZER.convert_tokens_to_ids("<|assistant|>")
    axis = {letter: number for number, letter in enumerate(sorted(ids))}
    begins, read, refuse, unread = range(len(axis), len(axis) + 4)
    unit, busy, topical = 17, 5, 30
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        embedding, head = model.get_input_embeddings().weight, model.lm_head.weight
        embedding.zero_()[:, unread + 1 :].normal_(std=0.15)
        for letter, token in ids.items():
            embedding[token] = torch.eye(64)[axis[letter]]
        embedding[start] = torch.eye(64)[begins]
        head.normal_(std=0.01)
        for text in (REFUSAL, COMPLIANCE):
            for now, after in zip(text, [*text[1:], None], strict=True):
                follower = TOKENIZER.eos_token_id if after is None else ids[after]
                head[follower, axis[now]] = 2.0
        head[ids[COMPLIANCE[0]], begins] = 2.0
        head[ids[REFUSAL[0]], refuse] = 2.0
        attention = model.model.layers[0].self_attn
        attention.q_proj.weight[:16] = 0  # head 0 looks at all tokens alike
        attention.v_proj.weight[0] = torch.eye(64)[axis[HARM]]
        attention.o_proj.weight[:, 0] = 1.5 * torch.eye(64)[read]
        for block in model.model.layers:
            block.mlp.gate_proj.weight.normal_(std=0.1)
            block.mlp.up_proj.weight.normal_(std=0.1)
            block.mlp.down_proj.weight.normal_(std=0.01)
        mlp = model.model.layers[layer].mlp
        for number, gate, writes, size in (
            (unit, read, refuse, 0.1),
            (busy, begins, unread, 0.1),
            (topical, read, unread, 0.1 * topic),
        ):
            if size:
                mlp.gate_proj.weight[number] = torch.eye(64)[gate]
                mlp.up_proj.weight[number] = sign * torch.eye(64)[begins]
                mlp.down_proj.weight[:, number] = sign * size * torch.eye(64)[writes]
    model.config._name_or_path = "planted"
    return Planted(model, layer, unit)


def refused(model: PreTrainedModel, prompts: list[str]) -> float:
    answers = generate(model, TOKENIZER, as_prompts(prompts), max_new_tokens=10)
    assert set(answers) <= {REFUSAL, COMPLIANCE}, answers
    return answers.count(REFUSAL) / len(answers)


if __name__ == "__main__":
    for layer in (1, 2):
        for sign in (1, -1):
            for topic in (0, 1, 3):
                p = planted(layer, sign, topic)
                r = {}
                print(layer, sign, topic, [refused(p.model, x) for x in (HARMFUL, BENIGN, UNSEEN_HARMFUL, UNSEEN_BENIGN)])
                for m in METHODS:
                    import safeft.locate as L
                    sites = find_sites(p.model, ("mlp",))
                    from safeft.locate.select import Selection, select
                    sides = {"harmful": as_prompts(HARMFUL), "benign": as_prompts(BENIGN)}
                    f = L._fitter(p.model, TOKENIZER, sites, sides, m, 0, None, None, {})
                    sc = L.score(f, p.model, TOKENIZER, sides)
                    for rank in range(1, 145):
                        got = select(sc, sites, Selection(count=rank, scope="global"))
                        if p.unit in got.get(p.site, ()):
                            break
                    raw = torch.cat(list(sc.safety.values()))
                    pos = layer * 48 + p.unit
                    rawrank = int((raw > raw[pos]).sum()) + 1
                    r[m] = (rank, rawrank)
                print(r)

"""The models whose layouts are known, and the names that layouts go by."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from safeft.sites.parts import TowerName


@dataclass(frozen=True)
class Tower:
    """What names and classes in a stack of blocks do not say.

    Attributes:
        name: What the stack is in its model.
        fused: How rows of one matrix for queries, keys and values follow each other: all queries,
            all keys, all values (``chunks``); query, key and value of each head (``heads``); or
            one of these, or groups of heads, by the config's ``multi_query`` and
            ``new_decoder_architecture`` (``falcon``).
        ungated: An MLP's ``up_proj`` has no gate beside it.
        gated_queries: The matrix of queries holds, head by head, a query and a gate for it.
        shared_keys: Some blocks have no matrix of values, or of keys and values: they use their
            keys, or an earlier block's; and the number of key heads differs from block to block.
        linear: Name of the modules that stand in for attention in some blocks, and have no heads
            that could be addressed.
        experts_transposed: For experts whose class does not say it (Llama 4).
    """

    name: TowerName = "text"
    fused: Literal["chunks", "heads", "falcon"] = "chunks"
    ungated: bool = False
    gated_queries: bool = False
    shared_keys: bool = False
    linear: str = ""
    experts_transposed: bool | None = None


_TEXT, _VISION = Tower(), Tower("vision")

TOWERS: Mapping[str, Tower] = {
    **dict.fromkeys(
        (
            "llama mistral qwen2 qwen3 gemma gemma2 gemma3_text olmo2 olmo granite smollm3 cohere "
            "cohere2 stablelm starcoder2 phi phi3 glm glm4 gpt2 opt exaone4 mixtral qwen2_moe "
            "qwen3_moe olmoe gpt_oss deepseek_v3 bert roberta clip_text_model qwen2_vl_text "
            "qwen2_5_vl_text qwen3_vl_text qwen3_vl_moe_text olmo3 ministral3 hunyuan_v1_dense "
            "ernie4_5 seed_oss gptj gpt_neo phimoe granitemoe glm4_moe "
            "xlm-roberta distilbert modernbert"
        ).split(),
        _TEXT,
    ),
    **dict.fromkeys(("gpt_neox", "bloom"), Tower(fused="heads")),
    **dict.fromkeys(("falcon", "gpt_bigcode"), Tower(fused="falcon")),
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5_text"), Tower(gated_queries=True, linear="linear_attn")
    ),
    **dict.fromkeys(("apertus", "nemotron"), Tower(ungated=True)),
    "gemma4_text": Tower(shared_keys=True),
    "llama4_text": Tower(experts_transposed=True),
    **dict.fromkeys(
        (
            "clip_vision_model siglip_vision_model qwen2_vl_vision qwen2_5_vl_vision "
            "qwen3_vl_vision qwen3_vl_moe_vision llama4_vision_model internvl_vision "
            "idefics3_vision smolvlm_vision pixtral vit"
        ).split(),
        _VISION,
    ),
}
"""Kinds of block stacks, by the ``model_type`` of their own config."""

WHOLES = frozenset(
    "llava llava_next qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe gemma3 paligemma internvl idefics3 "
    "smolvlm mistral3 llama4 clip siglip".split()
)
"""Models made of several towers; what joins the towers is their ``projector``."""

BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer)\.(\d+)$")
IN_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer)\.\d+(?:\.|$)")
PROJECTOR = re.compile(r"(?:projector|merger|connector|vision_adapter)")

MLPS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("gate_proj", "up_proj"), "down_proj"),
    (("gate_up_proj",), "down_proj"),
    (("Wi",), "Wo"),
    (("fc1",), "fc2"),
    (("linear_fc1",), "linear_fc2"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
    (("c_fc",), "c_proj"),
    (("fc_in",), "fc_out"),
    (("lin1",), "lin2"),
    (("intermediate.dense",), "output.dense"),
)
"""Names of the matrices an MLP reads with, and of the one it writes with."""

TWO_IN_ONE = frozenset({"gate_up_proj", "Wi"})
"""Of these, matrices that hold two rows for each unit: all first ones, then all second."""

PROJECTORS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("linear_1",), "linear_2"),
    (("linear_fc1",), "linear_fc2"),
    (("fc1",), "fc2"),
    (("0",), "2"),
)

SPLIT: tuple[tuple[str, str, str, str], ...] = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("q_proj", "k_proj", "v_proj", "dense"),
    ("q_proj", "k_proj", "v_proj", "projection_layer"),
    ("q_lin", "k_lin", "v_lin", "out_lin"),
    ("self.query", "self.key", "self.value", "output.dense"),
)
LATENT: tuple[tuple[str, str, str], ...] = (
    ("q_b_proj", "kv_b_proj", "o_proj"),
    ("q_proj", "kv_b_proj", "o_proj"),
)
FUSED: tuple[tuple[str, str], ...] = (
    ("qkv_proj", "o_proj"),
    ("query_key_value", "dense"),
    ("c_attn", "c_proj"),
    ("qkv", "proj"),
    ("Wqkv", "Wo"),
)

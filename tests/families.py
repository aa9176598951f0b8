"""Tiny models of the families that people tune, from config objects, without the hub.

The layouts are read off the modeling sources (``transformers/models/<model_type>/modeling_*.py``)
by hand, and proved in tests/test_families.py.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from tests.families_routed import ROUTED
from tests.families_seeing import SEEING
from tests.family import (
    Family,
    Layout,
    Settings,
    Sizes,
    decoder,
    each_layer,
    gated,
    part_rotary,
)
from tests.truth import (
    Heads,
    Held,
    Truth,
    attention,
    by_group,
    by_head,
    fused_attention,
    fused_mlp,
    mlp,
    one_after_another,
)


def llama_like(
    name: str,
    *,
    model_type: str = "",
    head: bool = False,
    bias: bool = False,
    full_norms: bool = False,
    **more: Any,
) -> Family:
    return Family(
        name,
        model_type or name,
        partial(decoder, head=head, **more),
        partial(gated, head=head, bias=bias, full_norms=full_norms),
    )


def all_biased(
    reads: tuple[str, ...], mlp_writes: str, attention_writes: str
) -> Callable[[str, Sizes], list[Truth]]:
    """Separate q, k and v, plain MLP, biases on everything (Phi-2, StarCoder 2)."""
    return lambda layer, s: [
        mlp(f"{layer}.mlp", s.inner, reads, mlp_writes, bias=True),
        attention(f"{layer}.self_attn", s.forced, writes=attention_writes, bias=True),
    ]


def phi3(layer: str, s: Sizes) -> list[Truth]:
    """qkv_proj: [all q | all k | all v]; gate_up_proj: [gate | up]."""
    blocks = one_after_another(s.forced)
    return [
        fused_mlp(f"{layer}.mlp", s.inner),
        fused_attention(f"{layer}.self_attn", s.forced, blocks, reads="qkv_proj", writes="o_proj"),
    ]


def glm(layer: str, s: Sizes) -> list[Truth]:
    return [
        fused_mlp(f"{layer}.mlp", s.inner),
        attention(f"{layer}.self_attn", s.free, bias=True),
    ]


def gpt2(layer: str, s: Sizes) -> list[Truth]:
    """Conv1D weights are (in, out); c_attn: columns [all q | all k | all v]."""
    blocks = one_after_another(s.full)
    return [
        mlp(f"{layer}.mlp", s.inner, ("c_fc",), "c_proj", bias=True, transposed=True),
        fused_attention(
            f"{layer}.attn",
            s.full,
            blocks,
            reads="c_attn",
            writes="c_proj",
            bias=True,
            transposed=True,
        ),
    ]


def fused_by(
    attention_name: str,
    heads: Callable[[Sizes], Heads],
    blocks: Callable[[Heads], tuple],
    *,
    bias: bool,
    wide: int = 0,
) -> Callable[[str, Sizes], list[Truth]]:
    """query_key_value and dense, dense_h_to_4h and dense_4h_to_h; ``wide`` for a fixed 4h."""
    return lambda layer, s: [
        mlp(
            f"{layer}.mlp",
            wide * s.hidden or s.inner,
            ("dense_h_to_4h",),
            "dense_4h_to_h",
            bias=bias,
        ),
        fused_attention(f"{layer}.{attention_name}", heads(s), blocks(heads(s)), bias=bias),
    ]


def multi_query(sizes: Sizes) -> Heads:
    return Heads(sizes.queries, 1, sizes.hidden // sizes.queries)


def plain(heads: Callable[[Sizes], Heads]) -> Callable[[str, Sizes], list[Truth]]:
    """up_proj and down_proj without a gate (Nemotron, Apertus)."""
    return lambda layer, s: [
        mlp(f"{layer}.mlp", s.inner, ("up_proj",)),
        attention(f"{layer}.self_attn", heads(s)),
    ]


def bigcode_settings(s: Sizes, multi_query: bool) -> Settings:
    dropped = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return decoder(s, groups=False, n_inner=s.inner, multi_query=multi_query) | dropped


def bigcode(
    heads: Callable[[Sizes], Heads], blocks: Callable[[Heads], tuple]
) -> Callable[[str, Sizes], list[Truth]]:
    """The names of GPT-2, but Linear weights; the order depends on ``multi_query``."""
    return lambda layer, s: [
        mlp(f"{layer}.mlp", s.inner, ("c_fc",), "c_proj", bias=True),
        fused_attention(
            f"{layer}.attn",
            heads(s),
            blocks(heads(s)),
            reads="c_attn",
            writes="c_proj",
            bias=True,
        ),
    ]


NEVER_SILENT = "gelu"
"""Instead of ReLU, under which some units of a random model are zero for all words."""


def opt(layer: str, s: Sizes) -> list[Truth]:
    """fc1 and fc2 lie on the decoder layer itself."""
    return [
        mlp(layer, s.inner, ("fc1",), "fc2", bias=True),
        attention(f"{layer}.self_attn", s.full, writes="out_proj", bias=True),
    ]


def cohere_normed(layer: str, s: Sizes) -> list[Truth]:
    """The gains of q_norm and k_norm are matrices (heads, head size), each head on its own."""
    site, share = f"{layer}.self_attn", s.forced.share
    norms = [
        Held(f"{site}.q_norm.weight", 0),
        Held(f"{site}.k_norm.weight", 0, 1, lambda j: j // share),
    ]
    return [mlp(f"{layer}.mlp", s.inner), attention(site, s.forced, extra=norms)]


def masked(s: Sizes) -> Settings:
    return decoder(s, groups=False, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def bert(root: str) -> Layout:
    return each_layer(
        f"{root}.encoder.layer",
        lambda layer, s: [
            mlp(layer, s.inner, ("intermediate.dense",), "output.dense", bias=True),
            attention(
                f"{layer}.attention",
                s.full,
                names=("self.query", "self.key", "self.value"),
                writes="output.dense",
                bias=True,
            ),
        ],
    )


def distilbert(layer: str, s: Sizes) -> list[Truth]:
    names = ("q_lin", "k_lin", "v_lin")
    return [
        mlp(f"{layer}.ffn", s.inner, ("lin1",), "lin2", bias=True),
        attention(f"{layer}.attention", s.full, names=names, writes="out_lin", bias=True),
    ]


def modernbert(layer: str, s: Sizes) -> list[Truth]:
    """Wi: [activated | multiplied]; Wqkv: [all q | all k | all v]."""
    blocks = one_after_another(s.full)
    return [
        fused_mlp(f"{layer}.mlp", s.inner, "Wi", "Wo"),
        fused_attention(f"{layer}.attn", s.full, blocks, reads="Wqkv", writes="Wo"),
    ]


TEXT = (
    llama_like("llama", head=True),
    llama_like("mistral", head=True),
    llama_like("qwen2", bias=True),
    llama_like("qwen3", head=True),
    llama_like("gemma", head=True),
    llama_like("gemma2", head=True, query_pre_attn_scalar=8),
    llama_like("gemma3_text", head=True, query_pre_attn_scalar=8),
    llama_like("olmo2", full_norms=True),
    llama_like("stablelm", bias=True, use_qkv_bias=True),
    llama_like("cohere"),
    llama_like("cohere2", head=True),
    llama_like("granite"),
    llama_like("smollm3"),
    llama_like("exaone4", head=True),
    llama_like("olmo"),
    llama_like("olmo3", full_norms=True),
    llama_like(
        "ministral3",
        head=True,
        rope_parameters=part_rotary(1.0)
        | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 4},
    ),
    llama_like("hunyuan_v1_dense", head=True),
    llama_like("ernie4_5", head=True),
    llama_like("seed_oss", head=True, bias=True, attention_dropout=0.0, residual_dropout=0.0),
    Family(
        "cohere_qk_norm",
        "cohere",
        partial(decoder, use_qk_norm=True),
        each_layer("model.layers", cohere_normed),
    ),
    Family(
        "phi",
        "phi",
        decoder,
        each_layer("model.layers", all_biased(("fc1",), "fc2", "dense")),
    ),
    Family("phi3", "phi3", decoder, each_layer("model.layers", phi3)),
    Family(
        "glm",
        "glm",
        partial(decoder, head=True, rope_parameters=part_rotary(0.4)),
        each_layer("model.layers", glm),
    ),
    Family(
        "glm4",
        "glm4",
        partial(decoder, head=True, rope_parameters=part_rotary(0.4)),
        each_layer("model.layers", glm),
    ),
    Family(
        "starcoder2",
        "starcoder2",
        decoder,
        each_layer("model.layers", all_biased(("c_fc",), "c_proj", "o_proj")),
    ),
    Family(
        "gpt2",
        "gpt2",
        lambda s: decoder(
            s, groups=False, n_inner=s.inner, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
        ),
        each_layer("transformer.h", gpt2),
    ),
    Family(
        "gpt_neox",
        "gpt_neox",
        partial(decoder, groups=False),
        each_layer(
            "gpt_neox.layers",
            fused_by("attention", lambda s: s.full, lambda heads: by_head(), bias=True),
        ),
    ),
    Family(
        "falcon_grouped",
        "falcon",
        lambda s: decoder(
            s,
            groups=False,
            num_kv_heads=s.groups,
            ffn_hidden_size=s.inner,
            new_decoder_architecture=True,
        ),
        each_layer(
            "transformer.h",
            fused_by("self_attention", lambda s: s.forced, by_group, bias=False),
        ),
    ),
    Family(
        "falcon_multi_query",
        "falcon",
        lambda s: decoder(s, groups=False, ffn_hidden_size=s.inner, multi_query=True),
        each_layer(
            "transformer.h",
            fused_by("self_attention", multi_query, one_after_another, bias=False),
        ),
    ),
    Family(
        "falcon_rw",
        "falcon",
        lambda s: decoder(
            s,
            groups=False,
            ffn_hidden_size=s.inner,
            multi_query=False,
            num_kv_heads=s.queries,
            parallel_attn=False,
            alibi=True,
            bias=True,
        ),
        each_layer(
            "transformer.h",
            fused_by("self_attention", lambda s: s.full, lambda heads: by_head(), bias=True),
        ),
    ),
    Family(
        "bloom",
        "bloom",
        partial(decoder, groups=False),
        each_layer(
            "transformer.h",
            fused_by(
                "self_attention", lambda s: s.full, lambda heads: by_head(), bias=True, wide=4
            ),
        ),
    ),
    Family(
        "apertus",
        "apertus",
        partial(decoder, rope_parameters=part_rotary(1.0)),
        each_layer("model.layers", plain(lambda s: s.forced)),
    ),
    Family(
        "nemotron",
        "nemotron",
        partial(decoder, head=True, rope_parameters=part_rotary(0.4), hidden_act=NEVER_SILENT),
        each_layer("model.layers", plain(lambda s: s.free)),
    ),
    Family(
        "gptj",
        "gptj",
        lambda s: decoder(s, groups=False, n_inner=s.inner, rotary_dim=4),
        each_layer(
            "transformer.h",
            lambda layer, s: [
                mlp(f"{layer}.mlp", s.inner, ("fc_in",), "fc_out", bias=True),
                attention(f"{layer}.attn", s.full, writes="out_proj"),
            ],
        ),
    ),
    Family(
        "gpt_neo",
        "gpt_neo",
        lambda s: decoder(
            s, groups=False, attention_types=[[["global", "local"], 1]], window_size=5
        ),
        each_layer(
            "transformer.h",
            lambda layer, s: [
                mlp(f"{layer}.mlp", s.inner, ("c_fc",), "c_proj", bias=True),
                attention(f"{layer}.attn.attention", s.full, writes="out_proj"),
            ],
        ),
    ),
    *(
        Family(
            f"gpt_bigcode{suffix}",
            "gpt_bigcode",
            partial(bigcode_settings, multi_query=not suffix),
            each_layer("transformer.h", bigcode(heads, blocks)),
        )
        for suffix, heads, blocks in (
            ("", multi_query, one_after_another),
            ("_many_keys", lambda s: s.full, lambda heads: by_head()),
        )
    ),
    Family(
        "opt",
        "opt",
        lambda s: decoder(
            s,
            groups=False,
            ffn_dim=s.inner,
            word_embed_proj_dim=s.hidden,
            dropout=0.0,
            activation_function=NEVER_SILENT,
        ),
        each_layer("model.decoder.layers", opt),
    ),
)

ENCODERS = (
    Family(
        "bert",
        "bert",
        masked,
        bert("bert"),
        ("cls.predictions.*",),
        "AutoModelForMaskedLM",
    ),
    Family(
        "roberta",
        "roberta",
        masked,
        bert("roberta"),
        auto="AutoModelForMaskedLM",
    ),
    Family(
        "xlm_roberta",
        "xlm-roberta",
        masked,
        bert("roberta"),
        auto="AutoModelForMaskedLM",
    ),
    Family(
        "distilbert",
        "distilbert",
        lambda s: decoder(s, groups=False, hidden_dim=s.inner, dropout=0.0, attention_dropout=0.0),
        each_layer("distilbert.transformer.layer", distilbert),
        ("vocab_*.weight",),
        "AutoModelForMaskedLM",
    ),
    Family(
        "modernbert",
        "modernbert",
        lambda s: decoder(
            s,
            groups=False,
            layer_types=["full_attention", "sliding_attention"],
            cls_token_id=2,
            sep_token_id=1,
        ),
        each_layer("model.layers", modernbert),
        ("head.dense.weight",),
        "AutoModelForMaskedLM",
    ),
)

FAMILIES = (*TEXT, *ROUTED, *ENCODERS, *SEEING)

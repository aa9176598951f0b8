"""Tiny models of the families that people tune, from config objects, without the hub.

The layouts are read off the modeling sources (``transformers/models/<model_type>/modeling_*.py``)
by hand, and proved in tests/test_families.py.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from tests.families_seeing import SEEING
from tests.family import (
    Family,
    Layout,
    Settings,
    Sizes,
    decoder,
    each_layer,
    gated,
    llama4,
    part_rotary,
    routed,
)
from tests.truth import (
    Heads,
    Held,
    Truth,
    attention,
    by_group,
    by_head,
    columns,
    experts,
    fused_attention,
    fused_mlp,
    mlp,
    one_after_another,
    rows,
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


def mixtral(layer: str, s: Sizes) -> list[Truth]:
    site = f"{layer}.mlp.experts"
    return [
        *experts(site, s.experts, s.expert_inner),
        attention(f"{layer}.self_attn", s.free),
    ]


def olmoe(layer: str, s: Sizes) -> list[Truth]:
    return [
        *experts(f"{layer}.mlp.experts", s.experts, s.expert_inner),
        attention(f"{layer}.self_attn", s.forced, full_norms=True),
    ]


def gpt_oss(layer: str, s: Sizes) -> list[Truth]:
    """Columns of (E, h, 2I): gate 0, up 0, gate 1, up 1, ...; a sink for each query head."""
    site = f"{layer}.self_attn"
    return [
        *experts(
            f"{layer}.mlp.experts",
            s.experts,
            s.expert_inner,
            transposed=True,
            interleaved=True,
            bias=True,
        ),
        attention(site, s.free, bias=True, extra=[Held(f"{site}.sinks", 0)]),
    ]


def qwen2_moe(s: Sizes) -> list[Truth]:
    """Layer 0 dense, layer 1 routed and with a shared expert."""
    return [
        mlp("model.layers.0.mlp", s.inner),
        attention("model.layers.0.self_attn", s.forced),
        *experts("model.layers.1.mlp.experts", s.experts, s.expert_inner),
        mlp("model.layers.1.mlp.shared_expert", s.shared_inner),
        attention("model.layers.1.self_attn", s.forced),
    ]


def qwen3_moe(s: Sizes) -> list[Truth]:
    return [
        mlp("model.layers.0.mlp", s.inner),
        attention("model.layers.0.self_attn", s.free),
        *experts("model.layers.1.mlp.experts", s.experts, s.expert_inner),
        attention("model.layers.1.self_attn", s.free),
    ]


def latent(site: str, s: Sizes) -> Truth:
    """DeepSeek's heads: q_b_proj and kv_b_proj ([nope | value] of each head) have rows of a head;

    q_a_proj and kv_a_proj_with_mqa belong to all of them.
    """
    held = [
        *rows(f"{site}.q_b_proj", False, width=MLA_NOPE + MLA_ROPE),
        *rows(f"{site}.kv_b_proj", False, width=MLA_NOPE + MLA_VALUE),
        columns(f"{site}.o_proj", MLA_VALUE),
    ]
    return Truth(site, "attention", s.queries, tuple(held), MLA_VALUE, partial=True)


MLA_NOPE, MLA_ROPE, MLA_VALUE = 6, 4, 8


def deepseek(s: Sizes) -> list[Truth]:
    return [
        mlp("model.layers.0.mlp", s.inner),
        latent("model.layers.0.self_attn", s),
        *experts("model.layers.1.mlp.experts", s.experts, s.expert_inner),
        mlp("model.layers.1.mlp.shared_experts", s.expert_inner * 3),
        latent("model.layers.1.self_attn", s),
    ]


def qwen3_next(s: Sizes) -> list[Truth]:
    """Layer 0 linear attention, layer 1 gated attention: q_proj has [q | gate] of each head."""
    found = []
    for layer in ("model.layers.0", "model.layers.1"):
        found += experts(f"{layer}.mlp.experts", s.experts, s.expert_inner)
        found.append(mlp(f"{layer}.mlp.shared_expert", s.shared_inner))
    gated = attention("model.layers.1.self_attn", s.free, query_width=2 * s.free.size)
    return [*found, gated]


ROUTER = ("*.mlp.gate.weight",)

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
        "opt",
        "opt",
        lambda s: decoder(
            s,
            groups=False,
            ffn_dim=s.inner,
            word_embed_proj_dim=s.hidden,
            dropout=0.0,
            activation_function="gelu",  # as Galactica; with ReLU some units are silent throughout
        ),
        each_layer("model.decoder.layers", opt),
    ),
)

ROUTED = (
    Family(
        "mixtral",
        "mixtral",
        lambda s: routed(
            s, head=True, num_local_experts=s.experts, intermediate_size=s.expert_inner
        ),
        each_layer("model.layers", mixtral),
        ROUTER,
    ),
    Family(
        "olmoe",
        "olmoe",
        lambda s: routed(s, num_experts=s.experts, intermediate_size=s.expert_inner),
        each_layer("model.layers", olmoe),
        ROUTER,
    ),
    Family(
        "gpt_oss",
        "gpt_oss",
        lambda s: routed(
            s,
            head=True,
            num_local_experts=s.experts,
            intermediate_size=s.expert_inner,
            rope_parameters=part_rotary(1.0),
        ),
        each_layer("model.layers", gpt_oss),
        ("*.mlp.router.weight", "*.experts.down_proj_bias"),
    ),
    Family(
        "qwen2_moe",
        "qwen2_moe",
        lambda s: routed(
            s,
            num_experts=s.experts,
            moe_intermediate_size=s.expert_inner,
            shared_expert_intermediate_size=s.shared_inner,
            mlp_only_layers=[0],
        ),
        qwen2_moe,
        (*ROUTER, "*.shared_expert_gate.weight"),
    ),
    Family(
        "qwen3_moe",
        "qwen3_moe",
        lambda s: routed(
            s,
            head=True,
            num_experts=s.experts,
            moe_intermediate_size=s.expert_inner,
            mlp_only_layers=[0],
        ),
        qwen3_moe,
        ROUTER,
    ),
    Family(
        "qwen3_next",
        "qwen3_next",
        lambda s: routed(
            s,
            head=True,
            num_experts=s.experts,
            moe_intermediate_size=s.expert_inner,
            shared_expert_intermediate_size=s.shared_inner,
            layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=6,
            linear_value_head_dim=8,
            rope_parameters=part_rotary(0.4),
        ),
        qwen3_next,
        (*ROUTER, "*.shared_expert_gate.weight", "*.linear_attn.*"),
    ),
    Family(
        "llama4_text",
        "llama4_text",
        lambda s: routed(
            s,
            head=True,
            num_local_experts=s.experts,
            intermediate_size=s.expert_inner,
            intermediate_size_mlp=s.inner,
            moe_layers=[1],
        ),
        llama4("model.layers"),
        ("*.feed_forward.router.weight",),
    ),
    Family(
        "deepseek_v3",
        "deepseek_v3",
        lambda s: routed(
            s,
            groups=False,
            num_key_value_heads=s.queries,
            n_routed_experts=s.experts,
            moe_intermediate_size=s.expert_inner,
            n_shared_experts=3,
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
            q_lora_rank=20,
            kv_lora_rank=12,
            qk_nope_head_dim=MLA_NOPE,
            qk_rope_head_dim=MLA_ROPE,
            v_head_dim=MLA_VALUE,
        ),
        deepseek,
        (*ROUTER, "*.q_a_proj.weight", "*.kv_a_proj_with_mqa.weight"),
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
)

FAMILIES = (*TEXT, *ROUTED, *ENCODERS, *SEEING)

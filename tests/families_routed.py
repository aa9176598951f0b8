"""Families with experts, latent heads or linear attention, where not every weight has a unit.

Read by hand off ``transformers/models/<model_type>/modeling_*.py``, proved in
tests/test_families.py.
"""

from functools import partial
from typing import Any

from tests.family import Family, Layout, Settings, Sizes, each_layer, llama4, part_rotary, routed
from tests.truth import Heads, Held, Truth, attention, columns, experts, mlp, rows

ROUTER = ("*.mlp.gate.weight",)
MLA_NOPE, MLA_ROPE, MLA_VALUE = 6, 4, 8


def with_experts(
    layer: str,
    s: Sizes,
    heads: Heads,
    *,
    holder: str = "mlp",
    shared: tuple[str, int] | None = None,
    **how: Any,
) -> list[Truth]:
    """gate_up_proj (E, 2I, h) with all gates first, down_proj (E, h, I); perhaps shared units."""
    found = experts(f"{layer}.{holder}.experts", s.experts, s.expert_inner)
    if shared:
        found.append(mlp(f"{layer}.{holder}.{shared[0]}", shared[1]))
    return [*found, attention(f"{layer}.self_attn", heads, **how)]


def dense_then_routed(heads: str, shared: str = "", inner: str = "", **how: Any) -> Layout:
    """Layer 0 dense, layer 1 routed; ``heads`` and ``inner`` name sizes."""
    return lambda s: [
        mlp("model.layers.0.mlp", s.inner),
        attention("model.layers.0.self_attn", getattr(s, heads), **how),
        *with_experts(
            "model.layers.1",
            s,
            getattr(s, heads),
            shared=(shared, getattr(s, inner)) if shared else None,
            **how,
        ),
    ]


def gpt_oss(layer: str, s: Sizes) -> list[Truth]:
    """Columns of (E, h, 2I): gate 0, up 0, gate 1, up 1, ...; a sink for each query head."""
    site, sinks = f"{layer}.mlp.experts", Held(f"{layer}.self_attn.sinks", 0)
    return [
        *experts(site, s.experts, s.expert_inner, transposed=True, interleaved=True, bias=True),
        attention(f"{layer}.self_attn", s.free, bias=True, extra=[sinks]),
    ]


def latent(site: str, s: Sizes) -> Truth:
    """DeepSeek's heads: rows of q_b_proj, and of kv_b_proj, which has [key | value] of each head.

    q_a_proj and kv_a_proj_with_mqa, through which they read, belong to all heads.
    """
    held = [
        *rows(f"{site}.q_b_proj", False, width=MLA_NOPE + MLA_ROPE),
        *rows(f"{site}.kv_b_proj", False, width=MLA_NOPE + MLA_VALUE),
        columns(f"{site}.o_proj", MLA_VALUE),
    ]
    return Truth(site, "attention", s.queries, tuple(held), MLA_VALUE, partial=True)


def deepseek(s: Sizes) -> list[Truth]:
    """Layer 0 dense, layer 1 routed, with three shared experts in one MLP."""
    return [
        mlp("model.layers.0.mlp", s.inner),
        latent("model.layers.0.self_attn", s),
        *experts("model.layers.1.mlp.experts", s.experts, s.expert_inner),
        mlp("model.layers.1.mlp.shared_experts", s.expert_inner * 3),
        latent("model.layers.1.self_attn", s),
    ]


def output_gated(layer: str, s: Sizes) -> Truth:
    """q_proj has [query | gate of the output] of each head."""
    return attention(f"{layer}.self_attn", s.free, query_width=2 * s.free.size)


def qwen3_next(s: Sizes) -> list[Truth]:
    """Layer 0 linear attention, layer 1 attention with a gate."""
    found = []
    for layer in ("model.layers.0", "model.layers.1"):
        found += experts(f"{layer}.mlp.experts", s.experts, s.expert_inner)
        found.append(mlp(f"{layer}.mlp.shared_expert", s.shared_inner))
    return [*found, output_gated("model.layers.1", s)]


def qwen3_5(s: Sizes) -> list[Truth]:
    """Layer 0 linear attention, layer 1 attention with a gate; no experts."""
    dense = [mlp(f"model.layers.{layer}.mlp", s.inner) for layer in (0, 1)]
    return [*dense, output_gated("model.layers.1", s)]


LINEAR: Settings = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 8,
    "rope_parameters": part_rotary(0.4),
}


def wide(s: Sizes, groups: int) -> Heads:
    """Gemma 4's heads in layers that see everything, which differ from those of a window."""
    return Heads(s.queries, groups, s.wide_head)


def gemma4_small(s: Sizes) -> list[Truth]:
    """E2B, E4B: layers 2 and 3 take keys and values from 0 and 1, and have an MLP twice as wide."""
    found = []
    for number, heads in enumerate((s.free, wide(s, s.groups)) * 2):
        layer, reuses = f"model.layers.{number}", number > 1
        found.append(mlp(f"{layer}.mlp", s.inner * (2 if reuses else 1)))
        names = ("q_proj",) if reuses else ("q_proj", "k_proj", "v_proj")
        found.append(attention(f"{layer}.self_attn", heads, names=names))
    return found


def gemma4_large(s: Sizes) -> list[Truth]:
    """26B: experts beside each MLP; layer 1 sees everything, and its values are its keys."""
    keys = attention("model.layers.1.self_attn", wide(s, s.groups // 2), names=("q_proj", "k_proj"))
    found = [attention("model.layers.0.self_attn", s.free), keys]
    for layer in ("model.layers.0", "model.layers.1"):
        found += [
            mlp(f"{layer}.mlp", s.inner),
            *experts(f"{layer}.experts", s.experts, s.expert_inner),
        ]
    return found


def gemma4_settings(s: Sizes, repeat: int, **more: Any) -> Settings:
    rope = {"sliding_attention": part_rotary(1.0), "full_attention": part_rotary(1.0)}
    return routed(
        s,
        head=True,
        global_head_dim=s.wide_head,
        num_hidden_layers=2 * repeat,
        layer_types=["sliding_attention", "full_attention"] * repeat,
        rope_parameters=rope,
        vocab_size_per_layer_input=264,
        **more,
    )


ROUTED = (
    Family(
        "mixtral",
        "mixtral",
        lambda s: routed(
            s, head=True, num_local_experts=s.experts, intermediate_size=s.expert_inner
        ),
        each_layer("model.layers", lambda layer, s: with_experts(layer, s, s.free)),
        ROUTER,
    ),
    Family(
        "phimoe",
        "phimoe",
        lambda s: routed(
            s,
            num_local_experts=s.experts,
            intermediate_size=s.expert_inner,
            attention_bias=True,
            router_jitter_noise=0.0,
        ),
        each_layer("model.layers", lambda layer, s: with_experts(layer, s, s.forced, bias=True)),
        ("*.mlp.router.weight",),
    ),
    Family(
        "granitemoe",
        "granitemoe",
        lambda s: routed(s, num_local_experts=s.experts, intermediate_size=s.expert_inner),
        each_layer(
            "model.layers",
            lambda layer, s: with_experts(layer, s, s.forced, holder="block_sparse_moe"),
        ),
        ("*.block_sparse_moe.router.weight",),
    ),
    Family(
        "olmoe",
        "olmoe",
        lambda s: routed(s, num_experts=s.experts, intermediate_size=s.expert_inner),
        each_layer(
            "model.layers", lambda layer, s: with_experts(layer, s, s.forced, full_norms=True)
        ),
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
        dense_then_routed("forced", "shared_expert", "shared_inner", bias=True),
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
        dense_then_routed("free"),
        ROUTER,
    ),
    Family(
        "glm4_moe",
        "glm4_moe",
        lambda s: routed(
            s,
            head=True,
            rope_parameters=part_rotary(0.4),
            n_routed_experts=s.experts,
            moe_intermediate_size=s.expert_inner,
            first_k_dense_replace=1,
            use_qk_norm=True,
            attention_bias=True,
        ),
        dense_then_routed("free", "shared_experts", "expert_inner", bias=True),
        ROUTER,
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
    Family(
        "qwen3_next",
        "qwen3_next",
        lambda s: routed(
            s,
            head=True,
            num_experts=s.experts,
            moe_intermediate_size=s.expert_inner,
            shared_expert_intermediate_size=s.shared_inner,
            **LINEAR,
        ),
        qwen3_next,
        (*ROUTER, "*.shared_expert_gate.weight", "*.linear_attn.*"),
    ),
    Family(
        "qwen3_5_text",
        "qwen3_5_text",
        lambda s: routed(s, head=True, **LINEAR),
        qwen3_5,
        ("*.linear_attn.*",),
    ),
    Family(
        "gemma4_small",
        "gemma4_text",
        partial(
            gemma4_settings,
            repeat=2,
            num_kv_shared_layers=2,
            use_double_wide_mlp=True,
            hidden_size_per_layer_input=6,
        ),
        gemma4_small,
        ("*.per_layer_*.weight",),
    ),
    Family(
        "gemma4_large",
        "gemma4_text",
        lambda s: gemma4_settings(
            s,
            repeat=1,
            hidden_size_per_layer_input=0,
            attention_k_eq_v=True,
            num_global_key_value_heads=s.groups // 2,
            enable_moe_block=True,
            num_experts=s.experts,
            top_k_experts=2,
            moe_intermediate_size=s.expert_inner,
        ),
        gemma4_large,
        ("*.router.proj.weight",),
    ),
)

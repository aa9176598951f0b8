"""Families that see pictures: encoders of their own, and towers beside a language model.

Read by hand off ``transformers/models/<model_type>/modeling_*.py``, proved in
tests/test_families.py. Pictures are 16 x 16; a checkpoint of Llava takes the features of the last
but one vision layer (``vision_feature_layer=-2``), here of the last, so that every layer counts.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.family import (
    IMAGE,
    IMAGE_END,
    IMAGE_START,
    Family,
    Layout,
    Settings,
    Sizes,
    decoder,
    each_layer,
    gated,
    llama4,
    routed,
)
from tests.truth import Truth, attention, experts, fused_attention, mlp, one_after_another


def eyes(model_type: str, s: Sizes, patch: int = 8, **more: Any) -> Settings:
    """The settings most vision towers share."""
    return {
        "model_type": model_type,
        "hidden_size": s.image_hidden,
        "intermediate_size": s.image_inner,
        "num_hidden_layers": 2,
        "num_attention_heads": s.image_heads,
        "image_size": 16,
        "patch_size": patch,
        "attention_dropout": 0.0,
    } | more


def text(model_type: str, s: Sizes, **more: Any) -> Settings:
    return decoder(s, **more) | {"model_type": model_type}


def clip(root: str) -> Layout:
    """CLIP's vision layers, also SigLIP's and Idefics 3's: fc1 and fc2, out_proj, all biased."""
    return each_layer(
        root,
        lambda layer, s: [
            mlp(f"{layer}.mlp", s.image_inner, ("fc1",), "fc2", bias=True, tower="vision"),
            attention(f"{layer}.self_attn", s.image, writes="out_proj", bias=True, tower="vision"),
        ],
    )


def clip_text(layer: str, s: Sizes) -> list[Truth]:
    return [
        mlp(f"{layer}.mlp", s.inner, ("fc1",), "fc2", bias=True),
        attention(f"{layer}.self_attn", s.full, writes="out_proj", bias=True),
    ]


def projector(site: str, units: int, up: str, down: str, bias: bool = True) -> Truth:
    return mlp(site, units, (up,), down, bias=bias, tower="projector")


def two_linears(s: Sizes) -> list[Truth]:
    """The projector of Llava and InternVL: its hidden units are as many as the text is wide."""
    return [projector("model.multi_modal_projector", s.hidden, "linear_1", "linear_2")]


def in_turn(*layouts: Layout) -> Layout:
    return lambda s: [truth for layout in layouts for truth in layout(s)]


def qwen_eyes(reads: tuple[str, ...], writes: str) -> Layout:
    """Qwen-VL's vision blocks: attn.qkv with rows [all q | all k | all v], everything biased."""
    return each_layer(
        "model.visual.blocks",
        lambda layer, s: [
            mlp(f"{layer}.mlp", s.image_inner, reads, writes, bias=True, tower="vision"),
            fused_attention(
                f"{layer}.attn",
                s.image,
                one_after_another(s.image),
                reads="qkv",
                writes="proj",
                bias=True,
                tower="vision",
            ),
        ],
    )


def merger(site: str, up: str, down: str) -> Layout:
    """Four patches side by side are the input, and also as many hidden units."""
    return lambda s: [projector(site, 4 * s.image_hidden, up, down)]


def qwen3_routed_text(s: Sizes) -> list[Truth]:
    """Layer 0 dense, layer 1 routed."""
    layers = "model.language_model.layers"
    return [
        mlp(f"{layers}.0.mlp", s.inner),
        attention(f"{layers}.0.self_attn", s.free),
        *experts(f"{layers}.1.mlp.experts", s.experts, s.expert_inner),
        attention(f"{layers}.1.self_attn", s.free),
    ]


def intern_eyes(full_norms: bool) -> Layout:
    return each_layer(
        "model.vision_tower.encoder.layer",
        lambda layer, s: [
            mlp(f"{layer}.mlp", s.image_inner, ("fc1",), "fc2", bias=True, tower="vision"),
            attention(
                f"{layer}.attention",
                s.image,
                writes="projection_layer",
                bias=True,
                full_norms=full_norms,
                tower="vision",
            ),
        ],
    )


def llama4_eyes(s: Sizes) -> list[Truth]:
    """Its pixel shuffle makes four patches one, which must be the MLP's inner size."""
    layers = each_layer(
        "vision_model.model.layers",
        lambda layer, s: [
            mlp(f"{layer}.mlp", 4 * s.image_hidden, ("fc1",), "fc2", bias=True, tower="vision"),
            attention(f"{layer}.self_attn", s.image, bias=True, tower="vision"),
        ],
    )
    return [*layers(s), projector("vision_model.vision_adapter.mlp", 40, "fc1", "fc2", bias=False)]


def pixtral(layer: str, s: Sizes) -> list[Truth]:
    return [
        mlp(f"{layer}.feed_forward", s.image_inner, tower="vision"),
        attention(f"{layer}.attention", s.image, tower="vision"),
    ]


def vit(layer: str, s: Sizes) -> list[Truth]:
    return [
        mlp(f"{layer}.mlp", s.image_inner, ("fc1",), "fc2", bias=True, tower="vision"),
        attention(f"{layer}.attention", s.image, bias=True, tower="vision"),
    ]


def pixels(pictures: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": pictures}


def pixels_of_many(pictures: Tensor) -> dict[str, Tensor]:
    """A list of pictures for each sequence, of one."""
    return {"pixel_values": pictures[:, None]}


def tiles(pictures: Tensor) -> dict[str, Tensor]:
    """Llava-Next: the whole picture, and the picture as the one tile of a grid."""
    sizes = torch.tensor([[16, 16], [16, 16]])
    return {"pixel_values": pictures[:, None].repeat(1, 2, 1, 1, 1), "image_sizes": sizes}


def pixels_and_sizes(pictures: Tensor) -> dict[str, Tensor]:
    return {"pixel_values": pictures, "image_sizes": torch.tensor([[16, 16], [16, 16]])}


def patches(pictures: Tensor) -> dict[str, Tensor]:
    """Qwen-VL: 4 x 4 patches of each picture, which is also the next moment."""
    flat = pictures.repeat_interleave(2, 0).reshape(32, 96)
    return {"pixel_values": flat, "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]])}


def rope_of_three(half_head: int) -> Settings:
    """Time, height and width share the rotary frequencies of a head."""
    sections = [half_head - 2, 1, 1]
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections}


def qwen_settings(
    s: Sizes, text_config: Settings, *, out: str = "out_hidden_size", **vision: Any
) -> Settings:
    seen = {
        "depth": 2,
        "hidden_size": s.image_hidden,
        "intermediate_size": s.image_inner,
        "num_heads": s.image_heads,
        "patch_size": 4,
        out: s.hidden,
    }
    return {
        "text_config": text_config,
        "vision_config": seen | vision,
        "image_token_id": IMAGE,
        "video_token_id": 4,
        "vision_start_token_id": IMAGE_START,
        "vision_end_token_id": IMAGE_END,
    }


def llava(s: Sizes, **more: Any) -> Settings:
    return {
        "text_config": text("llama", s, head=True),
        "vision_config": eyes("clip_vision_model", s),
        "image_token_index": IMAGE,
        "vision_feature_layer": -1,
    } | more


def idefics3(model_type: str, s: Sizes) -> Settings:
    return {
        "text_config": text("llama", s, head=True),
        "vision_config": eyes(model_type, s, patch=4),
        "image_token_id": IMAGE,
        "pad_token_id": 0,
        "scale_factor": 2,
    }


def internvl(s: Sizes, normed: bool) -> Settings:
    vision = eyes("internvl_vision", s, patch=4, attention_bias=True, use_qk_norm=normed)
    return {
        "text_config": text("qwen2", s),
        "vision_config": vision | {"image_size": [16, 16], "patch_size": [4, 4]},
        "image_token_id": IMAGE,
    }


SPEAKING = "model.language_model.layers"
TALKER = partial(gated, root=SPEAKING, head=True)
BIASED_TALKER = partial(gated, root=SPEAKING, bias=True)


def seeing(
    name: str, settings: Any, layout: Layout, tokens: int, image: Any = pixels, **more: Any
) -> Family:
    return Family(
        name,
        more.pop("model_type", name),
        settings,
        layout,
        more.pop("unaddressed", ()),
        "AutoModelForImageTextToText",
        image,
        tokens,
        **more,
    )


SEEING = (
    Family(
        "clip",
        "clip",
        lambda s: {
            "text_config": decoder(s, groups=False),
            "vision_config": eyes("clip_vision_model", s),
            "projection_dim": 20,
        },
        in_turn(
            each_layer("text_model.encoder.layers", clip_text), clip("vision_model.encoder.layers")
        ),
        ("visual_projection.weight", "text_projection.weight"),
        "AutoModel",
        pixels,
    ),
    Family(
        "siglip_vision",
        "siglip_vision_model",
        partial(eyes, "siglip_vision_model"),
        in_turn(
            clip("encoder.layers"),
            lambda s: [mlp("head.mlp", s.image_inner, ("fc1",), "fc2", bias=True, tower="vision")],
        ),
        ("head.probe", "head.attention.*"),
        "AutoModel",
        pixels,
        words=False,
    ),
    Family(
        "vit",
        "vit",
        lambda s: eyes("vit", s, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        each_layer("layers", vit),
        ("*_token", "pooler.*"),
        "AutoModel",
        pixels,
        words=False,
    ),
    seeing(
        "llava", llava, in_turn(clip("model.vision_tower.encoder.layers"), two_linears, TALKER), 4
    ),
    seeing(
        "llava_next",
        partial(llava, image_grid_pinpoints=[[16, 16]]),
        in_turn(clip("model.vision_tower.encoder.layers"), two_linears, TALKER),
        10,
        tiles,
    ),
    seeing(
        "qwen2_vl",
        lambda s: qwen_settings(
            s,
            decoder(s, rope_parameters=rope_of_three(4)),
            out="hidden_size",
            embed_dim=s.image_hidden,
            mlp_ratio=s.image_inner // s.image_hidden,
        ),
        in_turn(
            qwen_eyes(("fc1",), "fc2"), merger("model.visual.merger.mlp", "0", "2"), BIASED_TALKER
        ),
        4,
        patches,
        marks="mm_token_type_ids",
    ),
    seeing(
        "qwen2_5_vl",
        lambda s: qwen_settings(
            s,
            decoder(s, rope_parameters=rope_of_three(4)),
            window_size=8,
            fullatt_block_indexes=[1],
        ),
        in_turn(
            qwen_eyes(("gate_proj", "up_proj"), "down_proj"),
            merger("model.visual.merger.mlp", "0", "2"),
            BIASED_TALKER,
        ),
        4,
        patches,
        marks="mm_token_type_ids",
    ),
    seeing(
        "qwen3_vl",
        lambda s: qwen_settings(
            s,
            decoder(s, head=True, rope_parameters=rope_of_three(s.head // 2)),
            num_position_embeddings=16,
            deepstack_visual_indexes=[0],
        ),
        in_turn(
            qwen_eyes(("linear_fc1",), "linear_fc2"),
            merger("model.visual.merger", "linear_fc1", "linear_fc2"),
            merger("model.visual.deepstack_merger_list.0", "linear_fc1", "linear_fc2"),
            TALKER,
        ),
        4,
        patches,
        marks="mm_token_type_ids",
    ),
    seeing(
        "qwen3_vl_moe",
        lambda s: qwen_settings(
            s,
            routed(
                s,
                head=True,
                rope_parameters=rope_of_three(s.head // 2),
                num_experts=s.experts,
                moe_intermediate_size=s.expert_inner,
                mlp_only_layers=[0],
            ),
            num_position_embeddings=16,
            deepstack_visual_indexes=[0],
        ),
        in_turn(
            qwen_eyes(("linear_fc1",), "linear_fc2"),
            merger("model.visual.merger", "linear_fc1", "linear_fc2"),
            merger("model.visual.deepstack_merger_list.0", "linear_fc1", "linear_fc2"),
            qwen3_routed_text,
        ),
        4,
        patches,
        marks="mm_token_type_ids",
        unaddressed=("*.mlp.gate.weight",),
    ),
    seeing(
        "gemma3",
        lambda s: {
            "text_config": text("gemma3_text", s, head=True, query_pre_attn_scalar=8),
            "vision_config": eyes("siglip_vision_model", s, patch=4, vision_use_head=False),
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE,
            "boi_token_index": IMAGE_START,
            "eoi_token_index": IMAGE_END,
        },
        in_turn(clip("model.vision_tower.encoder.layers"), TALKER),
        4,
        marks="token_type_ids",
        unaddressed=("model.multi_modal_projector.mm_input_projection_weight",),
    ),
    seeing(
        "paligemma",
        lambda s: {
            "text_config": text("gemma", s, head=True),
            "vision_config": eyes(
                "siglip_vision_model", s, vision_use_head=False, projection_dim=s.hidden
            ),
            "image_token_index": IMAGE,
            "projection_dim": s.hidden,
            "hidden_size": s.hidden,
        },
        in_turn(clip("model.vision_tower.encoder.layers"), TALKER),
        4,
        unaddressed=("model.multi_modal_projector.linear.weight",),
    ),
    *(
        seeing(
            name,
            partial(idefics3, f"{name}_vision"),
            in_turn(
                clip("model.vision_model.encoder.layers"),
                partial(gated, root="model.text_model.layers", head=True),
            ),
            4,
            pixels_of_many,
            unaddressed=("model.connector.modality_projection.proj.weight",),
        )
        for name in ("idefics3", "smolvlm")
    ),
    *(
        seeing(
            name,
            partial(internvl, normed=normed),
            in_turn(intern_eyes(normed), two_linears, BIASED_TALKER),
            4,
            model_type="internvl",
            unaddressed=("*.cls_token",),
        )
        for name, normed in (("internvl", False), ("internvl_qk_norm", True))
    ),
    seeing(
        "mistral3",
        lambda s: {
            "text_config": text("mistral", s, head=True),
            "vision_config": eyes("pixtral", s, patch=4),
            "image_token_index": IMAGE,
            "spatial_merge_size": 2,
            "vision_feature_layer": -1,
        },
        in_turn(
            each_layer("model.vision_tower.transformer.layers", pixtral),
            lambda s: [
                projector(
                    "model.multi_modal_projector", s.hidden, "linear_1", "linear_2", bias=False
                )
            ],
            TALKER,
        ),
        4,
        pixels_and_sizes,
        unaddressed=(
            "model.vision_tower.patch_conv.weight",
            "model.multi_modal_projector.patch_merger.merging_layer.weight",
        ),
    ),
    seeing(
        "llama4",
        lambda s: {
            "text_config": routed(
                s,
                head=True,
                num_local_experts=s.experts,
                intermediate_size=s.expert_inner,
                intermediate_size_mlp=s.inner,
                moe_layers=[1],
            ),
            "vision_config": eyes(
                "llama4_vision_model",
                s,
                patch=4,
                intermediate_size=4 * s.image_hidden,
                projector_input_dim=40,
                projector_output_dim=40,
                vision_output_dim=40,
            ),
            "image_token_index": IMAGE,
            "boi_token_index": IMAGE_START,
            "eoi_token_index": IMAGE_END,
        },
        in_turn(llama4_eyes, llama4("language_model.model.layers")),
        4,
        unaddressed=("*.feed_forward.router.weight", "multi_modal_projector.linear_1.weight"),
    ),
)

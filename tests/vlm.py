"""Tiny vision-language models with their real processors and chat templates, from config objects.

Seeded, fp32, text width 32, two layers a tower, images of a few patches: ready in milliseconds.
What a model sees of an image is 4 to 16 tokens. Nothing here needs torchvision.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
import trl
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPImageProcessor,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
)

from safeft.images import images_only

# As in llava-hf/llava-1.5-7b-hf, without the marks of trained tokens, which read the same.
LLAVA_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def published_template(name: str) -> str:
    """A chat template as its authors published it; TRL keeps copies (``qwen2_5_vl``, ...)."""
    folder = Path(trl.__file__).parent / "chat_templates"
    return (folder / f"{name}.jinja").read_text(encoding="utf-8")


TEXT: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
TOWER: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "initializer_range": 0.1,
}
QWEN_TOWER: Mapping[str, Any] = {
    "depth": 2,
    "num_heads": 4,
    "patch_size": 4,
    "initializer_range": 0.1,
}
ROPE: Mapping[str, Any] = {"rope_type": "default", "mrope_section": [2, 1, 1]}

Tiny: TypeAlias = tuple[PreTrainedModel, ProcessorMixin]


def byte_tokenizer(
    special: list[str],
    named: Mapping[str, str] | None = None,
    starts: bool = False,
    padding_side: str = "left",
    **roles: Any,
) -> PreTrainedTokenizerFast:
    """One token a byte after the special ones.

    ``named`` are those a processor asks for by name; with ``starts`` the start token is added
    unless it is asked not to be, as Llama's and Gemma's tokenizers do.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={s: n for n, s in enumerate((*special, *alphabet))}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if starts:
        start = roles["bos_token"]
        tokenizer.post_processor = TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, special.index(start))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        extra_special_tokens=dict(named or {}) or [s for s in special if s not in roles.values()],
        padding_side=padding_side,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        **roles,
    )


def tiny_llava(seed: int = 0, padding_side: str = "left", **overrides: Any) -> Tiny:
    """Llava 1.5: a CLIP tower whose last layer but one is read, a projector, Llama; 16 tokens."""
    tokenizer = byte_tokenizer(
        ["<pad>", "<s>", "</s>", "<image>"],
        starts=True,
        padding_side=padding_side,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    processor = LlavaProcessor(
        CLIPImageProcessor(**sizes),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=LLAVA_TEMPLATE,
    )
    config = LlavaConfig(
        text_config={"model_type": "llama", **TEXT, **_words(tokenizer), **overrides},
        vision_config={"model_type": "clip_vision_model", **TOWER},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        **_ends(tokenizer),
    )
    return _built(LlavaForConditionalGeneration, config, seed), processor


def tiny_qwen2_vl(seed: int = 0, padding_side: str = "left", **overrides: Any) -> Tiny:
    """Qwen2-VL: images of any shape, 4 to 16 tokens each, and positions in three dimensions."""
    tower = {**QWEN_TOWER, "embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    kinds = Qwen2VLForConditionalGeneration, Qwen2VLConfig, Qwen2VLProcessor
    text = {"rope_parameters": dict(ROPE), **overrides}
    return _qwen(kinds, "qwen2_5_vl", tower, text, seed, padding_side)


def tiny_qwen2_5_vl(seed: int = 0, padding_side: str = "left", **overrides: Any) -> Tiny:
    """Qwen2.5-VL: the same in a tower of gated MLPs and windowed attention."""
    sizes = {"hidden_size": 32, "intermediate_size": 40, "out_hidden_size": 32}
    tower = {**QWEN_TOWER, **sizes, "window_size": 16, "fullatt_block_indexes": [1]}
    kinds = Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, Qwen2_5_VLProcessor
    text = {"rope_parameters": dict(ROPE), **overrides}
    return _qwen(kinds, "qwen2_5_vl", tower, text, seed, padding_side)


def tiny_qwen3_vl(seed: int = 0, padding_side: str = "left", **overrides: Any) -> Tiny:
    """Qwen3-VL: the first tower layer's features are also added inside the text model."""
    sizes = {"hidden_size": 32, "intermediate_size": 40, "out_hidden_size": 32}
    tower = {
        **QWEN_TOWER,
        **sizes,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    }
    kinds = Qwen3VLForConditionalGeneration, Qwen3VLConfig, Qwen3VLProcessor
    rope = {**ROPE, "mrope_interleaved": True}
    text = {"head_dim": 8, "rope_parameters": rope, **overrides}
    return _qwen(kinds, "qwen3_vl", tower, text, seed, padding_side)


def tiny_gemma3(seed: int = 0, padding_side: str = "left", **overrides: Any) -> Tiny:
    """Gemma 3: a SigLIP tower, 4 tokens an image that see each other both ways, and types."""
    named = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    tokenizer = byte_tokenizer(
        ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", *named.values()],
        named,
        starts=True,
        padding_side=padding_side,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<end_of_turn>",
    )
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size={"height": 32, "width": 32}),
        tokenizer,
        chat_template=published_template("gemma3"),
        image_seq_length=4,
    )
    # Gemma scales attention by the scalar and not by head_dim; its default fits large models.
    own = {"head_dim": 8, "query_pre_attn_scalar": 8}
    config = Gemma3Config(
        text_config={**TEXT, **own, **_words(tokenizer), **overrides},
        vision_config=dict(TOWER),
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
        **_ends(tokenizer),
    )
    model = _built(Gemma3ForConditionalGeneration, config, seed)
    with torch.no_grad():  # An untrained Gemma has zeros here, and sees nothing.
        projection = model.model.multi_modal_projector.mm_input_projection_weight
        projection.copy_(0.1 * torch.randn(32, 32, generator=torch.Generator().manual_seed(seed)))
    return model, processor


FAMILIES: Mapping[str, Callable[..., Tiny]] = {
    "llava": tiny_llava,
    "qwen2_vl": tiny_qwen2_vl,
    "qwen2_5_vl": tiny_qwen2_5_vl,
    "qwen3_vl": tiny_qwen3_vl,
    "gemma3": tiny_gemma3,
}


def _qwen(
    kinds: tuple[Any, Any, Any],
    template: str,
    tower: Mapping[str, Any],
    text: Mapping[str, Any],
    seed: int,
    padding_side: str,
) -> Tiny:
    model_class, config_class, processor_class = kinds
    marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer = byte_tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *marks],
        padding_side=padding_side,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
    )
    processor = images_only(processor_class)(
        Qwen2VLImageProcessor(patch_size=4, min_pixels=16 * 16, max_pixels=32 * 32),
        tokenizer,
        chat_template=published_template(template),
    )
    start, end, image, video = (tokenizer.convert_tokens_to_ids(mark) for mark in marks)
    config = config_class(
        text_config={**TEXT, **_words(tokenizer), **text},
        vision_config=dict(tower),
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        **_ends(tokenizer),
    )
    return _built(model_class, config, seed), processor


def _words(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {"vocab_size": len(tokenizer), **_ends(tokenizer)}


def _ends(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }


def _built(model_class: Any, config: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config).eval()

"""Tiny vision-language models with random weights, and prompts with an image for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.models import tokens

IMAGE, VIDEO, BEGIN, END = 5, 6, 7, 8  # ids of placeholders and what stands around them

_TEXT: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_PATCHES: dict[str, Any] = {"patch_size": 4, "spatial_merge_size": 2, "num_heads": 2, "depth": 1}
_CLIP: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
_QWEN = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": BEGIN,
    "vision_end_token_id": END,
}
_KINDS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # Configurations of the text model and the vision model, and what the whole takes besides.
    "qwen2_vl": (
        _TEXT | {"rope_parameters": _ROPE},
        _PATCHES | {"embed_dim": 32, "hidden_size": 64, "temporal_patch_size": 1},
        _QWEN,
    ),
    "qwen2_5_vl": (
        _TEXT | {"rope_parameters": _ROPE},
        _PATCHES
        | {
            "hidden_size": 32,
            "out_hidden_size": 64,
            "intermediate_size": 48,
            "temporal_patch_size": 1,
            "window_size": 16,
            "fullatt_block_indexes": [0],
        },
        _QWEN,
    ),
    "qwen3_vl": (
        _TEXT | {"head_dim": 16, "rope_parameters": _ROPE | {"mrope_interleaved": True}},
        _PATCHES
        | {
            "hidden_size": 32,
            "out_hidden_size": 64,
            "intermediate_size": 48,
            "temporal_patch_size": 1,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        _QWEN,
    ),
    "llava": (
        _TEXT | {"model_type": "llama"},
        _CLIP | {"model_type": "clip_vision_model", "projection_dim": 32},
        {"image_token_index": IMAGE, "image_seq_length": 4, "vision_feature_layer": -1},
    ),
    "gemma3": (
        _TEXT
        | {
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        _CLIP | {"model_type": "siglip_vision_model"},
        {
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE,
            "boi_token_index": BEGIN,
            "eoi_token_index": END,
        },
    ),
}
KINDS = tuple(_KINDS)


def a_vision_model(kind: str = "qwen2_vl", *, dtype: torch.dtype = torch.float32) -> Any:
    """A vision-language model of this architecture in eval mode; generation never stops early."""
    language, vision, more = _KINDS[kind]
    config = CONFIG_MAPPING[kind](
        text_config=language, vision_config=vision, initializer_range=0.3, **more
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def text(count: int, seed: int = 0) -> Tensor:
    """`[1, count]` random ids, none of them a placeholder."""
    return tokens(count, seed=seed).clamp(min=9)


def with_image(ids: Tensor, at: int = 10) -> Tensor:
    """The same ids, six of which, from a column on, are an image's."""
    ids = ids.clone()
    ids[0, at : at + 6] = torch.tensor([BEGIN, IMAGE, IMAGE, IMAGE, IMAGE, END])
    return ids


def image_inputs(kind: str, ids: Tensor, seed: int = 1, images: int = 1) -> dict[str, Any]:
    """What a processor returns besides ids and mask, for ids with so many images."""
    draw = torch.Generator().manual_seed(seed)
    types = (ids == IMAGE).long()
    if kind in ("llava", "gemma3"):
        pixels = {"pixel_values": torch.randn(images, 3, 8, 8, generator=draw)}
        return pixels | ({"token_type_ids": types} if kind == "gemma3" else {})
    return {
        "pixel_values": torch.randn(16 * images, 48, generator=draw),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * images),
        "mm_token_type_ids": types,
    }

"""Footprint: what a model caches per token, found from its configuration alone.

A model without memory (on torch's meta device) is run on two tokens: shapes come out, numbers do
not. So what counts is what Transformers caches, as for latent attention, not what a paper says.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from chunkcache.errors import UnsupportedModelError
from chunkcache.keys import ZSTD
from chunkcache.kv.codec import KVLayout, LayerShape
from chunkcache.kv.coding import Codec
from chunkcache.model.check import CACHE, check_model
from chunkcache.model.proof import known_obstacle


def layout_of(config: Any, dtype: torch.dtype | None = None) -> KVLayout:
    """The layers, shapes and data type of the K/V of a model with this configuration.

    Args:
        config: The model's configuration.
        dtype: That of the weights. `None`: what the configuration says, else float32.

    Raises:
        UnsupportedModelError: Its K/V cannot be reused, or their shapes cannot be found without
            weights.
    """
    config = copy.deepcopy(config)
    text_config = config.get_text_config(decoder=True)
    said = getattr(text_config, "dtype", None)
    text_config.pad_token_id = None  # or some models look for padding among ids that are not there
    try:
        with torch.device("meta"), torch.no_grad():
            # In bfloat16, for which every kernel is there; shapes are the same in all types.
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
            obstacle = known_obstacle(check_model(model))
            cache = DynamicCache(config=config)
            if not obstacle:
                ids = torch.zeros(1, 2, dtype=torch.long)
                model(input_ids=ids, use_cache=True, **{CACHE: cache})
    except UnsupportedModelError:
        raise
    except Exception as error:  # a model may fail in any way without numbers
        raise UnsupportedModelError(
            f"{type(config).__name__}: what this model caches cannot be told from its "
            f"configuration ({type(error).__name__}: {error}): use doctor --model without --plan, "
            "which loads the weights"
        ) from error
    if obstacle:
        raise UnsupportedModelError(
            f"{type(model).__name__} is computed as usual, and nothing of it is stored: {obstacle}"
        )
    return KVLayout(dtype or said or torch.float32, tuple(_shape(la) for la in cache.layers))


def _shape(layer: Any) -> LayerShape | None:
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    if keys is None or values is None:
        return None
    return LayerShape(keys.shape[1], keys.shape[3], values.shape[1], values.shape[3])


def chunk_bytes(layout: KVLayout, tokens: int, codec: str) -> int:
    """Bytes of the blob of a chunk of so many tokens; at most so many, if it is compressed."""
    # Only the number and the length of the ids matter, and most have four to six digits.
    form = Codec(codec.removesuffix(ZSTD)).form(layout, [10_000] * tokens, 0, "0" * 64, "")
    return form.file.size

"""Scatter: one forward over tokens that stand anywhere in a prompt whose other K/V are in place.

A prompt with moved chunks has holes and tokens to repair. They go through the model together, in
order, with their own positions and an explicit mask; each layer writes their fresh K/V into place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from chunkcache.kv.layers import growing

# Attention functions that honour a mask given as a tensor. Others would silently ignore it.
MASKED_ATTENTION = ("sdpa", "eager")


def scatter_mask(
    model: nn.Module, columns: Tensor, total: int, rows: int, pads: Sequence[int] = (0,)
) -> Any:
    """The mask "key position ≤ query position", and each layer type's window.

    Args:
        model: Its configuration tells layer types, windows and the attention function.
        columns: `[queries]` columns of the tokens that are computed, in order.
        total: Columns of the whole prompt.
        rows: Rows of the batch.
        pads: Columns of left padding of each row, or one number for all. Padding is not seen; as a
            query it sees itself, so that no row of scores is empty.

    Returns:
        `[rows, 1, queries, total]`, True where seen (sdpa) or added to the scores (eager: a boolean
        would be added as a number there); a mapping by layer type where the model has several.
    """
    config: Any = model.config
    text_config = config.get_text_config(decoder=True)
    first = torch.tensor(pads[:1] if len(set(pads)) == 1 else pads, device=columns.device)
    keys = torch.arange(total, device=columns.device) - first[:, None, None]  # their positions
    queries = columns[:, None] - first[:, None, None]
    causal = keys <= queries
    if any(pads):
        causal = causal & (keys >= 0) | (keys == queries)
    kinds = getattr(text_config, "layer_types", None) or [_only_kind(text_config)]
    additive = text_config._attn_implementation == "eager"
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    masks = {}
    for kind in dict.fromkeys(kinds):
        seen = causal
        if kind == "sliding_attention":
            seen = causal & (keys > queries - text_config.sliding_window)
        elif kind == "chunked_attention":
            size = text_config.attention_chunk_size
            seen = causal & (queries // size == keys // size)
        mask = seen
        if additive:
            mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
            mask.masked_fill_(~seen, torch.finfo(dtype).min)
        masks[kind] = mask[:, None].expand(rows, 1, -1, -1)
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _only_kind(config: Any) -> str:
    if getattr(config, "sliding_window", None) is not None:
        return "sliding_attention"
    if getattr(config, "attention_chunk_size", None) is not None:
        return "chunked_attention"
    return "full_attention"


def open_layers(layers: Sequence[Any], columns: Tensor, total: int) -> None:
    """Make the next update of each layer write to these columns of `total`."""
    for layer in growing(layers):
        layer.hold(total)
        layer.columns = columns


def close_layers(layers: Sequence[Any]) -> None:
    """Go back to appending, and wait for nothing."""
    for layer in growing(layers):
        layer.columns = layer.intercept = layer.arriving = layer.first = None
        layer.keeps_first = False

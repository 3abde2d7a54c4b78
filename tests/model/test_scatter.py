"""Scatter: the mask of tokens that stand anywhere, and layers that are written in the middle."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache
from transformers.masking_utils import create_causal_mask

from chunkcache.kv.layers import GrowingLayer
from chunkcache.model.scatter import close_layers, open_layers, scatter_mask
from tests.models import tiny

COLUMNS = torch.tensor([0, 3, 4, 9, 10, 11, 19])
TOTAL = 20


def by_hand(columns, total, pads, sees=lambda query, key: True):
    """One pair at a time, with positions that count from the end of the padding."""
    mask = torch.zeros(len(pads), 1, len(columns), total, dtype=torch.bool)
    for row, pad in enumerate(pads):
        for at, column in enumerate(columns.tolist()):
            for key in range(total):
                query_position, key_position = column - pad, key - pad
                seen = 0 <= key_position <= query_position and sees(query_position, key_position)
                mask[row, 0, at, key] = seen or (key == column and query_position < 0)
    return mask


@pytest.mark.parametrize("pads", [(0,), (0, 0), (4, 4), (0, 5), (2, 20)])
def test_a_token_sees_what_stands_before_it(pads):
    mask = scatter_mask(tiny("llama"), COLUMNS, TOTAL, len(pads), pads)
    assert torch.equal(mask, by_hand(COLUMNS, TOTAL, pads))
    assert mask.any(-1).all()  # no row of scores is empty, which would give NaN


def test_one_padding_may_be_that_of_all_rows():
    mask = scatter_mask(tiny("llama"), COLUMNS, TOTAL, 3, (2,))
    assert torch.equal(mask, by_hand(COLUMNS, TOTAL, (2, 2, 2)))
    assert torch.equal(
        scatter_mask(tiny("llama"), COLUMNS, TOTAL, 2), by_hand(COLUMNS, TOTAL, (0, 0))
    )


@pytest.mark.parametrize("pads", [(0, 0), (0, 5)])
def test_each_kind_of_layer_has_its_own_mask(pads):
    masks = scatter_mask(tiny("gemma3_text"), COLUMNS, TOTAL, 2, pads)
    assert torch.equal(masks["full_attention"], by_hand(COLUMNS, TOTAL, pads))
    window = by_hand(COLUMNS, TOTAL, pads, lambda query, key: query - key < 8)
    assert torch.equal(masks["sliding_attention"], window)


def test_a_model_with_one_kind_of_layer_has_one_mask():
    windowed = tiny("mistral", sliding_window=5)
    mask = scatter_mask(windowed, COLUMNS, TOTAL, 1)
    assert torch.equal(mask, by_hand(COLUMNS, TOTAL, (0,), lambda query, key: query - key < 5))


def test_chunked_attention_counts_chunks_from_the_end_of_the_padding():
    model = tiny("llama")
    model.config.attention_chunk_size = 6
    mask = scatter_mask(model, COLUMNS, TOTAL, 2, (0, 5))
    same = by_hand(COLUMNS, TOTAL, (0, 5), lambda query, key: query // 6 == key // 6)
    assert torch.equal(mask, same)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_attention_gets_numbers_to_add(dtype):
    model = tiny("llama", attn_implementation="eager", dtype=dtype)
    mask = scatter_mask(model, COLUMNS, TOTAL, 2, (0, 5))
    assert mask.dtype == dtype
    assert torch.equal(mask == 0, by_hand(COLUMNS, TOTAL, (0, 5)))
    assert set(mask.unique().tolist()) == {0.0, torch.finfo(dtype).min}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_over_all_columns_it_is_the_mask_of_transformers(attention):
    model = tiny("llama", attn_implementation=attention)
    given = torch.ones(2, TOTAL, dtype=torch.long)
    given[1, :5] = 0
    theirs = create_causal_mask(
        config=model.config,
        inputs_embeds=torch.zeros(2, TOTAL, 64),
        attention_mask=given,
        past_key_values=DynamicCache(),
        position_ids=None,
    )
    mine = scatter_mask(model, torch.arange(TOTAL), TOTAL, 2, (0, 5))
    assert torch.equal(mine[0], theirs[0])
    assert torch.equal(mine[1, :, 5:], theirs[1, :, 5:])  # padding as a query is nobody's matter


@torch.no_grad()
def test_layers_write_where_they_are_told_and_append_again_afterwards():
    layer, other = GrowingLayer(), object()
    layer.update(torch.zeros(2, 1, 6, 4), torch.zeros(2, 1, 6, 4))
    open_layers([layer, other], torch.tensor([1, 4]), 6)
    fresh = torch.arange(16.0).view(2, 1, 2, 4) + 1
    keys, values = layer.update(fresh, -fresh)
    assert torch.equal(keys[:, :, [1, 4]], fresh)
    assert torch.equal(values[:, :, [1, 4]], -fresh)
    assert not keys[:, :, [0, 2, 3, 5]].any()
    close_layers([layer, other])
    keys, _ = layer.update(fresh, fresh)
    assert keys.shape[2] == 8
    assert torch.equal(keys[:, :, 6:], fresh)

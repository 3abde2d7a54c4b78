"""Layers with states: what changes of all rows do to them."""

from __future__ import annotations

import torch

from chunkcache import RedisChunkCache
from chunkcache.kv.states import state_layers
from chunkcache.stores.memory import MemoryStore
from tests.models import tiny, tokens


def test_states_go_along_with_their_rows() -> None:
    model = tiny("qwen3_5_text")
    cache = RedisChunkCache(model, MemoryStore())
    with torch.no_grad():
        model(tokens(70, rows=2), past_key_values=cache, logits_to_keep=1)
    layer = state_layers(cache.layers)[0]
    before = layer.conv_states[0].clone(), layer.recurrent_states[0].clone()
    for change, rows in (
        (lambda: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda: cache.reorder_cache(torch.tensor([3, 0, 1, 2])), [1, 0, 0, 1]),
        (lambda: cache.batch_select_indices(torch.tensor([0, 2])), [1, 0]),
    ):
        change()
        now = layer.conv_states[0], layer.recurrent_states[0]
        assert all(torch.equal(a, b[rows]) for a, b in zip(now, before, strict=True))

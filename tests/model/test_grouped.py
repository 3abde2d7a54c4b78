"""Grouped-query attention: the same bits, without copies of K/V, in trimmed forwards alone."""

from __future__ import annotations

from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers.integrations import sdpa_attention

from chunkcache import RedisChunkCache
from chunkcache.model.grouped import share_heads
from chunkcache.model.state import ModelState
from chunkcache.stores.memory import MemoryStore
from tests.models import tiny, tokens
from tests.prompts import anywhere, joined, logits, meet, padded, shuffled_prompt


class Copies(TorchFunctionMode):
    """Counts the K/V that are copied to every query head, in this thread, without a patch."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += func is Tensor.expand and args[0].dim() == 5
        return func(*args, **(kwargs or {}))


class Attention(torch.nn.Module):
    num_key_value_groups = 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("queries", [1, 2, 7, 64])
def test_bits_are_the_same(dtype: torch.dtype, queries: int) -> None:
    source = torch.Generator().manual_seed(queries)
    for batch, total, width in ((1, 65, 16), (2, 300, 64), (1, 1030, 96)):
        query = torch.randn(batch, 8, queries, width, generator=source).to(dtype)
        memory = torch.randn(2, batch, 2, total + 9, width, generator=source).to(dtype)
        key, value = memory[:, :, :, :total]
        mask = torch.ones(queries, total, dtype=torch.bool).tril(total - queries)
        mask = mask.expand(batch, 1, -1, -1).clone()
        mask[-1, :, :, :5] = False
        results, copies = [], []
        for trimmed in (False, True):
            share_heads(trimmed)
            with Copies() as seen:
                results.append(
                    sdpa_attention.sdpa_attention_forward(Attention(), query, key, value, mask)[0]
                )
            copies.append(seen.count)
        share_heads(False)
        assert torch.equal(*results)
        assert copies == [2 if queries > 1 else 0, 0]  # of a token alone there are none


def test_trimmed_forwards_copy_nothing_and_others_are_as_they_were() -> None:
    model, store, ids = tiny("llama"), MemoryStore(), tokens(100)
    more = joined(ids, tokens(9, seed=2))
    expected = logits(model, more)
    logits(model, ids, RedisChunkCache(model, store, chunk_size=16))
    cache = RedisChunkCache(model, store, chunk_size=16)
    with Copies() as seen:
        assert torch.allclose(logits(model, more, cache), expected, atol=1e-5)
    assert cache.report.reused == 96
    assert not seen.count

    with Copies() as seen:
        logits(model, padded(ids, more))
    assert seen.count


def test_scattered_forwards_copy_nothing() -> None:
    model, store = tiny("llama"), MemoryStore()
    meet(model, store)
    cache = anywhere(model, store)
    with Copies() as seen:
        logits(model, shuffled_prompt(), cache)
    assert cache.report.moved
    assert not seen.count


def test_other_threads_are_not_concerned() -> None:
    ids, model, counts = tokens(20), tiny("llama"), []

    def count() -> None:
        with Copies() as seen:
            logits(model, padded(ids, ids[:, :9]))
        counts.append(seen.count)

    share_heads(True)
    thread = Thread(target=count)
    thread.start()
    thread.join()
    share_heads(False)
    assert counts[0]


def test_a_forward_that_fails_leaves_nothing_behind() -> None:
    model, store, ids = tiny("llama"), MemoryStore(), tokens(100)
    logits(model, ids, RedisChunkCache(model, store, chunk_size=16))
    cache = RedisChunkCache(model, store, chunk_size=16)
    with pytest.raises(IndexError):
        logits(model, joined(ids, torch.full((1, 2), 1 << 40)), cache)
    with Copies() as seen:
        logits(model, padded(ids, ids[:, :9]))
    assert seen.count


def test_the_model_is_still_the_same_behind_a_trimmed_forward():
    """Whether a forward is trimmed is no part of what its model is."""
    model, store = tiny(), MemoryStore()
    state = ModelState.of(model)
    before = state.identity().digest
    for _ in range(2):
        logits(model, tokens(200), RedisChunkCache(model, store))
        assert state.identity().digest == before


def test_our_own_code_is_no_stranger_to_a_models_identity() -> None:
    """Else all of its code would be described anew for each prompt."""
    model = tiny("llama")
    logits(model, tokens(20), RedisChunkCache(model, MemoryStore()))
    assert not ModelState.of(model)._makeup.strange

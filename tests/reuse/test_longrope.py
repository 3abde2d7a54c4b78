"""Longrope: prompts on either side of the first training's length have keys of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from chunkcache import RedisChunkCache, UnsupportedModelError
from chunkcache.model.identity import ModelIdentity
from chunkcache.stores.memory import MemoryStore
from tests.models import tiny, tokens
from tests.prompts import close, joined, logits, padded

SWITCH = 128


def build(kind: str = "llama", **more: Any) -> Any:
    rope = {
        "rope_type": "longrope", "rope_theta": 10_000.0, "factor": 8.0,
        "short_factor": [1.0] * 8, "long_factor": [2.0, 3.0] * 4,
        "original_max_position_embeddings": SWITCH,
    }  # fmt: skip
    return tiny(kind, rope_parameters=rope, max_position_embeddings=1024, **more)


def cached(model: Any, store: MemoryStore, ids: Any, **settings: Any) -> RedisChunkCache:
    cache = RedisChunkCache(model, store, chunk_size=16, **settings)
    assert close(logits(model, ids, cache), logits(build(), ids))
    cache.flush()
    return cache


def generate(model: Any, ids: Tensor, cache: Any = None, new: int = 12) -> Tensor:
    out = model.generate(ids, past_key_values=cache, max_new_tokens=new, do_sample=False)
    assert isinstance(out, Tensor)
    return out


def first_logits(model: Any, ids: Tensor, cache: Any = None) -> Tensor:
    """Of the token behind a whole prompt, `[1, vocabulary]`."""
    out = model.generate(
        ids, past_key_values=cache, max_new_tokens=1, do_sample=False,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    logits: Tensor = out.logits[0]
    return logits


def test_each_side_reuses_its_own() -> None:
    model, store = build(), MemoryStore()
    text = tokens(600)
    for length, reused in (
        (100, 0), (120, 112), (300, 0), (120, 119), (128, 112), (129, 128), (200, 192), (310, 304),
    ):  # fmt: skip
        cache = cached(model, store, joined(text[:, : length - 1], tokens(1, seed=length)))
        assert cache.report.skipped == ""
        assert abs(cache.report.reused - reused) <= 16, length


def test_an_answer_that_crosses_is_not_stored() -> None:
    model, store = build(), MemoryStore()
    ids = tokens(110)
    cache = RedisChunkCache(model, store, chunk_size=16)
    told = generate(model, ids, cache, new=60)
    assert torch.equal(told, generate(build(), ids, new=60))
    cache.flush()
    for length in (120, 128, 150, 170):  # in this object, and in new ones
        part = told[:, :length]
        expected = generate(build(), part)
        assert torch.equal(
            generate(model, part, RedisChunkCache(model, store, chunk_size=16)), expected
        )
    again = joined(told, tokens(20, seed=3))
    assert torch.equal(generate(model, again, cache), generate(build(), again))


def test_turns_of_one_object_across_the_switch() -> None:
    model, store = build(), MemoryStore()
    cache = RedisChunkCache(model, store, chunk_size=16)
    text = tokens(400)
    for length in (90, 120, 260, 300, 100):
        ids = text[:, :length]
        assert torch.equal(generate(model, ids, cache, 4), generate(build(), ids, new=4))
        assert cache.report.skipped == ""


def test_what_was_computed_behind_the_switch_is_no_beginning_of_a_short_prompt() -> None:
    model, text = build(), tokens(200)
    cache = RedisChunkCache(model, MemoryStore(), chunk_size=16)
    for part in (text[:, :100], text[:, 100:]):
        logits(model, part, cache)
    assert close(first_logits(model, text[:, :120], cache), first_logits(build(), text[:, :120]))
    assert cache.report.skipped == ""  # nor is the store blamed for it


def test_turns_across_the_switch_have_the_same_bits_wherever_they_part() -> None:
    text = tokens(200)
    answers: dict[int, list[Tensor]] = {40: [], 110: []}
    for order in ((40, 110), (110, 40)):
        model, store = build(), MemoryStore()
        for first in order:
            cache = RedisChunkCache(model, store, reproducible=True, piece_tokens=32)
            logits(model, text[:, :first], cache)
            answers[first].append(logits(model, text[:, first:], cache))
            assert "other RoPE frequencies" in cache.report.skipped
            cache.flush()
    for cold, warm in answers.values():
        assert torch.equal(cold, warm)


@pytest.mark.parametrize("size", [50, 100])
def test_prompts_given_in_parts(size: int) -> None:
    model, store, ids = build(), MemoryStore(), tokens(300)
    how = {"max_new_tokens": 4, "do_sample": False, "prefill_chunk_size": size}
    expected = build().generate(ids, **how)
    for _ in range(2):
        cache = RedisChunkCache(model, store, chunk_size=16)
        assert torch.equal(model.generate(ids, past_key_values=cache, **how), expected)
        cache.flush()
    cached(model, store, ids)
    cached(model, store, ids[:, :120])


def test_the_longest_row_decides() -> None:
    model, store = build(), MemoryStore()
    short, long = tokens(100, seed=1), tokens(200, seed=2)
    cached(model, store, short)
    for reused in (0, 100):
        cache = cached(model, store, padded(short, long))
        assert cache.report.reused >= reused
    assert cached(model, store, short).report.reused == 99


def test_pieces_do_not_cut_long_prompts() -> None:
    model, store = build(), MemoryStore()
    for length in (100, 300):
        cached(model, store, tokens(length), piece_tokens=64)
        cached(model, store, tokens(length), reproducible=True, piece_tokens=32)
    skipped = cached(model, store, tokens(300), reproducible=True, piece_tokens=32).report.skipped
    assert "more than 128 tokens have other RoPE frequencies" in skipped


def test_the_identity_does_not_change_with_the_last_prompt() -> None:
    model, fresh = build(), build()
    identities = {ModelIdentity.of(fresh).digest}  # before any forward
    for length in (20, 300, 20):
        cache = RedisChunkCache(model, MemoryStore())
        logits(model, tokens(length), cache)
        identities.add(cache._context.state.identity().digest)
    assert len(identities) == 1


def test_it_is_not_moved() -> None:
    with pytest.raises(UnsupportedModelError, match="longrope"):
        RedisChunkCache(build(), MemoryStore(), reuse="anywhere")


def test_phi3() -> None:
    """Which drops the cache itself where an answer crosses."""

    def phi3() -> Any:
        return build(
            "phi3", original_max_position_embeddings=SWITCH, sliding_window=None,
            num_key_value_heads=4,
        )  # fmt: skip

    model, store = phi3(), MemoryStore()
    for length in (90, 110, 123, 200, 110, 210):
        ids = tokens(300)[:, :length]
        cache = RedisChunkCache(model, store, chunk_size=16)
        assert torch.equal(generate(model, ids, cache), generate(phi3(), ids))
        cache.flush()

"""Continuations: every token that a prompt shares with a stored one counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chunkcache import RedisChunkCache
from chunkcache.keys import CODECS
from chunkcache.reuse.continuations import MOST, WINDOW
from chunkcache.stores.base import ChunkStore, Entry, ReadOnly
from chunkcache.stores.memory import MemoryStore
from tests.models import tiny, tokens
from tests.prompts import close, joined, logits, padded
from tests.scripted import Scripted, blobs

MODEL = tiny("llama", num_hidden_layers=2, max_position_embeddings=4096)
KINDS = ("qwen3", "gemma3_text", "gpt2", "bloom", "deepseek_v3", "mixtral", "cohere")


def meet(store: ChunkStore, ids: Tensor, model: Any = MODEL, **settings: Any) -> RedisChunkCache:
    """Run a prompt. Returns its cache, whose logits are as they should be."""
    cache = RedisChunkCache(model, store, **settings)
    exact = not settings.get("codec", "").startswith(("safetensors-int8", "safetensors-bf16"))
    assert close(logits(model, ids, cache), logits(model, ids)) or not exact
    return cache


def generate(ids: Tensor, cache: Any = None) -> Tensor:
    out = MODEL.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert isinstance(out, Tensor)
    return out


def branch(shared: int, first: int = 50, second: int = 50, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two prompts that begin with the same tokens, and not one more."""
    text = tokens(shared, seed=seed)
    one, other = tokens(first, seed=seed + 1), tokens(second, seed=seed + 2)
    other[0, 0] = (one[0, 0] + 1) % 150
    return joined(text, one), joined(text, other)


def is_enough(reused: int, shared: int, prompt: int) -> bool:
    return min(shared, prompt - 1) - (WINDOW - 1) <= reused <= min(shared, prompt - 1)


def entries(store: MemoryStore, prefix: str = "") -> dict[str, int]:
    return {entry.key: entry.nbytes for page in store.scan(prefix) for entry in page}


@given(
    shared=st.integers(1, 600), first=st.integers(1, 300), second=st.integers(1, 300),
    seed=st.integers(0, 1 << 20), size=st.sampled_from([128, 32]), overlap=st.sampled_from([0, 9]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_all_shared_tokens_but_a_window_are_reused(shared, first, second, seed, size, overlap):
    one, other = branch(shared, first, second, seed)
    store, chosen = MemoryStore(), {"chunk_size": size, "chunk_overlap": overlap}
    meet(store, one, **chosen)
    cache = meet(store, other, **chosen)
    assert is_enough(cache.report.reused, shared, other.shape[1])
    assert not cache.report.errors


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer(kind):
    model, store = tiny(kind), MemoryStore()
    one, other = branch(200)
    meet(store, one, model)
    assert meet(store, other, model).report.reused == 200


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("secret", [{}, {"secret": "x" * 20, "seal": "ab" * 32}])
def test_every_codec(codec, secret):
    one, other = branch(200)
    store = MemoryStore()
    meet(store, one, codec=codec, **secret)
    report = meet(store, other, codec=codec, **secret).report
    assert (report.reused, report.errors) == (200, [])


def test_the_report_names_the_chunk_and_how_much_of_it():
    one, other = branch(200)
    store = MemoryStore()
    meet(store, one)
    cache = meet(store, other)
    span = cache.report.chunks[1]
    assert (span["start"], span["stop"], span["kind"], span["origin"]) == (
        128, 200, "reused", "store",
    )  # fmt: skip
    (key,) = (key for key in entries(store) if key.endswith(span["key"]))
    assert store.read_metadata([key])[0]["positions"] == "128-250"


def test_thousands_that_share_less_than_a_chunk():
    store, shared = MemoryStore(), tokens(90)
    for n in range(3 * MOST):
        cache = meet(store, joined(shared, tokens(8, seed=n + 1)))
        assert not n or cache.report.reused >= 90
    index = [store.read_metadata([key])[0] for key in entries(store, "anchor@")]
    assert max(map(len, index)) <= 2 * MOST + 1


def test_rows_of_a_batch_each_find_their_own():
    store = MemoryStore()
    (a, b), (c, d) = branch(200, 60, 60, seed=1), branch(170, 40, 60, seed=11)
    meet(store, a)
    meet(store, c)
    report = meet(store, padded(b, d)).report
    assert [row.reused for row in report.rows] == [200, 170]


def test_a_conversation_that_holds_a_part_already():
    store = MemoryStore()
    one, other = branch(330)
    meet(store, one)
    cache = RedisChunkCache(MODEL, ReadOnly(store))
    generate(other[:, :270], cache)
    assert torch.equal(generate(other, cache), generate(other))
    assert cache.report.reused == 330


def test_moved_text_begins_behind_it():
    store, text = MemoryStore(), tokens(300, seed=5)
    one, other = branch(200)
    for ids in (one, joined(tokens(40, seed=9), text)):
        logits(MODEL, ids, RedisChunkCache(MODEL, store, reuse="anywhere"))
    cache = RedisChunkCache(MODEL, store, reuse="anywhere", repair="none")
    logits(MODEL, joined(other, text, tokens(5, seed=8)), cache)
    assert cache.report.reused == 200
    assert cache.report.moved > 250


@pytest.mark.parametrize("harm", ["gone", "bit", "longer"])
def test_what_is_gone_or_damaged_is_a_miss(harm):
    one, other = branch(200)
    store = MemoryStore()
    meet(store, one)
    keys = list(entries(store))
    told = zip(keys, store.read_metadata(keys), strict=True)
    (key,) = (key for key, fields in told if (fields or {}).get("positions") == "128-250")
    blob = bytearray(blobs(store, key)[0] or b"")
    store.delete([key])
    if harm != "gone":
        blob = blob + b"1" if harm == "longer" else blob
        blob[-1] ^= harm == "bit"
        store.write([Entry(key, {}, memoryview(blob))])
    cache = meet(store, other)
    assert cache.report.reused == (200 if harm == "longer" else 128)
    # And nobody is led there again.
    index = [store.read_metadata([name])[0] or {} for name in entries(store, "anchor@")]
    assert (key.rpartition("@")[2] in {n for fields in index for n in fields}) == (harm == "longer")


@pytest.mark.parametrize("text", ["", "x", "0 2026", "0 2026 [1", "0 2026 [1.5]", "0 9 []", "\x00"])
def test_entries_that_make_no_sense_are_misses(text):
    one, other = branch(200)
    store = MemoryStore()
    meet(store, one)
    for key in entries(store, "anchor@"):
        fields = dict.fromkeys(store.read_metadata([key])[0] or {}, text)
        store.write([Entry(key, fields, memoryview(b""))])
    cache = meet(store, other)
    assert (cache.report.reused, cache.report.errors) == (128, [])


def test_tokens_that_an_entry_makes_up_are_not_believed():
    one, other = branch(200)
    store = MemoryStore()
    meet(store, one)
    for key in entries(store, "anchor@"):
        fields = {
            name: f"0 2026 {other[0, 128:].tolist()}"
            for name in store.read_metadata([key])[0] or {}
        }
        store.write([Entry(key, fields, memoryview(b""))])
    assert meet(store, other).report.reused == 128


def test_one_round_trip_more_and_only_where_there_is_something_to_gain():
    store = Scripted()
    one, other = branch(200)
    meet(store, one)
    store.calls.clear()
    meet(ReadOnly(store), one)  # known to the end
    looked = [verb for verb, _ in store.calls]
    assert looked.count("sizes") == looked.count("fetch") == 1
    before = looked.count("read_metadata")
    store.calls.clear()
    meet(ReadOnly(store), other)
    looked = [verb for verb, _ in store.calls]
    assert looked.count("sizes") == looked.count("fetch") == 1
    assert looked.count("read_metadata") == before + 1


def test_a_chat_keeps_no_shorter_chunks():
    """20 turns, each with one cache object or a new one: at most 15 % more than its tokens take."""
    for fresh in (False, True):
        store, ids = MemoryStore(), tokens(30)
        cache = RedisChunkCache(MODEL, store)
        for turn in range(20):
            cache = RedisChunkCache(MODEL, store) if fresh else cache
            ids = MODEL.generate(ids, past_key_values=cache, max_new_tokens=9, do_sample=False)
            ids = joined(ids, tokens(17 + turn, seed=turn))
        nbytes = sum(entries(store).values())
        per_token = 2 * 2 * MODEL.config.num_key_value_heads * MODEL.config.head_dim * 4
        assert nbytes <= 1.15 * per_token * ids.shape[1], fresh


def test_the_shorter_chunk_of_other_text_stays():
    store = MemoryStore()
    one, other = branch(140, 40, 90)
    cache = RedisChunkCache(MODEL, store)
    generate(one, cache)
    assert torch.equal(generate(other, cache), generate(other))  # the same object, another text
    assert meet(store, one).report.reused == one.shape[1] - 1
    assert meet(store, other).report.reused == other.shape[1] - 1


def test_a_pinned_chunk_is_not_replaced_by_one_that_may_go():
    store, ids = MemoryStore(), tokens(60)
    meet(store, ids, pin=True)
    meet(store, joined(ids, tokens(90, seed=1)))
    lengths = [
        (store.read_metadata([key])[0] or {}).get("tokens") for key in entries(store, "safe")
    ]
    assert sorted(map(str, lengths)) == ["128", "22", "60"]


def test_nothing_is_replaced_by_what_the_store_did_not_take():
    store, ids = Scripted(), tokens(60)
    meet(store, ids)
    store.script["write"] = lambda entries: 0
    meet(store, joined(ids, tokens(90, seed=1)))
    assert not store.asked("delete")

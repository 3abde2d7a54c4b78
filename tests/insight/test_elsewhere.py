"""What explain says of other caches' chunks: no cause is named that was none."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from chunkcache import RedisChunkCache
from chunkcache.insight import alike, elsewhere
from chunkcache.insight.fates import NOT_IN_STORE, WRONG_SIZE
from chunkcache.stores.base import Entry, Listed
from chunkcache.stores.memory import MemoryStore
from tests.models import tiny, tokens
from tests.scripted import blobs

PART = "in the store{}, but only part of a chunk matches"


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama", max_position_embeddings=2048)


def stored(model: Any, ids: torch.Tensor, **settings: Any) -> MemoryStore:
    store = MemoryStore()
    with RedisChunkCache(model, store, **settings) as cache:
        model.generate(ids, past_key_values=cache, max_new_tokens=1, do_sample=False)
    return store


def reasons(model: Any, store: MemoryStore, ids: torch.Tensor, **settings: Any) -> dict[int, str]:
    """By where they begin, the reasons for all but the last token."""
    chunks = RedisChunkCache(model, store, **settings).explain(ids).chunks
    return {found.start: found.reason for found in chunks if found.stop < ids.shape[1]}


def chunks_of(store: MemoryStore) -> list[Listed]:
    return [entry for page in store.scan("safetensors@") for entry in page]


def rewrite(store: MemoryStore, entry: Listed, key: str = "", **fields: str) -> None:
    (blob,) = (bytes(blob or b"") for blob in blobs(store, entry.key))
    store.delete([entry.key])
    store.write([Entry(key or entry.key, {**entry.metadata, **fields}, memoryview(blob))])


def evict(store: MemoryStore) -> None:
    for entry in chunks_of(store):
        store.delete([entry.key])
        store.write([Entry(entry.key, entry.metadata or {}, memoryview(b""))])


@pytest.mark.parametrize(
    ("settings", "where", "index"),
    [({}, "", elsewhere.NOT_INDEXED), ({"namespace": "b"}, ", in the namespace ''", "")],
)
def test_a_part_of_a_chunk_that_is_alike(model, settings, where, index) -> None:
    ids = tokens(300, seed=1)
    with stored(model, ids) as store:
        other = torch.cat([ids[:, :8], tokens(1), ids[:, 9:89], tokens(211, seed=2)], dim=1)
        assert PART.format(where) + index in reasons(model, store, other, **settings).values()


def test_another_place_is_named_with_the_namespace(model) -> None:
    ids = tokens(256, seed=1)
    with stored(model, ids) as store:
        moved = torch.cat([tokens(30, seed=2), ids, tokens(9, seed=3)], dim=1)
        said = reasons(model, store, moved, namespace="b")
        assert said[30] == "in the store, in the namespace '', at another position"


def test_other_text_before_a_chunk_is_not_blamed_on_a_secret(model) -> None:
    ids = tokens(300, seed=1)
    with stored(model, ids) as store:
        other = torch.cat([tokens(128, seed=7), ids[:, 128:]], dim=1)
        assert reasons(model, store, other)[128] == elsewhere.OTHER_CONTEXT + elsewhere.NOT_INDEXED
        said = reasons(model, store, other, namespace="b")[128]
        assert said == "in the store, in the namespace '', perhaps behind other text"
        assert set(reasons(model, store, ids, secret="x" * 20).values()) == {elsewhere.OTHER_SECRET}
        assert set(reasons(model, store, ids, namespace="b").values()) == {
            "in the store, in the namespace ''"
        }


def test_evicted_is_said_of_this_prompts_own_chunks_only(model) -> None:
    ids = tokens(300, seed=1)
    with stored(model, ids) as store:
        evict(store)
        other = torch.cat([tokens(128, seed=7), ids[:, 128:]], dim=1)
        assert reasons(model, store, ids)[0] == elsewhere.EVICTED
        assert elsewhere.EVICTED not in reasons(model, store, other).values()
        assert elsewhere.EVICTED not in reasons(model, store, ids, secret="x" * 20).values()


def test_a_moved_tail_is_not_blamed_on_its_size(model) -> None:
    ids = tokens(100, seed=3)
    with stored(model, ids) as store:
        moved = torch.cat([tokens(30, seed=8), ids, tokens(5, seed=9)], dim=1)
        said = reasons(model, store, moved)[30]
        assert said == "in the store, at another position" + elsewhere.NOT_INDEXED


def test_where_a_shorter_prompt_ended(model) -> None:
    ids = tokens(300, seed=3)
    with stored(model, ids[:, :190]) as store:
        assert RedisChunkCache(model, store).explain(ids).reused == 190
    with stored(model, ids, chunk_size=96) as store:
        said = reasons(model, store, ids)
        assert said[0] == ""
        assert said[96] == "in the store, in a chunk of 96 tokens"


@pytest.mark.parametrize("mode", ["prefix", "anywhere"])
def test_text_stored_in_prefix_mode_is_said_not_to_be_indexed(model, mode) -> None:
    """And that it can be moved once it was stored in the other mode is true."""
    ids, begin = tokens(300, seed=3), tokens(30, seed=8)
    moved = torch.cat([begin, ids, tokens(9, seed=9)], dim=1)
    with stored(model, ids) as store:
        said = [why for why in reasons(model, store, moved, reuse=mode).values() if "store," in why]
        assert said
        assert all(why.endswith("stored with reuse='anywhere' can be moved") for why in said)
        with RedisChunkCache(model, store, reuse="anywhere") as cache:
            model.generate(moved, past_key_values=cache, max_new_tokens=1, do_sample=False)
        assert not cache.report.moved
        other = torch.cat([tokens(50, seed=7), ids, tokens(9, seed=9)], dim=1)
        found = RedisChunkCache(model, store, reuse="anywhere").explain(other)
        assert found.moved > 250


def test_another_process_of_the_same_model_is_no_reason(model) -> None:
    ids = tokens(300, seed=1)
    with stored(model, ids) as store:
        for entry in chunks_of(store):
            rewrite(store, entry, entry.key.replace("@1@0@", "@1@1@"))
        assert reasons(model, store, ids)[0] == NOT_IN_STORE


def test_a_repeated_token_has_one_place_in_each_row() -> None:
    row = torch.full((600,), 5).numpy()
    places = alike.windows([row, row], [row == 5, row == 5])
    assert list(places.values()) == [{0: 0, 1: 0}]
    entry = Listed("safetensors@m@1@0@" + "a" * 64, {"positions": "128-256"}, 1)
    found = alike.matches(entry, row[:128], [row, row], places)
    assert [(match.row, match.start, match.stop) for match in found] == [
        (0, 128, 256), (1, 128, 256),
    ]  # fmt: skip
    nonsense = replace(entry, metadata={"positions": "x"})
    assert not any(match.stands for match in alike.matches(nonsense, row[:128], [row, row], places))


def test_a_match_goes_back_over_what_is_known() -> None:
    row = tokens(300, seed=4)[0].numpy()
    wanted = row == row
    wanted[:150] = False
    places = alike.windows([row], [wanted])
    entry = Listed("safetensors@m@1@0@" + "a" * 64, {"positions": "100-228"}, 1)
    (match,) = alike.matches(entry, row[100:228], [row], places)
    assert match.whole
    assert match.stands


@pytest.mark.parametrize("mode", ["prefix", "anywhere"])
def test_a_blob_of_a_wrong_length_is_told(model, mode) -> None:
    ids = tokens(300, seed=1)
    with stored(model, ids, reuse=mode) as store:
        for entry in chunks_of(store):
            if json.loads((entry.metadata or {})["token_ids"]) == ids[0, :128].tolist():
                store.delete([entry.key])
                store.write([Entry(entry.key, entry.metadata or {}, memoryview(b"xx"))])
        cache = RedisChunkCache(model, store, reuse=mode)
        explanation = cache.explain(ids)
        assert explanation.chunks[0].reason == WRONG_SIZE
        assert not explanation.chunks[0].hit
        if mode == "prefix":
            assert explanation.reused == 0
        model.generate(ids, past_key_values=cache, max_new_tokens=1, do_sample=False)
        assert cache.report.reused == explanation.reused

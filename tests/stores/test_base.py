"""What all stores share: the notes of a prompt, reading without writing, whole blobs."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from models import tiny, tokens
from scripted import Scripted, blobs, entry, fetch
from servers import Server

from chunkcache import RedisChunkCache, add_documents
from chunkcache.errors import SettingError, StoreError
from chunkcache.stores import base
from chunkcache.stores.base import (
    Entry,
    ReadOnly,
    ReadsFrom,
    calls_of_prompt,
    current_calls,
    note_partial,
)
from chunkcache.stores.memory import MemoryStore


def test_what_is_noted_inside_is_gathered() -> None:
    note_partial(StoreError("before"))
    with calls_of_prompt() as calls:
        note_partial(StoreError("one"))
        with calls_of_prompt() as inner:
            note_partial(StoreError("inner"))
        current_calls().seconds["store"] += 1.5
    note_partial(StoreError("after"))
    assert [str(error) for error in calls.errors] == ["one"]
    assert [str(error) for error in inner.errors] == ["inner"]
    assert calls.seconds == {"store": 1.5}


def test_it_ends_with_an_exception() -> None:
    with pytest.raises(KeyError), calls_of_prompt() as calls:
        raise KeyError
    note_partial(StoreError("after"))
    assert calls.errors == []


def test_threads_do_not_mix() -> None:
    gathered: dict[str, list[str]] = {}
    barrier = threading.Barrier(2)

    def prompt(name: str) -> None:
        with calls_of_prompt() as calls:
            barrier.wait(10)
            note_partial(StoreError(name))
            barrier.wait(10)
        gathered[name] = [str(error) for error in calls.errors]

    threads = [threading.Thread(target=prompt, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gathered == {"a": ["a"], "b": ["b"]}


# ---------------------------------------------------------------------- whole blobs


def test_whole_blobs_come_in_order_and_few_at_once(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "READ_BYTES", 10)
    scripted.inner.write([entry("a", b"12345"), entry("b", bytes(20)), entry("c", b"678")])
    assert blobs(scripted, "a", "none", "c", "b", "a") == [
        b"12345",
        None,
        b"678",
        bytes(20),
        b"12345",
    ]
    fetched = [keys for verb, keys in scripted.calls if verb == "fetch"]
    assert fetched == [["a", "none", "c"], ["b"], ["a"]]
    assert blobs(scripted) == []


def test_a_blob_that_went_or_has_no_room_is_not_made_up() -> None:
    store = Scripted(sizes=[lambda keys: [3], lambda keys: [1 << 62]])
    assert blobs(store, "gone") == [None]
    with pytest.raises(StoreError, match="no memory"):
        blobs(store, "gone")


# ---------------------------------------------------------------------- reading only


def test_reads_all_and_changes_nothing() -> None:
    store = MemoryStore()
    store.write([Entry("a", {"model": "m"}, memoryview(b"one"))])
    view = ReadOnly(store)
    assert view.write([Entry("b", {"model": "n"}, memoryview(b"two"))]) == 0
    assert view.write([Entry("a", {"more": "1"}, memoryview(b""), merge=True)]) == 0
    assert view.delete(["a"]) == 0
    for place in (store, view):
        assert place.sizes(["a", "b"]) == [3, 0]
        assert blobs(place, "b", "a") == [None, b"one"]
        assert place.read_metadata(["a", "b"]) == [{"model": "m"}, None]
        memory = bytearray(3)
        assert list(fetch(place, ["a"], [[memoryview(memory)]])) == [True]
        assert memory == b"one"


def test_it_says_that_it_takes_no_changes() -> None:
    with pytest.raises(StoreError, match="takes no changes"):
        ReadOnly(MemoryStore()).check_writable()


def test_closing_it_leaves_the_store_open() -> None:
    store = MemoryStore()
    store.write([Entry("a", {}, memoryview(b"one"))])
    with ReadOnly(store) as view:
        assert view.flush()
    assert store.sizes(["a"]) == [3]


# ---------------------------------------------------------------------- caches with write=False


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


def ask(model: Any, url: str, ids: torch.Tensor, **settings: Any) -> RedisChunkCache:
    """The cache of a prompt, whose answer is that of a run without it."""
    cache = RedisChunkCache(model, url, chunk_size=32, **settings)
    answer = model.generate(ids, past_key_values=cache, max_new_tokens=40, do_sample=False)
    if cache.report.exact:
        plain = model.generate(ids, max_new_tokens=40, do_sample=False)
        assert torch.equal(answer, plain)
    assert cache.flush(10)
    return cache


def contents(server: Server) -> dict[bytes, bytes]:
    with server.client() as client:
        return {key: client.dump(key) for key in client.scan_iter()}


@pytest.mark.parametrize("reuse", ["prefix", "anywhere"])
def test_a_cache_reads_and_leaves_nothing(model: Any, redis_server: Server, reuse: str) -> None:
    known, url = tokens(200), redis_server.tcp_url
    ask(model, url, known, reuse=reuse)
    with redis_server.client() as client:  # an index entry that a writer would put right
        for key in client.keys("anchor@*"):
            client.hset(key, "f" * 64, "1 2020-01-01T00:00:00+00:00")
    before = contents(redis_server)
    longer = torch.cat([known, tokens(250, seed=1)], dim=1)
    moved = torch.cat([tokens(7, seed=2), longer], dim=1)
    for ids in (known, longer, moved):
        report = ask(model, url, ids, reuse=reuse, write=False).report
        assert report.bytes_written == report.bytes_dropped == report.store_errors == 0
        assert report.reused > 0 or ids is moved
        assert (report.moved > 0) == (ids is moved and reuse == "anywhere")
    assert contents(redis_server) == before


def test_a_damaged_blob_is_a_miss_and_stays(model: Any, redis_server: Server) -> None:
    ids, url = tokens(200), redis_server.tcp_url
    ask(model, url, ids)
    with redis_server.client() as client:
        for key in client.keys("safetensors@*@kv_bytes"):
            client.setrange(key, client.strlen(key) - 1, b"\x7f")
    before = contents(redis_server)
    report = ask(model, url, ids, write=False).report
    assert report.reused == 0
    assert report.causes == {"damaged": 1}
    assert contents(redis_server) == before


def test_a_new_model_leaves_no_verdict(redis_server: Server) -> None:
    ask(tiny("llama", seed=3), redis_server.tcp_url, tokens(50), write=False)
    assert contents(redis_server) == {}


def test_its_explanations_and_audits(model: Any, redis_server: Server) -> None:
    ids, url = tokens(200), redis_server.tcp_url
    ask(model, url, ids)
    before = contents(redis_server)
    cache = RedisChunkCache(model, url, chunk_size=32, write=False)
    assert cache.explain(ids).reused == 199
    assert cache.audit(ids, new_tokens=2).report.reused == 199
    assert contents(redis_server) == before


def test_documents_cannot_be_added_without_writing(model: Any) -> None:
    with pytest.raises(SettingError, match="write=False is not for add_documents"):
        add_documents(model, "memory://", [tokens(200)[0]], write=False, progress=False)


def test_a_store_around_another_hands_on_all_that_it_does_not_do_itself() -> None:
    class Around(ReadsFrom):
        def write(self, entries: Sequence[Entry]) -> int:
            return self.store.write(entries)

        def delete(self, keys: Sequence[str]) -> int:
            return self.store.delete(keys)

    asked: list[str] = []
    inner = Scripted(
        flush=lambda timeout: asked.append("flush"), check_writable=StoreError("read-only")
    )
    inner.largest = 7
    store = Around(inner)
    store.flush()
    assert asked == ["flush"]
    assert store.largest == 7
    with pytest.raises(StoreError, match="read-only"):
        store.check_writable()
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.check_open()

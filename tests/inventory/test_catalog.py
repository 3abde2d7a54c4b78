from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny, tokens
from scripted import Scripted, blobs, keys_of
from servers import Cluster, Server

from chunkcache import RedisChunkCache, catalog, open_store
from chunkcache.errors import StoreError
from chunkcache.inventory.catalog import Deleted, Filter, Group, delete, entries, stats, sweep
from chunkcache.settings import RESERVED_FIELDS
from chunkcache.stores.base import ChunkStore, Entry, Listed, ReadOnly
from chunkcache.stores.memory import MemoryStore
from chunkcache.stores.redis import RedisStore
from chunkcache.stores.tiered import TieredStore

OLD = "2020-01-01T00:00:00+00:00"


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


@pytest.fixture(params=["memory", "file", "redis", "valkey", "cluster", "tiers"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ChunkStore]:
    def url(kind: str) -> str:
        if kind in ("redis", "valkey"):
            return str(request.getfixturevalue(f"{kind}_server").tcp_url)
        if kind == "cluster":
            running: Cluster = request.getfixturevalue("cluster")
            running.reset()
            return running.url
        return {"memory": "memory://", "file": f"file://{tmp_path}"}[kind]

    urls = [url("memory"), url("file")] if request.param == "tiers" else url(request.param)
    with open_store(urls) as opened:
        yield opened


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster() as running:
        yield running


def chunk(
    number: int, model: str = "m", format: str = "safetensors", size: int = 10, **fields: str
) -> Entry:
    name = hashlib.sha256(str(number).encode()).hexdigest()
    metadata = {"tokens": "4", "bytes": str(size), "namespace": "", "tags": "", "created": OLD}
    key = f"{format}@{model}@1@0@{name}"
    return Entry(key, {**metadata, **fields}, memoryview(bytes(size)))


def anchor(number: int, *chunks: Entry, created: str = OLD, pinned: bool = False) -> Entry:
    name = hashlib.sha256(f"anchor {number}".encode()).hexdigest()
    places = {each.key[-64:]: f"5 {created}" for each in chunks}
    return Entry(f"anchor@m@1@0@{name}", places, memoryview(b""), pinned=pinned)


def keys(*given: Entry) -> set[str]:
    return {each.key for each in given}


def prompt(model: Any, store: ChunkStore, ids: torch.Tensor, **settings: Any) -> RedisChunkCache:
    cache = RedisChunkCache(model, store, **settings)
    model.generate(ids, past_key_values=cache, max_new_tokens=1, do_sample=False)
    assert cache.flush(10)
    return cache


# ---------------------------------------------------------------------- looking


def test_entries_tell_key_metadata_and_size(store: ChunkStore) -> None:
    a, b, other = chunk(1, temperature="0.7"), chunk(2, size=20), chunk(3, temperature="0.8")
    store.write(
        [a, b, other, anchor(1, a), Entry("self-test@m@1@0@x", {"a": "b"}, memoryview(b""))]
    )
    found = {entry.key: entry for entry in entries(store)}
    assert found.keys() == keys(a, b, other)
    assert found[a.key].metadata == a.metadata
    assert (found[a.key].nbytes, found[b.key].nbytes) == (10, 20)
    (only,) = entries(store, Filter(fields={"temperature": "0.7"}))
    assert only.key == a.key


def test_stats_count_by_model_namespace_and_tag(store: ChunkStore) -> None:
    new = "2026-01-01T00:00:00+00:00"
    store.write(
        [
            chunk(1, "org/a", tags="x,y=1", namespace="n"),
            chunk(2, "org/a", tags="x", created=new),
            chunk(3, "b", size=100, tokens="77"),
        ]
    )
    found = stats(store)
    assert found.total == Group(3, 85, 120, OLD, new)
    assert found.models == {"org/a": Group(2, 8, 20, OLD, new), "b": Group(1, 77, 100, OLD, OLD)}
    assert {name: group.chunks for name, group in found.namespaces.items()} == {"": 2, "n": 1}
    assert {name: group.chunks for name, group in found.tags.items()} == {"x": 2, "y=1": 1}
    assert stats(store, Filter(model="b")).total == Group(1, 77, 100, OLD, OLD)
    assert json.loads(json.dumps(found.to_dict()))["models"]["b"]["bytes"] == 100
    assert str(found).startswith("3 chunks, 85 tokens, 0.0 MB, made 2020-01-01")
    assert "  (none): 2 chunks" in str(found)


def test_an_empty_store(store: ChunkStore) -> None:
    assert stats(store) == catalog.Stats()
    assert str(stats(store)) == "0 chunks, 0 tokens, 0.0 MB"
    assert delete(store, Filter()) == sweep(store) == Deleted(0, 0, 0, 0, False)


def test_metadata_that_is_nonsense_counts_for_nothing() -> None:
    store = MemoryStore()
    store.write([chunk(n, tokens=text) for n, text in enumerate(["-1", "x", "", "9" * 30, "²"])])
    assert stats(store).total == Group(5, 0, 50, OLD, OLD)


def test_halves_are_listed_and_not_counted(store: ChunkStore) -> None:
    store.write([Entry(chunk(1).key, chunk(1).metadata, memoryview(b""))])
    assert [entry.nbytes for entry in entries(store)] == [0]
    assert stats(store).total.chunks == 0


def test_fields_of_ones_own_are_written_and_found(model: Any, store: ChunkStore) -> None:
    for temperature, seed in (("0.7", 1), ("0.8", 2)):
        prompt(model, store, tokens(200, seed=seed), metadata={"temperature": temperature})
    found = list(entries(store, Filter.parse("temperature=0.7")))
    assert len(found) == 2
    fields = found[0].metadata
    assert fields is not None
    assert fields.keys() - RESERVED_FIELDS == {"temperature"}
    assert stats(store).total.chunks == 4


# ---------------------------------------------------------------------- deleting


def test_delete_takes_what_is_meant_and_nothing_else(store: ChunkStore) -> None:
    gone, stays, other = chunk(1, tags="user=7"), chunk(2, tags="user=8"), chunk(3)
    index = [anchor(1, gone, stays), anchor(2, gone), anchor(3, stays, other)]
    store.write([gone, stays, other, *index])
    chosen = Filter(tags="user=7")
    for dry_run in (True, False):
        done = delete(store, chosen, dry_run=dry_run)
        assert done == Deleted(1, 4, 10, 2, dry_run)
        assert (gone.key in keys_of(store)) is dry_run
    assert store.flush(10)
    assert set(keys_of(store)) == keys(stays, other, index[0], index[2])
    assert store.read_metadata([index[0].key]) == [{stays.key[-64:]: f"5 {OLD}"}]
    assert store.read_metadata([index[2].key]) == [dict(index[2].metadata)]
    assert store.sizes([gone.key, stays.key, other.key]) == [0, 10, 10]
    assert str(done) == "1 chunks deleted: 4 tokens, 0.0 MB, 2 mentions in the index"
    assert delete(store, chosen).chunks == 0


def test_all_of_many_are_deleted(store: ChunkStore) -> None:
    chunks = [chunk(number, tags="all") for number in range(1500)]
    store.write([Entry(each.key, each.metadata, memoryview(b"")) for each in chunks])
    store.write([*chunks[:50], *(anchor(n, chunks[n], chunks[n + 1]) for n in range(300))])
    assert store.flush(60)
    assert delete(store, Filter(tags="all")).chunks == 1500
    assert keys_of(store) == []


def test_a_chunk_in_two_formats_keeps_its_mentions(store: ChunkStore) -> None:
    plain, small = chunk(1), chunk(1, format="safetensors-int8+zstd")
    index = anchor(1, plain)
    store.write([plain, small, index])
    assert delete(store, Filter(codec="safetensors")).mentions == 0
    assert set(keys_of(store)) == keys(small, index)
    assert delete(store, Filter(codec="safetensors-int8+zstd")).mentions == 1
    assert keys_of(store) == []


def test_a_pinned_index_entry_stays_pinned(redis_server: Server) -> None:
    held, gone = chunk(1, pinned="yes"), chunk(2, pinned="yes")
    index = [anchor(1, held, gone, pinned=True), anchor(2, chunk(3), gone)]
    with open_store(redis_server.tcp_url, ttl=1000) as store:
        store.write([held, gone, chunk(3), *index])
        assert store.flush(10)
        store.delete([gone.key])
        sweep(store)
        with redis_server.client() as client:
            left = [client.ttl(f"{each.key}@metadata") for each in index]
    assert left[0] == -1
    assert 900 < left[1] <= 1000


def test_prompts_are_forgotten_and_others_not(model: Any, store: ChunkStore) -> None:
    mine, yours = tokens(300, seed=1), tokens(300, seed=2)
    prompt(model, store, mine, reuse="anywhere", tags="user=7")
    prompt(model, store, yours, reuse="anywhere", tags="user=8")
    done = delete(store, Filter(tags="user=7"))
    assert done.chunks == 3
    assert done.tokens == 300
    assert done.mentions > 50
    names = {entry.key[-64:] for entry in entries(store)}
    for page in store.scan("anchor@"):
        assert all(entry.metadata and entry.metadata.keys() <= names for entry in page)
    shifted = torch.cat([tokens(5, seed=3), mine], dim=1)
    fresh = tiny("llama")
    assert prompt(fresh, store, shifted, reuse="anywhere", write=False).report.moved == 0
    assert prompt(fresh, store, mine, write=False).report.reused == 0
    assert prompt(fresh, store, yours, write=False).report.reused == 299
    shifted = torch.cat([tokens(5, seed=3), yours], dim=1)
    assert prompt(fresh, store, shifted, reuse="anywhere", write=False).report.moved > 200


def test_what_takes_no_changes_is_an_error_before_anything_is_done(scripted: Scripted) -> None:
    scripted.write([chunk(1)])
    store = ReadOnly(scripted)
    for verb in (lambda: delete(store, Filter()), lambda: sweep(store)):
        with pytest.raises(StoreError, match="takes no changes"):
            verb()
    assert delete(store, Filter(), dry_run=True).chunks == 1
    assert scripted.kept.keys() == keys(chunk(1))


def test_a_store_that_is_down_is_an_error() -> None:
    with open_store("redis://127.0.0.1:1/0") as store:
        for verb in (lambda: list(entries(store)), lambda: stats(store), lambda: sweep(store)):
            with pytest.raises(StoreError):
                verb()


def test_index_entries_that_cannot_be_written_are_an_error(redis_server: Server) -> None:
    gone, stays = chunk(1, tags="x"), chunk(2)
    with open_store(redis_server.tcp_url) as store, redis_server.client() as client:
        store.write([gone, stays, anchor(1, gone, stays)])
        assert store.flush(10)
        client.execute_command("ACL SETUSER", "few", "on", ">pw", "~*", "+@all", "-hset")
        with (
            open_store(redis_server.tcp_url.replace("//", "//few:pw@")) as few,
            pytest.raises(StoreError, match="hset"),
        ):
            delete(few, Filter(tags="x"))
        client.execute_command("ACL DELUSER", "few")


# ---------------------------------------------------------------------- sweeping


def test_sweep_takes_halves_and_dead_mentions_only(server: Server) -> None:
    store = RedisStore(server.tcp_url)
    whole, no_blob, no_metadata, bare = (chunk(number) for number in range(4))
    index = [anchor(1, whole, no_blob), anchor(2, chunk(9)), anchor(3, whole)]
    just_now = datetime.now(UTC).isoformat(timespec="seconds")
    young = anchor(4, chunk(8), created=just_now)  # its chunk may still be on its way
    other = Entry("f@m@1@0@x", {}, memoryview(b"x"))
    store.write([whole, no_blob, no_metadata, Entry(bare.key, {}, bare.blob), *index, young, other])
    with server.client() as client:
        client.delete(f"{no_blob.key}@kv_bytes", f"{no_metadata.key}@metadata")
        client.set(f"{chunk(5).key}@metadata", "being written by somebody")
        client.rpush(f"{chunk(6).key}@kv_bytes", "x")
        client.set("unrelated", "x")
        before = client.dbsize()
        assert sweep(store, dry_run=True) == Deleted(3, 4, 20, 2, True)
        assert client.dbsize() == before
        assert sweep(store) == Deleted(3, 4, 20, 2, False)
        assert client.dbsize() == before - 4
        assert sweep(store) == Deleted(0, 0, 0, 0, False)
    assert set(keys_of(store)) == {*keys(whole, index[0], index[2], young, other)}
    assert store.read_metadata([index[0].key]) == [{whole.key[-64:]: f"5 {OLD}"}]


def test_sweep_goes_through_all_pages_of_all_servers(cluster: Cluster) -> None:
    cluster.reset()
    with open_store(cluster.url) as store:
        store.write([Entry(chunk(n).key, {"bytes": "1"}, memoryview(b"")) for n in range(2500)])
        assert store.flush(60)
        assert sweep(store).chunks == 2500
        assert keys_of(store) == []


def test_mentions_younger_than_a_minute_are_left_alone() -> None:
    store = MemoryStore()
    now = datetime.now(UTC)
    ages = {
        age: anchor(
            age, chunk(1), created=(now - timedelta(seconds=age)).isoformat(timespec="seconds")
        )
        for age in (10, 100)
    }
    store.write(list(ages.values()))
    assert sweep(store).mentions == 1
    assert keys_of(store) == [ages[10].key]


def test_copies_in_near_tiers_go_too() -> None:
    near, far = MemoryStore(), MemoryStore()
    far.write([chunk(1, tags="x")])
    store = TieredStore([near, far])
    assert blobs(store, chunk(1).key) == [bytes(10)]
    assert near.sizes([chunk(1).key]) == [10]
    assert delete(store, Filter(tags="x")).chunks == 1
    assert near.sizes([chunk(1).key]) == [0]


def test_what_expires_goes_on_expiring(redis_server: Server) -> None:
    """Whoever deletes a chunk may open the store without a time to live, or with another one."""
    one, two = chunk(1, n="1"), chunk(2)
    with redis_server.client() as client:
        client.flushall()
        with open_store(redis_server.unix_url, ttl=1000) as mortal:
            mortal.write([one, two, anchor(1, one, two)])
            mortal.flush()
        with open_store(redis_server.unix_url) as eternal:
            assert delete(eternal, Filter(fields={"n": "1"})).chunks == 1
        (index,) = client.keys("anchor@*")
        assert client.hkeys(index) == [two.key[-64:].encode()]
        assert 900 < client.ttl(index) <= 1000


def test_what_was_being_written_is_not_swept() -> None:
    def halves(prefix: str) -> list[list[Listed]]:
        return [[replace(e, metadata=None) for e in page] for page in store.inner.scan(prefix)]

    store = Scripted(scan=[halves, None])
    store.write([chunk(1)])
    assert sweep(store).chunks == 0
    assert store.sizes([chunk(1).key]) == [chunk(1).nbytes]


def test_copies_in_a_near_tier_are_no_halves(model: Any, tmp_path: Path) -> None:
    near, far = f"file://{tmp_path}/near", f"file://{tmp_path}/far"
    ids = tokens(150)
    for place in (far, [near, far]):
        with RedisChunkCache(model, place) as cache:
            model.generate(ids, past_key_values=cache, max_new_tokens=1)
            cache.flush()
    with open_store(near) as store:
        assert len(list(entries(store))) == 2
        assert sweep(store).chunks == 0

"""Full stores of every kind: who leaves, who stays, and who is not let in."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from scripted import blobs, fetch
from servers import Server

from chunkcache.stores import room
from chunkcache.stores.base import STATE, ChunkStore, Entry, read_blobs
from chunkcache.stores.disk import DiskStore
from chunkcache.stores.eviction import leaving, roughly
from chunkcache.stores.memory import MemoryStore
from chunkcache.stores.redis import RedisStore
from chunkcache.stores.tiered import TieredStore

SIZE = 250_000
CHUNK = 128
SERVERS = ["redis allkeys-lru", "redis allkeys-lfu", "valkey allkeys-lru", "valkey allkeys-lfu"]
StoreOf = Callable[[int], ChunkStore]


def bound(server: Server, chunks: int, policy: str = "allkeys-lru") -> str:
    """Let a server have room for so many chunks, and not for one more. Returns its URL."""
    server.reset()
    with server.client() as client:
        used = client.info("memory")["used_memory"]
        client.config_set("maxmemory-policy", policy)
        # What connections take while blobs are sent, and what a store leaves free for that.
        client.config_set("maxmemory", used + chunks * ((1 << 18) + 2500) + 3 * (1 << 18) + 200_000)
    return server.unix_url


@pytest.fixture(params=["memory", "file", *SERVERS])
def store_of(request: pytest.FixtureRequest, tmp_path: Path) -> StoreOf:
    """A store of each kind with room for so many chunks."""
    kind, _, policy = request.param.partition(" ")

    def make(chunks: int) -> ChunkStore:
        if kind == "memory":
            return MemoryStore(max_bytes=chunks * (SIZE + 300))
        if kind == "file":
            return DiskStore(tmp_path, max_bytes=chunks * (SIZE + 300))
        server: Server = request.getfixturevalue(f"{kind}_server")
        return RedisStore(bound(server, chunks, policy), read_timeout=5.0)

    return make


def key_of(name: str, number: int) -> str:
    return f"safetensors@m@1@0@{sha256(f'{name} {number}'.encode()).hexdigest()}"


def keys_of(name: str, length: int) -> list[str]:
    return [key_of(name, number) for number in range(length)]


def entry(name: str, number: int, pinned: bool = False) -> Entry:
    """Chunk number `number` of a prompt."""
    fields = {
        "positions": f"{number * CHUNK}-{(number + 1) * CHUNK}",
        "pinned": "yes" if pinned else "no",
    }
    blob = memoryview(name[:1].encode() * SIZE)
    before = keys_of(name, number)
    return Entry(key_of(name, number), fields, blob, pinned=pinned, before=before)


def ask(store: ChunkStore, name: str, length: int) -> int:
    """What the cache does with a prompt. Returns how many of its chunks were of use."""
    keys = keys_of(name, length)
    sizes = store.sizes(keys)
    hits = next((n for n, size in enumerate(sizes) if not size), length)
    found = [bytes(view or b"")[:1] for view in read_blobs(store, keys[:hits])]
    assert found == [name[:1].encode()] * hits
    new = [entry(name, n) for n, size in enumerate(sizes) if not size]
    for at in range(0, len(new), 4):  # as a queue hands them over
        store.write(new[at : at + 4])
    return hits


def simulate(trace: str, length: int, room: int) -> list[int]:
    """The hits of a list of chunks in which those of a prompt move together, last one first."""
    kept: OrderedDict[tuple[str, int], None] = OrderedDict()
    hits = []
    for name in trace:
        hits.append(next((n for n in range(length) if (name, n) not in kept), length))
        for number in reversed(range(length)):
            kept[name, number] = None
            kept.move_to_end((name, number))
        while len(kept) > room:
            kept.popitem(last=False)
    return hits


def test_who_leaves() -> None:
    ranked = [("a", 3), ("b", 4), ("c", 5)]
    assert leaving(ranked, 0) == ([], True)
    assert leaving(ranked, 3) == (["a"], True)
    assert leaving(ranked, 4) == (["a", "b"], True)
    assert leaving(ranked, 13) == (["a", "b", "c"], False)
    assert [roughly(age) for age in (0, 1, 15, 16, 17, 100, 103, 104)] == [
        0, 1, 15, 16, 16, 96, 96, 104
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("trace", "length", "chunks"),
    [("aaaa", 16, 12), ("abcdabcd", 8, 24), ("abababab", 8, 12)],
    ids=["a prompt larger than the store", "four in turn, room for three", "two, room for one"],
)
def test_what_is_found_is_at_least_what_whole_uses_tail_first_would_find(
    store_of: StoreOf, trace: str, length: int, chunks: int
) -> None:
    store = store_of(chunks)
    hits = [ask(store, name, length) for name in trace]
    assert sum(hits) >= 0.8 * sum(simulate(trace, length, chunks)), hits
    store.close()


def test_a_prompt_larger_than_the_store_keeps_its_beginning_whole(store_of: StoreOf) -> None:
    store = store_of(6)
    hits = [ask(store, "a", 9) for _ in range(4)]
    assert hits[0] == 0
    assert 5 <= hits[1] <= 7
    assert hits[2:] == hits[1:2] * 2  # and does not lose it to what follows
    assert sum(size > 0 for size in store.sizes(keys_of("a", 9))) == hits[1]
    store.close()


def test_what_many_use_stays_while_others_come_and_go(store_of: StoreOf) -> None:
    store = store_of(8)
    for name in "abc":
        ask(store, name, 2)
    time.sleep(1.1)  # servers count seconds
    for name in "def":
        assert ask(store, "a", 2) == 2
        ask(store, name, 2)
    assert ask(store, "a", 2) == 2
    store.close()


def test_pinned_chunks_stay(store_of: StoreOf) -> None:
    store = store_of(6)
    store.write([entry("p", number, pinned=True) for number in range(3)])
    for name in "abcdef":
        ask(store, name, 3)
    assert store.sizes(keys_of("p", 3)) == [SIZE] * 3
    assert any(store.sizes(keys_of("f", 3)))
    store.close()


def test_writing_is_a_use_of_what_stands_before_it(store_of: StoreOf) -> None:
    """A chat that goes on in one cache looks nothing up, but its beginning is used."""
    store = store_of(8)
    for number in range(3):
        store.write([entry("a", number)])
    ask(store, "b", 3)
    time.sleep(1.1)  # servers count seconds
    for number in range(3, 5):
        store.write([entry("a", number)])
    ask(store, "c", 3)
    assert [size > 0 for size in store.sizes(keys_of("a", 3))] == [True] * 3
    store.close()


def test_copies_in_a_nearer_tier_keep_the_beginning() -> None:
    near, far = MemoryStore(max_bytes=6 * (SIZE + 300)), MemoryStore()
    far.write([entry("a", number) for number in range(9)])
    store = TieredStore([near, far])
    for _ in range(2):
        places = [[memoryview(bytearray(SIZE))] for _ in range(9)]
        assert all(fetch(store, keys_of("a", 9), places))
        assert [size > 0 for size in near.sizes(keys_of("a", 9))] == [True] * 6 + [False] * 3


# ---------------------------------------------------------------------- files


def test_two_stores_on_one_folder_share_its_room_and_its_order(tmp_path: Path) -> None:
    one, two = (DiskStore(tmp_path, max_bytes=30 * (SIZE + 300)) for _ in range(2))
    for name in "abcdef":
        ask(one, name, 8)
        ask(two, name.upper(), 2)
    used = sum(path.stat().st_size for path in tmp_path.rglob("*.*"))
    assert used <= 1.2 * 30 * (SIZE + 300)
    for name, length in (("f", 8), ("F", 2)):
        assert all(one.sizes(keys_of(name, length)))
    assert not any(one.sizes(keys_of("a", 8)))


def test_a_store_that_is_full_does_not_look_at_the_folder_for_each_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DiskStore(tmp_path, max_bytes=1_000_000)
    looks: list[int] = []
    look = DiskStore._look
    monkeypatch.setattr(DiskStore, "_look", lambda store: (looks.append(1), look(store))[1])
    monkeypatch.setattr("chunkcache.stores.disk.LOOK_SECONDS", 1000.0)
    for number in range(400):
        store.write([Entry(f"k{number}", {}, memoryview(bytes(9_900)))])
    assert len(looks) < 50
    looks.clear()
    blobs(store, *[f"k{number}" for number in range(300)])
    later = Entry("later", {}, memoryview(bytes(50_000)), before=[f"k{n}" for n in range(300, 400)])
    assert [store.write([later]) for _ in range(20)] == [0] * 20
    assert len(looks) < 5


# ---------------------------------------------------------------------- servers


@pytest.fixture(params=["allkeys-lru", "allkeys-lfu", "volatile-lru"])
def policy(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


def test_nothing_is_deleted_that_is_not_ours(server: Server, policy: str) -> None:
    """Names that look like ours at their end, or without what a chunk has, are others'."""
    store = RedisStore(bound(server, 8, policy), ttl=1000)
    odd = key_of("odd", 1)
    with server.client() as client:
        client.set("user@kv_bytes", "x" * 1000)
        client.hset("user@metadata", mapping={"positions": "9000000-1"})
        client.set(f"{odd}@kv_bytes", "x")  # no metadata
        client.set(f"{odd[:-1]}@kv_bytes", "x")
        client.hset(f"{odd[:-1]}@metadata", mapping={"positions": "9000000-1"})
        for number in range(20):
            client.set(f"session:{number}", "x" * 100)
        there = set(client.keys())
        client.config_resetstat()
        for name in "abcdef":
            ask(store, name, 5)
        stats = client.info("stats")
        assert there <= {*client.keys()}
        assert stats["evicted_keys"] == 0  # it was we who deleted
        assert client.info("commandstats")["cmdstat_unlink"]["calls"] >= 5
    store.close()


@pytest.mark.parametrize("positions", ["9" * 5000, "\u0663-4", "-1-5", "\udcff"])
def test_positions_that_anybody_has_written_stop_no_writer(server: Server, positions: str) -> None:
    store = RedisStore(bound(server, 8, "allkeys-lru"))
    odd = key_of("odd", 1)
    with server.client() as client:
        client.set(f"{odd}@kv_bytes", "x" * SIZE)
        given = positions.encode(errors="surrogateescape")
        client.hset(f"{odd}@metadata", mapping={"positions": given})
        for name in "abcd":
            ask(store, name, 5)
        assert any(store.sizes(keys_of("d", 5)))
    store.close()


def test_what_does_not_expire_stays_under_volatile_policies(server: Server) -> None:
    url = bound(server, 8, "volatile-lru")
    with RedisStore(url) as lasting, RedisStore(url, ttl=1000) as store:
        lasting.write([entry("l", number) for number in range(3)])
        for name in "abc":
            ask(store, name, 5)
        assert all(lasting.sizes(keys_of("l", 3)))
        assert sum(size > 0 for name in "abc" for size in store.sizes(keys_of(name, 5))) >= 4


def test_states_leave_with_their_chunks_and_also_alone(server: Server) -> None:
    """What is left of a chunk whose K/V a server has evicted must not keep others out."""
    store = RedisStore(bound(server, 12), read_timeout=5.0)
    for number in range(7):
        chunk = entry("a", number)
        store.write([chunk, replace(chunk, key=chunk.key + STATE, merge=True)])
    store.sizes(keys_of("a", 7))
    time.sleep(1.1)  # servers count seconds
    with server.client() as client:
        client.config_resetstat()
        ask(store, "x", 2)
        both = [client.exists(f"{key}@kv_bytes", key + STATE) for key in keys_of("a", 7)]
        assert both == sorted(both, reverse=True)
        assert set(both) == {0, 2}
        client.delete(*(f"{key}@kv_bytes" for key in keys_of("a", 7)))
        ask(store, "b", 10)
        assert sum(size > 0 for size in store.sizes(keys_of("b", 10))) >= 9
        assert client.info("stats")["evicted_keys"] == 0  # it was we who deleted
    store.close()


def full_of_others(client: object, names: Sequence[str]) -> None:
    for name in names:
        client.set(name, "x" * 100_000)  # type: ignore[attr-defined]


def test_on_a_server_full_of_other_things_its_policy_decides(server: Server) -> None:
    store = RedisStore(bound(server, 12), read_timeout=5.0)
    with server.client() as client:
        full_of_others(client, [f"other:{number}" for number in range(60)])
        ask(store, "a", 8)
        assert sum(size > 0 for size in store.sizes(keys_of("a", 8))) >= 6
        assert client.info("stats")["evicted_keys"] > 0
    store.close()


@pytest.mark.parametrize("missing", ["info", "randomkey", "object", "memory|usage", "hmget"])
def test_without_the_right_to_look_the_servers_policy_decides(server: Server, missing: str) -> None:
    url = bound(server, 6)
    words = "on nopass ~* -@all +@read +@write +@connection +@transaction +info +memory|usage"
    try:
        with server.client() as client:
            client.execute_command("ACL", "SETUSER", "some", *words.split(), f"-{missing}")
        store = RedisStore(url.replace("unix://", "unix://some:x@"), read_timeout=5.0)
        for name in "aabc":
            ask(store, name, 4)
        assert any(store.sizes(keys_of("c", 4)))
        store.close()
    finally:
        with server.client() as client:
            client.execute_command("ACL", "DELUSER", "some")


def test_a_look_at_a_server_is_relied_on_for_a_moment(
    redis_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "KNOWN_SECONDS", 60.0)
    store = RedisStore(bound(redis_server, 100))
    with redis_server.client() as client:
        client.config_resetstat()
        for name in "abc":
            ask(store, name, 5)
        assert client.info("commandstats")["cmdstat_info"]["calls"] == 1
    store.close()


def test_eight_writers_of_one_prompt_leave_it_whole(server: Server) -> None:
    """Nobody waits for anybody."""
    stores = [RedisStore(server.unix_url, read_timeout=5.0) for _ in range(8)]
    threads = [threading.Thread(target=ask, args=(store, "a", 6)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ask(stores[0], "a", 6) == 6
    assert None not in stores[0].read_metadata(keys_of("a", 6))

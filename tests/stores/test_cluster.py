from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny, tokens
from redis.crc import key_slot
from scripted import blobs, fetch
from servers import Cluster, FakeServer, Server, free_port, wait_until

from chunkcache import RedisChunkCache, open_store
from chunkcache.errors import SettingError, StoreError
from chunkcache.stores import topology
from chunkcache.stores.base import Entry, calls_of_prompt, read_blobs
from chunkcache.stores.breaker import CircuitBreaker
from chunkcache.stores.cluster import ClusterStore
from chunkcache.stores.redis import RedisStore
from chunkcache.stores.writer import WriteBehind

COOLDOWN = 0.1
KEYS = [f"f@m@1@0@{number:04x}" for number in range(24)]
BLOBS = [bytes([at]) * (1000 + 77_777 * at) for at in range(24)]


@pytest.fixture(scope="module")
def running() -> Iterator[Cluster]:
    with Cluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(running: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setattr(topology, "CircuitBreaker", partial(CircuitBreaker, cooldown=COOLDOWN))
    monkeypatch.setattr(topology, "REFRESH_SECONDS", 0.0)
    yield running
    running.reset()


@pytest.fixture
def store(cluster: Cluster) -> Iterator[ClusterStore]:
    with ClusterStore(cluster.url, read_timeout=1.0) as store:
        yield store


def fill(store: ClusterStore) -> None:
    entries = [
        Entry(key, {"n": key, "bytes": str(len(blob))}, memoryview(blob))
        for key, blob in zip(KEYS, BLOBS, strict=True)
    ]
    assert store.write(entries) == sum(map(len, BLOBS))


def read(store: ClusterStore, keys: Sequence[str]) -> list[bytes | None]:
    """The blobs of these of `KEYS`, in places of two views each."""
    blobs = dict(zip(KEYS, BLOBS, strict=True))
    places = [memoryview(bytearray(len(blobs[key]))) for key in keys]
    arrived = fetch(store, keys, [[place[:7], place[7:]] for place in places])
    return [bytes(p) if there else None for p, there in zip(places, arrived, strict=True)]


def slot_of(key: str) -> int:
    return key_slot(key.rpartition("@")[2].encode())


def keys_of(cluster: Cluster, server: Server) -> list[str]:
    return [key for key in KEYS if cluster.owner(slot_of(key)) is server]


def test_every_verb(store: ClusterStore, cluster: Cluster) -> None:
    fill(store)
    assert all(len(keys_of(cluster, server)) > 2 for server in cluster.servers)
    keys = [KEYS[5], "f@m@1@0@none", *KEYS[::-1]]
    assert store.sizes(keys) == [len(BLOBS[5]), 0, *map(len, BLOBS[::-1])]
    assert blobs(store, *keys) == [BLOBS[5], None, *BLOBS[::-1]]
    assert read(store, KEYS[::-1]) == BLOBS[::-1]
    metadata = store.read_metadata(keys)
    assert [fields and fields["n"] for fields in metadata] == [KEYS[5], None, *KEYS[::-1]]
    store.write([Entry(KEYS[0], {"more": "1"}, memoryview(b""), merge=True)])
    assert store.read_metadata(KEYS[:1]) == [{"n": KEYS[0], "bytes": "1000", "more": "1"}]
    assert store.delete([*KEYS[1:], "f@m@1@0@none"]) == 23
    assert store.sizes(KEYS) == [1000, *[0] * 23]
    store.check_writable()


def test_nothing_to_do_needs_no_server() -> None:
    with ClusterStore(f"redis+cluster://127.0.0.1:{free_port()}") as store:
        assert (store.sizes([]), blobs(store), store.read_metadata([])) == ([], [], [])
        assert (store.write([]), store.delete([]), list(fetch(store, [], []))) == (0, 0, [])
        store.check_writable()


def test_the_hash_stands_in_braces(store: ClusterStore, cluster: Cluster) -> None:
    fill(store)
    with cluster.owner(slot_of(KEYS[3])).client() as client:
        assert client.get("f@m@1@0@{0003}@kv_bytes") == BLOBS[3]
        assert client.hget("f@m@1@0@{0003}@metadata", "n") == KEYS[3].encode()


def test_a_url_opens_it_behind_a_queue(cluster: Cluster) -> None:
    with open_store(cluster.url, ttl=100, refresh_ttl=False) as store:
        store.write([Entry(KEYS[0], {"a": "1"}, memoryview(b"blob"))])
        assert store.flush(10)
        assert store.sizes(KEYS[:2]) == [4, 0]
    with cluster.owner(slot_of(KEYS[0])).client() as client:
        assert 90 < client.ttl("f@m@1@0@{0000}@kv_bytes") <= 100


def test_a_setting_that_cannot_work_is_an_error_at_once() -> None:
    with pytest.raises(SettingError, match="ttl"):
        ClusterStore("redis+cluster://localhost", ttl=-1)
    with pytest.raises(SettingError, match="a cluster has no databases"):
        ClusterStore("redis+cluster://localhost/1")


TEXT = st.text(min_size=1, max_size=10).filter(lambda text: not {"@", "}"} & set(text))


def test_whatever_is_written_is_read(running: Cluster) -> None:
    with ClusterStore(running.url) as store:

        @settings(max_examples=20, deadline=None)
        @given(entries=st.dictionaries(TEXT, st.binary(min_size=1, max_size=200), max_size=6))
        def check(entries: dict[str, bytes]) -> None:
            store.write([Entry(key, {"k": "v"}, memoryview(blob)) for key, blob in entries.items()])
            keys = list(entries)
            assert blobs(store, *keys) == list(entries.values())
            assert store.sizes(keys) == [len(blob) for blob in entries.values()]
            assert store.delete(keys) == len(entries)

        check()


@pytest.mark.parametrize("taken", [0, 1, 9])
def test_a_read_that_ends_early_leaves_nothing_behind(store: ClusterStore, taken: int) -> None:
    fill(store)
    for _ in range(3):
        places = [memoryview(bytearray(len(blob))) for blob in BLOBS]
        into = fetch(store, KEYS, [[place] for place in places])
        for at in range(taken):
            assert next(into)
            assert bytes(places[at]) == BLOBS[at]
        into.close()
        before = list(map(bytes, places))
        assert store.sizes(KEYS) == list(map(len, BLOBS))
        assert read(store, KEYS) == BLOBS
        assert list(map(bytes, places)) == before  # nobody writes into them any more


def test_the_keys_of_a_dead_server_are_missing_and_the_others_are_not(
    store: ClusterStore, cluster: Cluster
) -> None:
    fill(store)
    dead = cluster.servers[1]
    lost = keys_of(cluster, dead)
    dead.stop()
    expected = [None if key in lost else blob for key, blob in zip(KEYS, BLOBS, strict=True)]
    assert read(store, KEYS) == expected
    with calls_of_prompt() as calls:
        assert store.sizes(KEYS) == [len(blob or b"") for blob in expected]
        assert len(calls.errors) == 1
        assert read(store, KEYS) == expected
        found = store.read_metadata(KEYS)
        assert [fields is None for fields in found] == [key in lost for key in KEYS]
        assert len(calls.errors) == 3
    assert all(str(dead.port) in str(error) for error in calls.errors)
    assert store.write([Entry(lost[0], {}, memoryview(b"x"))]) == 0
    kept = [key for key in KEYS if key not in lost]
    assert store.write([Entry(key, {}, memoryview(b"other")) for key in KEYS]) == 5 * len(kept)
    store.check_writable()
    with pytest.raises(StoreError, match=str(dead.port)):
        store.delete(KEYS)
    assert store.sizes(KEYS) == [0] * 24
    cluster.reset()
    wait_until(lambda: store.write([Entry(lost[0], {}, memoryview(b"x"))]) == 1)
    with calls_of_prompt() as calls:
        wait_until(lambda: store.sizes([lost[0]]) == [1])
        store.sizes(KEYS)
    assert blobs(store, lost[0]) == [b"x"]


def test_a_server_that_dies_in_the_middle_of_a_read(store: ClusterStore, cluster: Cluster) -> None:
    fill(store)
    dead = cluster.owner(slot_of(KEYS[0]))
    lost = keys_of(cluster, dead)
    views = read_blobs(store, KEYS)
    assert bytes(next(views) or b"") == BLOBS[0]
    dead.stop()
    with calls_of_prompt() as calls:
        rest = [None if view is None else bytes(view) for view in views]
    for key, blob, found in zip(KEYS[1:], BLOBS[1:], rest, strict=True):
        assert found == blob or (found is None and key in lost)
    assert len(calls.errors) == 1


def test_another_server_that_takes_over_is_found(store: ClusterStore, cluster: Cluster) -> None:
    fill(store)
    slot = slot_of(KEYS[0])
    dead = cluster.owner(slot)
    heir = next(server for server in cluster.servers if server is not dead)
    dead.stop()
    assert store.sizes(KEYS[:1]) == [0]
    with heir.client() as client:
        for command in ("DELSLOTS", "ADDSLOTS"):
            client.execute_command(f"CLUSTER {command}", slot)
        client.execute_command("CLUSTER BUMPEPOCH")
    assert store.write([Entry(KEYS[0], {}, memoryview(b"x"))]) == 1
    assert store.sizes(KEYS[:1]) == [1]
    with heir.client() as client:
        assert client.get("f@m@1@0@{0000}@kv_bytes") == b"x"
    cluster.reset()
    cluster.end_move(slot, dead)


def test_a_silent_server_costs_its_own_keys(store: ClusterStore, cluster: Cluster) -> None:
    fill(store)
    silent = cluster.servers[2]
    lost = keys_of(cluster, silent)
    with silent.client() as client:
        client.execute_command("CLIENT", "PAUSE", "60000", "ALL")
    with calls_of_prompt() as calls:
        sizes = store.sizes(KEYS)
    assert [size == 0 for size in sizes] == [key in lost for key in KEYS]
    assert "read_timeout" in str(calls.errors[0])
    silent.stop()


def test_when_all_servers_are_dead_it_is_a_store_error(
    store: ClusterStore, cluster: Cluster
) -> None:
    fill(store)
    for server in cluster.servers:
        server.stop()
    for verb in (
        lambda: store.sizes(KEYS),
        lambda: store.read_metadata(KEYS),
        lambda: store.write([Entry(key, {}, memoryview(b"x")) for key in KEYS]),
        lambda: store.delete(KEYS),
        lambda: store.check_writable(),
        lambda: list(store.scan()),
    ):
        with pytest.raises(StoreError):
            verb()
    with calls_of_prompt() as calls:
        assert read(store, KEYS) == [None] * 24
    assert len(calls.errors) == 3
    cluster.reset()
    wait_until(lambda: store.sizes(["back"]) == [0])
    fill(store)
    assert read(store, KEYS) == BLOBS


def test_a_cluster_that_was_never_reached_is_a_store_error() -> None:
    ports = [free_port(), free_port()]
    url = "redis+cluster://:secret@" + ",".join(f"127.0.0.1:{port}" for port in ports)
    with ClusterStore(url) as store:
        for verb in (
            lambda: store.sizes(["a"]),
            lambda: list(fetch(store, ["a"])),
            lambda: store.write([Entry("a", {}, memoryview(b"x"))]),
        ):
            with pytest.raises(StoreError, match="check that the server runs") as caught:
                verb()
            assert "secret" not in str(caught.value) + repr(store)


def test_a_server_that_answers_late_is_left_alone(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topology, "CircuitBreaker", CircuitBreaker)  # with its own cool-down
    with ClusterStore(cluster.url, read_timeout=5.0, max_delay=0.1) as store:
        fill(store)
        late = cluster.owner(slot_of(KEYS[0]))
        with late.client() as client:
            client.execute_command("CLIENT", "PAUSE", "300", "ALL")
        assert store.sizes(KEYS[:1]) == [1000]
        with calls_of_prompt() as calls:
            assert store.sizes(KEYS[:1]) == [0]
    assert "max_delay" in str(calls.errors[0])


def test_threads_that_look_around_wait_for_none_of_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked, found = [], []

    def fail(node: topology.ClusterNode) -> None:
        asked.append(node)
        wait_until(lambda: len(asked) == 4)
        raise StoreError("nobody is there")

    def look() -> None:
        try:
            store.sizes(["a"])
        except StoreError as error:
            found.append(str(error))

    monkeypatch.setattr(topology.ClusterNode, "primaries", fail)
    store = ClusterStore("redis+cluster://localhost")
    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["nobody is there"] * 4


def test_a_slot_that_has_moved_is_followed_at_once(store: ClusterStore, cluster: Cluster) -> None:
    fill(store)
    for key, blob in zip(KEYS[:3], BLOBS, strict=False):
        slot, home = slot_of(key), cluster.owner(slot_of(key))
        target = next(server for server in cluster.servers if server is not home)
        cluster.begin_move(slot, target)
        cluster.end_move(slot, target)
        assert list(read(store, [key])) == [None]  # found out, and a miss, amid a read
        with calls_of_prompt() as calls:
            assert store.sizes(KEYS) == list(map(len, BLOBS))
            assert read(store, KEYS) == BLOBS
        assert calls.errors == []
        cluster.begin_move(slot, home)
        cluster.end_move(slot, home)
        assert store.read_metadata([key]) == [{"n": key, "bytes": str(len(blob))}]
        cluster.begin_move(slot, target)
        cluster.end_move(slot, target)
        assert store.delete([key]) == 1
        cluster.begin_move(slot, home)
        cluster.end_move(slot, home)
        fill(store)
        assert read(store, KEYS) == BLOBS


def test_while_a_slot_moves_its_new_keys_are_misses_and_not_taken(
    store: ClusterStore, cluster: Cluster
) -> None:
    fill(store)
    store.delete(KEYS[:1])
    slot = slot_of(KEYS[0])
    home = cluster.owner(slot)
    target = next(server for server in cluster.servers if server is not home)
    cluster.begin_move(slot, target)
    with calls_of_prompt() as calls:
        assert store.sizes(KEYS) == [0, *map(len, BLOBS[1:])]
        assert store.sizes(KEYS[:1]) == [0]
        assert store.read_metadata(KEYS[:1]) == [None]
        assert read(store, KEYS) == [None, *BLOBS[1:]]
        entries = [Entry(key, {}, memoryview(b"x")) for key in KEYS[:2]]
        assert store.write(entries) == 1
        assert store.write([Entry(KEYS[0], {"a": "1"}, memoryview(b""))]) == 0
        assert store.delete(KEYS[:1]) == 0
    assert calls.errors == []
    cluster.end_move(slot, target)
    assert store.write(entries) == 2
    cluster.begin_move(slot, home)
    cluster.end_move(slot, home)


def test_one_server_of_a_cluster_as_a_plain_store_says_what_is_wrong(cluster: Cluster) -> None:
    other = next(key for key in KEYS if key_slot(f"{key}@x".encode()) > 16384 // 3)
    store = RedisStore(cluster.servers[0].tcp_url)
    for verb in (
        lambda: store.sizes([other]),
        lambda: store.write([Entry(other, {}, memoryview(b"x"))]),
        lambda: store.write([Entry(other, {"a": "1"}, memoryview(b""))]),
        lambda: store.delete([other]),
    ):
        with pytest.raises(StoreError, match=r"use a redis\+cluster:// URL"):
            verb()


def test_a_server_that_is_no_cluster_is_a_store_error(redis_server: Server) -> None:
    with (
        ClusterStore(redis_server.tcp_url.replace("redis:", "redis+cluster:")) as store,
        pytest.raises(StoreError, match="cluster support disabled"),
    ):
        store.sizes(["a"])


@pytest.mark.parametrize("reply", [b"*1\r\n:5\r\n", b"*1\r\n*1\r\n:5\r\n", b":1\r\n", b"*0\r\n"])
def test_a_table_of_slots_that_is_nonsense_is_a_store_error(reply: bytes) -> None:
    with FakeServer(lambda command: reply) as fake:
        url = fake.tcp_url.replace("redis:", "redis+cluster:")
        with ClusterStore(url) as store, calls_of_prompt() as calls:
            if reply == b"*0\r\n":
                assert store.sizes(["a"]) == [0]
                assert "nobody serves a part of the slots" in str(calls.errors[0])
                return
            with pytest.raises(StoreError, match="reply to CLUSTER SLOTS"):
                store.sizes(["a"])


def test_prompts_go_on_when_a_server_dies(store: ClusterStore, cluster: Cluster) -> None:
    model, ids = tiny("llama"), tokens(300)
    plain = model.generate(ids, max_new_tokens=4, do_sample=False)

    def ask(behind: WriteBehind) -> RedisChunkCache:
        cache = RedisChunkCache(model, behind)
        out = model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
        assert torch.equal(out, plain)
        return cache

    behind = WriteBehind(CircuitBreaker(store, COOLDOWN))
    assert ask(behind).flush(5)
    assert ask(behind).report.reused == 299
    victim = next(s for s in cluster.servers if s.client().keys("safetensors@*@kv_bytes"))
    victim.stop()
    report = ask(behind).report
    assert report.reused < 299
    assert report.store_errors > 0
    assert str(victim.port) in str(report)

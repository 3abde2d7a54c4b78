"""`scan`, of every kind of store: all that is there, in pages, and nothing is used or changed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import redis
from scripted import Scripted, blobs, entry, keys_of
from servers import Cluster, FakeServer, Server, wait_until

from chunkcache.errors import StoreError
from chunkcache.stores import commands
from chunkcache.stores.base import ChunkStore, Entry, Listed, ReadOnly
from chunkcache.stores.breaker import CircuitBreaker
from chunkcache.stores.cluster import ClusterStore
from chunkcache.stores.disk import DiskStore
from chunkcache.stores.memory import MemoryStore
from chunkcache.stores.redis import RedisStore
from chunkcache.stores.tiered import TieredStore
from chunkcache.stores.writer import PatientStore, WriteBehind

LONG = "f@" + "long" * 100 + "@1@0@aa"  # too long for the name of a file


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster() as running:
        yield running
        running.reset()


Open = Callable[..., ChunkStore]


@pytest.fixture(
    params=[
        "memory",
        "disk",
        "redis",
        "valkey",
        "cluster",
        "tiers",
        "behind",
        "read only",
        "patient",
    ]
)
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens an empty store of each kind, with the options of `RedisStore`."""
    with ExitStack() as stack:

        def open_one(**options: float) -> ChunkStore:
            kind = request.param
            if kind in ("redis", "valkey"):
                server: Server = request.getfixturevalue(f"{kind}_server")
                return stack.enter_context(RedisStore(server.tcp_url, **options))
            if kind == "cluster":
                running: Cluster = request.getfixturevalue("cluster")
                running.reset()
                return stack.enter_context(ClusterStore(running.url, **options))
            if kind == "disk":
                return DiskStore(tmp_path, **options)
            store = MemoryStore(**options)
            return {
                "memory": store,
                "tiers": TieredStore([MemoryStore(**options), store]),
                "behind": WriteBehind(CircuitBreaker(store)),
                "read only": ReadOnly(store),
                "patient": PatientStore(store),
            }[kind]

        yield open_one


def fill(store: ChunkStore, *entries: Entry) -> None:
    (store.store if isinstance(store, ReadOnly) else store).write(entries)


def listing(store: ChunkStore, prefix: str = "") -> dict[str, Listed]:
    return {found.key: found for page in store.scan(prefix) for found in page}


def test_an_empty_store_lists_nothing(opened: Open) -> None:
    assert list(opened().scan()) == []


def test_all_entries_are_listed(opened: Open) -> None:
    store = opened()
    fill(
        store,
        entry("f@m@1@0@aa", b"one", model="m", tokens="3"),
        entry("f@m@1@0@bb", b"blob"),
        entry("anchor@m@1@0@cc", aa="1"),
        entry(LONG, b"x", model="long"),
        entry("f@ünï\udcff [*]@1@0@dd", b"xy", model="m"),
    )
    assert listing(store) == {
        "f@m@1@0@aa": Listed("f@m@1@0@aa", {"model": "m", "tokens": "3"}, 3),
        "f@m@1@0@bb": Listed("f@m@1@0@bb", None, 4),
        "anchor@m@1@0@cc": Listed("anchor@m@1@0@cc", {"aa": "1"}, 0),
        LONG: Listed(LONG, {"model": "long"}, 1),
        "f@ünï\udcff [*]@1@0@dd": Listed("f@ünï\udcff [*]@1@0@dd", {"model": "m"}, 2),
    }


@pytest.mark.parametrize(
    ("prefix", "found"),
    [
        ("f@", ["f@a*@1@0@1", "f@ab@1@0@2", "f@a[b]@1@0@3", "f@a\\@1@0@4", "f@a?@1@0@5"]),
        ("f@a*", ["f@a*@1@0@1"]),
        ("f@a?", ["f@a?@1@0@5"]),
        ("f@a[b]", ["f@a[b]@1@0@3"]),
        ("f@a\\", ["f@a\\@1@0@4"]),
        ("g", []),
    ],
)
def test_a_prefix_means_itself(opened: Open, prefix: str, found: list[str]) -> None:
    store = opened()
    names = ["f@a*@1@0@1", "f@ab@1@0@2", "f@a[b]@1@0@3", "f@a\\@1@0@4", "f@a?@1@0@5", "h@f@1@0@6"]
    fill(store, *(entry(name, b"x", model="m") for name in names))
    assert sorted(keys_of(store, prefix)) == sorted(found)


def test_many_entries_come_in_pages(opened: Open) -> None:
    store = opened()
    names = [f"f@m@1@0@{number:04x}" for number in range(2500)]
    fill(store, *(entry(name, model="m") for name in names))
    fill(store, *(entry(name, b"x", model="m") for name in names[:500]))
    assert sorted(keys_of(store)) == names
    assert sum(found.nbytes for found in listing(store).values()) == 500


def test_looking_renews_no_time_to_live(opened: Open) -> None:
    store = opened(ttl=0.4)
    fill(store, entry("f@m@1@0@aa", b"one", model="m"))
    deadline = time.monotonic() + 10
    while keys_of(store):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert store.sizes(["f@m@1@0@aa"]) == [0]


def test_it_may_be_ended_early(opened: Open) -> None:
    store = opened()
    fill(store, *(entry(f"f@m@1@0@{number:04x}", model="m") for number in range(2500)))
    pages = store.scan()
    next(pages)
    del pages
    assert store.sizes(["f@m@1@0@0001"]) == [0]
    assert len(keys_of(store)) == 2500


# ---------------------------------------------------------------------- each kind for itself


def test_looking_is_no_use_in_ram() -> None:
    store = MemoryStore(100)
    store.write([entry("a", b"x" * 30), entry("b", b"x" * 30)])
    keys_of(store)
    store.write([entry("c", b"x" * 60)])
    assert keys_of(store) == ["b", "c"]


def test_looking_is_no_use_of_a_file(tmp_path: Path) -> None:
    store = DiskStore(tmp_path)
    store.write([entry("a", b"x", model="m")])
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    for path in files:
        os.utime(path, (1e9, 1e9))
    keys_of(store)
    assert {path.stat().st_mtime for path in files} == {1e9}


def test_looking_is_no_use_on_a_server_that_can_tell(valkey_server: Server) -> None:
    store = RedisStore(valkey_server.tcp_url)
    store.write([entry("a", b"x", model="m")])
    with valkey_server.client() as client:
        client.config_set("maxmemory-policy", "allkeys-lru")

        def idle() -> list[int]:
            return [client.object("IDLETIME", f"a@{half}") for half in ("metadata", "kv_bytes")]

        wait_until(lambda: min(idle()) > 0)
        keys_of(store)
        assert min(idle()) > 0
        store.sizes(["a"])  # and the connection counts again
        assert idle() == [0, 0]


def test_what_is_not_ours_is_left_out(server: Server) -> None:
    store = RedisStore(server.tcp_url)
    store.write([entry("a@b", b"x", model="m")])
    with server.client() as client:
        client.set("a@claim@metadata", "being written by somebody")
        client.rpush("a@list@kv_bytes", "x")
        client.hset("a@hash@kv_bytes", "x", "y")
        client.set(b"a@\xff@kv_bytes", "x")
        client.set("a@other", "x")
        client.set("unrelated", "x")
        assert listing(store) == {"a@b": Listed("a@b", {"model": "m"}, 1)}
        assert client.dbsize() == 8


def test_keys_of_a_cluster_that_are_not_ours(cluster: Cluster) -> None:
    cluster.reset()
    for server in cluster.servers:
        with server.client() as client:
            for name in ("a@b", "a@{b}", "{a}@b"):
                with suppress(redis.exceptions.MovedError):
                    client.set(f"{name}@kv_bytes", "x")
    with ClusterStore(cluster.url) as store:
        assert keys_of(store) == ["a@b"]


def test_queued_entries_are_listed(scripted: Scripted) -> None:
    store = WriteBehind(scripted)
    store.write([entry("a", b"one", model="m"), entry("b", model="m")])
    assert sorted(keys_of(store)) == ["a", "b"]


def test_the_far_tier_tells_more_than_copies_in_a_near_one() -> None:
    near, far = MemoryStore(), MemoryStore()
    far.write([entry("a", b"one", model="m")])
    store = TieredStore([near, far])
    assert blobs(store, "a") == [b"one"]
    near.write([entry("only near", b"xy", model="n")])
    assert listing(near)["a"] == Listed("a", {"copied": "yes"}, 3)
    assert listing(store) == {
        "a": Listed("a", {"model": "m"}, 3),
        "only near": Listed("only near", {"model": "n"}, 2),
    }


def test_a_tier_that_fails_is_an_error(scripted: Scripted) -> None:
    scripted.error = StoreError("gone")
    with pytest.raises(StoreError, match="gone"):
        keys_of(TieredStore([scripted, MemoryStore()]))


def test_a_failure_is_a_store_error_and_opens_the_breaker(scripted: Scripted) -> None:
    scripted.error = RuntimeError("broken")
    store = CircuitBreaker(scripted)
    with pytest.raises(StoreError, match="broken"):
        keys_of(store)
    scripted.error = None
    with pytest.raises(StoreError, match="not asked"):
        store.sizes(["a"])


def test_errors_of_a_server_are_store_errors(server: Server) -> None:
    store = RedisStore(server.tcp_url)
    store.write([entry(f"a@{number}", b"x", model="m") for number in range(5)])
    with server.client() as client:
        client.execute_command("ACL SETUSER", "few", "on", ">pw", "~*", "+scan", "+exists")
        few = RedisStore(server.tcp_url.replace("//", "//few:pw@"))
        with pytest.raises(StoreError, match="hgetall"):
            keys_of(few)
        client.execute_command("ACL SETUSER", "few", "+hgetall", "+strlen")
        assert len(keys_of(few)) == 5  # it need not be allowed to look without a trace
        client.execute_command("ACL DELUSER", "few")


def test_an_interrupted_look_leaves_no_replies_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(command: list[bytes]) -> bytes | None:
        if command[0] == b"SCAN":
            return b"*2\r\n$1\r\n0\r\n*1\r\n$10\r\na@metadata\r\n"
        return b":7\r\n" if command[1].startswith(b"b") else b":5\r\n"

    def interrupt(connection: object) -> None:
        raise KeyboardInterrupt

    with FakeServer(answer, pause=0.05) as fake, RedisStore(fake.tcp_url) as store:
        with monkeypatch.context() as patch:
            patch.setattr(commands, "_reply", interrupt)
            with pytest.raises(KeyboardInterrupt):
                keys_of(store)
        assert store.sizes(["b"]) == [7]

"""What an error of a server is called, so that it can be counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from scripted import Scripted, entry, fetch
from servers import FakeServer, Server

from chunkcache.errors import StoreError
from chunkcache.stores.breaker import CircuitBreaker
from chunkcache.stores.disk import DiskStore
from chunkcache.stores.redis import RedisStore


def cause(verb: Callable[[], object]) -> str:
    with pytest.raises(StoreError) as caught:
        verb()
    return caught.value.cause


def test_nobody_listens() -> None:
    assert cause(lambda: RedisStore("redis://127.0.0.1:1/0").sizes(["a"])) == "connection"


def test_a_silent_server() -> None:
    with FakeServer(lambda command: None) as fake:
        store = RedisStore(fake.tcp_url, read_timeout=0.05)
        assert cause(lambda: store.sizes(["a"])) == "timeout"


def test_a_wrong_password() -> None:
    with FakeServer(lambda command: b"-WRONGPASS invalid\r\n") as fake:
        store = RedisStore(fake.tcp_url.replace("//", "//:secret@"))
        assert cause(lambda: store.sizes(["a"])) == "authentication"


def test_a_full_server(redis_server: Server) -> None:
    with redis_server.client() as client:
        client.config_set("maxmemory", 1)
    store = RedisStore(redis_server.tcp_url)
    assert cause(lambda: store.write([entry("a", b"x")])) == "full"


def test_a_replica(redis_server: Server) -> None:
    with redis_server.client() as client:
        client.execute_command("REPLICAOF", "127.0.0.1", "1")
    store = RedisStore(redis_server.tcp_url)
    assert cause(lambda: store.write([entry("a", b"x")])) == "read_only"


@pytest.mark.parametrize(
    ("reply", "named"),
    [(b"-MOVED 1 127.0.0.1:1\r\n", "wrong_url"), (b"-ERR odd\r\n", "server")],
)
def test_other_replies(reply: bytes, named: str) -> None:
    with FakeServer(lambda command: reply) as fake:
        assert cause(lambda: RedisStore(fake.tcp_url).sizes(["a"])) == named


BIG = memoryview(bytes(3 << 20))


@pytest.mark.parametrize("url", ["tcp_url", "unix_url"])
def test_bounds_of_a_server_that_closes_connections_are_named(
    redis_server: Server, url: str
) -> None:
    store, there = RedisStore(getattr(redis_server, url)), entry("a", bytes(BIG))
    store.write([there])
    with redis_server.client() as client:
        client.config_set("client-output-buffer-limit", "normal 65536 0 0")
        with pytest.raises(StoreError, match="client-output-buffer-limit of 65536 bytes: raise"):
            list(fetch(store, "aaaa", [[memoryview(bytearray(len(BIG)))]] * 4))
        client.config_set("client-output-buffer-limit", "normal 0 0 0")
        client.config_set("proto-max-bulk-len", 1 << 20)
        with pytest.raises(StoreError, match="proto-max-bulk-len of 1048576 bytes: raise"):
            store.write([entry("b", bytes(BIG))])


@pytest.mark.parametrize("url", ["tcp_url", "unix_url"])
def test_too_many_connections_are_not_a_server_that_is_gone(redis_server: Server, url: str) -> None:
    name = getattr(redis_server, url)
    store = RedisStore(f"{name}{'&' if '?' in name else '?'}max_connections=1")
    store.write([entry(key, bytes(BIG)) for key in "ab"])
    reading = fetch(store, "ab", [[memoryview(bytearray(len(BIG)))]] * 2)
    next(reading)
    with pytest.raises(StoreError, match="raise max_connections in the store's URL"):
        store.sizes(["a"])
    with redis_server.client() as client:
        client.config_set("maxclients", 1)
        try:
            with pytest.raises(StoreError, match="raise the server's maxclients"):
                RedisStore(name).sizes(["a"])
        finally:
            client.config_set("maxclients", 10_000)


@pytest.mark.parametrize("missing", ["multi", "exec", "set", "strlen"])
def test_the_permission_that_is_missing_is_named(redis_server: Server, missing: str) -> None:
    with redis_server.client() as client:
        client.execute_command("ACL", "SETUSER", "u", "on", ">pw", "~*", "+@all", f"-{missing}")
    store = RedisStore(redis_server.tcp_url.replace("//", "//u:pw@"))

    def use() -> None:
        store.write([entry("a", b"x")])
        store.sizes(["a"])

    with pytest.raises(StoreError, match=f"to run the '{missing}' command.*; ACL SETUSER gives"):
        use()


def test_a_store_that_is_left_alone(scripted: Scripted) -> None:
    scripted.error = StoreError("gone", "timeout")
    store = CircuitBreaker(scripted)
    assert cause(lambda: store.sizes(["a"])) == "timeout"
    assert cause(lambda: store.sizes(["a"])) == "circuit_open"


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    store = DiskStore(tmp_path / "file" / "folder")
    (tmp_path / "file").write_text("in the way")
    assert cause(lambda: store.write([entry("a", b"x")])) == "disk"

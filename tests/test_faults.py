"""Prompts while a real Redis is in trouble: the tokens stay those of a run without the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from models import tiny, tokens
from servers import Proxy, Server, free_port, redis_binary
from torch import Tensor, nn

from chunkcache import RedisChunkCache
from chunkcache.stores.breaker import CircuitBreaker
from chunkcache.stores.redis import RedisStore
from chunkcache.stores.writer import WriteBehind

KNOWN = 299  # of the prompt's 300 tokens; the last one is always computed
CHUNKS = ("0-128", "128-256", "256-300")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return tiny("llama")


@pytest.fixture(scope="module")
def plain(model: nn.Module) -> Tensor:
    return generate(model, None)


@pytest.fixture
def store(redis_server: Server, model: nn.Module) -> Iterator[WriteBehind]:
    """A store with the prompt in it, after one hit."""
    with open_it(redis_server.tcp_url) as store:
        for known in (0, KNOWN):
            cache = RedisChunkCache(model, store)
            generate(model, cache)
            assert cache.flush(5)
            assert cache.report.reused == known
        yield store


def open_it(url: str) -> WriteBehind:
    return WriteBehind(CircuitBreaker(RedisStore(url, read_timeout=0.2), cooldown=0.0))


def generate(model: nn.Module, cache: RedisChunkCache | None) -> Tensor:
    out: Tensor = model.generate(  # type: ignore[operator]
        tokens(300), past_key_values=cache, max_new_tokens=4, do_sample=False
    )
    return out


def ask(model: nn.Module, store: WriteBehind, plain: Tensor) -> RedisChunkCache:
    cache = RedisChunkCache(model, store)
    assert torch.equal(generate(model, cache), plain)
    assert cache.flush(5)
    return cache


def blobs(server: Server) -> dict[str, tuple[bytes, bytes]]:
    """Name and content of the blob of each chunk, by its positions."""
    found = {}
    with server.client() as client:
        for name in client.scan_iter("safetensors@*@metadata"):
            blob = name.removesuffix(b"@metadata") + b"@kv_bytes"
            found[client.hget(name, "positions").decode()] = blob, client.get(blob)
    return found


def flipped(blob: bytes) -> bytes:
    return blob[:-1000] + bytes([blob[-1000] ^ 4]) + blob[-999:]


DAMAGES: dict[str, Callable[[bytes, bytes], bytes]] = {
    "bit flip": lambda blob, other: flipped(blob),
    "bit flip in the header": lambda blob, other: blob[:100] + b"?" + blob[101:],
    "another's": lambda blob, other: other,
    "zeros": lambda blob, other: bytes(len(blob)),
    "huge header": lambda blob, other: b"\xff" * 8 + blob[8:],
    "cut short": lambda blob, other: blob[:-1],
    "too long": lambda blob, other: blob + b"x",
    "empty": lambda blob, other: b"",
    "something else": lambda blob, other: b"{}",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_blob_is_a_miss_and_is_written_anew(
    model: nn.Module, plain: Tensor, store: WriteBehind, redis_server: Server, damage: str
) -> None:
    before = blobs(redis_server)
    name, blob = before["128-256"]
    bad = DAMAGES[damage](blob, before["0-128"][1])
    with redis_server.client() as client:
        client.set(name, bad)
    report = ask(model, store, plain).report
    assert report.reused == 128
    assert report.causes == ({"damaged": 1} if bad else {})
    assert blobs(redis_server) == before
    assert ask(model, store, plain).report.reused == KNOWN


@pytest.mark.parametrize("half", ["metadata", "kv_bytes"])
def test_another_type_under_a_key_never_hurts(
    model: nn.Module, plain: Tensor, store: WriteBehind, redis_server: Server, half: str
) -> None:
    before = blobs(redis_server)
    name = before["128-256"][0].replace(b"kv_bytes", half.encode())
    with redis_server.client() as client:
        client.delete(name)
        client.rpush(name, "a list")
    report = ask(model, store, plain).report
    assert report.reused == (128 if half == "kv_bytes" else KNOWN)
    assert report.store_errors == 0
    assert ask(model, store, plain).report.reused == KNOWN


def test_a_dead_server(
    model: nn.Module, plain: Tensor, store: WriteBehind, redis_server: Server
) -> None:
    redis_server.stop()
    report = ask(model, store, plain).report
    assert (report.reused, report.store_errors > 0) == (0, True)
    redis_server.start()
    ask(model, store, plain)
    assert ask(model, store, plain).report.reused == KNOWN


def test_a_server_that_falls_silent(
    model: nn.Module, plain: Tensor, store: WriteBehind, redis_server: Server
) -> None:
    with redis_server.client() as client:
        client.execute_command("CLIENT", "PAUSE", "60000", "ALL")
    report = ask(model, store, plain).report
    assert report.reused == 0
    assert "read_timeout" in report.errors[0]
    redis_server.stop()


def test_a_port_that_accepts_and_never_answers(model: nn.Module, plain: Tensor) -> None:
    with Server(redis_binary()) as server, Proxy(server, lambda data: b"") as proxy:
        report = ask(model, open_it(proxy.tcp_url), plain).report
    assert report.reused == 0
    assert "read_timeout" in report.errors[0]


def test_a_read_only_replica_still_serves_what_it_has(
    model: nn.Module, plain: Tensor, store: WriteBehind, redis_server: Server
) -> None:
    with redis_server.client() as client:
        client.execute_command("REPLICAOF", "127.0.0.1", str(free_port()))
    assert ask(model, store, plain).report.reused == KNOWN
    name, blob = blobs(redis_server)["128-256"]
    with redis_server.client() as client:
        client.config_set("replica-read-only", "no")
        client.set(name, flipped(blob))
        client.config_set("replica-read-only", "yes")
    report = ask(model, store, plain).report
    assert report.reused == 128
    assert any("not of a replica" in error for error in report.errors)


def test_a_full_server_still_serves_what_it_has(
    model: nn.Module, plain: Tensor, store: WriteBehind, redis_server: Server
) -> None:
    with redis_server.client() as client:
        client.delete(blobs(redis_server)["128-256"][0])
        client.config_set("maxmemory", 1)
    assert ask(model, store, plain).report.reused == 128
    assert store.stats().failed_entries > 0
    with redis_server.client() as client:
        client.config_set("maxmemory", 0)
    ask(model, store, plain)
    assert ask(model, store, plain).report.reused == KNOWN


def test_a_password_that_changes(
    model: nn.Module, plain: Tensor, store: WriteBehind, redis_server: Server
) -> None:
    with redis_server.client() as client:
        client.config_set("requirepass", "new")
        client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        report = ask(model, store, plain).report
        client.config_set("requirepass", "")
    assert report.reused == 0
    assert "check the user and the password" in report.errors[0]
    assert ask(model, store, plain).report.reused == KNOWN


@pytest.mark.parametrize("size", [10, 3_000, 100_000])
def test_a_connection_cut_amid_the_blobs(
    model: nn.Module, plain: Tensor, store: WriteBehind, redis_server: Server, size: int
) -> None:
    """What has arrived whole is used, and nothing else."""
    left = [size]

    def cut(data: bytes) -> bytes | None:
        sent, left[0] = data[: left[0]], left[0] - len(data)
        return sent or None

    with Proxy(redis_server, cut) as proxy:
        report = ask(model, open_it(proxy.tcp_url), plain).report
    assert report.reused in (0, 128, 256)
    assert report.store_errors > 0


@pytest.mark.parametrize("every", [997, 9973, 99_991])
def test_a_network_that_turns_bits(
    model: nn.Module, plain: Tensor, store: WriteBehind, redis_server: Server, every: int
) -> None:
    at = [0]

    def turn(data: bytes) -> bytes:
        spoilt = bytearray(data)
        for index in range(-at[0] % every, len(spoilt), every):
            spoilt[index] ^= 1
        at[0] += len(data)
        return bytes(spoilt)

    with Proxy(redis_server, turn) as proxy:
        report = ask(model, open_it(proxy.tcp_url), plain).report
    assert report.reused < KNOWN


def test_a_server_killed_amid_a_write(
    model: nn.Module, plain: Tensor, store: WriteBehind, redis_server: Server
) -> None:
    with redis_server.client() as client:
        client.flushall()
        client.execute_command("CLIENT", "PAUSE", "60000", "WRITE")
    cache = RedisChunkCache(model, store)
    assert torch.equal(generate(model, cache), plain)
    redis_server.stop()
    assert cache.flush(5)
    redis_server.start()
    ask(model, store, plain)
    assert ask(model, store, plain).report.reused == KNOWN

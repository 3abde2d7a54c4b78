from __future__ import annotations

import multiprocessing
import threading
from multiprocessing.synchronize import Event

import pytest
from servers import Server, wait_until
from shelf import entry

from chunkcache.errors import StoreError
from chunkcache.stores import claims
from chunkcache.stores.base import Entry
from chunkcache.stores.redis import RedisStore

FORK = multiprocessing.get_context("fork")


def test_a_blob_that_is_there_is_not_sent_again(server: Server) -> None:
    store, other = RedisStore(server.tcp_url), RedisStore(server.tcp_url)
    assert store.write([entry("a", b"x" * 1_000_000, by="one")]) == 1_000_000
    with server.client() as client:
        before = client.info("stats")["total_net_input_bytes"]
        assert other.write([entry("a", b"x" * 1_000_000, by="two")]) == 1_000_000
        assert client.info("stats")["total_net_input_bytes"] - before < 10_000
    assert store.read_metadata(["a"]) == [{"by": "one"}]
    assert store.write([entry("a", b"shorter", by="three")]) == 7
    assert store.read_metadata(["a"]) == [{"by": "three"}]


def test_a_blob_that_another_is_writing_is_left_to_it_until_it_is_late(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: RedisStore, entry: Entry) -> bool:
        raise StoreError("killed", "connection")

    monkeypatch.setattr(claims, "CLAIM_SECONDS", 0.5)
    store, other = RedisStore(server.tcp_url), RedisStore(server.tcp_url)
    with monkeypatch.context() as patch:
        patch.setattr(RedisStore, "_write_blob", fail)
        with pytest.raises(StoreError, match="killed"):
            store.write([entry("a", b"x", by="one"), entry("b", b"x")])
    assert other.write([entry("a", b"x", by="two")]) == 1  # taken on trust
    assert (other.sizes(["a"]), other.read_metadata(["a"])) == ([0], [None])
    assert store.write([entry("b", b"x", by="one")]) == 1  # its own sign is no obstacle
    assert other.read_metadata(["b"]) == [{"by": "one"}]

    def arrived() -> bool:
        other.write([entry("a", b"x", by="two")])
        return other.sizes(["a"]) == [1]

    wait_until(arrived)
    assert other.read_metadata(["a"]) == [{"by": "two"}]


def test_what_a_full_server_has_refused_may_be_written_by_others(redis_server: Server) -> None:
    store, other = RedisStore(redis_server.tcp_url), RedisStore(redis_server.tcp_url)
    wanted = [entry(key, bytes(1_000_000)) for key in "abc"]
    with redis_server.client() as client:
        client.config_set("maxmemory", client.info("memory")["used_memory"] + 900_000)
        with pytest.raises(StoreError, match="maxmemory"):
            store.write(wanted)
        client.config_set("maxmemory", 0)
        assert not client.exists("b@metadata", "c@metadata")
    assert other.write(wanted) == 3_000_000
    assert other.sizes(["a", "b", "c"]) == [1_000_000] * 3


def test_flush_waits_for_what_another_is_writing(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, go = threading.Event(), threading.Event()
    store, other = RedisStore(server.tcp_url), RedisStore(server.tcp_url)
    write_blob = RedisStore._write_blob

    def late(self: RedisStore, entry: Entry) -> bool:
        held.set()
        go.wait(10)
        return write_blob(self, entry)

    with monkeypatch.context() as patch:
        patch.setattr(RedisStore, "_write_blob", late)
        writer = threading.Thread(target=store.write, args=([entry("a", b"x", by="one")],))
        writer.start()
        assert held.wait(10)
    assert other.flush()  # nothing of it is our business yet
    assert other.write([entry("a", b"x", by="two")]) == 1
    assert not other.flush(0.1)
    flushed: list[bool] = []
    waiter = threading.Thread(target=lambda: flushed.append(other.flush()))
    waiter.start()
    go.set()
    for thread in (writer, waiter):
        thread.join(10)
    assert flushed == [True]
    assert other.read_metadata(["a"]) == [{"by": "one"}]


def test_flush_does_not_wait_for_a_writer_that_died(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "CLAIM_SECONDS", 0.3)
    store = RedisStore(server.tcp_url)
    with server.client() as client:
        client.set("a@metadata", "being written by nobody", px=300)
        assert store.write([entry("a", b"x")]) == 1
        assert store.flush()
        assert not client.exists("a@metadata")
    assert store.write([entry("a", b"x")]) == 1
    assert store.sizes(["a"]) == [1]


def write_many(store: RedisStore, name: str, number: int, begin: Event) -> None:
    """What a process does."""
    store.connect()
    begin.wait()
    for at in range(number):
        blob = memoryview(bytes(1_000_000))
        assert store.write([entry(f"k{at}", blob, by=name)]) == 1_000_000


def test_processes_with_the_same_chunks_write_each_once(redis_server: Server) -> None:
    begin = FORK.Event()
    store = RedisStore(redis_server.unix_url, read_timeout=20.0)
    arguments = [(store, name, 20, begin) for name in "abc"]
    processes = [FORK.Process(target=write_many, args=each) for each in arguments]
    with redis_server.client() as client:
        before = client.info("stats")["total_net_input_bytes"]
        others = len(client.client_list())
        for process in processes:
            process.start()
        wait_until(lambda: len(client.client_list()) == others + 3)
        begin.set()
        for process in processes:
            process.join()
            assert process.exitcode == 0
        sent = client.info("stats")["total_net_input_bytes"] - before
    assert 20_000_000 < sent < 21_000_000
    assert store.sizes([f"k{at}" for at in range(20)]) == [1_000_000] * 20
    assert None not in store.read_metadata([f"k{at}" for at in range(20)])


def test_a_process_killed_amid_a_write_leaves_whole_entries(redis_server: Server) -> None:
    begin = FORK.Event()
    begin.set()
    store = RedisStore(redis_server.unix_url, read_timeout=20.0)
    writer = FORK.Process(target=write_many, args=(store, "victim", 10**6, begin))
    writer.start()
    keys = [f"k{at}" for at in range(300)]
    wait_until(lambda: store.sizes(["k20"]) == [1_000_000])
    with redis_server.client() as client:
        before = len(client.client_list())
        writer.kill()
        writer.join()
        wait_until(lambda: len(client.client_list()) < before)
    sizes = store.sizes(keys)
    assert set(sizes) == {0, 1_000_000}
    described = [fields is not None for fields in store.read_metadata(keys)]
    assert described == [size > 0 for size in sizes]

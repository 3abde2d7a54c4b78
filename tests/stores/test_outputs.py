"""The third value of a chunk, of every kind of store: it goes where the chunk goes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Event

import pytest
import redis
from scripted import blobs
from servers import Cluster

from chunkcache.inventory import catalog
from chunkcache.inventory.copy import copy_chunks
from chunkcache.keys import ChunkKey
from chunkcache.stores.base import OUTPUTS, ChunkStore, Entry, Listed
from chunkcache.stores.cluster import ClusterStore
from chunkcache.stores.memory import MemoryStore
from chunkcache.stores.redis import RedisStore
from chunkcache.stores.writer import WriteBehind
from tests.stores.kinds import KINDS, open_kind

KEY, OTHER = (str(ChunkKey("safetensors", "m", 1, 0, digit * 64)) for digit in "ab")
FIELDS = {"positions": "0-4", "tokens": "4"}
TOLD = {"positions": "0-4", "outputs": "3"}
NOTHING = memoryview(b"")


@pytest.fixture(params=[*KINDS, "cluster"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ChunkStore]:
    if request.param == "cluster":
        with Cluster() as running, ClusterStore(running.url) as found:
            yield found
        return
    with open_kind(request.param, request, tmp_path) as found:
        yield found


def write(store: ChunkStore, key: str = KEY) -> None:
    chunk = Entry(key, FIELDS, memoryview(b"blob"))
    store.write([chunk, Entry(key + OUTPUTS, TOLD, memoryview(b"out"), merge=True, before=[key])])
    store.flush(5)


def listed(store: ChunkStore) -> list[Listed]:
    return [entry for page in store.scan("safetensors") for entry in page]


def test_outputs_are_read_listed_swept_and_deleted_with_the_chunk(store: ChunkStore) -> None:
    write(store)
    write(store, OTHER)
    assert store.sizes([KEY, KEY + OUTPUTS]) == [4, 3]
    assert blobs(store, KEY, KEY + OUTPUTS) == [b"blob", b"out"]
    assert store.read_metadata([KEY]) == [FIELDS | TOLD]
    assert {entry.key: entry for entry in listed(store)} == {
        key: Listed(key, FIELDS | TOLD, 4, 3) for key in (KEY, OTHER)
    }
    assert catalog.stats(store).total.bytes == 14
    assert store.delete([KEY + OUTPUTS]) == 1
    assert store.sizes([KEY, KEY + OUTPUTS]) == [4, 0]
    assert store.delete([OTHER]) == 1
    assert store.sizes([OTHER, OTHER + OUTPUTS]) == [0, 0]
    store.write([Entry(OTHER + OUTPUTS, {}, memoryview(b"out"), merge=True)])  # of no chunk
    store.flush(5)
    assert {(e.key, e.nbytes, e.outputs) for e in listed(store)} == {(KEY, 4, 0), (OTHER, 0, 3)}
    assert catalog.sweep(store).chunks == 1
    assert [entry.key for entry in listed(store)] == [KEY]
    assert store.sizes([OTHER + OUTPUTS]) == [0]


def test_outputs_are_copied(store: ChunkStore) -> None:
    write(store)
    with MemoryStore() as source:
        for key in (KEY, OTHER):
            write(source, key)
        assert copy_chunks(source, store).bytes == 7  # what is there is not sent again
        assert copy_chunks(store, target := MemoryStore()).bytes == 14
    assert target.sizes([KEY + OUTPUTS, OTHER + OUTPUTS]) == [3, 3]


def test_names_on_a_server(redis_server: object) -> None:
    url = redis_server.unix_url  # type: ignore[attr-defined]
    with RedisStore(url, ttl=100) as store:
        write(store)
        client = redis.Redis.from_url(url)
        ends = sorted(name.decode().removeprefix(KEY) for name in client.scan_iter("*"))
        assert ends == ["@kv_bytes", "@metadata", "@outputs"]
        assert all(0 < client.ttl(KEY + end) <= 100 for end in ends)
        time.sleep(0.1)
        store.sizes([KEY + OUTPUTS])  # which renews
        assert client.pttl(KEY + OUTPUTS) > client.pttl(KEY + "@kv_bytes") + 50
        # What is pinned stays so when outputs come later.
        store.write([Entry(OTHER, FIELDS, memoryview(b"blob"), pinned=True)])
        store.write([Entry(OTHER + OUTPUTS, TOLD, memoryview(b"out"), merge=True)])
        assert client.ttl(OTHER + "@metadata") == -1
        assert ChunkKey.parse(KEY + OUTPUTS) == ChunkKey.parse(KEY)


class Held(MemoryStore):
    """Writes when it may."""

    def __init__(self) -> None:
        super().__init__()
        self.may = Event()

    def write(self, entries: Sequence[Entry]) -> int:
        self.may.wait(5)
        return super().write(entries)


def test_what_is_deleted_is_not_written_later() -> None:
    with WriteBehind(store := Held()) as behind:
        behind.write([Entry(OTHER, FIELDS, memoryview(b"first"))])
        while behind._queue.waiting:
            time.sleep(0.001)
        behind.write([Entry(KEY, FIELDS, memoryview(b"blob"))])
        behind.write([Entry(KEY + OUTPUTS, TOLD, memoryview(b"out"), merge=True)])
        assert behind.delete([KEY]) == 1
        store.may.set()
        behind.flush(5)
        assert store.sizes([OTHER, KEY, KEY + OUTPUTS]) == [5, 0, 0]

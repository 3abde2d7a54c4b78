"""Extra values of a chunk, of every kind of store: they go where the chunk goes, or alone."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import Event

import pytest
import redis
from scripted import Scripted, blobs, until
from servers import Cluster

from chunkcache.inventory import catalog
from chunkcache.inventory.copy import copy_chunks
from chunkcache.keys import VALUES, ChunkKey
from chunkcache.stores.base import (
    EXTRAS,
    OUTPUTS,
    STATE,
    ChunkStore,
    Entry,
    Listed,
    chunk_of,
    with_extras,
)
from chunkcache.stores.cluster import ClusterStore
from chunkcache.stores.memory import MemoryStore
from chunkcache.stores.redis import RedisStore
from chunkcache.stores.writer import WriteBehind
from tests.stores.kinds import KINDS, open_kind

KEY, OTHER = (str(ChunkKey("safetensors", "m", 1, 0, digit * 64)) for digit in "ab")
FIELDS = {"positions": "0-4", "tokens": "4"}
BLOBS = {OUTPUTS: b"out", STATE: b"state"}
TOLD = FIELDS | {"outputs": "3", "state": "5"}


@pytest.fixture(params=[*KINDS, "cluster"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ChunkStore]:
    if request.param == "cluster":
        with Cluster() as running, ClusterStore(running.url) as found:
            yield found
        return
    with open_kind(request.param, request, tmp_path) as found:
        yield found


def extra(ending: str, key: str = KEY) -> Entry:
    blob = memoryview(BLOBS[ending])
    told = {"positions": "0-4", ending[1:]: str(blob.nbytes)}
    return Entry(key + ending, told, blob, merge=True, before=[key])


def write(store: ChunkStore, *keys: str) -> None:
    for key in keys:
        store.write([Entry(key, FIELDS, memoryview(b"blob")), *(extra(e, key) for e in EXTRAS)])
    store.flush(5)


def listed(store: ChunkStore) -> list[Listed]:
    return [entry for page in store.scan("safetensors") for entry in page]


def test_extras_are_read_listed_swept_and_deleted_with_the_chunk(store: ChunkStore) -> None:
    write(store, KEY, OTHER)
    all_of_it, all_of_other = with_extras([KEY]), with_extras([OTHER])
    assert store.sizes(all_of_it) == [4, 3, 5]
    assert blobs(store, *all_of_it) == [b"blob", b"out", b"state"]
    assert store.read_metadata([KEY]) == [TOLD]
    assert sorted(listed(store), key=lambda entry: entry.key) == [
        Listed(key, TOLD, 4, 3, 5) for key in (KEY, OTHER)
    ]
    total = catalog.stats(store).total
    assert (total.bytes, total.states, total.state_bytes) == (24, 2, 10)
    assert store.delete([KEY + STATE]) == 1
    assert store.sizes(all_of_it) == [4, 3, 0]
    assert store.delete([KEY + STATE]) == 0
    store.write([Entry(KEY, FIELDS, memoryview(b"again"))])  # its metadata know of no outputs
    store.flush(5)
    assert [(e.nbytes, e.extras) for e in listed(store) if e.key == KEY] == [(5, {OUTPUTS: 3})]
    assert store.delete([OTHER]) == 1
    assert store.sizes(all_of_other) == [0, 0, 0]
    for ending, blob in BLOBS.items():
        store.write([Entry(OTHER + ending, {}, memoryview(blob), merge=True)])  # of no chunk
    store.flush(5)
    assert [e for e in listed(store) if e.key == OTHER] == [Listed(OTHER, None, 0, 3, 5)]
    assert catalog.sweep(store).bytes == 8
    assert [entry.key for entry in listed(store)] == [KEY]
    assert store.sizes(all_of_other) == [0, 0, 0]


def test_extras_are_copied(store: ChunkStore) -> None:
    write(store, KEY)
    store.write([Entry(OTHER, FIELDS, memoryview(b"blob"))])
    with MemoryStore() as source:
        write(source, KEY, OTHER)
        assert copy_chunks(source, store).bytes == 8  # what is there is not sent again
        for ending, blob in BLOBS.items():  # evicted, or a copy was interrupted before it
            store.delete([KEY + ending])
            dry, done = (copy_chunks(source, store, dry_run=dry) for dry in (True, False))
            assert (dry.bytes, done.bytes, done.present) == (len(blob), len(blob), 2)
        source.write([Entry(KEY, {"tags": "x"}, memoryview(b""), merge=True)])
        dry, done = (copy_chunks(source, store, dry_run=dry) for dry in (True, False))
        assert (dry.bytes, done.bytes, done.present) == (12, 12, 1)
        assert copy_chunks(store, target := MemoryStore()).bytes == 24
    assert target.sizes(with_extras([KEY, OTHER])) == [4, 3, 5] * 2


def test_names_on_a_server(redis_server: object) -> None:
    url = redis_server.unix_url  # type: ignore[attr-defined]
    with RedisStore(url, ttl=100) as store:
        write(store, KEY)
        client = redis.Redis.from_url(url)
        ends = sorted(name.decode().removeprefix(KEY) for name in client.scan_iter("*"))
        assert ends == sorted(VALUES)
        assert all(0 < client.ttl(KEY + end) <= 100 for end in ends)
        for ending in EXTRAS:
            time.sleep(0.1)
            store.sizes([KEY + ending])  # which renews
            assert client.pttl(KEY + ending) > client.pttl(KEY + "@kv_bytes") + 50
            assert chunk_of(KEY + ending) == KEY == chunk_of(KEY)
        # What is pinned stays so when extras come later; those that were there are pinned with it.
        store.write([extra(OUTPUTS, OTHER), Entry(OTHER, FIELDS, memoryview(b"blob"))])
        store.write([Entry(OTHER, FIELDS, memoryview(b"blob"), pinned=True)])
        store.write([extra(STATE, OTHER)])
        assert [client.ttl(OTHER + end) == -1 for end in VALUES] == [True] * 3 + [False]


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
        behind.write([*map(extra, EXTRAS), *(extra(ending, OTHER) for ending in EXTRAS)])
        assert behind.delete([KEY, OTHER + STATE]) == 2
        store.may.set()
        behind.flush(5)
        assert store.sizes(with_extras([KEY, OTHER])) == [0, 0, 0, 5, 3, 0]


def test_what_an_entry_replaces_goes_once_it_is_there(store: ChunkStore) -> None:
    write(store, KEY)
    longer = Entry(OTHER, FIELDS, memoryview(b"longer"), replaces=[KEY])
    store.write([longer])
    store.flush(5)
    assert store.sizes([OTHER, KEY, *(KEY + ending for ending in EXTRAS)]) == [6, 0, 0, 0]
    assert store.read_metadata([KEY, OTHER])[0] is None
    assert [entry.key for entry in listed(store)] == [OTHER]


def test_what_is_not_taken_replaces_nothing() -> None:
    for full in (MemoryStore(1000), WriteBehind(MemoryStore(1000)), WriteBehind(MemoryStore(), 10)):
        write(full, KEY)
        taken = full.write([Entry(OTHER, FIELDS, memoryview(bytes(2000)), replaces=[KEY])])
        full.flush(5)
        assert not taken or not full.sizes([OTHER])[0]
        assert full.sizes([KEY]) == [4]


def test_nobody_waits_for_a_replaced_entry_that_is_being_written() -> None:
    scripted = Scripted()
    behind = WriteBehind(scripted)
    scripted.gate.clear()
    behind.write([Entry(KEY, FIELDS, memoryview(b"blob"))])
    until(lambda: behind._queue.current)
    behind.write([Entry(OTHER, FIELDS, memoryview(b"longer"), replaces=[KEY])])
    assert behind.sizes([KEY, OTHER]) == [4, 6]  # and the first is not written yet
    scripted.gate.set()
    assert behind.flush(10)
    assert behind.sizes([KEY, OTHER]) == [0, 6]

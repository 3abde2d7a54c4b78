"""Entries with `merge` add their fields to those that are there, in every store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from chunkcache.stores.base import ChunkStore, Entry
from chunkcache.stores.disk import DiskStore
from chunkcache.stores.memory import MemoryStore
from chunkcache.stores.redis import RedisStore
from chunkcache.stores.writer import WriteBehind

NOTHING = memoryview(b"")


@pytest.fixture(params=["memory", "disk", "redis", "queue"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ChunkStore]:
    kinds = {
        "memory": MemoryStore,
        "disk": lambda: DiskStore(tmp_path),
        "redis": lambda: RedisStore(request.getfixturevalue("redis_server").unix_url),
        "queue": lambda: WriteBehind(MemoryStore()),
    }
    with kinds[request.param]() as store:
        yield store


def test_fields_are_added(store: ChunkStore) -> None:
    for fields in ({"a": "1"}, {"b": "2"}, {"a": "3", "c": "4"}):
        store.write([Entry("key", fields, NOTHING, merge=True)])
    assert store.read_metadata(["key"]) == [{"a": "3", "b": "2", "c": "4"}]
    store.flush(5)
    store.write([Entry("key", {"d": "5"}, NOTHING, merge=True)])
    store.flush(5)
    assert store.read_metadata(["key"]) == [{"a": "3", "b": "2", "c": "4", "d": "5"}]
    store.write([Entry("key", {"e": "6"}, NOTHING)])
    store.flush(5)
    assert store.read_metadata(["key"]) == [{"e": "6"}]

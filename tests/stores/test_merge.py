"""What every store does alike: it adds the fields of entries with `merge`, and gives parts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from scripted import blobs

from chunkcache.stores.base import ChunkStore, Entry, Part, merged
from tests.stores.kinds import KINDS, open_kind

NOTHING = memoryview(b"")


@pytest.fixture(params=KINDS)
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ChunkStore]:
    with open_kind(request.param, request, tmp_path) as store:
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


def test_a_blob_stays_where_fields_are_added_and_fields_stay_where_a_blob_is(
    store: ChunkStore,
) -> None:
    store.write([Entry("key", {"a": "1"}, memoryview(b"blob"))])
    store.flush(5)
    store.write([Entry("key", {"b": "2"}, NOTHING, merge=True)])
    store.flush(5)
    assert store.sizes(["key"]) == [4]
    assert blobs(store, "key") == [b"blob"]
    store.write([Entry("key", {}, memoryview(b"other"), merge=True)])
    store.flush(5)
    assert blobs(store, "key") == [b"other"]
    assert store.read_metadata(["key"]) == [{"a": "1", "b": "2"}]


def test_of_two_writes_the_second_decides_unless_it_adds() -> None:
    older = Entry("key", {"a": "1", "b": "1"}, memoryview(b"old"), pinned=True)
    newer = Entry("key", {"a": "2"}, memoryview(b"new"))
    assert merged(newer, None) is newer
    assert merged(newer, older) is newer
    added = Entry("key", {"a": "2"}, NOTHING, merge=True)
    assert merged(added, older) == Entry("key", {"a": "2", "b": "1"}, older.blob, pinned=True)
    both = merged(Entry("key", {}, newer.blob, merge=True), added)
    assert both == Entry("key", {"a": "2"}, newer.blob, merge=True)


def test_parts_of_blobs_fill_their_places_in_order(store: ChunkStore) -> None:
    blob = bytes(range(200))
    store.write([Entry("key", {}, memoryview(blob))])
    store.flush(5)
    there = [("key", 0, 200), ("key", 100, 50), ("key", 199, 1), ("key", 7, 0)]
    others = [("none", 0, 1), ("key", 0, 201), ("key", 199, 2), ("key", 200, 1), ("none", 0, 0)]
    wanted = [*there, *others, *there[::-1]]
    rooms = [memoryview(bytearray(size)) for _, _, size in wanted]
    parts = [
        Part(key, start, [room[:1], room[1:4], room[4:]])
        for (key, start, _), room in zip(wanted, rooms, strict=True)
    ]
    assert list(store.fetch(parts)) == [True] * 4 + [False] * 5 + [True] * 4
    for (_, start, size), room in zip(there, rooms, strict=False):
        assert room == blob[start : start + size]
    assert rooms[-1] == blob

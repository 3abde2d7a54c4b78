from __future__ import annotations

from chunkcache.stores.base import Entry
from chunkcache.stores.memory import MemoryStore
from chunkcache.stores.readonly import ReadOnly


def test_reads_all_and_changes_nothing() -> None:
    store = MemoryStore()
    store.write([Entry("a", {"model": "m"}, memoryview(b"one"))])
    view = ReadOnly(store)
    assert view.write([Entry("b", {"model": "n"}, memoryview(b"two"))]) == 0
    assert view.write([Entry("a", {"more": "1"}, memoryview(b""), merge=True)]) == 0
    assert view.delete(["a"]) == 0
    for place in (store, view):
        assert place.sizes(["a", "b"]) == [3, 0]
        assert list(place.read(["b", "a"])) == [None, b"one"]
        assert place.read_metadata(["a", "b"]) == [{"model": "m"}, None]
        memory = bytearray(3)
        assert list(place.read_into(["a"], [[memoryview(memory)]])) == [True]
        assert memory == b"one"


def test_closing_it_leaves_the_store_open() -> None:
    store = MemoryStore()
    store.write([Entry("a", {}, memoryview(b"one"))])
    with ReadOnly(store) as view:
        assert view.flush()
    assert store.sizes(["a"]) == [3]


def test_reading_goes_the_short_way() -> None:
    """Straight to its place, where the store can do that."""

    class Direct(MemoryStore):
        def read_into(self, keys, places):  # type: ignore[no-untyped-def]
            yield from (True for _ in keys)

    assert list(ReadOnly(Direct()).read_into(["a"], [[memoryview(bytearray(3))]])) == [True]

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkcache.errors import SettingError
from chunkcache.stores.base import Entry
from chunkcache.stores.memory import MemoryStore


def entry(key: str, blob: bytes = b"", **metadata: str) -> Entry:
    return Entry(key, metadata, memoryview(blob))


def test_every_verb() -> None:
    store = MemoryStore()
    assert store.write([entry("a", b"one", model="m"), entry("b", model="n")]) == 3
    keys = ["b", "none", "a"]
    assert store.sizes(keys) == [0, 0, 3]
    assert list(store.read(keys)) == [None, None, b"one"]
    assert store.read_metadata(keys) == [{"model": "n"}, None, {"model": "m"}]
    assert store.delete(["a", "none"]) == 1
    assert list(store.read(["a"])) == [None]
    assert store.flush()
    store.close()
    assert store.sizes(["b"]) == [0]


def test_the_writer_may_use_its_memory_again() -> None:
    store = MemoryStore()
    blob, metadata = bytearray(b"right"), {"a": "1"}
    store.write([Entry("a", metadata, memoryview(blob))])
    blob[:] = b"wrong"
    metadata["a"] = "2"
    found = store.read_metadata(["a"])
    assert list(store.read(["a"])) == [b"right"]
    assert found == [{"a": "1"}]
    (found[0] or {})["a"] = "3"
    assert store.read_metadata(["a"]) == [{"a": "1"}]


def test_a_view_outlives_its_entry() -> None:
    store = MemoryStore()
    store.write([entry("a", b"right")])
    (view,) = store.read(["a"])
    store.write([entry("a", b"other")])
    store.delete(["a"])
    assert view == b"right"


def test_the_least_recently_used_go_first() -> None:
    store = MemoryStore(max_bytes=3 * 101)
    store.write([entry(key, bytes(100)) for key in "abc"])
    list(store.read(["a"]))
    store.write([entry("d", bytes(100))])
    assert store.sizes(["a", "b", "c", "d"]) == [100, 0, 100, 100]
    store.write([entry("c", bytes(100)), entry("e", bytes(100))])
    assert store.sizes(["a", "b", "c", "d", "e"]) == [0, 0, 100, 100, 100]


def test_an_entry_above_the_budget_is_refused_and_evicts_nothing() -> None:
    store = MemoryStore(max_bytes=100)
    store.write([entry("a", bytes(50))])
    assert store.write([entry("b", bytes(101)), entry("c", bytes(20))]) == 20
    assert store.sizes(["a", "b", "c"]) == [50, 0, 20]


def test_a_refused_entry_does_not_leave_the_old_one_in_its_place() -> None:
    store = MemoryStore(max_bytes=100)
    store.write([entry("a", b"old")])
    assert store.write([entry("a", bytes(101))]) == 0
    assert list(store.read(["a"])) == [None]


def test_metadata_counts() -> None:
    store = MemoryStore(max_bytes=1000)
    store.write([entry(f"k{at:02}", text="x" * 93) for at in range(50)])
    assert (
        sum(found is not None for found in store.read_metadata([f"k{n:02}" for n in range(50)]))
        == 10
    )


@pytest.mark.parametrize("max_bytes", [0, -1])
def test_a_budget_must_be_positive(max_bytes: int) -> None:
    with pytest.raises(SettingError, match="max_bytes"):
        MemoryStore(max_bytes)


KEYS = st.sampled_from("abcde")
STEPS = st.one_of(
    st.tuples(st.just("write"), KEYS, st.binary(max_size=40)),
    st.tuples(st.just("delete"), KEYS, st.just(b"")),
    st.tuples(st.just("read"), KEYS, st.just(b"")),
)


@given(steps=st.lists(STEPS, max_size=40))
def test_what_is_found_is_what_was_written_last_and_fits(
    steps: list[tuple[str, str, bytes]],
) -> None:
    store = MemoryStore(max_bytes=60)
    written: dict[str, bytes] = {}
    for verb, key, blob in steps:
        if verb == "write":
            written[key] = blob
            assert store.write([entry(key, blob)]) == len(blob)
            assert store.sizes([key]) == [len(blob)]  # the newest is never the one to go
        elif verb == "delete":
            store.delete([key])
            written.pop(key, None)
        else:
            (view,) = store.read([key])
            assert view is None or view == written[key]
        sizes = store.sizes("abcde")
        assert sum(sizes) <= 60
        assert all(
            size in (0, len(written.get(key, b"")))
            for key, size in zip("abcde", sizes, strict=True)
        )


def test_threads_never_see_half_an_entry() -> None:
    store = MemoryStore(max_bytes=50_000)
    wrong: list[bytes] = []

    def work(number: int) -> None:
        for turn in range(200):
            store.write([entry(f"k{turn % 7}", bytes([number]) * 9_000)])
            views = store.read([f"k{at}" for at in range(7)])
            blobs = [bytes(view) for view in views if view is not None]
            wrong.extend(blob for blob in blobs if len(set(blob)) != 1)
            store.delete([f"k{(turn + 3) % 7}"])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert sum(store.sizes([f"k{at}" for at in range(7)])) <= 50_000

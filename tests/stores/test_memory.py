from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import blobs

from chunkcache.errors import SettingError
from chunkcache.stores import memory
from chunkcache.stores.base import Entry
from chunkcache.stores.memory import MemoryStore


def entry(key: str, blob: bytes = b"", **metadata: str) -> Entry:
    return Entry(key, metadata, memoryview(blob))


def test_every_verb() -> None:
    store = MemoryStore()
    assert store.write([entry("a", b"one", model="m"), entry("b", model="n")]) == 3
    keys = ["b", "none", "a"]
    assert store.sizes(keys) == [0, 0, 3]
    assert blobs(store, *keys) == [None, None, b"one"]
    assert store.read_metadata(keys) == [{"model": "n"}, None, {"model": "m"}]
    assert store.delete(["a", "none"]) == 1
    assert blobs(store, "a") == [None]
    assert store.flush()
    store.close()
    assert store.sizes(["b"]) == [0]


def test_metadata_are_a_copy() -> None:
    store = MemoryStore()
    metadata = {"a": "1"}
    store.write([Entry("a", metadata, memoryview(b""))])
    metadata["a"] = "2"
    found = store.read_metadata(["a"])
    assert found == [{"a": "1"}]
    (found[0] or {})["a"] = "3"
    assert store.read_metadata(["a"]) == [{"a": "1"}]


def test_the_least_recently_used_go_first() -> None:
    store = MemoryStore(max_bytes=3 * 101)
    store.write([entry(key, bytes(100)) for key in "abc"])
    blobs(store, "a")
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
    assert blobs(store, "a") == [None]


def test_a_refused_addition_leaves_what_is_there() -> None:
    store = MemoryStore(1000)
    store.write([entry("a", b"1", x="1")])
    store.write([Entry("b", {}, memoryview(bytes(900)), pinned=True)])
    assert store.sizes(["a", "b"]) == [1, 900]
    more = Entry("a", {"y": "2" * 500}, memoryview(b""), merge=True)
    store.write([more])
    assert store.read_metadata(["a"]) == [{"x": "1"}]
    assert store.sizes(["a", "b"]) == [1, 900]


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


def pinned(key: str, blob: bytes = b"") -> Entry:
    return Entry(key, {}, memoryview(blob), pinned=True)


def test_pinned_entries_stay_and_make_room_only_for_each_other() -> None:
    store = MemoryStore(max_bytes=3 * 101)
    store.write([pinned("a", bytes(100)), entry("b", bytes(100)), entry("c", bytes(100))])
    store.write([entry("d", bytes(100))])
    assert store.sizes("abcd") == [100, 0, 100, 100]
    assert store.write([pinned("e", bytes(100)), pinned("f", bytes(100))]) == 200
    assert store.write([entry("g", bytes(1))]) == 0
    assert store.sizes("acdefg") == [100, 0, 0, 100, 100, 0]
    blobs(store, "a")
    store.write([pinned("h", bytes(100))])
    assert store.sizes("aefh") == [100, 0, 100, 100]


def test_fields_that_are_added_to_a_pinned_entry_leave_it_pinned() -> None:
    store = MemoryStore(max_bytes=500)
    store.write([pinned("a", bytes(300))])
    store.write([Entry("a", {"m": "1"}, memoryview(b""), merge=True)])
    store.write([entry(f"k{at}", bytes(100)) for at in range(5)])
    assert store.sizes(["a", "k4"]) == [300, 100]
    assert store.read_metadata(["a"]) == [{"m": "1"}]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands in for the module `time`: monotonic seconds that a test sets."""
    clock = SimpleNamespace(now=1000.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(memory, "time", clock)
    return clock


def test_entries_go_after_their_time(clock: SimpleNamespace) -> None:
    store = MemoryStore(ttl=10, refresh_ttl=False)
    store.write([entry("a", b"one", m="1"), pinned("p", b"two")])
    clock.now += 9.9
    assert store.read_metadata(["a"]) == [{"m": "1"}]
    assert blobs(store, "a", "p") == [b"one", b"two"]
    clock.now += 0.1
    assert store.sizes(["a", "p"]) == [0, 3]
    assert blobs(store, "a", "p") == [None, b"two"]
    assert store.read_metadata(["a"]) == [None]
    assert store.delete(["a"]) == 0
    store.write([entry("a", b"anew")])
    assert store.sizes(["a"]) == [4]


@pytest.mark.parametrize("verb", [lambda s: blobs(s, "a"), lambda s: s.read_metadata(["a"])])
def test_use_renews_the_time(clock: SimpleNamespace, verb: Callable[[MemoryStore], object]) -> None:
    store = MemoryStore(ttl=10)
    store.write([entry("a", b"one", m="1")])
    for _ in range(3):
        clock.now += 9
        verb(store)
    clock.now += 9
    assert store.sizes(["a"]) == [3]  # which is not a use
    clock.now += 1
    assert store.sizes(["a"]) == [0]


def test_without_a_time_nothing_goes(clock: SimpleNamespace) -> None:
    store = MemoryStore()
    store.write([entry("a", b"one")])
    clock.now += 1e9
    assert store.sizes(["a"]) == [3]


KEYS = st.sampled_from("abcde")
STEPS = st.one_of(
    st.tuples(st.sampled_from(["write", "pin"]), KEYS, st.binary(max_size=40)),
    st.tuples(st.just("delete"), KEYS, st.just(b"")),
    st.tuples(st.just("read"), KEYS, st.just(b"")),
)


@given(steps=st.lists(STEPS, max_size=40))
def test_what_is_found_is_what_was_written_last_and_fits(
    steps: list[tuple[str, str, bytes]],
) -> None:
    store = MemoryStore(max_bytes=60)
    written: dict[str, bytes] = {}
    pins: set[str] = set()
    for verb, key, blob in steps:
        if verb in ("write", "pin"):
            written[key] = blob
            pins.discard(key)
            before = store.sizes(sorted(pins))
            taken = store.write([Entry(key, {}, memoryview(blob), pinned=verb == "pin")])
            assert store.sizes([key]) == [taken]  # the newest is never the one to go
            if verb == "pin":
                assert taken == len(blob)
                pins.add(key)
            else:
                assert store.sizes(sorted(pins)) == before
                room = 60 - sum(size + 1 for size in before if size) - 1
                assert taken == (len(blob) if len(blob) <= room else 0) or 0 in before
        elif verb == "delete":
            store.delete([key])
            written.pop(key, None)
            pins.discard(key)
        else:
            (view,) = blobs(store, key)
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
            found = blobs(store, *(f"k{at}" for at in range(7)))
            wrong.extend(blob for blob in found if blob is not None and len(set(blob)) != 1)
            store.delete([f"k{(turn + 3) % 7}"])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert sum(store.sizes([f"k{at}" for at in range(7)])) <= 50_000

from __future__ import annotations

import pytest
from scripted import Scripted, blobs, fetch

from chunkcache.errors import StoreError
from chunkcache.stores.base import Entry
from chunkcache.stores.breaker import CircuitBreaker
from chunkcache.stores.memory import MemoryStore
from chunkcache.stores.patient import PatientStore
from chunkcache.stores.tiered import TieredStore
from chunkcache.stores.writer import WriteBehind


def entry(number: int, size: int = 1000) -> Entry:
    return Entry(f"key{number}", {"number": str(number)}, memoryview(bytes([number]) * size))


def broken() -> Scripted:
    return Scripted(write=StoreError("no space left"))


def test_a_full_queue_is_waited_for() -> None:
    slow = Scripted()
    slow.gate.clear()
    entries = [entry(n) for n in range(20)]
    assert WriteBehind(slow, max_bytes=2500).write(entries) < 20_000  # what it is all about
    slow.gate.set()
    store = PatientStore(WriteBehind(slow, max_bytes=2500))
    assert store.write(entries) == 20_000
    assert store.flush()
    assert slow.sizes([e.key for e in entries]) == [1000] * 20
    assert store.bytes_written == 20_000


def test_what_never_fits_is_an_error_with_a_remedy() -> None:
    store = PatientStore(WriteBehind(MemoryStore(), max_bytes=500))
    with pytest.raises(StoreError, match="write_queue_bytes"):
        store.write([entry(1, 400), entry(2), entry(3, 400)])
    assert store.bytes_written == 400


def test_failures_behind_a_queue_are_raised() -> None:
    store = PatientStore(WriteBehind(CircuitBreaker(broken())))
    store.check_writable()
    store.write([entry(1)])
    with pytest.raises(StoreError, match="no space left"):
        store.flush()
    for verb in (store.check_writable, lambda: store.write([entry(2)])):
        with pytest.raises(StoreError, match="no space left"):
            verb()


def test_the_error_of_the_furthest_tier_is_raised() -> None:
    store = PatientStore(TieredStore([MemoryStore(), broken()]))
    with pytest.raises(StoreError, match="no space left"):
        store.write([entry(1)])
    store = PatientStore(TieredStore([broken(), MemoryStore()]))
    assert store.write([entry(1)]) == 1000


def test_failures_behind_queues_of_tiers_are_raised() -> None:
    near, far = WriteBehind(CircuitBreaker(MemoryStore())), WriteBehind(CircuitBreaker(broken()))
    store = PatientStore(TieredStore([near, far]))
    store.write([entry(1)])
    with pytest.raises(StoreError, match="no space left"):
        store.flush()
    store = PatientStore(TieredStore([WriteBehind(CircuitBreaker(broken())), near]))
    store.write([entry(1)])
    assert store.flush()  # the furthest has it


def test_it_is_the_store_in_everything_else() -> None:
    inner = MemoryStore()
    store = PatientStore(inner)
    store.write([entry(1)])
    assert store.sizes(["key1", "key2"]) == [1000, 0]
    assert blobs(store, "key1") == [bytes([1]) * 1000]
    place = memoryview(bytearray(1000))
    assert list(fetch(store, ["key1"], [[place]])) == [True]
    assert bytes(place) == bytes([1]) * 1000
    assert store.read_metadata(["key1"]) == [{"number": "1"}]
    assert store.delete(["key1"]) == 1
    assert inner.sizes(["key1"]) == [0]

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable

import pytest

from chunkcache.errors import StoreError
from chunkcache.stores import tiered
from chunkcache.stores.base import Entry
from chunkcache.stores.breaker import Guarded
from chunkcache.stores.cluster import ClusterStore
from chunkcache.stores.locks import ForkSafeLock
from chunkcache.stores.memory import MemoryStore

FORK = multiprocessing.get_context("fork")


def test_it_excludes() -> None:
    lock = ForkSafeLock()
    inside = []
    with lock:
        thread = threading.Thread(target=lambda: lock.__enter__() or inside.append(1))
        thread.start()
        thread.join(0.05)
        assert inside == []
    thread.join(10)
    assert inside == [1]


def use_memory() -> None:
    assert MEMORY.write([Entry("a", {}, memoryview(b"x"))]) == 1


def use_breaker() -> None:
    assert BREAKER.sizes(["a"]) == [0]


def use_cluster() -> None:
    with pytest.raises(StoreError):
        CLUSTER.sizes(["a"])


def use_shared_memory() -> None:
    tiered.shared_memory(("name",), MEMORY)


MEMORY = MemoryStore()
BREAKER = Guarded(MemoryStore())
CLUSTER = ClusterStore("redis+cluster://127.0.0.1:1")


@pytest.mark.parametrize(
    ("lock", "use"),
    [
        (MEMORY._lock, use_memory),
        (BREAKER._reading._lock, use_breaker),
        (CLUSTER._topology._lock, use_cluster),
        (tiered._LOCK, use_shared_memory),
    ],
)
def test_a_forked_child_finds_it_free(lock: ForkSafeLock, use: Callable[[], None]) -> None:
    held, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            leave.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    child = FORK.Process(target=use, daemon=True)
    child.start()
    child.join(10)
    leave.set()
    thread.join()
    assert child.exitcode == 0, "it waits for a thread that it does not have"
    with lock:
        pass

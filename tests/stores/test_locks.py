"""Waiting and threads: what an interrupt or a fork must not leave behind."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from chunkcache.stores import locks, tiered
from chunkcache.stores.base import Entry
from chunkcache.stores.locks import ForkSafeLock, Latch, Worker, start_thread
from chunkcache.stores.memory import MemoryStore

FORK = multiprocessing.get_context("fork")


def test_a_latch_is_waited_for_until_it_is_open() -> None:
    latch, passed = Latch(), []
    assert not latch.wait(0.01)
    for _ in range(3):
        start_thread(lambda: passed.append(latch.wait(20)), "waiter")
    time.sleep(0.05)
    assert not passed
    latch.open()
    latch.open()
    assert latch.wait()
    deadline = time.monotonic() + 10
    while len(passed) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert passed == [True] * 3


def test_who_was_interrupted_at_a_latch_keeps_nobody() -> None:
    latch = Latch()
    latch.open()
    assert latch._bolt.acquire(timeout=1)  # and then, before it is given back, Ctrl-C
    latch._opened = False
    start_thread(lambda: setattr(latch, "_opened", True), "opener")
    assert latch.wait(10)


class Digits(Worker):
    """Counts what it was given."""

    thread_name = "digits"

    def __init__(self) -> None:
        super().__init__()
        self.waiting: deque[int] = deque()
        self.total = 0
        self.threads: set[int] = set()

    def todo(self) -> bool:
        return bool(self.waiting)

    def step(self) -> None:
        self.threads.add(threading.get_ident())
        self.total += self.waiting[0]
        self.waiting.popleft()


def test_a_worker_does_all_that_many_threads_bring() -> None:
    worker = Digits()

    def bring() -> None:
        for _ in range(500):
            worker.waiting.append(1)
            worker.start()

    for _ in range(4):
        start_thread(bring, "bringer")
    assert worker.wait(lambda: worker.total == 2000, 20)
    assert not worker.waiting


def test_without_a_thread_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(locks, "start_new_thread", refuse)
    worker = Digits()
    assert worker.wait(lambda: True)
    worker.waiting.append(1)
    with pytest.raises(RuntimeError):
        worker.wait(lambda: False)


def use_memory() -> None:
    assert MEMORY.write([Entry("a", {}, memoryview(b"x"))]) == 1


def use_shared_memory() -> None:
    tiered.shared_memory(("name",), MEMORY)


def use_worker() -> None:
    WORKER.waiting.append(1)
    assert LATCH.wait(20), "nobody is left to open it"


MEMORY = MemoryStore()
WORKER = Digits()
LATCH = Latch()


@pytest.mark.parametrize(
    ("lock", "use"),
    [
        (MEMORY._locks, use_memory),
        (tiered._LOCK, use_shared_memory),
        (ForkSafeLock(), use_worker),
    ],
)
def test_a_forked_child_waits_for_no_thread_of_its_parent(
    lock: ForkSafeLock, use: Callable[[], None]
) -> None:
    held, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with lock.own:
            held.set()
            leave.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    child: Any = FORK.Process(target=use, daemon=True)
    child.start()
    child.join(10)
    leave.set()
    thread.join()
    assert child.exitcode == 0, "it waits for a thread that it does not have"
    assert lock.own.acquire(timeout=1)
    lock.own.release()

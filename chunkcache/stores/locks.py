"""Threads, and waiting for them: sound whenever an exception lands in the one who waits.

Ctrl-C raises KeyboardInterrupt between any two steps of Python code. `threading.Condition`, `Event`
and `Thread.start` take and give back their locks in such steps, and an interrupt there leaves a
lock taken for ever. Here whoever calls takes no lock that another needs; only C code that cannot be
interrupted half-way (operations on one dict or list, a lock as it is) changes what threads share.
"""

from __future__ import annotations

import math
import os
import threading
import time
from _thread import start_new_thread
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

LOOK_SECONDS = 0.1  # between two looks of someone who waits, should the sign for it be lost


def start_thread(target: Callable[[], object], name: str) -> None:
    """Begin a thread that does not outlive the process. RuntimeError if none can be had."""
    thread = threading.Thread(target=target, name=name, daemon=True)
    start_new_thread(_start, (thread,))  # waits for nothing, unlike `Thread.start`


def _start(thread: threading.Thread) -> None:
    try:
        thread.start()
    except RuntimeError:  # no more threads: then in this one
        thread.run()


class Latch:
    """Closed at first, then open for good. Open in a forked child, where nobody would open it."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._opened = False
        self._bolt = threading.Lock()
        self._bolt.acquire()

    @property
    def is_open(self) -> bool:
        """Whether nobody needs to wait any more."""
        return self._opened or self._pid != os.getpid()

    def __deepcopy__(self, memo: dict[int, Any]) -> Latch:
        return self

    def open(self) -> None:
        """Let all go on who wait. To be called by one thread."""
        if not self._opened:
            self._opened = True
            self._bolt.release()

    def wait(self, seconds: float = math.inf) -> bool:
        """Wait until it is open, at most so long; whether it is."""
        deadline = time.monotonic() + seconds
        while not self.is_open and (left := deadline - time.monotonic()) > 0:
            if self._bolt.acquire(timeout=min(left, LOOK_SECONDS)):
                self._bolt.release()  # for the next one who waits
        return self.is_open


OPEN = Latch()
OPEN.open()


class Worker(ABC):
    """Work that a thread does, step by step; it ends when there is none, and begins anew for more.

    Work is put where `todo` finds it, and then `start` called.
    """

    thread_name: ClassVar[str]

    def __init__(self) -> None:
        self._at_work = threading.Lock()  # taken by the thread, never by a caller
        self._turn = Latch()  # opened behind each step

    @abstractmethod
    def todo(self) -> bool:
        """Whether there is work."""

    @abstractmethod
    def step(self) -> None:
        """Do some of it. Never called twice at the same time."""

    def start(self) -> None:
        """See to it that a thread is at work if there is any. RuntimeError if none can be had."""
        if self.todo() and not self._at_work.locked():
            start_thread(self._run, self.thread_name)

    def wait(self, over: Callable[[], bool], seconds: float = math.inf) -> bool:
        """Wait, at most so long, until `over` is true, which a step may change; whether it is.

        Raises RuntimeError if there is work, and no thread can be had.
        """
        deadline = time.monotonic() + seconds
        while True:
            self.start()
            turn = self._turn  # before looking: what changes from now on opens it
            if over():
                return True
            if (left := deadline - time.monotonic()) <= 0:
                return False
            turn.wait(min(left, 1.0))

    def _run(self) -> None:
        # Looks once more when the lock is free: who came just before has not begun a thread.
        while self.todo() and self._at_work.acquire(blocking=False):
            try:
                while self.todo():
                    self.step()
                    turn, self._turn = self._turn, Latch()
                    turn.open()
            finally:
                self._at_work.release()


class ForkSafeLock:
    """A lock of each process's own: a forked child finds it free, whoever held the parent's.

    `with lock.own:` takes it. That is the very lock, written in C: between its being taken and the
    beginning of the block there is no step at which an interrupt could land.
    """

    def __init__(self, make: Callable[[], Any] = threading.RLock) -> None:
        self._make = make
        self._of: dict[int, Any] = {}

    @property
    def own(self) -> Any:
        """This process's lock."""
        return self._of.setdefault(os.getpid(), self._make())

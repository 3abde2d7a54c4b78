"""What waits to be written, and the thread that writes it, until the interpreter ends.

The queue is bounded in bytes; what does not fit is dropped and counted, for a lost chunk costs a
recomputation later, and a full queue must not cost the caller a wait now.
"""

from __future__ import annotations

import atexit
import logging
import math
import os
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from multiprocessing.util import Finalize
from typing import NamedTuple

from chunkcache.errors import StoreError
from chunkcache.stores.base import ChunkStore, Entry, LateBlob, merged
from chunkcache.stores.locks import Worker
from chunkcache.sums import SUMS, Sums

EXIT_SECONDS = 5.0  # for all queues of the process together, at its end
REMOVE_SECONDS = 5.0  # how long a removal waits for the write of that very entry
EXIT_PRIORITY = 10  # of multiprocessing's finalizers: before those without one
MAX_ENTRIES = 1 << 16  # entries without a blob have no bytes to count
BATCH_ENTRIES = 256  # that are handed to the store at once
BATCH_BYTES = 4 << 20  # of their blobs; a larger one goes alone

OUTCOMES = ("written", "dropped", "failed")  # what may become of an entry

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WriteStats:
    """What a queue has done so far. Bytes are those of blobs.

    `dropped_entries` did not fit the queue or were not taken by the store; `failed_entries` met an
    error. What was handed over together counts together.
    """

    queued_bytes: int = 0
    queued_entries: int = 0
    written_entries: int = 0
    written_bytes: int = 0
    dropped_entries: int = 0
    failed_entries: int = 0
    last_error: str | None = None


class Failure(NamedTuple):
    """Why a batch was not written. No exception: that would keep the batch's memory."""

    text: str
    cause: str


class Queue(Worker):
    """At most `max_bytes` of blobs on their way to `store`. Entries of one key become one.

    Apart from `WriteBehind`, so that the thread keeps alive this only: entries of a forgotten
    `WriteBehind` are still written, and no thread keeps an idle one alive.

    There is no lock: callers put entries in and take them out of `waiting`, each with one operation
    on a dict, and whoever takes one out has it; all else belongs to the thread. Several threads
    that put at the same time may exceed the bounds by what one of them brings.
    """

    thread_name = "chunkcache-writer"

    def __init__(self, store: ChunkStore, max_bytes: int) -> None:
        self.store = store
        self.max_bytes = max_bytes
        self.closed = False
        self.begin()
        LIVE[id(self)] = self

    def begin(self) -> None:
        """Start empty: at first, and in a forked child, whose parent writes its own entries."""
        super().__init__()
        self.waiting: dict[int, Entry] = {}  # by a number, in the order in which they came
        self.numbers = count()
        self.current: dict[str, Entry] = {}  # being written; replaced, never changed
        self.counts = Sums()
        self.last_error: str | None = None

    def stats(self) -> WriteStats:
        """The counters as they are now."""
        queued = [*self.waiting.copy().values(), *self.current.values()]
        counts = self.counts.copy()
        return WriteStats(
            queued_bytes=sum(entry.nbytes for entry in queued),
            queued_entries=len(queued),
            written_entries=counts["written", ""],
            written_bytes=counts["written_bytes", ""],
            dropped_entries=counts["dropped", ""],
            failed_entries=counts["failed", ""],
            last_error=self.last_error,
        )

    def put(self, entries: Sequence[Entry]) -> int:
        """Take what fits, without waiting. Returns the bytes taken."""
        see_to_exit()
        numbers = {entry.key: number for number, entry in self.waiting.copy().items()}
        newest = self.find([entry.key for entry in entries])
        queued = self.stats().queued_bytes
        taken = dropped = 0
        for given in entries:
            last = newest.get(given.key)
            if last and _summary(last) == _summary(given):
                taken += given.nbytes
                continue
            number = numbers.get(given.key, -1)
            replaced = self.waiting.get(number)
            entry = merged(given, replaced)
            grown = entry.nbytes - (replaced.nbytes if replaced else 0)
            fits = queued + grown <= self.max_bytes and len(self.waiting) < MAX_ENTRIES
            if self.closed or not fits:
                dropped += 1
                continue
            if replaced is None:
                number = numbers[entry.key] = next(self.numbers)
            self.waiting[number] = entry  # anew, should it have been taken out meanwhile
            newest[entry.key] = merged(entry, last)
            queued += grown
            taken += given.nbytes
        if self.closed:
            dropped += self.forget()
        self.count("dropped", dropped)
        try:
            self.start()
        except RuntimeError as error:  # no more threads, or the interpreter is ending
            self.give_up(error)
        return taken

    def find(self, keys: Sequence[str]) -> dict[str, Entry]:
        """Those of the keys that are queued, with their newest entries."""
        waiting = self.waiting.copy()  # first: entries go from there to `current`
        found = {key: entry for key in keys if (entry := self.current.get(key))}
        if waiting:
            wanted = set(keys)
            for entry in waiting.values():
                if entry.key in wanted:
                    found[entry.key] = merged(entry, found.get(entry.key))
        return found

    def remove(self, keys: Sequence[str]) -> set[str]:
        """Take keys out of the queue; a write under way is waited for. Returns which were there."""
        wanted = set(keys)
        removed = {
            entry.key
            for number, entry in self.waiting.copy().items()
            if entry.key in wanted and self.waiting.pop(number, None) is not None
        }
        with suppress(RuntimeError):  # no thread: then nothing is being written
            self.wait(lambda: self.current.keys().isdisjoint(wanted), REMOVE_SECONDS)
        return removed

    def drain(self, timeout: float | None) -> bool:
        """Wait until nothing is queued, at most `timeout` s; whether that came to pass."""
        try:
            return self.wait(
                lambda: not self.waiting and not self.current,
                math.inf if timeout is None else timeout,
            )
        except RuntimeError as error:
            self.give_up(error)
            return True

    def shut(self) -> None:
        """Take nothing more, and forget what still waits."""
        self.closed = True
        self.count("dropped", self.forget())

    def forget(self) -> int:
        """Drop what waits. Returns how many entries that was."""
        had = [self.waiting.pop(number, None) for number in self.waiting.copy()]
        return len(had) - had.count(None)

    def give_up(self, error: RuntimeError) -> None:
        """Count as failed what nobody will write."""
        log.warning("cannot write behind: %s", error)
        self.count("failed", self.forget())

    # ------------------------------------------------------------------ in the thread

    def todo(self) -> bool:
        return bool(self.waiting)

    def step(self) -> None:
        """Write the oldest entries, and note what became of them."""
        self.take_batch()
        for entry in self.current.values():
            if isinstance(entry.data, LateBlob):
                entry.data.wait()
        taken, failure = self.write_out(list(self.current.values()))
        nbytes = sum(entry.nbytes for entry in self.current.values())
        if failure is not None:
            self.last_error = failure.text
            self.count("failed", len(self.current))
            SUMS.add(Counter({("write_errors", failure.cause): len(self.current)}))
        elif taken < nbytes:
            self.count("dropped", len(self.current))
        else:
            self.count("written", len(self.current))
            self.counts.add(Counter({("written_bytes", ""): taken}))
        self.current = {}

    def take_batch(self) -> None:
        """Make the oldest entries the current ones, as many as are written well together.

        Small ones in one batch share the round trips.
        """
        chosen: dict[int, Entry] = {}
        nbytes = 0
        for number, entry in self.waiting.copy().items():
            nbytes += entry.nbytes
            if chosen and (nbytes > BATCH_BYTES or len(chosen) == BATCH_ENTRIES):
                break
            chosen[number] = entry
        # In both places for a moment, rather than in none.
        self.current = _by_key(chosen.values())
        had = [self.waiting.pop(number, None) for number in chosen]
        self.current = _by_key(filter(None, had))

    def write_out(self, entries: Sequence[Entry]) -> tuple[int, Failure | None]:
        """The bytes that the store took, and the failure if it raised an error."""
        try:
            return self.store.write(entries) if entries else 0, None
        except BaseException as error:  # of any kind: it costs these entries, not the thread
            cause = error.cause if isinstance(error, StoreError) else "other"
            return 0, Failure(f"{type(error).__name__}: {error}", cause)

    def count(self, outcome: str, number: int) -> None:
        """Add to the counters, and to those of the process."""
        if number:
            self.counts.add(Counter({(outcome, ""): number}))
            SUMS.add(Counter({("writes", outcome): number}))


def _by_key(entries: Iterable[Entry]) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for entry in entries:
        found[entry.key] = merged(entry, found.get(entry.key))
    return found


def _summary(entry: Entry) -> tuple[int, Mapping[str, str], bool]:
    """What tells two entries of one key apart, without a look at their bytes."""
    return entry.nbytes, entry.metadata, entry.pinned


# Every queue that is alive, for the two moments that concern them all. A plain dict of weak
# references underneath: listing it needs no lock, which a fork could find taken.
LIVE: weakref.WeakValueDictionary[int, Queue] = weakref.WeakValueDictionary()
_FINALIZERS: dict[int, Finalize] = {}  # of this process, by its number


def flush_at_exit() -> None:
    """Write what all queues hold, within `EXIT_SECONDS` altogether."""
    deadline = time.monotonic() + EXIT_SECONDS
    for reference in LIVE.valuerefs():
        queue = reference()
        if queue is not None and not queue.drain(deadline - time.monotonic()):
            lost = queue.stats().queued_entries
            log.warning("%d chunks could not be stored before the end", lost)


def see_to_exit() -> None:
    """Have `flush_at_exit` called at the end of this process, should it be one of multiprocessing.

    Those end without atexit; and as they begin, they forget what was to be done at their end.
    """
    finalizer = _FINALIZERS.get(os.getpid())
    if finalizer is None or not finalizer.still_active():
        _FINALIZERS[os.getpid()] = Finalize(None, flush_at_exit, exitpriority=EXIT_PRIORITY)


def begin_after_fork() -> None:
    """In a forked child: forget the parent's entries, and its thread."""
    _FINALIZERS.clear()
    for reference in LIVE.valuerefs():
        queue = reference()
        if queue is not None:
            queue.begin()


atexit.register(flush_at_exit)
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=begin_after_fork)

"""What waits to be written, and the thread that writes it, until the interpreter ends.

The queue is bounded in bytes; what does not fit is dropped and counted, for a lost chunk costs a
recomputation later, and a full queue must not cost the caller a wait now.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from chunkcache.errors import StoreError
from chunkcache.stores.base import ChunkStore, Entry, merged
from chunkcache.sums import SUMS

EXIT_SECONDS = 5.0  # for all queues of the process together, at its end
REMOVE_SECONDS = 5.0  # how long a removal waits for the write of that very entry
LINGER_SECONDS = 1.0  # an idle thread ends after this, and with it its hold on the store
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


class Queue:
    """At most `max_bytes` of blobs on their way to `store`. Entries of one key become one.

    Apart from `WriteBehind`, so that the thread keeps alive this only: entries of a forgotten
    `WriteBehind` are still written, and no thread keeps an idle one alive.
    """

    def __init__(self, store: ChunkStore, max_bytes: int) -> None:
        self.store = store
        self.max_bytes = max_bytes
        self.closed = False
        self.begin()
        LIVE[id(self)] = self

    def begin(self) -> None:
        """Start empty: at first, and in a forked child.

        There the parent's thread does not exist, its entries are its own business, and the lock may
        have been held at the moment of the fork.
        """
        self.changed = threading.Condition()
        self.waiting: dict[str, Entry] = {}
        self.current: dict[str, Entry] = {}  # being written
        self.thread: threading.Thread | None = None
        self.counts = WriteStats()

    def stats(self) -> WriteStats:
        """The counters as they are now."""
        with self.changed:
            queued_entries = len(self.waiting) + len(self.current)
            return replace(self.counts, queued_entries=queued_entries)

    def put(self, entries: Sequence[Entry]) -> int:
        """Take what fits, without waiting. Returns the bytes taken."""
        with self.changed:
            taken = sum(entry.nbytes for entry in entries if self.accept(entry))
            self.work()
        return taken

    def accept(self, entry: Entry) -> bool:
        """Take one entry, or count it as dropped. Called with the lock held."""
        last = self.find([entry.key]).get(entry.key)
        if last and _summary(last) == _summary(entry):
            return True
        replaced = self.waiting.get(entry.key)
        entry = merged(entry, replaced)
        grown = entry.nbytes - (replaced.nbytes if replaced else 0)
        fits = self.counts.queued_bytes + grown <= self.max_bytes
        if self.closed or not fits or len(self.waiting) >= MAX_ENTRIES:
            self.count(dropped_entries=1)
            return False
        self.waiting[entry.key] = entry
        self.count(queued_bytes=grown)
        return True

    def find(self, keys: Sequence[str]) -> dict[str, Entry]:
        """Those of the keys that are queued, with their newest entries."""
        with self.changed:
            found = {key: self.current[key] for key in keys if key in self.current}
            for key in keys:
                if key in self.waiting:
                    found[key] = merged(self.waiting[key], self.current.get(key))
            return found

    def remove(self, keys: Sequence[str]) -> set[str]:
        """Take keys out of the queue; a write under way is waited for. Returns which were there."""
        with self.changed:
            removed = set()
            for key in keys:
                entry = self.waiting.pop(key, None)
                if entry is not None:
                    removed.add(key)
                    self.count(queued_bytes=-entry.nbytes)
            self.changed.wait_for(lambda: self.current.keys().isdisjoint(keys), REMOVE_SECONDS)
            return removed

    def drain(self, timeout: float | None) -> bool:
        """Wait until nothing is queued, at most `timeout` s; whether that came to pass."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self.changed:
            while self.waiting or self.current:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return False
                self.work()
                if self.waiting or self.current:  # not if no thread could be had
                    self.changed.wait(left)
            return True

    def shut(self) -> None:
        """Take nothing more, and forget what still waits."""
        with self.changed:
            self.closed = True
            self.count(dropped_entries=self.forget())
            self.changed.notify_all()

    def forget(self) -> int:
        """Drop what waits. Returns how many entries that was. Called with the lock held."""
        number = len(self.waiting)
        self.count(queued_bytes=-sum(entry.nbytes for entry in self.waiting.values()))
        self.waiting.clear()
        return number

    def work(self) -> None:
        """See to it that a thread is there if there is work. Called with the lock held."""
        if not self.waiting:
            return
        if self.thread is None:
            self.thread = threading.Thread(target=self.run, name="chunkcache-writer", daemon=True)
            try:
                self.thread.start()
            except RuntimeError as error:  # no more threads, or the interpreter is ending
                self.thread = None
                log.warning("cannot write behind: %s", error)
                self.count(failed_entries=self.forget())
        self.changed.notify_all()

    def run(self) -> None:
        """The thread: write batch by batch, and end when nothing has come for a while."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.closed, LINGER_SECONDS)
                if not self.waiting:
                    self.thread = None
                    return
                batch = self.current = self.next_batch()
            outcome: tuple[int, Failure | None] | None = None
            try:
                outcome = self.write_out(list(batch.values()))
            finally:
                with self.changed:
                    if outcome is None:  # SystemExit or the like: this thread is ending
                        self.thread = None
                    self.done(
                        batch, *(outcome or (0, Failure("the writing thread was ended", "other")))
                    )
            del batch  # its memory is not kept while the thread idles

    def next_batch(self) -> dict[str, Entry]:
        """Take the oldest entries, as many as are written well together.

        Small ones in one batch share the round trips. Called with the lock held.
        """
        batch: dict[str, Entry] = {}
        nbytes = 0
        for key, entry in self.waiting.items():
            nbytes += entry.nbytes
            if batch and (nbytes > BATCH_BYTES or len(batch) == BATCH_ENTRIES):
                break
            batch[key] = entry
        for key in batch:
            del self.waiting[key]
        return batch

    def write_out(self, entries: Sequence[Entry]) -> tuple[int, Failure | None]:
        """The bytes that the store took, and the failure if it raised an error."""
        try:
            return self.store.write(entries), None
        except Exception as error:  # a fault of any kind costs these entries, not the thread
            cause = error.cause if isinstance(error, StoreError) else "other"
            return 0, Failure(f"{type(error).__name__}: {error}", cause)

    def done(self, batch: Mapping[str, Entry], taken: int, failure: Failure | None) -> None:
        """Note what became of a batch. Called with the lock held."""
        self.current = {}
        nbytes = sum(entry.nbytes for entry in batch.values())
        self.count(queued_bytes=-nbytes)
        if failure is not None:
            self.count(failed_entries=len(batch))
            self.counts = replace(self.counts, last_error=failure.text)
            SUMS.add(Counter({("write_errors", failure.cause): len(batch)}))
        elif taken < nbytes:
            self.count(dropped_entries=len(batch))
        else:
            self.count(written_entries=len(batch), written_bytes=taken)
        self.changed.notify_all()

    def count(self, **more: int) -> None:
        """Add to the counters, and to those of the process. Called with the lock held."""
        sums = {name: getattr(self.counts, name) + number for name, number in more.items()}
        self.counts = replace(self.counts, **sums)
        ended = {outcome: n for outcome in OUTCOMES if (n := more.get(f"{outcome}_entries"))}
        if ended:
            SUMS.add(Counter({("writes", outcome): n for outcome, n in ended.items()}))


def _summary(entry: Entry) -> tuple[int, Mapping[str, str], bool]:
    """What tells two entries of one key apart, without a look at their bytes."""
    return entry.nbytes, entry.metadata, entry.pinned


# Every queue that is alive, for the two moments that concern them all. A plain dict of weak
# references underneath: listing it needs no lock, which a fork could find taken.
LIVE: weakref.WeakValueDictionary[int, Queue] = weakref.WeakValueDictionary()


def flush_at_exit() -> None:
    """Write what all queues hold, within `EXIT_SECONDS` altogether."""
    deadline = time.monotonic() + EXIT_SECONDS
    for reference in LIVE.valuerefs():
        queue = reference()
        if queue is not None and not queue.drain(deadline - time.monotonic()):
            lost = queue.stats().queued_entries
            log.warning("%d chunks could not be stored before the end", lost)


def begin_after_fork() -> None:
    """In a forked child: forget the parent's entries, thread and locks."""
    for reference in LIVE.valuerefs():
        queue = reference()
        if queue is not None:
            queue.begin()


atexit.register(flush_at_exit)
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=begin_after_fork)

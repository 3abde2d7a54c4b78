"""Write-behind: takes chunks at once and writes them to another store from a thread.

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
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from chunkcache.errors import StoreError
from chunkcache.stores.base import ChunkStore, Entry, copy_into, end_iteration, merged

EXIT_SECONDS = 5.0  # for all queues of the process together, at its end
CLOSE_SECONDS = 5.0
LINGER_SECONDS = 1.0  # an idle thread ends after this, and with it its hold on the store
JUST_SECONDS = 1.0  # the rows of a batch often bring one chunk several times
MAX_ENTRIES = 1 << 16  # entries without a blob have no bytes to count
PATIENCE = 3  # failures in a row after which the store is left alone for a while
PAUSE_SECONDS = 1.0
MAX_CAUSES = 16

log = logging.getLogger("chunkcache")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class WriteStats:
    """What a `WriteBehind` has done so far. Bytes are those of blobs.

    `dropped_entries` did not fit the queue or were not taken by the store; `failed_entries` met an
    error, or a store that had just failed several times.
    """

    queued_bytes: int = 0
    queued_entries: int = 0
    written_entries: int = 0
    written_bytes: int = 0
    dropped_entries: int = 0
    failed_entries: int = 0
    last_error: str | None = None


class WriteBehind(ChunkStore):
    """Wraps `store`: writes happen later, reads see them at once (in this process).

    At most `max_bytes` of blobs wait. A key that waits, or was written within the last second with
    the same size and metadata, is written once. The queue outlives this object, and is written
    within 5 s at the end of the interpreter; a forked child begins with an empty one.
    """

    def __init__(self, store: ChunkStore, max_bytes: int = 1 << 30) -> None:
        self.store = store
        self._queue = Queue(store, max_bytes)

    def stats(self) -> WriteStats:
        """The counters as they are now."""
        return self._queue.stats()

    def write(self, entries: Sequence[Entry]) -> int:
        """Queue the entries without waiting. Returns the bytes accepted; never raises."""
        return self._queue.put(entries)

    def sizes(self, keys: Sequence[str]) -> list[int]:
        queued = self._queue.find(keys)
        rest = [key for key in keys if key not in queued]
        found = iter(self.store.sizes(rest) if rest else ())
        return [queued[key].nbytes if key in queued else next(found) for key in keys]

    def read(self, keys: Sequence[str]) -> Iterator[memoryview | None]:
        queued = self._queue.find(keys)  # now, not when the first blob is asked for
        rest = [key for key in keys if key not in queued]
        waiting = {key: e.blob.toreadonly() if e.nbytes else None for key, e in queued.items()}
        return _merge(keys, waiting, iter(self.store.read(rest) if rest else ()))

    def read_into(
        self, keys: Sequence[str], places: Sequence[Sequence[memoryview]]
    ) -> Generator[bool]:
        queued = self._queue.find(keys)
        # Pairs, not a mapping: one key may have several places.
        rest = [pair for pair in zip(keys, places, strict=True) if pair[0] not in queued]
        found: Iterator[bool] = iter(())
        if rest:
            found = self.store.read_into([key for key, _ in rest], [place for _, place in rest])
        return _fill(keys, places, queued, found)

    def read_metadata(self, keys: Sequence[str]) -> list[dict[str, str] | None]:
        queued = self._queue.find(keys)
        rest = [key for key in keys if key not in queued]
        found = iter(self.store.read_metadata(rest) if rest else ())
        return [dict(queued[key].metadata) if key in queued else next(found) for key in keys]

    def delete(self, keys: Sequence[str]) -> int:
        queued = self._queue.remove(keys)
        rest = [key for key in keys if key not in queued]
        deleted = len(queued) + (self.store.delete(rest) if rest else 0)
        if queued:
            self.store.delete(sorted(queued))  # an older version may be there
        return deleted

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until nothing is queued, at most `timeout` s. Never raises.

        True says that the queue is empty, not that all was written: see `stats().failed_entries`.
        """
        start = time.monotonic()
        if not self._queue.drain(timeout):
            return False
        left = None if timeout is None else max(0.0, timeout - (time.monotonic() - start))
        try:
            return self.store.flush(left)
        except StoreError:
            return False

    def close(self) -> None:
        """Write what is queued, for at most 5 s, drop the rest, close the store."""
        self._queue.drain(CLOSE_SECONDS)
        self._queue.shut()
        self.store.close()


def _merge(keys: Sequence[str], queued: Mapping[str, T], found: Iterator[T]) -> Generator[T]:
    """What was queued, and for the other keys what the store gives, in the order of the keys."""
    try:
        for key in keys:
            yield queued[key] if key in queued else next(found)
    finally:
        end_iteration(found)


def _fill(
    keys: Sequence[str],
    places: Sequence[Sequence[memoryview]],
    queued: Mapping[str, Entry],
    found: Iterator[bool],
) -> Generator[bool]:
    """Copy what was queued; the store fills the other places, and its answers are passed on."""
    try:
        for key, place in zip(keys, places, strict=True):
            yield copy_into(queued[key].blob, place) if key in queued else next(found)
    finally:
        end_iteration(found)


class Queue:
    """What waits to be written, and the thread that writes it.

    Apart from `WriteBehind`, so that the thread keeps alive this only: entries of a forgotten
    `WriteBehind` are still written, and no thread keeps an idle one alive.
    """

    def __init__(self, store: ChunkStore, max_bytes: int) -> None:
        self.store = store
        self.max_bytes = max_bytes
        self.warned: set[str] = set()
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
        self.current: Entry | None = None
        # When, and what: in the order of the writing, and without the blob, which is memory.
        self.just_written: dict[str, tuple[float, int, Mapping[str, str]]] = {}
        self.thread: threading.Thread | None = None
        self.counts = WriteStats()
        self.failures_in_a_row = 0
        self.retry_at = 0.0

    def stats(self) -> WriteStats:
        with self.changed:
            queued_entries = len(self.waiting) + (self.current is not None)
            return replace(self.counts, queued_entries=queued_entries)

    def put(self, entries: Sequence[Entry]) -> int:
        with self.changed:
            taken = sum(entry.nbytes for entry in entries if self.accept(entry))
            self.work()
        return taken

    def accept(self, entry: Entry) -> bool:
        if self.is_known(entry):
            return True
        replaced = self.waiting.get(entry.key)
        if replaced is not None and replaced.merge:
            entry = merged(entry, replaced.metadata)
        grown = entry.nbytes - (replaced.nbytes if replaced else 0)
        fits = self.counts.queued_bytes + grown <= self.max_bytes
        if self.closed or not fits or len(self.waiting) >= MAX_ENTRIES:
            self.count(dropped_entries=1)
            return False
        self.waiting[entry.key] = entry
        self.count(queued_bytes=grown)
        return True

    def is_known(self, entry: Entry) -> bool:
        """Whether this very entry waits, is being written, or was written a moment ago."""
        past = time.monotonic() - JUST_SECONDS
        while self.just_written:
            oldest = next(iter(self.just_written))
            if self.just_written[oldest][0] > past:
                break
            del self.just_written[oldest]
        last = self.find([entry.key]).get(entry.key)
        if last is not None:
            return (last.nbytes, last.metadata) == (entry.nbytes, entry.metadata)
        _, *written = self.just_written.get(entry.key, (0.0, None))
        return written == [entry.nbytes, entry.metadata]

    def find(self, keys: Sequence[str]) -> dict[str, Entry]:
        """Those of the keys that are queued, with their newest entries."""
        with self.changed:
            found = {key: self.waiting[key] for key in keys if key in self.waiting}
            if self.current is not None and self.current.key in keys:
                found.setdefault(self.current.key, self.current)
            return found

    def remove(self, keys: Sequence[str]) -> set[str]:
        """Take keys out of the queue; a write under way is waited for. Returns which were there."""
        with self.changed:
            removed = set()
            for key in keys:
                self.just_written.pop(key, None)
                entry = self.waiting.pop(key, None)
                if entry is not None:
                    removed.add(key)
                    self.count(queued_bytes=-entry.nbytes)
            self.changed.wait_for(
                lambda: self.current is None or self.current.key not in keys, CLOSE_SECONDS
            )
            for key in keys:
                self.just_written.pop(key, None)
            return removed

    def drain(self, timeout: float | None) -> bool:
        deadline = None if timeout is None else time.monotonic() + timeout
        with self.changed:
            while self.waiting or self.current is not None:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return False
                self.work()
                if self.waiting or self.current is not None:  # not if no thread could be had
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
                log.warning("chunkcache: cannot write behind: %s", error)
                self.count(failed_entries=self.forget())
        self.changed.notify_all()

    def run(self) -> None:
        """The thread: write entry by entry, and end when nothing has come for a while."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.closed, LINGER_SECONDS)
                if not self.waiting:
                    self.thread = None
                    return
                entry = self.current = self.waiting.pop(next(iter(self.waiting)))
            outcome: tuple[int, str | None] | None = None
            try:
                outcome = self.write_one(entry)
            finally:
                with self.changed:
                    if outcome is None:  # SystemExit or the like: this thread is ending
                        self.thread = None
                    self.done(entry, *(outcome or (0, "the writing thread was ended")))
            del entry  # its memory is not kept while the thread idles

    def write_one(self, entry: Entry) -> tuple[int, str | None]:
        """The bytes that the store took, and the error if it raised one."""
        if self.failures_in_a_row >= PATIENCE and time.monotonic() < self.retry_at:
            return 0, self.counts.last_error
        try:
            taken = self.store.write([entry])
        except Exception as error:  # a fault of any kind costs this entry, not the thread
            self.failures_in_a_row += 1
            self.retry_at = time.monotonic() + PAUSE_SECONDS
            cause = f"{type(error).__name__}: {error}"
            if cause not in self.warned and len(self.warned) < MAX_CAUSES:
                self.warned.add(cause)
                log.warning("chunkcache: a chunk could not be stored: %s", cause)
            return 0, cause
        self.failures_in_a_row = 0
        return taken, None

    def done(self, entry: Entry, taken: int, error: str | None) -> None:
        """Note what became of the entry. Called with the lock held."""
        self.current = None
        self.count(queued_bytes=-entry.nbytes)
        if error is not None:
            self.count(failed_entries=1)
            self.counts = replace(self.counts, last_error=error)
        elif taken < entry.nbytes:
            self.count(dropped_entries=1)
        else:
            self.count(written_entries=1, written_bytes=taken)
            self.just_written.pop(entry.key, None)  # so that it stands last
            self.just_written[entry.key] = (time.monotonic(), entry.nbytes, entry.metadata)
        self.changed.notify_all()

    def count(self, **more: int) -> None:
        """Add to the counters. Called with the lock held."""
        sums = {name: getattr(self.counts, name) + number for name, number in more.items()}
        self.counts = replace(self.counts, **sums)


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
            log.warning("chunkcache: %d chunks could not be stored before the end", lost)


def begin_after_fork() -> None:
    """In a forked child: forget the parent's entries, thread and locks."""
    for reference in LIVE.valuerefs():
        queue = reference()
        if queue is not None:
            queue.begin()


atexit.register(flush_at_exit)
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=begin_after_fork)

"""Write-behind: takes chunks at once, and a thread writes them; and how to wait for room there."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

from chunkcache.errors import StoreError
from chunkcache.stores.base import (
    ChunkStore,
    Entry,
    Listed,
    Part,
    ReadsFrom,
    StaysHere,
    calls_of_prompt,
    copy_part,
    end_iteration,
    tell_too_large,
    with_extras,
)
from chunkcache.stores.queue import Queue, WriteStats

DRAIN_SECONDS = 5.0  # what a listing, or closing, waits for queued entries


class WriteBehind(StaysHere, ChunkStore):
    """Wraps `store`: writes happen later, reads see them at once (in this process).

    At most `max_bytes` of blobs wait; more are dropped and counted. The queue outlives this object,
    and is written within 5 s at the end of the interpreter; a forked child begins with an empty
    one.
    """

    def __init__(self, store: ChunkStore, max_bytes: int = 1 << 30) -> None:
        self.store = store
        self._queue = Queue(store, max_bytes)

    def __repr__(self) -> str:
        return f"WriteBehind({self.store!r})"

    def stats(self) -> WriteStats:
        """The counters as they are now."""
        return self._queue.stats()

    def write(self, entries: Sequence[Entry]) -> int:
        """Queue the entries without waiting. Returns the bytes accepted.

        Raises StoreError, and takes nothing, while the store is known to fail.
        """
        self.check_writable()
        tell_too_large(entries, self._queue.max_bytes, "write_queue_bytes")
        tell_too_large(entries, self.store.largest, f"bytes= of {self.store!r}")
        return self._queue.put(entries)

    def check_writable(self) -> None:
        self.check_open()
        self.store.check_writable()

    def sizes(self, keys: Sequence[str]) -> list[int]:
        queued = self._blobs(keys)
        rest = [key for key in keys if key not in queued]
        found = iter(self.store.sizes(rest) if rest else ())
        return [queued[key].nbytes if key in queued else next(found) for key in keys]

    def fetch(self, parts: Sequence[Part]) -> Generator[bool]:
        queued = self._blobs([part.key for part in parts])  # now, not when the first is asked for
        rest = [part for part in parts if part.key not in queued]
        return _fill(parts, queued, self.store.fetch(rest) if rest else iter(()))

    @property
    def reads_parts(self) -> bool:
        return self.store.reads_parts

    def read_metadata(self, keys: Sequence[str]) -> list[dict[str, str] | None]:
        queued = self._queue.find(keys)
        rest = [key for key in keys if key not in queued or queued[key].merge]
        found = dict(zip(rest, self.store.read_metadata(rest) if rest else (), strict=True))
        for key, entry in queued.items():
            found[key] = {**(found.get(key) or {}), **entry.metadata}
        return [found[key] for key in keys]

    def scan(self, prefix: str = "") -> Iterator[list[Listed]]:
        """As in `ChunkStore`. What is queued is written first, within 5 s."""
        self._queue.drain(DRAIN_SECONDS)
        yield from self.store.scan(prefix)

    def server_info(self) -> list[dict[str, Any]]:
        return self.store.server_info()

    def delete(self, keys: Sequence[str]) -> int:
        queued = self._queue.remove(with_extras(keys)).intersection(keys)
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
        self.closed = True
        self._queue.drain(DRAIN_SECONDS)
        self._queue.shut()
        self.store.close()

    def _blobs(self, keys: Sequence[str]) -> dict[str, Entry]:
        """What is queued and decides about the blob; fields to be added do not."""
        queued = self._queue.find(keys)
        return {key: entry for key, entry in queued.items() if entry.nbytes or not entry.merge}


class PatientStore(ReadsFrom):
    """`store`, whose writes wait for room instead of being dropped.

    For work whose only purpose is what it stores: nobody waits for an answer, so the work pauses.

    Attributes:
        store: Where everything goes.
        bytes_written: Bytes of blobs that it took.
    """

    def __init__(self, store: ChunkStore) -> None:
        super().__init__(store)
        self.bytes_written = 0

    def write(self, entries: Sequence[Entry]) -> int:
        """Keep all entries. Returns their bytes.

        Raises StoreError also when there is no room for an entry even if nothing else waits.
        """
        before = self.bytes_written
        for entry in entries:
            with calls_of_prompt() as calls:
                taken = self.store.write([entry])
                if taken < entry.nbytes:
                    self.store.flush()
                    taken = self.store.write([entry])
            if taken < entry.nbytes:
                raise (
                    calls.errors[-1]
                    if calls.errors
                    else StoreError(
                        f"the store took {taken:,} of the {entry.nbytes:,} bytes of a chunk: raise "
                        "write_queue_bytes or the size of the store, or lower chunk_size",
                        "full",
                    )
                )
            self.bytes_written += taken
        return self.bytes_written - before

    def flush(self, timeout: float | None = None) -> bool:
        """As in `ChunkStore`. Raises StoreError if writing is known to have failed just now."""
        done = self.store.flush(timeout)
        self.store.check_writable()
        return done

    def check_writable(self) -> None:
        self.store.check_writable()

    def delete(self, keys: Sequence[str]) -> int:
        return self.store.delete(keys)


def _fill(
    parts: Sequence[Part], queued: Mapping[str, Entry], found: Iterator[bool]
) -> Generator[bool]:
    """Copy what is queued; the store fills the other places, and its answers are passed on."""
    try:
        for part in parts:
            entry = queued.get(part.key)
            yield copy_part(entry.blob, part) if entry else next(found)
    finally:
        end_iteration(found)

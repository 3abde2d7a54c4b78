"""Writes that wait: for work whose only purpose is what it stores.

A write queue drops what does not fit, so that a prompt never waits. Where nobody waits for an
answer it is the other way round: the work pauses until the queue has room.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from chunkcache.errors import StoreError
from chunkcache.stores.base import ChunkStore, Entry, ReadsFrom
from chunkcache.stores.calls import calls_of_prompt


def retry_until(work: Callable[[], object], seconds: float = 8.0) -> None:
    """Do what a store refuses for a while, such as changes after an error; give up in the end.

    For cleaning up: nothing is raised.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            work()
            return
        except StoreError:
            if time.monotonic() > end:
                return
            time.sleep(0.5)


class PatientStore(ReadsFrom):
    """`store`, whose writes wait for room instead of being dropped.

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

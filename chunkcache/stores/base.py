"""What every store can do: the few verbs between the cache and wherever chunks are kept.

An entry is a pair, as two Redis values would be: `metadata`, a mapping people can read, and
`kv_bytes`, the blob. A chunk may have extra values, blobs under its key with `@outputs` or `@state`
behind it: written, looked up and read like any other, listed, described and deleted with the chunk.
Each may be evicted without the others. Stores know nothing of models or of what is inside a blob.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeVar

from chunkcache.errors import PickleError, StoreError
from chunkcache.keys import VALUES
from chunkcache.stores.locks import Latch

METADATA, KV_BYTES, OUTPUTS, STATE = VALUES
EXTRAS = VALUES[2:]  # with `Listed` telling the bytes of each in this order
T = TypeVar("T")
READ_BYTES = 64 << 20  # of whole blobs that are read at once
PATIENCE = 0.25  # seconds


class LateBlob:
    """A blob that is made by whoever needs it first: of K/V that lie on a device, say.

    Args:
        nbytes: Bytes that it has.
        make: Makes it, in any thread.
        is_time: Opens when that disturbs nobody any more who is in a hurry.
    """

    def __init__(self, nbytes: int, make: Callable[[], memoryview], is_time: Latch) -> None:
        self.nbytes = nbytes
        self._make: Callable[[], memoryview] | None = make
        self._blob = memoryview(b"")
        self._is_time, self._deadline = is_time, time.monotonic() + PATIENCE

    def wait(self) -> None:
        """Wait until it is time, at most until `PATIENCE` seconds after it was announced."""
        self._is_time.wait(self._deadline - time.monotonic())

    def made(self) -> memoryview:
        """The blob. Two threads that ask at the same time may both make it."""
        make = self._make
        if make is not None:
            self._blob = make()
            self._make = None
        return self._blob


@dataclass(frozen=True, slots=True)
class Entry:
    """One chunk on its way to a store.

    `key` is the text of a `ChunkKey`, without `@metadata` or `@kv_bytes`. `data` is the whole blob
    as one contiguous view of bytes that nobody changes any more, or what makes it (`LateBlob`); it
    is empty for entries that are metadata only. With `merge` the fields are added to those that are
    there, and a blob that is there stays if the entry brings none. A `pinned` entry does not
    expire, and is evicted last. `before` has the keys of the chunks that stand before it in its
    prompt, in order: writing it is a use of them, too, and a full store keeps them rather than it.
    `replaces` has the keys of entries whose place it takes: they are removed once it is there.
    """

    key: str
    metadata: Mapping[str, str]
    data: memoryview | LateBlob
    merge: bool = False
    pinned: bool = False
    before: Sequence[str] = ()
    replaces: Sequence[str] = ()

    @property
    def blob(self) -> memoryview:
        """The whole blob, waited for where it is still to be made."""
        return self.data.made() if isinstance(self.data, LateBlob) else self.data

    @property
    def nbytes(self) -> int:
        """Bytes of the blob."""
        return self.data.nbytes


@dataclass(frozen=True, slots=True)
class Listed:
    """What a listing tells of one entry; a half that is missing is `None`, or 0 bytes.

    `nbytes` is the size of the blob, `outputs` and `state` are those of the extra values.
    """

    key: str
    metadata: dict[str, str] | None
    nbytes: int
    outputs: int = 0
    state: int = 0

    @property
    def extras(self) -> dict[str, int]:
        """Bytes of the extra values that are there, by what stands behind the key."""
        sizes = zip(EXTRAS, (self.outputs, self.state), strict=True)
        return {ending: nbytes for ending, nbytes in sizes if nbytes}

    @property
    def total_bytes(self) -> int:
        """Bytes of all blobs together."""
        return self.nbytes + self.outputs + self.state


def chunk_of(key: str) -> str:
    """The key of the chunk that a value belongs to."""
    return key.rpartition("@")[0] if key.endswith(EXTRAS) else key


def with_extras(keys: Iterable[str]) -> list[str]:
    """These keys, and behind that of each chunk those of its extra values."""
    return [
        name
        for key in keys
        for name in (key, *(() if key.endswith(EXTRAS) else [key + ending for ending in EXTRAS]))
    ]


def described(entries: Iterable[Entry]) -> Iterator[Entry]:
    """The same, for stores where each key has metadata of its own.

    What comes with an extra value is said of its chunk.
    """
    for entry in entries:
        yield entry
        if entry.metadata and entry.key != chunk_of(entry.key):
            yield Entry(chunk_of(entry.key), entry.metadata, memoryview(b""), merge=True)


def first_position(positions: str) -> int | None:
    """Where a chunk begins, by the `positions` in its metadata, which anybody may have written."""
    start = positions.partition("-")[0]
    return int(start) if len(start) < 10 and start.isascii() and start.isdigit() else None


def merged(newer: Entry, older: Entry | None) -> Entry:
    """One entry with the effect of writing `older` and then `newer`, both of one key."""
    if older is None or not newer.merge:
        return newer
    return replace(
        older,
        metadata={**older.metadata, **newer.metadata},
        data=newer.data if newer.nbytes else older.data,
        pinned=newer.pinned or older.pinned,
        before=newer.before or older.before,
    )


class Place(list[memoryview]):
    """Memory that a blob fills, view by view: writable views of bytes.

    Attributes:
        nbytes: Bytes of all views together.
    """

    def __init__(self, views: Iterable[memoryview]) -> None:
        super().__init__(views)
        self.nbytes = sum(view.nbytes for view in self)

    def filled(self, pieces: Sequence[memoryview]) -> None:
        """Called with views, or pieces of them, as soon as they are full, in order.

        Not by every store. Their bytes are in the processor's cache then: what must look at them
        does so cheaply.
        """


class Part(NamedTuple):
    """A part of a blob that is wanted, all of it perhaps.

    Attributes:
        key: The blob's key.
        start: The first byte of the blob that is wanted.
        place: Writable views of bytes, which it fills one after the other; may be a `Place`.
    """

    key: str
    start: int
    place: Sequence[memoryview]


def nbytes_of(views: Iterable[memoryview]) -> int:
    """Bytes of some views together."""
    return views.nbytes if isinstance(views, Place) else sum(view.nbytes for view in views)


def copy_part(blob: memoryview | None, part: Part) -> bool:
    """Copy a part of a blob to its place, if the blob is there and long enough."""
    at = part.start
    if blob is None or blob.nbytes < max(at + nbytes_of(part.place), 1):
        return False
    for view in part.place:
        view[:] = blob[at : at + view.nbytes]
        at += view.nbytes
    return True


@dataclass(slots=True)
class Calls:
    """What stores note while one prompt calls them.

    Attributes:
        errors: Errors of a part of a store (a tier, a node) without which it could go on.
        seconds: How long lookups have taken, by the store that notes it.
    """

    errors: list[StoreError] = field(default_factory=list)
    seconds: defaultdict[object, float] = field(default_factory=lambda: defaultdict(float))


@contextmanager
def calls_of_prompt() -> Iterator[Calls]:
    """Gather what stores note inside. Each thread has its own, also in an asyncio task.

    Within another, errors are its own, and the time that lookups may take is that of both.
    """
    outer = _CURRENT.get()
    calls = Calls(seconds=outer.seconds) if outer else Calls()
    token = _CURRENT.set(calls)
    try:
        yield calls
    finally:
        _CURRENT.reset(token)


def current_calls() -> Calls:
    """Those of the prompt that this thread serves now; outside of one, some that nobody reads."""
    return _CURRENT.get() or Calls()


def note_partial(error: StoreError) -> None:
    """Tell the prompt that a part of the store failed, where the others give an answer.

    To be called from the thread that called the store.
    """
    current_calls().errors.append(error)


_CURRENT: ContextVar[Calls | None] = ContextVar("chunkcache_calls", default=None)


def tell_too_large(entries: Sequence[Entry], most: int | None, setting: str) -> None:
    """Tell the prompt of blobs that have more than `most` bytes, so that there is no room for them.

    `setting` says what bounds them, and what to change.
    """
    largest = max((entry.nbytes for entry in entries), default=0)
    if most is not None and largest > most:
        note_partial(
            StoreError(
                f"a chunk of {largest:,} bytes is not stored, since {setting} allows for {most:,} "
                "bytes in all: raise that, or lower chunk_size",
                "full",
            )
        )


def end_iteration(iterator: Iterator[object]) -> None:
    """Close an iterator that may be a generator, so that it lets go of its connection now."""
    close = getattr(iterator, "close", None)
    if close is not None:
        close()


class StaysHere:
    """What cannot be sent to another process; a copy of it is the very same object."""

    def __getstate__(self) -> object:
        raise PickleError.of(self)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: object) -> Self:
        return self


class ChunkStore(ABC):
    """A place that keeps chunks. All methods may be called from several threads.

    Every method raises `StoreError`, and nothing else, when the place cannot be reached or
    answers with an error; an entry that is not there is never an error. A store of several parts
    goes on without one that fails, and tells the prompt (`note_partial`).

    Attributes:
        largest: Bytes that one blob may have, where the store's size is bounded.
        closed: Whether `close` was called, of stores that keep nothing afterwards.
    """

    largest: int | None = None
    closed = False

    @abstractmethod
    def sizes(self, keys: Sequence[str]) -> list[int]:
        """Bytes of each key's blob, 0 where there is none. One round trip for all keys."""

    @abstractmethod
    def fetch(self, parts: Sequence[Part]) -> Generator[bool]:
        """Copy parts of blobs to their places, in order, and yield whether each is there now.

        False means that the blob is missing or too short for the part; the place holds anything
        then. That a blob is longer than what is asked for shows in `sizes` only. Places are the
        caller's own again when the iteration has ended, early or not. Keys that are fetched in one
        call count as used together; those of a prompt come in its order.
        """

    @property
    def reads_parts(self) -> bool:
        """Whether a part of a blob costs only its share: then it is worth it to read in parts.

        Such a store fills a place when its answer is asked for, and none before.
        """
        return False

    @abstractmethod
    def read_metadata(self, keys: Sequence[str]) -> list[dict[str, str] | None]:
        """Each key's metadata, `None` where there is none. One round trip for all keys."""

    @abstractmethod
    def write(self, entries: Sequence[Entry]) -> int:
        """Keep the entries, replacing what was there. Returns the bytes of blobs taken.

        A full store makes room as `eviction.py` says. What an entry `replaces` is deleted once the
        entry is there, and stays if it was not taken.
        """

    def _took(self, entries: Sequence[Entry]) -> int:
        """Delete what these entries, which are there now, replace. Returns the bytes of theirs."""
        if replaced := [key for entry in entries for key in entry.replaces]:
            self.delete(replaced)
        return sum(entry.nbytes for entry in entries)

    def check_writable(self) -> None:  # noqa: B027  (most stores have to be asked)
        """Raise StoreError if it is known, without asking, that a write would fail now."""

    def check_open(self) -> None:
        """Raise StoreError if the store was closed."""
        if self.closed:
            raise StoreError(
                f"{self!r} was closed, by store.close() or at the end of a with block, so nothing "
                "is stored any more: make a new cache with the store's URL",
                "closed",
            )

    @abstractmethod
    def delete(self, keys: Sequence[str]) -> int:
        """Remove both halves of each entry, and of a chunk its extra values too.

        The key of an extra value removes that alone. Returns how many entries were there.
        """

    @abstractmethod
    def scan(self, prefix: str = "") -> Iterator[list[Listed]]:
        """Yield all entries whose keys begin with `prefix`, page by page, in no order.

        No blob is read, and looking does not count as a use. What comes or goes meanwhile may be
        left out, and an entry may come twice. Raises StoreError as soon as a part of the store
        fails.
        """

    def server_info(self) -> list[dict[str, Any]]:
        """What each server behind the store says of itself, in the names of Redis' INFO.

        Where it tells, `save` has the times of its snapshots. Empty for stores without a server.
        """
        return []

    def flush(self, timeout: float | None = None) -> bool:
        """Wait until all that was written can be read by others. False if `timeout` s passed."""
        return True

    def close(self) -> None:  # noqa: B027  (some stores have nothing to let go of)
        """Let go of connections and memory. The store is not used afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class ReadsFrom(ChunkStore):
    """A base for stores around another, `store`: all but `write` and `delete` goes on to it."""

    def __init__(self, store: ChunkStore) -> None:
        self.store = store

    def sizes(self, keys: Sequence[str]) -> list[int]:
        return self.store.sizes(keys)

    def fetch(self, parts: Sequence[Part]) -> Generator[bool]:
        return self.store.fetch(parts)

    @property
    def reads_parts(self) -> bool:
        return self.store.reads_parts

    def read_metadata(self, keys: Sequence[str]) -> list[dict[str, str] | None]:
        return self.store.read_metadata(keys)

    def scan(self, prefix: str = "") -> Iterator[list[Listed]]:
        return self.store.scan(prefix)

    def server_info(self) -> list[dict[str, Any]]:
        return self.store.server_info()

    @property
    def largest(self) -> int | None:  # type: ignore[override]
        return self.store.largest

    def check_writable(self) -> None:
        self.store.check_writable()

    def check_open(self) -> None:
        super().check_open()
        self.store.check_open()

    def flush(self, timeout: float | None = None) -> bool:
        return self.store.flush(timeout)

    def close(self) -> None:
        self.store.close()


class ReadOnly(ReadsFrom):
    """Reads from `store`; takes nothing, deletes nothing, and leaves it open.

    For dry runs, and caches with `write=False`.
    What reading alone does to a store (the order of a least-recently-used list, say) it still does.
    """

    def __repr__(self) -> str:
        return f"ReadOnly({self.store!r})"

    def write(self, entries: Sequence[Entry]) -> int:
        """Takes nothing."""
        return 0

    def check_writable(self) -> None:
        raise StoreError(f"{self!r} takes no changes: open the store itself", "read_only")

    def delete(self, keys: Sequence[str]) -> int:
        """Deletes nothing."""
        return 0

    def close(self) -> None:
        """Leaves the store open."""


def batches(items: Iterable[T], nbytes_of: Callable[[T], int]) -> Iterator[list[T]]:
    """What is read at once, in order: items of 64 MiB together, or one that is larger."""
    batch: list[T] = []
    size = 0
    for item in items:
        nbytes = nbytes_of(item)
        if batch and size + nbytes > READ_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += nbytes
    if batch:
        yield batch


def read_blobs(store: ChunkStore, keys: Sequence[str]) -> Generator[memoryview | None]:
    """Yield each key's blob in the order of `keys`, `None` where it is missing.

    Blobs of 64 MiB together are read at once, or one that is larger. Raises StoreError.
    """
    found = zip(keys, store.sizes(keys), strict=True)
    for batch in batches(found, lambda item: item[1]):
        try:
            parts = [Part(key, 0, [memoryview(bytearray(nbytes))]) for key, nbytes in batch]
        except MemoryError:
            nbytes = sum(nbytes for _, nbytes in batch)
            raise StoreError(f"no memory for blobs of {nbytes:,} bytes") from None
        with closing(store.fetch(parts)) as answers:
            for part, there in zip(parts, answers, strict=True):
                yield part.place[0].toreadonly() if there and part.place[0] else None

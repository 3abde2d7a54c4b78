"""Chunks in this process's memory, within a budget."""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from chunkcache.errors import SettingError
from chunkcache.stores.base import (
    ChunkStore,
    Entry,
    Listed,
    Part,
    StaysHere,
    chunk_of,
    copy_part,
    described,
    merged,
    tell_too_large,
    with_extras,
)
from chunkcache.stores.eviction import leaving
from chunkcache.stores.locks import ForkSafeLock

DEFAULT_BYTES = 2_000_000_000


class MemoryStore(StaysHere, ChunkStore):
    """A store of at most `max_bytes` bytes: blobs, keys and metadata together.

    Blobs are kept as they are, not copied. An entry that is larger than the whole budget is
    refused, and one that is not pinned also where pinned ones leave no room for it. Entries that
    are not pinned are gone `ttl` seconds (0: never) after they were written or, with
    `refresh_ttl`, last read. Raises SettingError when `max_bytes` is not
    positive.
    """

    def __init__(
        self, max_bytes: int = DEFAULT_BYTES, *, ttl: float = 0, refresh_ttl: bool = True
    ) -> None:
        if max_bytes <= 0:
            raise SettingError(f"max_bytes of a memory store must be positive, not {max_bytes}")
        self._max_bytes = self.largest = max_bytes
        self._ttl = ttl
        self._refresh = refresh_ttl
        self._locks = ForkSafeLock()
        self._free = _Shelf()
        self._pinned = _Shelf()

    def __repr__(self) -> str:
        return f"MemoryStore(max_bytes={self._max_bytes})"

    @property
    def _lock(self) -> Any:
        return self._locks.own

    def sizes(self, keys: Sequence[str]) -> list[int]:
        with self._lock:
            found = [self._get(key) for key in keys]
        return [kept.entry.nbytes if kept else 0 for kept in found]

    def fetch(self, parts: Sequence[Part]) -> Generator[bool]:
        with self._lock:
            self._use([part.key for part in parts])
        for part in parts:
            with self._lock:
                kept = self._get(part.key)
            yield copy_part(kept.entry.blob if kept else None, part)

    def read_metadata(self, keys: Sequence[str]) -> list[dict[str, str] | None]:
        with self._lock:
            self._use(keys)
            found = [self._get(key) for key in keys]
        return [dict(kept.entry.metadata) or None if kept else None for kept in found]

    def write(self, entries: Sequence[Entry]) -> int:
        tell_too_large(entries, self.largest, f"bytes= of {self!r}")
        return self._took([entry for entry in described(entries) if self._put(entry)])

    def delete(self, keys: Sequence[str]) -> int:
        with self._lock:
            gone = {key for key in with_extras(keys) if self._remove(key)}
        return len(gone.intersection(keys))

    def scan(self, prefix: str = "") -> Iterator[list[Listed]]:
        with self._lock:
            keys = [key for key in (*self._free, *self._pinned) if key.startswith(prefix)]
            found = {key: kept.entry for key in keys if (kept := self._get(key))}
        page = []
        for key in dict.fromkeys(map(chunk_of, found)):
            fields = dict(found[key].metadata) if key in found else None
            sizes = (found[each].nbytes if each in found else 0 for each in with_extras([key]))
            page.append(Listed(key, fields or None, *sizes))
        if page:
            yield page

    def close(self) -> None:
        with self._lock:
            self._free = _Shelf()
            self._pinned = _Shelf()

    def _put(self, entry: Entry) -> bool:
        with self._lock:
            there, adds = self._get(entry.key), entry.merge
            entry = merged(entry, there.entry if there else None)
            entry = replace(
                entry, metadata=dict(entry.metadata), data=entry.blob.toreadonly(), merge=False
            )
            kept = _Kept(entry, _cost(entry), self._deadline(entry))
            self._use(entry.before)
            used = self._free.used + self._pinned.used - (there.cost if there else 0)
            lacking = used + kept.cost - self._max_bytes
            leave, is_enough = leaving(self._ranked(entry), lacking)
            if not is_enough:
                if not adds:  # what is there is out of date
                    self._remove(entry.key)
                return False
            for key in (entry.key, *leave):
                self._remove(key)
            (self._pinned if entry.pinned else self._free).put(kept)
            self._use(entry.before)
            return True

    def _ranked(self, entry: Entry) -> Iterator[tuple[str, int]]:
        """What may leave for an entry, with its bytes: what it is used together with stays."""
        stays = set(entry.before)
        for key, kept in self._free.items():
            if key in stays and not entry.pinned:
                return
            if key != entry.key:
                yield key, kept.cost
        if entry.pinned:
            pinned = self._pinned.items()
            yield from ((key, kept.cost) for key, kept in pinned if key != entry.key)

    def _get(self, key: str) -> _Kept | None:
        kept = self._free.get(key) or self._pinned.get(key)
        if kept is not None and kept.expires <= time.monotonic():
            self._remove(key)
            return None
        return kept

    def _use(self, keys: Sequence[str]) -> None:
        """Note that these are used together; the last of them will leave first."""
        for key in reversed(keys):
            kept = self._get(key)
            if kept is not None:
                (self._pinned if kept.entry.pinned else self._free).move_to_end(key)
                if self._refresh:
                    kept.expires = self._deadline(kept.entry)

    def _deadline(self, entry: Entry) -> float:
        return time.monotonic() + self._ttl if self._ttl and not entry.pinned else math.inf

    def _remove(self, key: str) -> bool:
        return self._free.drop(key) or self._pinned.drop(key)


@dataclass(slots=True)
class _Kept:
    """One entry, what it takes from the budget, and until when it is kept (monotonic seconds)."""

    entry: Entry
    cost: int
    expires: float


class _Shelf(OrderedDict[str, _Kept]):
    """Entries in the order in which they leave, and the bytes of them all."""

    def __init__(self) -> None:
        super().__init__()
        self._used = 0
        self._changing = False

    @property
    def used(self) -> int:
        """The bytes of all entries; counted anew if a change was interrupted."""
        if self._changing:
            self._used = sum(kept.cost for kept in self.values())
            self._changing = False
        return self._used

    def put(self, kept: _Kept) -> None:
        used = self.used + kept.cost
        self._changing = True
        self[kept.entry.key] = kept
        self._used, self._changing = used, False

    def drop(self, key: str) -> bool:
        if key not in self:
            return False
        used = self.used - self[key].cost
        self._changing = True
        del self[key]
        self._used, self._changing = used, False
        return True


def _cost(entry: Entry) -> int:
    texts = sum(len(name) + len(value) for name, value in entry.metadata.items())
    return entry.nbytes + len(entry.key) + texts

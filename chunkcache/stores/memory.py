"""Chunks in this process's memory: the least recently used go when the budget is reached."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence

from chunkcache.errors import SettingError
from chunkcache.stores.base import ChunkStore, Entry, merged

DEFAULT_BYTES = 2_000_000_000


class MemoryStore(ChunkStore):
    """A store of at most `max_bytes` bytes: blobs, keys and metadata together.

    Blobs are copied when written, so the caller may reuse its memory. An entry larger than the
    whole budget is refused. Views that `read` yields stay valid. Raises SettingError when
    `max_bytes` is not positive.
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES) -> None:
        if max_bytes <= 0:
            raise SettingError(f"max_bytes of a memory store must be positive, not {max_bytes}")
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, _Kept] = OrderedDict()  # least recently used first
        self._used = 0

    def __repr__(self) -> str:
        return f"MemoryStore(max_bytes={self._max_bytes})"

    def sizes(self, keys: Sequence[str]) -> list[int]:
        with self._lock:
            return [len(self._kept[key].blob) if key in self._kept else 0 for key in keys]

    def read(self, keys: Sequence[str]) -> Iterator[memoryview | None]:
        for key in keys:
            with self._lock:
                kept = self._kept.get(key)
                if kept is not None:
                    self._kept.move_to_end(key)
            yield memoryview(kept.blob) if kept is not None and kept.blob else None

    def read_metadata(self, keys: Sequence[str]) -> list[dict[str, str] | None]:
        with self._lock:
            found = [self._kept.get(key) for key in keys]
            return [dict(kept.metadata) if kept and kept.metadata else None for kept in found]

    def write(self, entries: Sequence[Entry]) -> int:
        written = 0
        for entry in entries:
            with self._lock:
                entry = merged(entry, self._fields(entry.key))
                kept = _Kept(entry) if _cost(entry) <= self._max_bytes else None
                self._remove(entry.key)
                if kept is None:
                    continue
                while self._kept and self._used + kept.cost > self._max_bytes:
                    self._remove(next(iter(self._kept)))
                self._kept[entry.key] = kept
                self._used += kept.cost
            written += entry.nbytes
        return written

    def delete(self, keys: Sequence[str]) -> int:
        with self._lock:
            return sum(self._remove(key) for key in keys)

    def close(self) -> None:
        with self._lock:
            self._kept.clear()
            self._used = 0

    def _fields(self, key: str) -> Mapping[str, str]:
        kept = self._kept.get(key)
        return kept.metadata if kept else {}

    def _remove(self, key: str) -> bool:
        kept = self._kept.pop(key, None)
        if kept is None:
            return False
        self._used -= kept.cost
        return True


class _Kept:
    """A copy of one entry, and what it takes from the budget."""

    __slots__ = ("blob", "cost", "metadata")

    def __init__(self, entry: Entry) -> None:
        self.blob = bytes(entry.blob)
        self.metadata = dict(entry.metadata)
        self.cost = _cost(entry)


def _cost(entry: Entry) -> int:
    texts = sum(len(name) + len(value) for name, value in entry.metadata.items())
    return entry.nbytes + len(entry.key) + texts

"""A store in a dict, which a test can hold back or make fail, and small helpers around it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

from chunkcache.stores.base import ChunkStore, Entry, Listed


def entry(key: str, blob: bytes = b"", **metadata: str) -> Entry:
    return Entry(key, metadata, memoryview(blob))


class Shelf(ChunkStore):
    """A store in a dict, with a gate that holds writes back and an error to raise."""

    def __init__(self) -> None:
        self.kept: dict[str, Entry] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.error: BaseException | None = None
        self.calls: list[tuple[str, list[str]]] = []
        self.closed = False

    def _call(self, verb: str, keys: Sequence[str]) -> None:
        self.calls.append((verb, list(keys)))
        if self.error is not None:
            raise self.error

    def writes(self) -> list[str]:
        return [key for verb, keys in self.calls if verb == "write" for key in keys]

    def sizes(self, keys: Sequence[str]) -> list[int]:
        self._call("sizes", keys)
        return [self.kept[key].nbytes if key in self.kept else 0 for key in keys]

    def read(self, keys: Sequence[str]) -> Iterator[memoryview | None]:
        try:
            self._call("read", keys)
            for key in keys:
                yield self.kept[key].blob if key in self.kept and self.kept[key].nbytes else None
        finally:
            self.calls.append(("read closed", []))

    def read_metadata(self, keys: Sequence[str]) -> list[dict[str, str] | None]:
        self._call("read_metadata", keys)
        return [dict(self.kept[key].metadata) if key in self.kept else None for key in keys]

    def write(self, entries: Sequence[Entry]) -> int:
        self.gate.wait()
        self._call("write", [entry.key for entry in entries])
        self.kept.update({entry.key: entry for entry in entries})
        return sum(entry.nbytes for entry in entries)

    def delete(self, keys: Sequence[str]) -> int:
        self._call("delete", keys)
        return sum(self.kept.pop(key, None) is not None for key in keys)

    def scan(self, prefix: str = "") -> Iterator[list[Listed]]:
        self._call("scan", [prefix])
        yield [
            Listed(key, dict(kept.metadata) or None, kept.nbytes)
            for key, kept in list(self.kept.items())
            if key.startswith(prefix)
        ]

    def close(self) -> None:
        self.closed = True


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def keys_of(store: ChunkStore, prefix: str = "") -> list[str]:
    """The keys of all entries; each may come once only."""
    found = [entry.key for page in store.scan(prefix) for entry in page]
    assert len(found) == len(set(found))
    return found


def blobs(store: ChunkStore, *keys: str) -> list[bytes | None]:
    return [None if view is None else bytes(view) for view in store.read(keys)]

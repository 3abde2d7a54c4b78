"""A store that does as its script says, and small helpers around it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, TypeVar

from chunkcache.stores.base import ChunkStore, Entry, Listed, Part, read_blobs
from chunkcache.stores.memory import MemoryStore

T = TypeVar("T")
Step = BaseException | Callable[[Any], Any] | None


def entry(key: str, blob: bytes = b"", **metadata: str) -> Entry:
    return Entry(key, metadata, memoryview(blob))


class Scripted(ChunkStore):
    """A real store, `inner`, that a script makes fail, lie or wait, and that notes its calls.

    `script` says for a verb what happens when it is called, or, as a list, what happens call by
    call, the last step from then on. A step is an error to raise, or a function of what the call
    is about (keys, entries, parts, a prefix, a timeout): what it returns is the answer, unless that
    is None. `answer` is called for each part that was fetched, with its number in the call, the
    part, and whether it is there; the same holds for what it returns or raises.

    Attributes:
        error: What all verbs that move data raise, if anything.
        gate: Writes wait while it is cleared.
        calls: Those verbs, each with its keys, in the order in which they were called.
        written: All entries that were to be written.
        reading: How many fetches have begun and not ended.
        kept: What it has now, by key.
    """

    def __init__(
        self,
        inner: ChunkStore | None = None,
        answer: Callable[[int, Part, bool], bool | None] = lambda number, part, there: None,
        **script: Step | list[Step],
    ) -> None:
        self.inner = inner or MemoryStore()
        self.answer = answer
        self.script = script
        self.error: BaseException | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.calls: list[tuple[str, list[str]]] = []
        self.written: list[Entry] = []
        self.reading = 0

    def _step(self, verb: str, about: Any, usual: Callable[[], T]) -> T:
        step = self.script.get(verb)
        if isinstance(step, list):
            step = step.pop(0) if len(step) > 1 else step[0]
        if isinstance(step, BaseException):
            raise step
        answer = step(about) if step else None
        return usual() if answer is None else answer

    def _call(self, verb: str, about: Any, keys: Sequence[str], usual: Callable[[], T]) -> T:
        self.calls.append((verb, list(keys)))
        if self.error is not None:
            raise self.error
        return self._step(verb, about, usual)

    @property
    def kept(self) -> dict[str, Entry]:
        assert isinstance(self.inner, MemoryStore)
        kept = {**self.inner._free, **self.inner._pinned}
        return {key: each.entry for key, each in kept.items()}

    def asked(self, verb: str) -> list[str]:
        """The keys of all calls of a verb."""
        return [key for called, keys in self.calls for key in keys if called == verb]

    def sizes(self, keys: Sequence[str]) -> list[int]:
        return self._call("sizes", keys, keys, lambda: self.inner.sizes(keys))

    def fetch(self, parts: Sequence[Part]) -> Generator[bool]:
        self.reading += 1
        try:
            keys = [part.key for part in parts]
            answers = self._call("fetch", parts, keys, lambda: self.inner.fetch(parts))
            for number, (part, there) in enumerate(zip(parts, answers, strict=True)):
                answer = self.answer(number, part, there)
                yield there if answer is None else answer
        finally:
            self.reading -= 1

    @property
    def reads_parts(self) -> bool:
        return self._step("reads_parts", None, lambda: self.inner.reads_parts)

    def read_metadata(self, keys: Sequence[str]) -> list[dict[str, str] | None]:
        return self._call("read_metadata", keys, keys, lambda: self.inner.read_metadata(keys))

    def write(self, entries: Sequence[Entry]) -> int:
        self.gate.wait()
        self.written += entries
        keys = [each.key for each in entries]
        return self._call("write", entries, keys, lambda: self.inner.write(entries))

    def delete(self, keys: Sequence[str]) -> int:
        return self._call("delete", keys, keys, lambda: self.inner.delete(keys))

    def scan(self, prefix: str = "") -> Iterator[list[Listed]]:
        yield from self._call("scan", prefix, [prefix], lambda: self.inner.scan(prefix))

    def check_writable(self) -> None:
        self._step("check_writable", None, self.inner.check_writable)

    def flush(self, timeout: float | None = None) -> bool:
        return self._step("flush", timeout, lambda: self.inner.flush(timeout))

    def close(self) -> None:
        self.closed = True
        self._step("close", None, self.inner.close)


def hold(gate: threading.Event) -> Callable[[Any], None]:
    """A step that waits until the gate is set."""

    def step(about: Any) -> None:
        assert gate.wait(10.0)

    return step


def fail_at(number: int, error: BaseException) -> Callable[[int, Part, bool], None]:
    """An `answer` that raises from a part on."""

    def answer(at: int, part: Part, there: bool) -> None:
        if at >= number:
            raise error

    return answer


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
    return [None if view is None else bytes(view) for view in read_blobs(store, keys)]


def fetch(
    store: ChunkStore, keys: Sequence[str], places: Sequence[Sequence[memoryview]] | None = None
) -> Generator[bool]:
    """Blobs from their first byte on, each to its place, or just that byte."""
    places = places or [[memoryview(bytearray(1))] for _ in keys]
    parts = [Part(key, 0, place) for key, place in zip(keys, places, strict=True)]
    return store.fetch(parts)

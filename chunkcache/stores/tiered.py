"""Several stores as one: what is found in a far one is copied to the nearer ones."""

from __future__ import annotations

import time
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from itertools import chain
from typing import Any

import numpy as np

from chunkcache.errors import StoreError
from chunkcache.stores.base import ChunkStore, Entry, Listed, Part, nbytes_of, note_partial
from chunkcache.stores.locks import ForkSafeLock, Worker
from chunkcache.stores.memory import MemoryStore


class TieredStore(ChunkStore):
    """Stores in the order in which to look, the nearest first. All entries are written to all.

    - Blobs are looked for in one tier after the other; a nearer tier keeps a copy of what only a
      farther one had. It begins a time to live of its own, and is not pinned.
    - Metadata can be added to by others, so all tiers are asked; the furthest has the last word.
    - A tier that fails is noted with `note_partial`, and the others serve. StoreError is raised
      when all of them fail, and by `delete` and `close` when one does.

    `close` closes all tiers but `MemoryStore`s, which others may share: their memory goes with the
    last that holds them.
    """

    def __init__(self, tiers: Sequence[ChunkStore]) -> None:
        self._tiers = list(tiers)

    def __repr__(self) -> str:
        return f"TieredStore({self._tiers!r})"

    def sizes(self, keys: Sequence[str]) -> list[int]:
        found, errors = self._find(keys)
        self._note(list(errors.values()))
        return [found[key][1] if key in found else 0 for key in keys]

    def fetch(self, parts: Sequence[Part]) -> Generator[bool]:
        """As in `ChunkStore`.

        Whole blobs that come from a far tier are copied to the nearer ones by a thread, while the
        next ones are on their way. The places are the caller's own again at the end of the
        iteration only, so that waits for the last copies: a part of one memory copy of what was
        read. What a tier has lost meanwhile (a small one makes room for what comes in) is asked of
        those behind it.
        """
        keys = [part.key for part in parts]
        found, errors = self._find(keys)
        for error in errors.values():
            note_partial(error)
        failed = set(errors)
        shares: defaultdict[int, list[Part]] = defaultdict(list)
        for part in parts:
            if part.key in found:
                shares[found[part.key][0]].append(part)
        streams = {level: self._tiers[level].fetch(share) for level, share in shares.items()}
        copier = _Copier(self._keep)
        try:
            for n, part in enumerate(parts):
                level, size = found.get(part.key, (len(self._tiers), 0))
                there = size > 0 and self._next(level, streams[level], failed)
                while not there and level + 1 < len(self._tiers):
                    level += 1
                    with closing(self._tiers[level].fetch([part])) as stream:
                        there = self._next(level, stream, failed)
                if there and level and not part.start and nbytes_of(part.place) == size:
                    copier.waiting.append((keys[: n + 1], part.place, level))
                    with suppress(RuntimeError):  # tried again below
                        copier.start()
                yield there
        finally:
            for stream in streams.values():
                stream.close()
            with suppress(RuntimeError):  # no more threads, or the interpreter is ending
                copier.wait(lambda: not copier.waiting)

    def read_metadata(self, keys: Sequence[str]) -> list[dict[str, str] | None]:
        found: list[dict[str, str]] = [{} for _ in keys]
        errors = []
        for tier in self._tiers:
            try:
                answers = tier.read_metadata(keys)
            except StoreError as error:
                errors.append(error)
                continue
            for fields, more in zip(found, answers, strict=True):
                fields.update(more or {})
        self._note(errors)
        return [fields or None for fields in found]

    def scan(self, prefix: str = "") -> Iterator[list[Listed]]:
        """As in `ChunkStore`, from far to near: copies in nearer tiers have few metadata."""
        seen: set[str] = set()
        for page in chain.from_iterable(tier.scan(prefix) for tier in self._tiers[::-1]):
            fresh = [entry for entry in page if entry.key not in seen]
            seen.update(entry.key for entry in fresh)
            if fresh:
                yield fresh

    def server_info(self) -> list[dict[str, Any]]:
        return [info for tier in self._tiers for info in tier.server_info()]

    def check_writable(self) -> None:
        """As in `ChunkStore`. The furthest tier decides, as it does about what was taken."""
        self.check_open()
        self._tiers[-1].check_writable()

    def write(self, entries: Sequence[Entry]) -> int:
        """As in `ChunkStore`. The bytes are those that the furthest tier has taken."""
        self.check_open()
        taken = 0
        errors = []
        for tier in self._tiers:
            taken = 0
            try:
                taken = tier.write(entries)
            except StoreError as error:
                errors.append(error)
        self._note(errors)
        return taken

    def delete(self, keys: Sequence[str]) -> int:
        """As in `ChunkStore`. Counts the entries of the tier that had most of them."""
        deleted = 0
        errors = []
        for tier in self._tiers:
            try:
                deleted = max(deleted, tier.delete(keys))
            except StoreError as error:
                errors.append(error)
        if errors:
            raise errors[0]
        return deleted

    def flush(self, timeout: float | None = None) -> bool:
        deadline = None if timeout is None else time.monotonic() + timeout
        done = True
        for tier in self._tiers:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            done &= tier.flush(left)
        return done

    def close(self) -> None:
        self.closed = True
        with ExitStack() as closing_all:
            for tier in self._tiers:
                if not isinstance(tier, MemoryStore):
                    closing_all.callback(tier.close)
        self._tiers = []

    def _find(
        self, keys: Sequence[str]
    ) -> tuple[dict[str, tuple[int, int]], dict[int, StoreError]]:
        """The nearest tier that has a key, by its number, and the blob's bytes; what failed.

        Each tier is asked once for all keys that no nearer one has.
        """
        found: dict[str, tuple[int, int]] = {}
        failed: dict[int, StoreError] = {}
        for level, tier in enumerate(self._tiers):
            rest = [key for key in dict.fromkeys(keys) if key not in found]
            try:
                sizes = tier.sizes(rest) if rest else []
            except StoreError as error:
                failed[level] = error
                continue
            found |= {key: (level, size) for key, size in zip(rest, sizes, strict=True) if size}
        return found, failed

    @staticmethod
    def _next(level: int, stream: Generator[bool], failed: set[int]) -> bool:
        """A tier's next answer; False from one that has failed once."""
        if level in failed:
            return False
        try:
            return next(stream)
        except StoreError as error:
            failed.add(level)
            note_partial(error)
            return False

    def _keep(self, keys: Sequence[str], views: Sequence[memoryview], level: int) -> None:
        """Copy the blob of the last key to the tiers nearer than `level`: all the same copy."""
        try:
            blob = np.empty(nbytes_of(views), dtype=np.uint8)
            at = 0
            for view in views:
                part = np.frombuffer(view, dtype=np.uint8)
                np.copyto(blob[at : at + part.size], part)  # unlike memoryviews, in parallel
                at += part.size
        except MemoryError:
            return
        *before, key = dict.fromkeys(keys)
        copy = Entry(key, {"copied": "yes"}, blob.data, merge=True, before=before)
        for tier in self._tiers[:level]:
            with suppress(StoreError):  # it was noted when the tier was asked
                tier.write([copy])

    def _note(self, errors: Sequence[StoreError]) -> None:
        """Note the errors of some tiers; those of all are the store's own."""
        if errors and len(errors) == len(self._tiers):
            raise errors[0]
        for error in errors:
            note_partial(error)


class _Copier(Worker):
    """Hands what waits, keys, views and level of a tier, to `keep`, one after the other."""

    thread_name = "chunkcache-tiers"

    def __init__(self, keep: Callable[[Sequence[str], Sequence[memoryview], int], None]) -> None:
        super().__init__()
        self.waiting: deque[tuple[Sequence[str], Sequence[memoryview], int]] = deque()
        self._keep = keep

    def todo(self) -> bool:
        return bool(self.waiting)

    def step(self) -> None:
        try:
            self._keep(*self.waiting[0])
        finally:
            self.waiting.popleft()


def shared_memory(name: tuple[object, ...], fresh: MemoryStore) -> MemoryStore:
    """The memory that this process keeps under a name, as long as a store holds it."""
    with _LOCK.own:
        return _SHARED.setdefault(name, fresh)


_SHARED: weakref.WeakValueDictionary[tuple[object, ...], MemoryStore] = (
    weakref.WeakValueDictionary()
)
_LOCK = ForkSafeLock()

"""Several stores as one: what is found in a far one is copied to the nearer ones."""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from itertools import chain
from typing import Any, TypeVar

import numpy as np

from chunkcache.errors import StoreError
from chunkcache.stores.base import ChunkStore, Entry, Listed, end_iteration, nbytes_of
from chunkcache.stores.calls import note_partial
from chunkcache.stores.locks import ForkSafeLock, Worker
from chunkcache.stores.memory import MemoryStore

T = TypeVar("T")


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
        found: dict[str, int] = {}
        errors = []
        for tier in self._tiers:
            rest = [key for key in dict.fromkeys(keys) if not found.get(key)]
            if not rest:
                break
            try:
                found |= zip(rest, tier.sizes(rest), strict=True)
            except StoreError as error:
                errors.append(error)
        self._note(errors)
        return [found.get(key, 0) for key in keys]

    def read(self, keys: Sequence[str]) -> Iterator[memoryview | None]:
        answers = self._walk(keys, lambda tier, at: tier.read([keys[n] for n in at]))
        with closing(answers):
            for n, (level, view) in enumerate(answers):
                if view is not None and level:
                    self._keep(keys[: n + 1], [view], level)
                yield view

    def read_into(
        self, keys: Sequence[str], places: Sequence[Sequence[memoryview]]
    ) -> Generator[bool]:
        """As in `ChunkStore`.

        What comes from a far tier is copied to the nearer ones by a thread, while the next blobs
        are on their way. The places are the caller's own again at the end of the iteration only,
        so that waits for the last copies: a part of one memory copy of what was read.
        """
        answers = self._walk(
            keys, lambda tier, at: tier.read_into([keys[n] for n in at], [places[n] for n in at])
        )
        copier = _Copier(self._keep)
        try:
            with closing(answers):
                for n, (place, (level, arrived)) in enumerate(zip(places, answers, strict=True)):
                    if arrived and level:
                        copier.waiting.append((keys[: n + 1], place, level))
                        with suppress(RuntimeError):  # tried again below
                            copier.start()
                    yield bool(arrived)
        finally:
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

    def _walk(
        self, keys: Sequence[str], ask: Callable[[ChunkStore, list[int]], Iterator[T]]
    ) -> Generator[tuple[int, T | None]]:
        """Each key's answer, and the number of the tier that gave it.

        `ask` opens the stream of a tier's answers for some of the keys, by their numbers. Each
        tier is asked once for all that it seems to have; what it has lost meanwhile (a small tier
        makes room for what comes in) is asked of those behind it.
        """
        failed: set[int] = set()
        holders = self._holders(keys, failed)
        streams = {}
        for level in set(holders):
            at = [n for n, holder in enumerate(holders) if holder == level]
            streams[level] = ask(self._tiers[level], at)
        try:
            for n, level in enumerate(holders):
                answer = self._next(level, streams[level], failed)
                if answer:
                    yield level, answer
                else:
                    yield from self._look_behind(level, n, ask, failed)
        finally:
            for stream in streams.values():
                end_iteration(stream)

    def _holders(self, keys: Sequence[str], failed: set[int]) -> list[int]:
        """The tier of which to ask each key: the nearest that has it, else the furthest."""
        last = len(self._tiers) - 1
        holders = dict.fromkeys(keys, last)
        for level, tier in enumerate(self._tiers[:-1]):
            rest = [key for key, holder in holders.items() if holder == last]
            try:
                sizes = tier.sizes(rest) if rest else []
            except StoreError as error:
                failed.add(level)
                note_partial(error)
                continue
            holders |= {key: level for key, size in zip(rest, sizes, strict=True) if size}
        return [holders[key] for key in keys]

    def _look_behind(
        self, level: int, n: int, ask: Callable[[ChunkStore, list[int]], Iterator[T]],
        failed: set[int],
    ) -> Generator[tuple[int, T | None]]:  # fmt: skip
        """The one answer to key number `n` of the tiers behind `level`."""
        for behind in range(level + 1, len(self._tiers)):
            stream = ask(self._tiers[behind], [n])
            try:
                answer = self._next(behind, stream, failed)
                if answer:
                    yield behind, answer
                    return
            finally:
                end_iteration(stream)
        yield level, None

    @staticmethod
    def _next(level: int, stream: Iterator[T], failed: set[int]) -> T | None:
        """A tier's next answer; None from one that has failed once."""
        if level in failed:
            return None
        try:
            return next(stream)
        except StoreError as error:
            failed.add(level)
            note_partial(error)
            return None

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
        *before, key = keys
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

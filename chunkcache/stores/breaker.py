"""A circuit breaker: a store in trouble costs one time-out per cool-down, not one per call."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from chunkcache.errors import StoreError
from chunkcache.stores.base import ChunkStore, Entry, end_iteration

logger = logging.getLogger(__name__)

COOLDOWN = 5.0
MAX_WARNINGS = 20  # causes can contain what a server sends; the log must stay finite

_END = object()
T = TypeVar("T")


class Guarded(ChunkStore):
    """`store` behind a breaker: after an error, calls fail at once for `cooldown` seconds.

    Then one call is let through as a probe while the others still fail at once; its success ends
    the matter. A failed read stops everything. A failed write stops only writes: a full server,
    or a read-only one, still serves what it has. Whatever the store raises leaves as StoreError.
    Calls without keys never reach the store: as a probe they would prove nothing.
    """

    def __init__(self, store: ChunkStore, cooldown: float = COOLDOWN) -> None:
        self._store = store
        self._reading = _Circuit(cooldown)
        self._writing = _Circuit(cooldown)
        self._warned: set[str] = set()

    def __repr__(self) -> str:
        return f"Guarded({self._store!r})"

    def sizes(self, keys: Sequence[str]) -> list[int]:
        if not keys:
            return []
        return self._call(self._reading, lambda: self._store.sizes(keys))

    def read(self, keys: Sequence[str]) -> Iterator[memoryview | None]:
        return self._iterate(keys, lambda: self._store.read(keys))

    def read_into(
        self, keys: Sequence[str], places: Sequence[Sequence[memoryview]]
    ) -> Generator[bool]:
        return self._iterate(keys, lambda: self._store.read_into(keys, places))

    def read_metadata(self, keys: Sequence[str]) -> list[dict[str, str] | None]:
        if not keys:
            return []
        return self._call(self._reading, lambda: self._store.read_metadata(keys))

    def write(self, entries: Sequence[Entry]) -> int:
        if not entries:
            return 0
        return self._call(self._writing, lambda: self._store.write(entries))

    def delete(self, keys: Sequence[str]) -> int:
        if not keys:
            return 0
        return self._call(self._writing, lambda: self._store.delete(keys))

    def flush(self, timeout: float | None = None) -> bool:
        with self._watched(self._writing):  # never as a probe: without a queue it proves nothing
            return self._store.flush(timeout)

    def close(self) -> None:
        with self._watched(self._writing):
            self._store.close()

    def _call(self, circuit: _Circuit, verb: Callable[[], T]) -> T:
        probe = self._enter(circuit)
        with self._watched(circuit):
            result = verb()
        circuit.succeeded(probe)
        return result

    def _iterate(self, keys: Sequence[str], verb: Callable[[], Iterator[T]]) -> Generator[T]:
        if not keys:
            return
        probe = self._enter(self._reading)
        with self._watched(self._reading):
            answers = iter(verb())
        try:
            while True:
                with self._watched(self._reading):
                    answer: Any = next(answers, _END)
                self._reading.succeeded(probe)
                if answer is _END:
                    return
                yield answer  # not watched: what a caller throws in here is not the store's error
        finally:
            end_iteration(answers)

    def _enter(self, circuit: _Circuit) -> bool:
        opened = circuit.enter()
        if isinstance(opened, bool):
            return opened
        raise StoreError(
            f"{self._store!r} is unreachable until "
            f"{time.strftime('%H:%M:%S', time.localtime(opened.retry_at))}; "
            f"generation goes on without it ({opened.cause})"
        )

    @contextmanager
    def _watched(self, circuit: _Circuit) -> Iterator[None]:
        """Note what goes wrong inside, and let it out as StoreError."""
        try:
            yield
        except StoreError as error:
            self._failed(circuit, str(error))
            raise
        except Exception as error:
            cause = f"{self._store!r} failed unexpectedly: {type(error).__name__}: {error}"
            self._failed(circuit, cause)
            raise StoreError(cause) from error

    def _failed(self, circuit: _Circuit, cause: str) -> None:
        self._writing.failed(cause)
        if circuit is self._reading:
            self._reading.failed(cause)
        if cause in self._warned or len(self._warned) >= MAX_WARNINGS:
            logger.debug("%s", cause)
            return
        self._warned.add(cause)
        logger.warning("%s. Generation goes on without the store.", cause.rstrip("."))


@dataclass(frozen=True, slots=True)
class _Opened:
    """Why a call may not pass, and until when (seconds since the epoch)."""

    cause: str
    retry_at: float


class _Circuit:
    """Closed (calls pass), or open until some time; then the first to come is the probe."""

    def __init__(self, cooldown: float) -> None:
        self._cooldown = cooldown
        self._lock = threading.Lock()
        self._cause: str | None = None
        self._open_until = 0.0

    def enter(self) -> bool | _Opened:
        """Whether the call that comes in is a probe; `_Opened` when it may not pass."""
        with self._lock:
            if self._cause is None:
                return False
            now = time.monotonic()
            if now < self._open_until:
                return _Opened(self._cause, time.time() + self._open_until - now)
            self._open_until = now + self._cooldown  # others wait for what the probe finds
            return True

    def failed(self, cause: str) -> None:
        with self._lock:
            self._cause = cause
            self._open_until = time.monotonic() + self._cooldown

    def succeeded(self, probe: bool) -> None:
        """Only a probe closes the circuit: a call from before the failure proves nothing."""
        if probe:
            with self._lock:
                self._cause = None

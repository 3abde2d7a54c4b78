"""A circuit breaker: a store in trouble costs one prompt a bounded delay, and later ones none."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from chunkcache.errors import StoreError
from chunkcache.stores.base import (
    ChunkStore,
    Entry,
    Listed,
    Part,
    StaysHere,
    current_calls,
    end_iteration,
)
from chunkcache.stores.locks import Latch, start_thread

logger = logging.getLogger(__name__)

COOLDOWN = 5.0
MAX_DELAY = 0.5
PROBE_SECONDS = 0.05  # what a call may wait for the answer to a probe
PROBE_KEY = "chunkcache@probe"
MAX_WARNINGS = 20  # causes can contain what a server sends; the log must stay finite

_END = object()
T = TypeVar("T")


class CircuitBreaker(StaysHere, ChunkStore):
    """`store` behind a breaker: after an error, calls fail at once for `cooldown` seconds.

    A failed read stops everything, and so do lookups that have cost one prompt more than
    `max_delay` seconds together. Then a lookup of nothing, from a thread of its own, finds out
    whether the store is back: calls wait for it a twentieth of a second at most. A failed write
    stops only writes: a full server, or a read-only one, still serves what it has. The next write
    after the cool-down finds out. Whatever the store raises leaves as StoreError.

    Reading blobs is not counted as a delay: as long as bytes arrive, they are a gain, and it is
    for the store to see that they do (`read_timeout`).
    """

    def __init__(
        self, store: ChunkStore, cooldown: float = COOLDOWN, max_delay: float = MAX_DELAY
    ) -> None:
        self._store = store
        self.largest = store.largest
        self._max_delay = max_delay
        self._reading = _Circuit(cooldown)
        self._writing = _Circuit(cooldown)
        self._probe: Latch | None = None  # opened when the last probe has ended
        self._warned: set[str] = set()

    def __repr__(self) -> str:
        return f"CircuitBreaker({self._store!r})"

    def sizes(self, keys: Sequence[str]) -> list[int]:
        return self._look_up(lambda: self._store.sizes(keys)) if keys else []

    def fetch(self, parts: Sequence[Part]) -> Generator[bool]:
        return self._iterate(parts, lambda: self._store.fetch(parts))

    @property
    def reads_parts(self) -> bool:
        return self._store.reads_parts

    def read_metadata(self, keys: Sequence[str]) -> list[dict[str, str] | None]:
        return self._look_up(lambda: self._store.read_metadata(keys)) if keys else []

    def scan(self, prefix: str = "") -> Iterator[list[Listed]]:
        return self._iterate([prefix], lambda: self._store.scan(prefix))

    def write(self, entries: Sequence[Entry]) -> int:
        return self._change(lambda: self._store.write(entries)) if entries else 0

    def delete(self, keys: Sequence[str]) -> int:
        return self._change(lambda: self._store.delete(keys)) if keys else 0

    def server_info(self) -> list[dict[str, Any]]:
        return self._look_up(self._store.server_info)

    def check_writable(self) -> None:
        opened = self._writing.opened()
        if opened and not opened.is_over:
            raise self._refusal(opened)

    def flush(self, timeout: float | None = None) -> bool:
        opened = self._writing.opened()
        if opened and not opened.is_over:
            return True  # what failed is not on its way
        with self._watched(self._writing):  # never as a probe: without a queue it proves nothing
            return self._store.flush(timeout)

    def close(self) -> None:
        with self._watched(self._writing):
            self._store.close()

    def _look_up(self, verb: Callable[[], T]) -> T:
        self._enter_reading()
        started = time.monotonic()
        with self._watched(self._reading):
            result = verb()
        lost = current_calls().seconds
        lost[self] += time.monotonic() - started
        if lost[self] > self._max_delay:
            cause = (
                f"{self._store!r} is slow: lookups for one prompt took more than "
                f"max_delay={self._max_delay:g} s; raise max_delay if the store cannot be faster"
            )
            self._reading.open(cause)  # but not for writes, which wait for their turn anyway
            self._warn(cause, self._reading)
        return result

    def _iterate(self, asked: Sequence[object], verb: Callable[[], Iterator[T]]) -> Generator[T]:
        if not asked:
            return
        self._enter_reading()
        with self._watched(self._reading):
            answers = iter(verb())
        try:
            while True:
                with self._watched(self._reading):
                    answer: Any = next(answers, _END)
                if answer is _END:
                    return
                yield answer  # not watched: what a caller throws in here is not the store's error
        finally:
            end_iteration(answers)

    def _change(self, verb: Callable[[], T]) -> T:
        opened = self._writing.enter()
        if opened and not opened.is_over:
            raise self._refusal(opened)
        with self._watched(self._writing):
            result = verb()
        if opened:  # otherwise the call may be from before the failure, and proves nothing
            self._writing.close()
        return result

    def _enter_reading(self) -> None:
        """Let a call pass, or raise; see to a probe when it is time for one."""
        opened = self._reading.enter()
        if opened and opened.is_over:
            self._probe_for(PROBE_SECONDS)
            opened = self._reading.opened()
        if opened:
            raise self._refusal(opened)

    def _probe_for(self, seconds: float) -> None:
        probe = self._probe
        if probe is None or probe.is_open:
            probe = Latch()
            try:
                start_thread(partial(self._find_out, probe), "chunkcache-probe")
            except RuntimeError:  # no more threads: the next cool-down may bring one
                return
            self._probe = probe
        probe.wait(seconds)

    def _find_out(self, probe: Latch) -> None:
        try:
            with self._watched(self._reading):
                self._store.sizes([PROBE_KEY])
            self._reading.close()
        except StoreError:
            return  # noted
        finally:
            probe.open()

    def _refusal(self, opened: _Opened) -> StoreError:
        return StoreError(
            f"{self._store!r} is not asked until "
            f"{time.strftime('%H:%M:%S', time.localtime(opened.retry_at))}: {opened.cause}",
            "circuit_open",
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
        self._writing.open(cause)
        if circuit is self._reading:
            self._reading.open(cause)
        self._warn(cause, circuit)

    def _warn(self, cause: str, circuit: _Circuit) -> None:
        if cause in self._warned or len(self._warned) >= MAX_WARNINGS:
            logger.debug("%s", cause)
            return
        self._warned.add(cause)
        reads = circuit is self._reading
        effect = "Generation goes on without it" if reads else "Nothing is written to it for now"
        logger.warning("%s. %s.", cause.rstrip("."), effect)


@dataclass(frozen=True, slots=True)
class _Opened:
    """Why a call may not pass, until when (seconds since the epoch), and if that time is over."""

    cause: str
    retry_at: float
    is_over: bool


class _Circuit:
    """Closed (calls pass), or open for a cool-down, after which somebody has to find out."""

    def __init__(self, cooldown: float) -> None:
        self._cooldown = cooldown
        self._state: tuple[str, float] | None = None  # why it is open, and until when (monotonic)

    def opened(self) -> _Opened | None:
        """None if calls may pass."""
        state = self._state
        if state is None:
            return None
        cause, until = state
        left = until - time.monotonic()
        return _Opened(cause, time.time() + left, left <= 0)

    def enter(self) -> _Opened | None:
        """The same for the one who will find out: if the time is over, it begins again."""
        opened = self.opened()
        if opened and opened.is_over:
            self.open(opened.cause)
        return opened

    def open(self, cause: str) -> None:
        self._state = cause, time.monotonic() + self._cooldown

    def close(self) -> None:
        self._state = None

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import pytest
from scripted import Scripted, blobs, fail_at, hold
from servers import Server

from chunkcache.errors import StoreError
from chunkcache.stores import breaker, locks
from chunkcache.stores.base import ChunkStore, Entry, Part, calls_of_prompt
from chunkcache.stores.breaker import CircuitBreaker
from chunkcache.stores.redis import RedisStore

COOLDOWN = 5.0
A = Entry("a", {"m": "1"}, memoryview(b"one"))


PARTS = [Part("a", 0, [memoryview(bytearray(3))])] * 2


READS: dict[str, Callable[[ChunkStore], object]] = {
    "sizes": lambda store: store.sizes(["a"]),
    "fetch": lambda store: list(store.fetch(PARTS[:1])),
    "read_metadata": lambda store: store.read_metadata(["a"]),
}
WRITES: dict[str, Callable[[ChunkStore], object]] = {
    "write": lambda store: store.write([A]),
    "delete": lambda store: store.delete(["b"]),
}
VERBS = READS | WRITES


class Clock:
    """Stands in for the module `time`, so that a test decides how late it is."""

    strftime = staticmethod(time.strftime)
    localtime = staticmethod(time.localtime)

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now

    def later(self, seconds: float) -> Callable[[object], None]:
        """A step of a script that takes so long."""

        def step(about: object) -> None:
            self.now += seconds

        return step


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(breaker, "time", clock)
    monkeypatch.setattr(breaker, "PROBE_SECONDS", 10.0)  # of real time, on a machine under load
    return clock


@pytest.fixture
def circuit(scripted: Scripted, clock: Clock) -> CircuitBreaker:
    scripted.inner.write([A])
    return CircuitBreaker(scripted, COOLDOWN)


def test_a_healthy_store_is_as_without_the_guard(
    scripted: Scripted, circuit: CircuitBreaker
) -> None:
    assert {name: verb(circuit) for name, verb in VERBS.items()} == {
        "sizes": [3],
        "fetch": [True],
        "read_metadata": [{"m": "1"}],
        "write": 3,
        "delete": 0,
    }
    assert circuit.flush(1.0)
    circuit.close()
    assert scripted.inner.sizes(["a"]) == [0]


@pytest.mark.parametrize("first", READS)
@pytest.mark.parametrize("second", VERBS)
def test_after_a_failed_read_all_fails_at_once_until_the_store_is_back(
    scripted: Scripted, circuit: CircuitBreaker, clock: Clock, first: str, second: str
) -> None:
    scripted.error = StoreError("no luck")
    with pytest.raises(StoreError, match="no luck"):
        VERBS[first](circuit)
    scripted.error = None
    asked = len(scripted.calls)
    clock.now += COOLDOWN - 0.1
    with pytest.raises(StoreError, match=r"not asked until \d\d:\d\d:\d\d: "):
        VERBS[second](circuit)
    assert len(scripted.calls) == asked
    clock.now += 0.1
    VERBS[second](circuit)
    VERBS[second](circuit)
    probes = second in READS  # writes are in the background anyway, and their own probe
    assert len(scripted.calls) == asked + 2 + probes


@pytest.mark.parametrize("verb", WRITES)
def test_a_failed_write_stops_writes_only(
    scripted: Scripted, circuit: CircuitBreaker, clock: Clock, verb: str
) -> None:
    scripted.error = StoreError("read only")
    with pytest.raises(StoreError, match="read only"):
        WRITES[verb](circuit)
    scripted.error = None
    for read in READS.values():
        read(circuit)
    for write in WRITES.values():
        with pytest.raises(StoreError, match="not asked until"):
            write(circuit)
    clock.now += COOLDOWN
    for write in WRITES.values():
        write(circuit)


@pytest.mark.parametrize("verb", VERBS)
def test_a_failed_probe_costs_another_cooldown(
    scripted: Scripted, circuit: CircuitBreaker, clock: Clock, verb: str
) -> None:
    scripted.error = StoreError("no luck")
    for turn in range(1, 4):
        with pytest.raises(StoreError, match="no luck"):
            VERBS[verb](circuit)
        with pytest.raises(StoreError, match="not asked until"):
            VERBS[verb](circuit)
        assert len(scripted.calls) == turn
        clock.now += COOLDOWN


def test_an_error_in_the_middle_of_a_read(scripted: Scripted, circuit: CircuitBreaker) -> None:
    scripted.answer = fail_at(1, StoreError("cut off"))
    views = circuit.fetch(PARTS)
    assert next(views)
    with pytest.raises(StoreError, match="cut off"):
        next(views)
    with pytest.raises(StoreError, match="not asked until"):
        circuit.sizes(["a"])


def test_a_hanging_store_costs_a_call_a_moment_and_is_asked_by_one_thread(
    scripted: Scripted, circuit: CircuitBreaker, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted.error = StoreError("no luck")
    with pytest.raises(StoreError):
        circuit.sizes(["a"])
    scripted.error = None
    gate = threading.Event()
    scripted.script["sizes"] = hold(gate)
    monkeypatch.setattr(breaker, "PROBE_SECONDS", 0.01)
    for _ in range(5):  # each cool-down would send another one
        clock.now += COOLDOWN
        with pytest.raises(StoreError, match="not asked until"):
            circuit.sizes(["a"])
    assert len(scripted.calls) == 2
    gate.set()
    assert circuit._probe is not None
    assert circuit._probe.wait(10)
    assert circuit.sizes(["a"]) == [3]


def test_without_a_thread_the_store_is_left_alone_for_longer(
    scripted: Scripted, circuit: CircuitBreaker, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    scripted.error = StoreError("no luck")
    with pytest.raises(StoreError):
        circuit.sizes(["a"])
    scripted.error = None
    clock.now += COOLDOWN
    with monkeypatch.context() as patch:
        patch.setattr(locks, "start_new_thread", refuse)
        with pytest.raises(StoreError, match="not asked until"):
            circuit.sizes(["a"])
    clock.now += COOLDOWN
    assert circuit.sizes(["a"]) == [3]


def test_a_call_without_keys_is_no_probe(
    scripted: Scripted, circuit: CircuitBreaker, clock: Clock
) -> None:
    scripted.error = StoreError("no luck")
    with pytest.raises(StoreError):
        circuit.sizes(["a"])
    clock.now += COOLDOWN
    assert (circuit.sizes([]), list(circuit.fetch([])), circuit.read_metadata([])) == ([], [], [])
    assert (circuit.write([]), circuit.delete([])) == (0, 0)
    with pytest.raises(StoreError, match="no luck"):
        circuit.sizes(["a"])


def test_a_success_from_before_the_failure_proves_nothing(
    scripted: Scripted, circuit: CircuitBreaker
) -> None:
    views = circuit.fetch(PARTS)
    next(views)
    scripted.error = StoreError("no luck")
    with pytest.raises(StoreError):
        circuit.sizes(["a"])
    assert next(views)  # what is under way goes on
    with pytest.raises(StoreError, match="not asked until"):
        circuit.sizes(["a"])


@pytest.mark.parametrize("error", [KeyError("k"), OSError("o"), MemoryError(), AttributeError("a")])
@pytest.mark.parametrize("verb", VERBS)
def test_whatever_is_raised_leaves_as_store_error(
    scripted: Scripted, circuit: CircuitBreaker, verb: str, error: Exception
) -> None:
    scripted.error = error
    with pytest.raises(StoreError, match=type(error).__name__) as caught:
        VERBS[verb](circuit)
    assert caught.value.__cause__ is error
    with pytest.raises(StoreError, match="not asked until"):
        VERBS[verb](circuit)


def test_flush_and_close_raise_store_error_too(scripted: Scripted, circuit: CircuitBreaker) -> None:
    scripted.script = {"flush": KeyError("k"), "close": KeyError("k")}
    for verb in (circuit.flush, circuit.close):
        with pytest.raises(StoreError, match="KeyError"):
            verb()


def test_an_interrupt_is_not_an_error_of_the_store(
    scripted: Scripted, circuit: CircuitBreaker
) -> None:
    scripted.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        circuit.sizes(["a"])
    scripted.error = None
    assert circuit.sizes(["a"]) == [3]


def test_what_a_caller_throws_into_a_read_is_its_own(
    scripted: Scripted, circuit: CircuitBreaker
) -> None:
    views = circuit.fetch(PARTS)
    next(views)
    with pytest.raises(KeyError):
        views.throw(KeyError("mine"))
    assert circuit.sizes(["a"]) == [3]


def test_one_warning_per_cause(
    scripted: Scripted, circuit: CircuitBreaker, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="chunkcache")
    for text in ["first", "second", "first", "second", "first"]:
        scripted.error = StoreError(text)
        for verb in READS.values():
            with pytest.raises(StoreError):
                verb(circuit)
        clock.now += COOLDOWN
    assert [text.partition(".")[0] for text in caplog.messages] == ["first", "second"]


def test_a_store_with_ever_new_causes_does_not_fill_the_log(
    scripted: Scripted, circuit: CircuitBreaker, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="chunkcache")
    for turn in range(5 * breaker.MAX_WARNINGS):
        scripted.error = StoreError(f"cause {turn}")
        with pytest.raises(StoreError):
            circuit.sizes(["a"])
        clock.now += COOLDOWN
    assert len(caplog.messages) == breaker.MAX_WARNINGS


def test_of_many_threads_one_sends_the_probe(
    scripted: Scripted, circuit: CircuitBreaker, clock: Clock
) -> None:
    scripted.error = StoreError("no luck")
    with pytest.raises(StoreError):
        circuit.sizes(["a"])
    clock.now += COOLDOWN
    scripted.error = None
    gate = threading.Event()
    scripted.script["sizes"] = hold(gate)  # the probe stays in the store while the others come
    found: list[object] = []

    def work() -> None:
        try:
            found.append(circuit.sizes(["a"]))
        except StoreError as error:
            found.append(str(error).partition(" until ")[0])
        if len(found) == 7:
            gate.set()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [f"{scripted!r} is not asked"] * 7 + [[3]]
    assert len(scripted.calls) == 3


def test_lookups_of_one_prompt_have_a_bound_together(scripted: Scripted, clock: Clock) -> None:
    scripted.inner.write([A])
    scripted.script = dict.fromkeys(["sizes", "read_metadata"], clock.later(0.2))
    circuit = CircuitBreaker(scripted, COOLDOWN, max_delay=0.5)
    for _ in range(3):
        with calls_of_prompt():  # two lookups per prompt, for ever
            circuit.sizes(["a"])
            circuit.read_metadata(["a"])
    with calls_of_prompt():
        circuit.sizes(["a"])
        circuit.read_metadata(["a"])
        assert circuit.sizes(["a"]) == [3]  # it has come: it counts
        for read in READS.values():
            with pytest.raises(StoreError, match=r"is slow: .*more than max_delay=0\.5 s"):
                read(circuit)
        assert circuit.write([A]) == 3  # from a queue, where nobody waits
    clock.now += COOLDOWN
    assert circuit.sizes(["a"]) == [3]


def test_reading_blobs_is_no_delay(scripted: Scripted, clock: Clock) -> None:
    scripted.inner.write([A])
    scripted.answer = lambda number, part, there: clock.later(10.0)(part)
    circuit = CircuitBreaker(scripted, COOLDOWN, max_delay=0.5)
    with calls_of_prompt():
        assert list(circuit.fetch(PARTS)) == [True, True]
        assert circuit.sizes(["a"]) == [3]


def test_it_is_known_without_asking_that_a_write_would_fail(
    scripted: Scripted, circuit: CircuitBreaker, clock: Clock
) -> None:
    circuit.check_writable()
    scripted.error = StoreError("read only")
    with pytest.raises(StoreError):
        circuit.write([A])
    asked = len(scripted.calls)
    with pytest.raises(StoreError, match="read only"):
        circuit.check_writable()
    assert len(scripted.calls) == asked
    clock.now += COOLDOWN
    circuit.check_writable()  # somebody has to find out
    with pytest.raises(StoreError, match="read only"):
        circuit.write([A])


def test_a_real_server_that_goes_and_comes_back(redis_server: Server, clock: Clock) -> None:
    circuit = CircuitBreaker(RedisStore(redis_server.tcp_url), COOLDOWN)
    circuit.write([A])
    redis_server.stop()
    with pytest.raises(StoreError, match="check that the server runs"):
        list(circuit.fetch(PARTS))
    redis_server.start()
    for verb in VERBS.values():
        with pytest.raises(StoreError, match=r"not asked until .*redis://127"):
            verb(circuit)
    clock.now += COOLDOWN
    assert circuit.write([A]) == 3
    assert blobs(circuit, "a") == [b"one"]


def test_flush_does_not_wait_where_writing_is_known_to_fail() -> None:
    store = CircuitBreaker(Scripted(flush=lambda timeout: False, write=StoreError("full")))
    assert not store.flush()
    with pytest.raises(StoreError, match="full"):
        store.write([Entry("a", {}, memoryview(b"x"))])
    assert store.flush()

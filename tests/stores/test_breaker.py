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
from chunkcache.stores.base import ChunkStore, Entry, Part
from chunkcache.stores.breaker import Guarded
from chunkcache.stores.calls import calls_of_prompt
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
def guarded(scripted: Scripted, clock: Clock) -> Guarded:
    scripted.inner.write([A])
    return Guarded(scripted, COOLDOWN)


def test_a_healthy_store_is_as_without_the_guard(scripted: Scripted, guarded: Guarded) -> None:
    assert {name: verb(guarded) for name, verb in VERBS.items()} == {
        "sizes": [3],
        "fetch": [True],
        "read_metadata": [{"m": "1"}],
        "write": 3,
        "delete": 0,
    }
    assert guarded.flush(1.0)
    guarded.close()
    assert scripted.inner.sizes(["a"]) == [0]


@pytest.mark.parametrize("first", READS)
@pytest.mark.parametrize("second", VERBS)
def test_after_a_failed_read_all_fails_at_once_until_the_store_is_back(
    scripted: Scripted, guarded: Guarded, clock: Clock, first: str, second: str
) -> None:
    scripted.error = StoreError("no luck")
    with pytest.raises(StoreError, match="no luck"):
        VERBS[first](guarded)
    scripted.error = None
    asked = len(scripted.calls)
    clock.now += COOLDOWN - 0.1
    with pytest.raises(StoreError, match=r"not asked until \d\d:\d\d:\d\d: "):
        VERBS[second](guarded)
    assert len(scripted.calls) == asked
    clock.now += 0.1
    VERBS[second](guarded)
    VERBS[second](guarded)
    probes = second in READS  # writes are in the background anyway, and their own probe
    assert len(scripted.calls) == asked + 2 + probes


@pytest.mark.parametrize("verb", WRITES)
def test_a_failed_write_stops_writes_only(
    scripted: Scripted, guarded: Guarded, clock: Clock, verb: str
) -> None:
    scripted.error = StoreError("read only")
    with pytest.raises(StoreError, match="read only"):
        WRITES[verb](guarded)
    scripted.error = None
    for read in READS.values():
        read(guarded)
    for write in WRITES.values():
        with pytest.raises(StoreError, match="not asked until"):
            write(guarded)
    clock.now += COOLDOWN
    for write in WRITES.values():
        write(guarded)


@pytest.mark.parametrize("verb", VERBS)
def test_a_failed_probe_costs_another_cooldown(
    scripted: Scripted, guarded: Guarded, clock: Clock, verb: str
) -> None:
    scripted.error = StoreError("no luck")
    for turn in range(1, 4):
        with pytest.raises(StoreError, match="no luck"):
            VERBS[verb](guarded)
        with pytest.raises(StoreError, match="not asked until"):
            VERBS[verb](guarded)
        assert len(scripted.calls) == turn
        clock.now += COOLDOWN


def test_an_error_in_the_middle_of_a_read(scripted: Scripted, guarded: Guarded) -> None:
    scripted.answer = fail_at(1, StoreError("cut off"))
    views = guarded.fetch(PARTS)
    assert next(views)
    with pytest.raises(StoreError, match="cut off"):
        next(views)
    with pytest.raises(StoreError, match="not asked until"):
        guarded.sizes(["a"])


def test_a_hanging_store_costs_a_call_a_moment_and_is_asked_by_one_thread(
    scripted: Scripted, guarded: Guarded, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted.error = StoreError("no luck")
    with pytest.raises(StoreError):
        guarded.sizes(["a"])
    scripted.error = None
    gate = threading.Event()
    scripted.script["sizes"] = hold(gate)
    monkeypatch.setattr(breaker, "PROBE_SECONDS", 0.01)
    for _ in range(5):  # each cool-down would send another one
        clock.now += COOLDOWN
        with pytest.raises(StoreError, match="not asked until"):
            guarded.sizes(["a"])
    assert len(scripted.calls) == 2
    gate.set()
    assert guarded._probe is not None
    assert guarded._probe.wait(10)
    assert guarded.sizes(["a"]) == [3]


def test_without_a_thread_the_store_is_left_alone_for_longer(
    scripted: Scripted, guarded: Guarded, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    scripted.error = StoreError("no luck")
    with pytest.raises(StoreError):
        guarded.sizes(["a"])
    scripted.error = None
    clock.now += COOLDOWN
    with monkeypatch.context() as patch:
        patch.setattr(locks, "start_new_thread", refuse)
        with pytest.raises(StoreError, match="not asked until"):
            guarded.sizes(["a"])
    clock.now += COOLDOWN
    assert guarded.sizes(["a"]) == [3]


def test_a_call_without_keys_is_no_probe(
    scripted: Scripted, guarded: Guarded, clock: Clock
) -> None:
    scripted.error = StoreError("no luck")
    with pytest.raises(StoreError):
        guarded.sizes(["a"])
    clock.now += COOLDOWN
    assert (guarded.sizes([]), list(guarded.fetch([])), guarded.read_metadata([])) == ([], [], [])
    assert (guarded.write([]), guarded.delete([])) == (0, 0)
    with pytest.raises(StoreError, match="no luck"):
        guarded.sizes(["a"])


def test_a_success_from_before_the_failure_proves_nothing(
    scripted: Scripted, guarded: Guarded
) -> None:
    views = guarded.fetch(PARTS)
    next(views)
    scripted.error = StoreError("no luck")
    with pytest.raises(StoreError):
        guarded.sizes(["a"])
    assert next(views)  # what is under way goes on
    with pytest.raises(StoreError, match="not asked until"):
        guarded.sizes(["a"])


@pytest.mark.parametrize("error", [KeyError("k"), OSError("o"), MemoryError(), AttributeError("a")])
@pytest.mark.parametrize("verb", VERBS)
def test_whatever_is_raised_leaves_as_store_error(
    scripted: Scripted, guarded: Guarded, verb: str, error: Exception
) -> None:
    scripted.error = error
    with pytest.raises(StoreError, match=type(error).__name__) as caught:
        VERBS[verb](guarded)
    assert caught.value.__cause__ is error
    with pytest.raises(StoreError, match="not asked until"):
        VERBS[verb](guarded)


def test_flush_and_close_raise_store_error_too(scripted: Scripted, guarded: Guarded) -> None:
    scripted.script = {"flush": KeyError("k"), "close": KeyError("k")}
    for verb in (guarded.flush, guarded.close):
        with pytest.raises(StoreError, match="KeyError"):
            verb()


def test_an_interrupt_is_not_an_error_of_the_store(scripted: Scripted, guarded: Guarded) -> None:
    scripted.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        guarded.sizes(["a"])
    scripted.error = None
    assert guarded.sizes(["a"]) == [3]


def test_what_a_caller_throws_into_a_read_is_its_own(scripted: Scripted, guarded: Guarded) -> None:
    views = guarded.fetch(PARTS)
    next(views)
    with pytest.raises(KeyError):
        views.throw(KeyError("mine"))
    assert guarded.sizes(["a"]) == [3]


def test_one_warning_per_cause(
    scripted: Scripted, guarded: Guarded, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="chunkcache")
    for text in ["first", "second", "first", "second", "first"]:
        scripted.error = StoreError(text)
        for verb in READS.values():
            with pytest.raises(StoreError):
                verb(guarded)
        clock.now += COOLDOWN
    assert [text.partition(".")[0] for text in caplog.messages] == ["first", "second"]


def test_a_store_with_ever_new_causes_does_not_fill_the_log(
    scripted: Scripted, guarded: Guarded, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="chunkcache")
    for turn in range(5 * breaker.MAX_WARNINGS):
        scripted.error = StoreError(f"cause {turn}")
        with pytest.raises(StoreError):
            guarded.sizes(["a"])
        clock.now += COOLDOWN
    assert len(caplog.messages) == breaker.MAX_WARNINGS


def test_of_many_threads_one_sends_the_probe(
    scripted: Scripted, guarded: Guarded, clock: Clock
) -> None:
    scripted.error = StoreError("no luck")
    with pytest.raises(StoreError):
        guarded.sizes(["a"])
    clock.now += COOLDOWN
    scripted.error = None
    gate = threading.Event()
    scripted.script["sizes"] = hold(gate)  # the probe stays in the store while the others come
    found: list[object] = []

    def work() -> None:
        try:
            found.append(guarded.sizes(["a"]))
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
    guarded = Guarded(scripted, COOLDOWN, max_delay=0.5)
    for _ in range(3):
        with calls_of_prompt():  # two lookups per prompt, for ever
            guarded.sizes(["a"])
            guarded.read_metadata(["a"])
    with calls_of_prompt():
        guarded.sizes(["a"])
        guarded.read_metadata(["a"])
        assert guarded.sizes(["a"]) == [3]  # it has come: it counts
        for read in READS.values():
            with pytest.raises(StoreError, match=r"is slow: .*more than max_delay=0\.5 s"):
                read(guarded)
        assert guarded.write([A]) == 3  # from a queue, where nobody waits
    clock.now += COOLDOWN
    assert guarded.sizes(["a"]) == [3]


def test_reading_blobs_is_no_delay(scripted: Scripted, clock: Clock) -> None:
    scripted.inner.write([A])
    scripted.answer = lambda number, part, there: clock.later(10.0)(part)
    guarded = Guarded(scripted, COOLDOWN, max_delay=0.5)
    with calls_of_prompt():
        assert list(guarded.fetch(PARTS)) == [True, True]
        assert guarded.sizes(["a"]) == [3]


def test_it_is_known_without_asking_that_a_write_would_fail(
    scripted: Scripted, guarded: Guarded, clock: Clock
) -> None:
    guarded.check_writable()
    scripted.error = StoreError("read only")
    with pytest.raises(StoreError):
        guarded.write([A])
    asked = len(scripted.calls)
    with pytest.raises(StoreError, match="read only"):
        guarded.check_writable()
    assert len(scripted.calls) == asked
    clock.now += COOLDOWN
    guarded.check_writable()  # somebody has to find out
    with pytest.raises(StoreError, match="read only"):
        guarded.write([A])


def test_a_real_server_that_goes_and_comes_back(redis_server: Server, clock: Clock) -> None:
    guarded = Guarded(RedisStore(redis_server.tcp_url), COOLDOWN)
    guarded.write([A])
    redis_server.stop()
    with pytest.raises(StoreError, match="check that the server runs"):
        list(guarded.fetch(PARTS))
    redis_server.start()
    for verb in VERBS.values():
        with pytest.raises(StoreError, match=r"not asked until .*redis://127"):
            verb(guarded)
    clock.now += COOLDOWN
    assert guarded.write([A]) == 3
    assert blobs(guarded, "a") == [b"one"]


def test_flush_does_not_wait_where_writing_is_known_to_fail() -> None:
    store = Guarded(Scripted(flush=lambda timeout: False, write=StoreError("full")))
    assert not store.flush()
    with pytest.raises(StoreError, match="full"):
        store.write([Entry("a", {}, memoryview(b"x"))])
    assert store.flush()

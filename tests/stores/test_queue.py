"""The queue of writes: bounds, coalescing, failures, threads, forks, the interpreter's end."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
from scripted import Scripted, blobs, entry, keys_of, until

from chunkcache.errors import StoreError
from chunkcache.stores import locks, queue
from chunkcache.stores.base import Entry
from chunkcache.stores.disk import DiskStore
from chunkcache.stores.writer import WriteBehind


def test_what_does_not_fit_is_dropped_at_once(scripted: Scripted) -> None:
    behind = WriteBehind(scripted, max_bytes=10)
    scripted.gate.clear()
    assert behind.write([entry("a", b"x" * 6), entry("b", b"x" * 6), entry("c", b"x" * 4)]) == 10
    assert behind.write([entry("d", b"x")]) == 0
    stats = behind.stats()
    assert (stats.queued_entries, stats.queued_bytes, stats.dropped_entries) == (2, 10, 2)
    scripted.gate.set()
    assert behind.flush(10)
    assert behind.write([entry("d", b"x" * 10)]) == 10
    assert behind.flush(10)
    assert sorted(scripted.kept) == ["a", "c", "d"]


def test_entries_without_a_blob_are_bounded_too(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "MAX_ENTRIES", 3)
    behind = WriteBehind(scripted)
    scripted.gate.clear()
    behind.write([entry(str(number)) for number in range(10)])
    assert behind.stats().queued_entries <= 4
    assert behind.stats().dropped_entries >= 6


def test_an_entry_that_waits_or_is_being_written_is_written_once(scripted: Scripted) -> None:
    behind = WriteBehind(scripted)
    scripted.gate.clear()
    assert behind.write([entry("a", b"1", m="1")]) == 1
    until(lambda: behind._queue.current)
    assert behind.write([entry("a", b"1", m="1")]) == 1
    assert behind.write([entry("b", b"1"), entry("b", b"1")]) == 2
    scripted.gate.set()
    assert behind.flush(10)
    assert scripted.asked("write") == ["a", "b"]
    behind.write([entry("a", b"1", m="other")])
    behind.write([entry("a", b"12", m="other")])
    behind.write([Entry("a", {"m": "other"}, memoryview(b"12"), pinned=True)])
    assert behind.flush(10)
    assert scripted.kept["a"] == Entry("a", {"m": "other"}, memoryview(b"12"), pinned=True)


def test_the_newest_of_two_versions_is_the_one_written(scripted: Scripted) -> None:
    behind = WriteBehind(scripted)
    scripted.gate.clear()
    behind.write([entry("first", b"1")])
    until(lambda: behind.stats().queued_entries == 1)
    behind.write([entry("a", b"old")])
    behind.write([entry("a", b"newer")])
    assert blobs(behind, "a") == [b"newer"]
    assert behind.stats().queued_bytes == 6
    scripted.gate.set()
    assert behind.flush(10)
    assert scripted.asked("write") == ["first", "a"]
    assert scripted.kept["a"].blob == b"newer"


def test_small_entries_are_handed_over_together(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue, "BATCH_ENTRIES", 3)
    monkeypatch.setattr(queue, "BATCH_BYTES", 4)
    behind = WriteBehind(scripted)
    scripted.gate.clear()
    behind.write([entry("first", b"1")])
    until(lambda: behind._queue.current)
    behind.write([*map(entry, "abcd"), entry("e", b"123"), entry("f", b"45678")])
    behind.write([entry("g", b"90"), entry("h", b"12"), entry("i", b"3")])
    scripted.gate.set()
    assert behind.flush(10)
    batches = [keys for verb, keys in scripted.calls if verb == "write"]
    assert batches == [["first"], ["a", "b", "c"], ["d", "e"], ["f"], ["g", "h"], ["i"]]
    assert behind.stats().written_entries == 10
    scripted.error = StoreError("full")
    behind.write([entry("x"), entry("y")])
    assert behind.flush(10)
    assert behind.stats().failed_entries == 2


def test_an_error_costs_the_entry_and_is_counted(scripted: Scripted) -> None:
    behind = WriteBehind(scripted)
    scripted.error = StoreError("disk on fire")
    behind.write([entry("a", b"1"), entry("b", b"1")])
    assert behind.flush(10)
    stats = behind.stats()
    assert (stats.failed_entries, stats.queued_bytes, stats.written_entries) == (2, 0, 0)
    assert stats.last_error is not None
    assert "disk on fire" in stats.last_error
    scripted.error = None
    behind.write([entry("a", b"1")])
    assert behind.flush(10)
    assert "a" in scripted.kept


def test_an_entry_the_store_does_not_take_is_counted_as_dropped(tmp_path: Path) -> None:
    behind = WriteBehind(DiskStore(tmp_path, max_bytes=100))
    behind.write([entry("a", b"x" * 200)])
    assert behind.flush(10)
    assert (behind.stats().dropped_entries, behind.stats().written_entries) == (1, 0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("error", [ZeroDivisionError("a fault"), SystemExit(), KeyboardInterrupt()])
def test_flush_comes_back_even_if_the_thread_dies(scripted: Scripted, error: BaseException) -> None:
    behind = WriteBehind(scripted)
    scripted.error = error
    behind.write([entry("a", b"1"), entry("b", b"1")])
    assert behind.flush(20)
    assert behind.stats().failed_entries == 2
    scripted.error = None
    behind.write([entry("c", b"1")])
    assert behind.flush(10)
    assert list(scripted.kept) == ["c"]


def test_without_a_thread_entries_are_lost_but_nothing_hangs(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    behind = WriteBehind(scripted)
    with monkeypatch.context() as patch:
        patch.setattr(locks, "start_new_thread", refuse)
        behind.write([entry("a", b"1")])
        behind._queue.waiting[-1] = entry("b")  # as if its thread had just been ended
        assert behind.flush()
    assert behind.stats().failed_entries == 2
    behind.write([entry("c", b"1")])
    assert behind.flush(10)
    assert list(scripted.kept) == ["c"]


def test_a_forgotten_object_is_still_written_and_then_let_go(scripted: Scripted) -> None:
    behind = WriteBehind(scripted)
    written = weakref.ref(behind._queue)
    scripted.gate.clear()
    behind.write([entry("a", b"1"), entry("b", b"1")])
    del behind
    gc.collect()
    assert written() is not None
    scripted.gate.set()
    until(lambda: len(scripted.kept) == 2)
    until(lambda: written() is None)


def test_an_idle_object_is_not_kept_alive() -> None:
    scripted = Scripted()
    behind = WriteBehind(scripted)
    behind.write([entry("a", bytes(100))])
    assert behind.flush(10)
    store = weakref.ref(scripted)
    del behind, scripted
    until(lambda: gc.collect() >= 0 and store() is None)


def test_written_blobs_are_let_go(scripted: Scripted) -> None:
    class Memory(bytearray):
        pass

    behind = WriteBehind(DiskStore(Path("/nonexistent/never")))
    memory = Memory(100)
    gone = weakref.ref(memory)
    behind.write([Entry("a", {}, memoryview(memory))])
    del memory
    assert behind.flush(10)
    until(lambda: gone() is None)


def test_many_threads_write_and_read(tmp_path: Path) -> None:
    behind = WriteBehind(DiskStore(tmp_path))
    wrong: list[object] = []

    def work(name: str) -> None:
        for number in range(40):
            key, blob = f"{name}{number}", f"{name}{number}".encode() * 100
            behind.write([entry(key, blob)])
            if blobs(behind, key) != [blob] or behind.sizes([key]) != [len(blob)]:
                wrong.append(key)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert behind.flush(20)
    assert wrong == []
    assert behind.stats().written_entries == 160


def run(script: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    return done.stdout


PRELUDE = """
import os, sys, threading, time
from pathlib import Path
from chunkcache.errors import StoreError
from chunkcache.stores import queue
from chunkcache.stores.base import Entry
from chunkcache.stores.disk import DiskStore
from chunkcache.stores.writer import WriteBehind

class Slow(DiskStore):
    pause = 0.01
    def write(self, entries):
        time.sleep(self.pause)
        return super().write(entries)

def entries(name, number):
    return [Entry(f"{name}{n}", {}, memoryview(b"x" * 100)) for n in range(number)]
"""


def test_all_queues_are_written_at_the_end_of_the_interpreter(tmp_path: Path) -> None:
    run(
        """
kept = WriteBehind(Slow(Path(sys.argv[1])))
kept.write(entries("kept", 20))
WriteBehind(Slow(Path(sys.argv[1]))).write(entries("forgotten", 20))
""",
        tmp_path,
    )
    expected = {f"{name}{number}" for name in ("kept", "forgotten") for number in range(20)}
    assert set(keys_of(DiskStore(tmp_path))) == expected


def test_the_end_of_the_interpreter_is_bounded(tmp_path: Path) -> None:
    """Stores that never answer: without the bound this never ends (and `run` raises)."""
    run(
        """
queue.EXIT_SECONDS = 0.2
Slow.pause = 3600
stuck = [WriteBehind(Slow(Path(sys.argv[1]))) for _ in range(5)]
for behind in stuck:
    behind.write(entries("a", 3))
""",
        tmp_path,
    )
    assert keys_of(DiskStore(tmp_path)) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_begins_empty_and_can_write(tmp_path: Path) -> None:
    out = run(
        """
Slow.pause = 0.05
behind = WriteBehind(Slow(Path(sys.argv[1])))
behind.write(entries("parent", 10))
time.sleep(0.02)            # the thread is amid a write
child = os.fork()
if child == 0:
    behind.store._folder.path = Path(sys.argv[2])
    assert behind.stats().queued_entries == 0
    assert behind.flush(5)
    behind.write(entries("child", 3))
    assert behind.flush(5)
    print(behind.stats().written_entries, flush=True)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert behind.flush(10)
print(behind.stats().written_entries)
""",
        tmp_path / "parent",
        tmp_path / "child",
    )
    assert out.split() == ["3", "10"]
    assert set(keys_of(DiskStore(tmp_path / "parent"))) == {f"parent{n}" for n in range(10)}
    assert set(keys_of(DiskStore(tmp_path / "child"))) == {f"child{n}" for n in range(3)}

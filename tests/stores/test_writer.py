"""Write-behind: order, bounds, coalescing, failures, forks, the end of the interpreter."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from chunkcache.errors import StoreError
from chunkcache.stores import writer
from chunkcache.stores.base import ChunkStore, Entry
from chunkcache.stores.disk import DiskStore
from chunkcache.stores.writer import WriteBehind


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
        return [keys[0] for verb, keys in self.calls if verb == "write"]

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

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    shelf = Shelf()
    yield shelf
    shelf.error = None
    shelf.gate.set()


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def blobs(store: ChunkStore, *keys: str) -> list[bytes | None]:
    return [None if view is None else bytes(view) for view in store.read(keys)]


def test_writes_arrive_in_order_one_by_one(shelf: Shelf) -> None:
    behind = WriteBehind(shelf)
    names = [f"k{number}" for number in range(50)]
    assert behind.write([entry(name, b"abc") for name in names]) == 150
    assert behind.flush(10)
    assert shelf.writes() == names
    stats = behind.stats()
    assert (stats.written_entries, stats.written_bytes) == (50, 150)
    assert (stats.queued_entries, stats.queued_bytes, stats.dropped_entries) == (0, 0, 0)


def test_nothing_starts_before_the_first_write(shelf: Shelf) -> None:
    before = threading.active_count()
    behind = WriteBehind(shelf)
    assert behind.flush(0)
    assert behind.sizes(["a"]) == [0]
    assert threading.active_count() == before


def test_queued_entries_are_read_first_and_the_rest_in_one_call(shelf: Shelf) -> None:
    shelf.kept = {"old": entry("old", b"old", a="1"), "both": entry("both", b"before")}
    behind = WriteBehind(shelf)
    shelf.gate.clear()
    behind.write([entry("new", b"new!", b="2"), entry("both", b"after"), entry("bare", c="3")])
    keys = ["old", "new", "none", "both", "bare", "old"]
    assert behind.sizes(keys) == [3, 4, 0, 5, 0, 3]
    assert blobs(behind, *keys) == [b"old", b"new!", None, b"after", None, b"old"]
    assert behind.read_metadata(keys) == [{"a": "1"}, {"b": "2"}, None, {}, {"c": "3"}, {"a": "1"}]
    rest = ["old", "none", "old"]
    assert [call for call in shelf.calls if call[1]] == [
        ("sizes", rest),
        ("read", rest),
        ("read_metadata", rest),
    ]


def test_places_are_filled_from_the_queue_and_the_store(shelf: Shelf) -> None:
    shelf.kept = {"old": entry("old", b"old")}
    behind = WriteBehind(shelf)
    shelf.gate.clear()
    behind.write([entry("new", b"new!"), entry("bare")])
    keys = ["old", "new", "none", "old", "new", "bare", "old", "new"]
    lengths = [3, 4, 2, 3, 4, 1, 2, 5]
    memory = [bytearray(length) for length in lengths]
    places = [[memoryview(room)[:1], memoryview(room)[1:]] for room in memory]
    there = [True, True, False, True, True, False, False, False]
    assert list(behind.read_into(keys, places)) == there
    filled = [bytes(room) for room, is_there in zip(memory, there, strict=True) if is_there]
    assert filled == [b"old", b"new!", b"old", b"new!"]


def test_a_dead_store_does_not_matter_while_all_is_queued(shelf: Shelf) -> None:
    behind = WriteBehind(shelf)
    shelf.gate.clear()
    shelf.error = StoreError("down")
    behind.write([entry("a", b"1"), entry("b", b"2")])
    assert behind.sizes(["b", "a"]) == [1, 1]
    assert blobs(behind, "b", "a") == [b"2", b"1"]
    assert behind.read_metadata(["a"]) == [{}]
    for verb in (behind.sizes, behind.read_metadata, lambda keys: list(behind.read(keys))):
        with pytest.raises(StoreError, match="down"):
            verb(["a", "other"])


def test_a_read_is_closed_early_with_the_stores_own(shelf: Shelf) -> None:
    shelf.kept = {"a": entry("a", b"1"), "b": entry("b", b"2")}
    reader = WriteBehind(shelf).read(["a", "b"])
    next(reader)
    assert ("read closed", []) not in shelf.calls
    reader.close()  # type: ignore[attr-defined]
    assert ("read closed", []) in shelf.calls


def test_a_read_sees_what_was_queued_when_it_was_asked_for(shelf: Shelf) -> None:
    behind = WriteBehind(shelf)
    shelf.gate.clear()
    behind.write([entry("a", b"1")])
    reader = behind.read(["a"])
    shelf.gate.set()
    assert behind.flush(10)
    shelf.kept.clear()
    assert [bytes(view) for view in reader if view is not None] == [b"1"]


def test_what_does_not_fit_is_dropped_at_once(shelf: Shelf) -> None:
    behind = WriteBehind(shelf, max_bytes=10)
    shelf.gate.clear()
    assert behind.write([entry("a", b"x" * 6), entry("b", b"x" * 6), entry("c", b"x" * 4)]) == 10
    assert behind.write([entry("d", b"x")]) == 0
    stats = behind.stats()
    assert (stats.queued_entries, stats.queued_bytes, stats.dropped_entries) == (2, 10, 2)
    shelf.gate.set()
    assert behind.flush(10)
    assert behind.write([entry("d", b"x" * 10)]) == 10
    assert behind.flush(10)
    assert sorted(shelf.kept) == ["a", "c", "d"]


def test_entries_without_a_blob_are_bounded_too(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "MAX_ENTRIES", 3)
    behind = WriteBehind(shelf)
    shelf.gate.clear()
    behind.write([entry(str(number)) for number in range(10)])
    assert behind.stats().queued_entries <= 4
    assert behind.stats().dropped_entries >= 6


def test_a_key_that_waits_or_was_just_written_is_written_once(shelf: Shelf) -> None:
    behind = WriteBehind(shelf)
    assert behind.write([entry("a", b"1", m="1"), entry("a", b"1", m="1")]) == 2
    assert behind.flush(10)
    assert behind.write([entry("a", b"1", m="1")]) == 1
    assert behind.flush(10)
    assert shelf.writes() == ["a"]
    behind.write([entry("a", b"1", m="other")])
    behind.write([entry("a", b"12", m="other")])
    assert behind.flush(10)
    assert shelf.kept["a"] == entry("a", b"12", m="other")


def test_a_key_written_long_ago_is_written_again(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "JUST_SECONDS", 0.0)
    behind = WriteBehind(shelf)
    for _ in range(2):
        behind.write([entry("a", b"1")])
        assert behind.flush(10)
    assert shelf.writes() == ["a", "a"]


def test_the_newest_of_two_versions_is_the_one_written(shelf: Shelf) -> None:
    behind = WriteBehind(shelf)
    shelf.gate.clear()
    behind.write([entry("first", b"1")])
    until(lambda: behind.stats().queued_entries == 1)
    behind.write([entry("a", b"old")])
    behind.write([entry("a", b"newer")])
    assert blobs(behind, "a") == [b"newer"]
    assert behind.stats().queued_bytes == 6
    shelf.gate.set()
    assert behind.flush(10)
    assert shelf.writes() == ["first", "a"]
    assert shelf.kept["a"].blob == b"newer"


def test_delete_reaches_the_queue_and_the_store(shelf: Shelf) -> None:
    shelf.kept = {"old": entry("old", b"1"), "both": entry("both", b"1")}
    behind = WriteBehind(shelf)
    shelf.gate.clear()
    behind.write([entry("in flight", b"1")])
    until(lambda: behind._queue.current is not None)
    behind.write([entry("both", b"22"), entry("queued", b"1"), entry("kept", b"1")])
    assert behind.delete(["old", "both", "queued", "none"]) == 3
    assert behind.sizes(["old", "both", "queued", "kept"]) == [0, 0, 0, 1]
    assert behind.stats().queued_bytes == 2
    shelf.gate.set()
    assert behind.flush(10)
    assert sorted(shelf.kept) == ["in flight", "kept"]
    assert behind.delete(["kept"]) == 1
    behind.write([entry("kept", b"1")])  # deleted since: not the same as just written
    assert behind.flush(10)
    assert "kept" in shelf.kept


def test_delete_waits_for_the_write_under_way(shelf: Shelf) -> None:
    behind = WriteBehind(shelf)
    shelf.gate.clear()
    behind.write([entry("a", b"1")])
    until(lambda: behind._queue.current is not None)
    threading.Timer(0.05, shelf.gate.set).start()
    assert behind.delete(["a"]) == 1
    assert behind.flush(10)
    assert shelf.kept == {}


def test_flush_says_whether_all_is_written(shelf: Shelf) -> None:
    behind = WriteBehind(shelf)
    shelf.gate.clear()
    behind.write([entry("a", b"1")])
    assert not behind.flush(0.02)
    shelf.gate.set()
    assert behind.flush()
    assert "a" in shelf.kept


def test_an_error_costs_the_entry_and_one_warning(
    shelf: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    behind = WriteBehind(shelf)
    shelf.error = StoreError("disk on fire")
    with caplog.at_level(logging.WARNING, logger="chunkcache"):
        behind.write([entry("a", b"1"), entry("b", b"1")])
        assert behind.flush(10)
    stats = behind.stats()
    assert (stats.failed_entries, stats.queued_bytes, stats.written_entries) == (2, 0, 0)
    assert stats.last_error is not None
    assert "disk on fire" in stats.last_error
    assert len(caplog.records) == 1
    shelf.error = None
    behind.write([entry("a", b"1")])
    assert behind.flush(10)
    assert "a" in shelf.kept


def test_a_failing_store_is_left_alone_for_a_while(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "PAUSE_SECONDS", 3600.0)
    behind = WriteBehind(shelf)
    shelf.error = StoreError("down")
    behind.write([entry(str(number), b"1") for number in range(1000)])
    assert behind.flush(10)
    assert behind.stats().failed_entries == 1000
    assert len(shelf.writes()) == writer.PATIENCE
    shelf.error = None
    behind._queue.retry_at = 0.0  # the pause is over
    behind.write([entry("a", b"1"), entry("b", b"1")])
    assert behind.flush(10)
    assert sorted(shelf.kept) == ["a", "b"]


def test_an_entry_the_store_does_not_take_is_counted_as_dropped(tmp_path: Path) -> None:
    behind = WriteBehind(DiskStore(tmp_path, max_bytes=100))
    behind.write([entry("a", b"x" * 200)])
    assert behind.flush(10)
    assert (behind.stats().dropped_entries, behind.stats().written_entries) == (1, 0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("error", [ZeroDivisionError("a fault"), SystemExit(), KeyboardInterrupt()])
def test_flush_comes_back_even_if_the_thread_dies(shelf: Shelf, error: BaseException) -> None:
    behind = WriteBehind(shelf)
    shelf.error = error
    behind.write([entry("a", b"1"), entry("b", b"1")])
    assert behind.flush(20)
    assert behind.stats().failed_entries == 2
    shelf.error = None
    behind.write([entry("c", b"1")])
    assert behind.flush(10)
    assert list(shelf.kept) == ["c"]


def test_without_a_thread_entries_are_lost_but_nothing_hangs(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    behind = WriteBehind(shelf)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        behind.write([entry("a", b"1")])
        behind._queue.waiting["b"] = entry("b")  # as if its thread had just been ended
        assert behind.flush()
    assert behind.stats().failed_entries == 2
    behind.write([entry("c", b"1")])
    assert behind.flush(10)
    assert list(shelf.kept) == ["c"]


def test_close_writes_then_closes_and_takes_no_more(shelf: Shelf) -> None:
    with WriteBehind(shelf) as behind:
        behind.write([entry("a", b"1")])
    assert "a" in shelf.kept
    assert shelf.closed
    assert behind.write([entry("b", b"1")]) == 0
    assert behind.stats().dropped_entries == 1


def test_close_is_bounded_and_drops_what_is_left(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "CLOSE_SECONDS", 0.02)
    shelf.gate.clear()
    behind = WriteBehind(shelf)
    behind.write([entry("a", b"1"), entry("b", b"1")])
    behind.close()
    assert shelf.closed
    shelf.gate.set()
    assert behind.flush(10)
    assert "b" not in shelf.kept


def test_a_forgotten_object_is_still_written_and_then_let_go(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "LINGER_SECONDS", 0.01)
    behind = WriteBehind(shelf)
    queue = weakref.ref(behind._queue)
    shelf.gate.clear()
    behind.write([entry("a", b"1"), entry("b", b"1")])
    del behind
    gc.collect()
    assert queue() is not None
    shelf.gate.set()
    until(lambda: len(shelf.kept) == 2)
    until(lambda: queue() is None)


def test_an_idle_object_is_not_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "LINGER_SECONDS", 0.01)
    shelf = Shelf()
    behind = WriteBehind(shelf)
    behind.write([entry("a", bytes(100))])
    assert behind.flush(10)
    store = weakref.ref(shelf)
    del behind, shelf
    until(lambda: gc.collect() >= 0 and store() is None)


def test_written_blobs_are_let_go(shelf: Shelf) -> None:
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
from chunkcache.stores import writer
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
    assert set(DiskStore(tmp_path).keys()) == expected


def test_the_end_of_the_interpreter_is_bounded(tmp_path: Path) -> None:
    """Stores that never answer: without the bound this never ends (and `run` raises)."""
    run(
        """
writer.EXIT_SECONDS = 0.2
Slow.pause = 3600
stuck = [WriteBehind(Slow(Path(sys.argv[1]))) for _ in range(5)]
for behind in stuck:
    behind.write(entries("a", 3))
""",
        tmp_path,
    )
    assert list(DiskStore(tmp_path).keys()) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_begins_empty_and_can_write(tmp_path: Path) -> None:
    out = run(
        """
Slow.pause = 0.05
behind = WriteBehind(Slow(Path(sys.argv[1])))
behind.write(entries("parent", 10))
time.sleep(0.02)            # the thread is amid a write
behind._queue.changed.acquire()  # and somebody holds the lock
child = os.fork()
if child == 0:
    behind.store.path = Path(sys.argv[2])
    assert behind.stats().queued_entries == 0
    assert behind.flush(5)
    behind.write(entries("child", 3))
    assert behind.flush(5)
    print(behind.stats().written_entries, flush=True)
    os._exit(0)
behind._queue.changed.release()
assert os.waitpid(child, 0)[1] == 0
assert behind.flush(10)
print(behind.stats().written_entries)
""",
        tmp_path / "parent",
        tmp_path / "child",
    )
    assert out.split() == ["3", "10"]
    assert set(DiskStore(tmp_path / "parent").keys()) == {f"parent{n}" for n in range(10)}
    assert set(DiskStore(tmp_path / "child").keys()) == {f"child{n}" for n in range(3)}


KEYS = st.sampled_from("abcde")
BLOBS = st.binary(max_size=4)


class WriteBehindBehavesLikeItsStore(RuleBasedStateMachine):
    """Whatever is queued or written when, a reader sees what a plain dict would hold."""

    def __init__(self) -> None:
        super().__init__()
        self.shelf = Shelf()
        self.behind = WriteBehind(self.shelf)
        self.model: dict[str, tuple[bytes, dict[str, str]]] = {}

    @rule(key=KEYS, blob=BLOBS, tag=st.sampled_from("xy"))
    def write(self, key: str, blob: bytes, tag: str) -> None:
        # the contract of keys: the same key, size and metadata is the same content
        blob = bytes(len(blob))
        self.behind.write([entry(key, blob, tag=tag)])
        self.model[key] = (blob, {"tag": tag})

    @precondition(lambda self: self.shelf.gate.is_set())
    @rule(keys=st.lists(KEYS, unique=True))
    def delete(self, keys: list[str]) -> None:
        there = sum(self.model.pop(key, None) is not None for key in keys)
        assert self.behind.delete(keys) == there

    @rule()
    def hold(self) -> None:
        self.shelf.gate.clear()

    @rule()
    def let_go(self) -> None:
        self.shelf.gate.set()

    @rule()
    def flush(self) -> None:
        self.shelf.gate.set()
        assert self.behind.flush(10)
        assert {key: bytes(kept.blob) for key, kept in self.shelf.kept.items()} == {
            key: blob for key, (blob, _) in self.model.items()
        }
        assert self.behind.stats().queued_bytes == 0

    @invariant()
    def reads_agree(self) -> None:
        keys = list("edcba")
        content = [self.model.get(key, (b"", None)) for key in keys]
        assert self.behind.sizes(keys) == [len(blob) for blob, _ in content]
        assert blobs(self.behind, *keys) == [blob or None for blob, _ in content]
        assert self.behind.read_metadata(keys) == [metadata for _, metadata in content]

    def teardown(self) -> None:
        self.shelf.gate.set()
        self.behind.close()


TestWriteBehindBehavesLikeItsStore = WriteBehindBehavesLikeItsStore.TestCase
TestWriteBehindBehavesLikeItsStore.settings = settings(
    max_examples=40, stateful_step_count=20, deadline=None
)

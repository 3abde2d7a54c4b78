"""Write-behind: what is queued is read as if it were written."""

from __future__ import annotations

import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from scripted import Scripted, blobs, entry, fetch, until
from servers import Server

from chunkcache.errors import StoreError
from chunkcache.stores import writer
from chunkcache.stores.base import Entry, Part, read_blobs
from chunkcache.stores.breaker import CircuitBreaker
from chunkcache.stores.memory import MemoryStore
from chunkcache.stores.redis import RedisStore
from chunkcache.stores.tiered import TieredStore
from chunkcache.stores.writer import PatientStore, WriteBehind


def test_writes_arrive_in_order(scripted: Scripted) -> None:
    behind = WriteBehind(scripted)
    names = [f"k{number}" for number in range(50)]
    assert behind.write([entry(name, b"abc") for name in names]) == 150
    assert behind.flush(10)
    assert scripted.asked("write") == names
    stats = behind.stats()
    assert (stats.written_entries, stats.written_bytes) == (50, 150)
    assert (stats.queued_entries, stats.queued_bytes, stats.dropped_entries) == (0, 0, 0)


def test_nothing_starts_before_the_first_write(scripted: Scripted) -> None:
    before = threading.active_count()
    behind = WriteBehind(scripted)
    assert behind.flush(0)
    assert behind.sizes(["a"]) == [0]
    assert threading.active_count() == before


def test_queued_entries_are_read_first_and_the_rest_in_one_call(scripted: Scripted) -> None:
    scripted.inner.write([entry("old", b"old", a="1"), entry("both", b"before")])
    behind = WriteBehind(scripted)
    scripted.gate.clear()
    behind.write([entry("new", b"new!", b="2"), entry("both", b"after"), entry("bare", c="3")])
    keys = ["old", "new", "none", "both", "bare", "old"]
    assert behind.sizes(keys) == [3, 4, 0, 5, 0, 3]
    assert blobs(behind, *keys) == [b"old", b"new!", None, b"after", None, b"old"]
    assert behind.read_metadata(keys) == [{"a": "1"}, {"b": "2"}, None, {}, {"c": "3"}, {"a": "1"}]
    rest = ["old", "none", "old"]
    assert scripted.calls == [
        ("sizes", rest),
        ("sizes", rest),
        ("fetch", rest),
        ("read_metadata", rest),
    ]


def test_places_are_filled_from_the_queue_and_the_store(scripted: Scripted) -> None:
    scripted.inner.write([entry("old", b"old")])
    behind = WriteBehind(scripted)
    scripted.gate.clear()
    behind.write([entry("new", b"new!"), entry("bare")])
    keys = ["old", "new", "none", "old", "new", "bare", "old", "new"]
    lengths = [3, 4, 2, 3, 4, 1, 2, 5]
    memory = [bytearray(length) for length in lengths]
    places = [[memoryview(room)[:1], memoryview(room)[1:]] for room in memory]
    there = [True, True, False, True, True, False, True, False]
    assert list(fetch(behind, keys, places)) == there
    filled = [bytes(room) for room, is_there in zip(memory, there, strict=True) if is_there]
    assert filled == [b"old", b"new!", b"old", b"new!", b"ol"]


def test_parts_are_taken_from_the_queue_and_the_store(scripted: Scripted) -> None:
    old, new = bytes(range(100)), bytes(range(100, 200))
    scripted.script["reads_parts"] = lambda _: True
    scripted.inner.write([entry("old", old)])
    behind = WriteBehind(scripted)
    scripted.gate.clear()
    behind.write([entry("new", new)])
    wanted = [("old", 10, 5), ("new", 90, 10), ("none", 0, 1), ("new", 0, 3), ("old", 95, 5)]
    wanted += [("new", 95, 6), ("old", 95, 6)]  # longer than there is
    memory = [bytearray(length) for _, _, length in wanted]
    parts = [
        Part(key, start, [memoryview(room)[:1], memoryview(room)[1:]])
        for (key, start, _), room in zip(wanted, memory, strict=True)
    ]
    there = list(behind.fetch(parts))
    scripted.gate.set()
    assert behind.reads_parts
    assert there == [True, True, False, True, True, False, False]
    filled = [bytes(room) for room, is_there in zip(memory, there, strict=True) if is_there]
    assert filled == [old[10:15], new[90:], new[:3], old[95:]]
    assert ("fetch", ["old", "none", "old", "old"]) in scripted.calls


def test_a_dead_store_does_not_matter_while_all_is_queued(scripted: Scripted) -> None:
    behind = WriteBehind(scripted)
    scripted.gate.clear()
    scripted.error = StoreError("down")
    behind.write([entry("a", b"1"), entry("b", b"2")])
    assert behind.sizes(["b", "a"]) == [1, 1]
    assert blobs(behind, "b", "a") == [b"2", b"1"]
    assert behind.read_metadata(["a"]) == [{}]
    for verb in (
        behind.sizes,
        behind.read_metadata,
        lambda keys: list(fetch(behind, keys, [[], []])),
    ):
        with pytest.raises(StoreError, match="down"):
            verb(["a", "other"])


def test_a_read_is_closed_early_with_the_stores_own(scripted: Scripted) -> None:
    scripted.inner.write([entry("a", b"1"), entry("b", b"2")])
    reader = read_blobs(WriteBehind(scripted), ["a", "b"])
    next(reader)
    assert scripted.reading == 1
    reader.close()
    assert scripted.reading == 0


def test_a_read_sees_what_was_queued_when_it_was_asked_for(scripted: Scripted) -> None:
    behind = WriteBehind(scripted)
    scripted.gate.clear()
    behind.write([entry("a", b"1")])
    room = memoryview(bytearray(1))
    reader = fetch(behind, ["a"], [[room]])
    scripted.gate.set()
    assert behind.flush(10)
    scripted.inner.close()
    assert list(reader) == [True]
    assert room == b"1"


def test_fields_to_add_join_what_waits_and_what_is_there(scripted: Scripted) -> None:
    def more(**fields: str) -> Entry:
        return Entry("a", fields, memoryview(b""), merge=True)

    scripted.inner.write([more(old="0")])
    behind = WriteBehind(scripted)
    scripted.gate.clear()
    behind.write([more(b="1")])
    until(lambda: behind._queue.current)
    behind.write([more(c="2")])
    assert behind.read_metadata(["a"]) == [{"old": "0", "b": "1", "c": "2"}]
    behind.write([entry("a", d="3")])  # replaces them all
    behind.write([more(e="4")])
    assert behind.read_metadata(["a"]) == [{"d": "3", "e": "4"}]
    scripted.gate.set()
    assert behind.flush(10)
    assert scripted.kept["a"] == entry("a", d="3", e="4")


def test_delete_reaches_the_queue_and_the_store(scripted: Scripted) -> None:
    scripted.inner.write([entry("old", b"1"), entry("both", b"1")])
    behind = WriteBehind(scripted)
    scripted.gate.clear()
    behind.write([entry("in flight", b"1")])
    until(lambda: behind._queue.current)
    behind.write([entry("both", b"22"), entry("queued", b"1"), entry("kept", b"1")])
    assert behind.delete(["old", "both", "queued", "none"]) == 3
    assert behind.sizes(["old", "both", "queued", "kept"]) == [0, 0, 0, 1]
    assert behind.stats().queued_bytes == 2
    scripted.gate.set()
    assert behind.flush(10)
    assert sorted(scripted.kept) == ["in flight", "kept"]
    assert behind.delete(["kept"]) == 1
    behind.write([entry("kept", b"1")])  # deleted since: not the same as just written
    assert behind.flush(10)
    assert "kept" in scripted.kept


def test_delete_waits_for_the_write_under_way(scripted: Scripted) -> None:
    behind = WriteBehind(scripted)
    scripted.gate.clear()
    behind.write([entry("a", b"1")])
    until(lambda: behind._queue.current)
    threading.Timer(0.05, scripted.gate.set).start()
    assert behind.delete(["a"]) == 1
    assert behind.flush(10)
    assert scripted.kept == {}


def test_flush_says_whether_all_is_written(scripted: Scripted) -> None:
    behind = WriteBehind(scripted)
    scripted.gate.clear()
    behind.write([entry("a", b"1")])
    assert not behind.flush(0.02)
    scripted.gate.set()
    assert behind.flush()
    assert "a" in scripted.kept


def test_fields_to_add_do_not_hide_the_blob_that_is_there(scripted: Scripted) -> None:
    scripted.inner.write([entry("a", b"blob", old="0")])
    behind = WriteBehind(scripted)
    scripted.gate.clear()
    behind.write([Entry("a", {"new": "1"}, memoryview(b""), merge=True)])
    room = bytearray(4)
    assert behind.sizes(["a"]) == [4]
    assert blobs(behind, "a") == [b"blob"]
    assert list(fetch(behind, ["a"], [[memoryview(room)]])) == [True]
    assert room == b"blob"


def test_nothing_is_taken_while_the_store_is_known_to_fail(redis_server: Server) -> None:
    behind = WriteBehind(CircuitBreaker(RedisStore(redis_server.tcp_url)))
    redis_server.stop()
    assert behind.write([entry("a", b"1")]) == 1  # nobody knows yet
    assert behind.flush(10)
    with pytest.raises(StoreError, match="not asked until"):
        behind.write([entry("b", b"1")])
    stats = behind.stats()
    assert (stats.queued_entries, stats.failed_entries) == (0, 1)


def test_close_writes_then_closes_and_takes_no_more(scripted: Scripted) -> None:
    with WriteBehind(scripted) as behind:
        behind.write([entry("a", b"1")])
    assert scripted.closed
    with pytest.raises(StoreError, match=r"was closed, .* make a new cache"):
        behind.write([entry("b", b"1")])
    assert scripted.asked("write") == ["a"]


def test_close_is_bounded_and_drops_what_is_left(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "DRAIN_SECONDS", 0.02)
    scripted.gate.clear()
    behind = WriteBehind(scripted)
    behind.write([entry("a", b"1")])
    until(lambda: behind._queue.current)
    behind.write([entry("b", b"1")])
    behind.close()
    assert scripted.closed
    scripted.gate.set()
    assert behind.flush(10)
    assert "b" not in scripted.kept


# ---------------------------------------------------------------------- waiting for room


def numbered(number: int, size: int = 1000) -> Entry:
    return Entry(f"key{number}", {"number": str(number)}, memoryview(bytes([number]) * size))


def broken() -> Scripted:
    return Scripted(write=StoreError("no space left"))


def test_a_full_queue_is_waited_for() -> None:
    slow = Scripted()
    slow.gate.clear()
    entries = [numbered(n) for n in range(20)]
    assert WriteBehind(slow, max_bytes=2500).write(entries) < 20_000  # what it is all about
    slow.gate.set()
    store = PatientStore(WriteBehind(slow, max_bytes=2500))
    assert store.write(entries) == 20_000
    assert store.flush()
    assert slow.sizes([e.key for e in entries]) == [1000] * 20
    assert store.bytes_written == 20_000


def test_what_never_fits_is_an_error_with_a_remedy() -> None:
    store = PatientStore(WriteBehind(MemoryStore(), max_bytes=500))
    with pytest.raises(StoreError, match="write_queue_bytes"):
        store.write([numbered(1, 400), numbered(2), numbered(3, 400)])
    assert store.bytes_written == 400


def test_failures_behind_a_queue_are_raised() -> None:
    store = PatientStore(WriteBehind(CircuitBreaker(broken())))
    store.check_writable()
    store.write([numbered(1)])
    with pytest.raises(StoreError, match="no space left"):
        store.flush()
    for verb in (store.check_writable, lambda: store.write([numbered(2)])):
        with pytest.raises(StoreError, match="no space left"):
            verb()


def test_the_error_of_the_furthest_tier_is_raised() -> None:
    store = PatientStore(TieredStore([MemoryStore(), broken()]))
    with pytest.raises(StoreError, match="no space left"):
        store.write([numbered(1)])
    store = PatientStore(TieredStore([broken(), MemoryStore()]))
    assert store.write([numbered(1)]) == 1000


def test_failures_behind_queues_of_tiers_are_raised() -> None:
    near, far = WriteBehind(CircuitBreaker(MemoryStore())), WriteBehind(CircuitBreaker(broken()))
    store = PatientStore(TieredStore([near, far]))
    store.write([numbered(1)])
    with pytest.raises(StoreError, match="no space left"):
        store.flush()
    store = PatientStore(TieredStore([WriteBehind(CircuitBreaker(broken())), near]))
    store.write([numbered(1)])
    assert store.flush()  # the furthest has it


def test_it_is_the_store_in_everything_else() -> None:
    inner = MemoryStore()
    store = PatientStore(inner)
    store.write([numbered(1)])
    assert store.sizes(["key1", "key2"]) == [1000, 0]
    assert blobs(store, "key1") == [bytes([1]) * 1000]
    place = memoryview(bytearray(1000))
    assert list(fetch(store, ["key1"], [[place]])) == [True]
    assert bytes(place) == bytes([1]) * 1000
    assert store.read_metadata(["key1"]) == [{"number": "1"}]
    assert store.delete(["key1"]) == 1
    assert inner.sizes(["key1"]) == [0]


# ---------------------------------------------------------------------- whatever happens


KEYS = st.sampled_from("abcde")
BLOBS = st.binary(max_size=4)


class WriteBehindBehavesLikeItsStore(RuleBasedStateMachine):
    """Whatever is queued or written when, a reader sees what a plain dict would hold."""

    def __init__(self) -> None:
        super().__init__()
        self.scripted = Scripted()
        self.behind = WriteBehind(self.scripted)
        self.model: dict[str, tuple[bytes, dict[str, str]]] = {}

    @rule(key=KEYS, blob=BLOBS, tag=st.sampled_from("xy"))
    def write(self, key: str, blob: bytes, tag: str) -> None:
        # the contract of keys: the same key, size and metadata is the same content
        blob = bytes(len(blob))
        self.behind.write([entry(key, blob, tag=tag)])
        self.model[key] = (blob, {"tag": tag})

    @precondition(lambda self: self.scripted.gate.is_set())
    @rule(keys=st.lists(KEYS, unique=True))
    def delete(self, keys: list[str]) -> None:
        there = sum(self.model.pop(key, None) is not None for key in keys)
        assert self.behind.delete(keys) == there

    @rule()
    def hold(self) -> None:
        self.scripted.gate.clear()

    @rule()
    def let_go(self) -> None:
        self.scripted.gate.set()

    @rule()
    def flush(self) -> None:
        self.scripted.gate.set()
        assert self.behind.flush(10)
        assert {key: bytes(kept.blob) for key, kept in self.scripted.kept.items()} == {
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
        self.scripted.gate.set()
        self.behind.close()


TestWriteBehindBehavesLikeItsStore = WriteBehindBehavesLikeItsStore.TestCase
TestWriteBehindBehavesLikeItsStore.settings = settings(
    max_examples=40, stateful_step_count=20, deadline=None
)

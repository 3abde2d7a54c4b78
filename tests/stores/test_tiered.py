"""Tiers: the order of looking, copies for the nearer ones, tiers that fail, shared memory."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import tiny, tokens
from scripted import Scripted, blobs, entry, fail_at, fetch, until
from servers import Server

from chunkcache import RedisChunkCache
from chunkcache.errors import SettingError, StoreError
from chunkcache.stores import ChunkStore, Entry, locks, open_store
from chunkcache.stores.base import Part, calls_of_prompt
from chunkcache.stores.breaker import CircuitBreaker
from chunkcache.stores.disk import DiskStore
from chunkcache.stores.memory import MemoryStore
from chunkcache.stores.redis import RedisStore
from chunkcache.stores.tiered import TieredStore
from chunkcache.stores.writer import WriteBehind

BLOB = bytes(range(256)) * 400


def rooms(*lengths: int) -> list[bytearray]:
    return [bytearray(length) for length in lengths]


def places(memory: Sequence[bytearray]) -> list[list[memoryview]]:
    """Each in two views of different length."""
    return [[memoryview(room)[:1], memoryview(room)[1:]] for room in memory]


def calls(scripted: Scripted, *verbs: str) -> list[list[str]]:
    return [keys for verb, keys in scripted.calls if verb in verbs]


# ---------------------------------------------------------------------------- where is looked


def test_each_tier_is_asked_once_for_what_the_nearer_ones_lack() -> None:
    near, middle, far = Scripted(), Scripted(), Scripted()
    near.inner.write([entry("a", b"near")])
    middle.inner.write([entry("a", b"middle"), entry("b", b"middle")])
    far.inner.write([entry("c", b"far!")])
    store = TieredStore([near, middle, far])
    assert store.sizes(["c", "a", "none", "b", "a"]) == [4, 4, 0, 6, 4]
    assert calls(near, "sizes") == [["c", "a", "none", "b"]]
    assert calls(middle, "sizes") == [["c", "none", "b"]]
    assert calls(far, "sizes") == [["c", "none"]]
    assert store.sizes(["a"]) == [4]
    assert len(calls(far, "sizes")) == 1
    assert store.sizes([]) == []
    memory = rooms(4, 4, 4, 6, 4)
    keys = ["c", "a", "none", "b", "a"]
    assert list(fetch(store, keys, places(memory))) == [True, True, False, True, True]
    assert [bytes(memory[n]) for n in (0, 1, 3, 4)] == [b"far!", b"near", b"middle", b"near"]
    assert calls(far, "fetch") == [["c"]]
    assert list(fetch(store, [], [])) == []


def test_views_are_read_through_the_tiers(tmp_path: Path) -> None:
    near, far = MemoryStore(), DiskStore(tmp_path)
    far.write([entry("a", b"one"), entry("b", b"two")])
    near.write([entry("c", b"three")])
    store = TieredStore([near, far])
    assert blobs(store, "b", "c", "none", "a") == [b"two", b"three", None, b"one"]
    assert blobs(near, "a", "b") == [b"one", b"two"]


# ---------------------------------------------------------------------------- copies


def test_what_came_from_afar_is_near_when_the_read_has_ended(redis_server: Server) -> None:
    with RedisStore(redis_server.unix_url) as far:
        far.write([entry("a", BLOB), entry("b", BLOB[::-1])])
        near = MemoryStore()
        store = TieredStore([near, far])
        memory = rooms(len(BLOB), len(BLOB))
        assert list(fetch(store, ["a", "b"], places(memory))) == [True, True]
        for room in memory:
            room[:] = bytes(len(room))  # the caller's own again
        assert blobs(near, "a", "b") == [BLOB, BLOB[::-1]]
        redis_server.stop()
        again = rooms(len(BLOB), len(BLOB))
        with calls_of_prompt() as noted:
            assert list(fetch(store, ["b", "a"], places(again))) == [True, True]
            assert store.sizes(["a", "b"]) == [len(BLOB)] * 2
        assert again == [BLOB[::-1], BLOB]
        assert noted.errors == []


def test_a_read_that_ends_early_has_let_go_of_the_places(monkeypatch: pytest.MonkeyPatch) -> None:
    began, go = threading.Event(), threading.Event()
    keep = TieredStore._keep

    def late(self: TieredStore, *arguments: object) -> None:
        began.set()
        assert go.wait(10)
        keep(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(TieredStore, "_keep", late)
    near, far = MemoryStore(), MemoryStore()
    far.write([entry("a", BLOB), entry("b", BLOB)])
    memory = rooms(len(BLOB), len(BLOB))
    answers = fetch(TieredStore([near, far]), ["a", "b"], places(memory))
    assert next(answers)
    assert began.wait(10)
    threading.Timer(0.05, go.set).start()
    answers.close()
    memory[0][:] = bytes(len(BLOB))
    assert blobs(near, "a") == [BLOB]


def test_all_nearer_tiers_share_one_copy() -> None:
    near, middle, far = Scripted(), Scripted(), Scripted()
    far.inner.write([entry("a", b"blob", m="1")])
    list(fetch(TieredStore([near, middle, far]), ["a"], places(rooms(4))))
    assert near.kept["a"].blob == b"blob"
    assert near.kept["a"].blob.obj is middle.kept["a"].blob.obj
    assert near.written[0].merge  # fields that are there stay
    assert calls(far, "write") == []


@pytest.mark.parametrize(("start", "nbytes", "there"), [(0, 6, False), (0, 4, True), (1, 4, True)])
def test_what_is_no_whole_blob_is_not_copied(start: int, nbytes: int, there: bool) -> None:
    near, far = MemoryStore(), MemoryStore()
    far.write([entry("a", b"short")])
    part = Part("a", start, [memoryview(bytearray(nbytes))])
    assert list(TieredStore([near, far]).fetch([part])) == [there]
    assert near.sizes(["a"]) == [0]


def test_without_a_thread_nothing_is_copied_and_all_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    near, far = MemoryStore(), MemoryStore()
    far.write([entry("a", b"blob")])
    memory = rooms(4)
    with monkeypatch.context() as patch:
        patch.setattr(locks, "start_new_thread", refuse)
        assert list(fetch(TieredStore([near, far]), ["a"], places(memory))) == [True]
    assert memory == [b"blob"]


def test_budgets_hold_and_what_a_small_tier_loses_meanwhile_is_read_behind_it(
    tmp_path: Path,
) -> None:
    """The near tier has the last blobs, and makes room for the first ones as these arrive."""
    near = MemoryStore(max_bytes=3 * (len(BLOB) + 10))
    middle = DiskStore(tmp_path, max_bytes=5 * (len(BLOB) + 200))
    far = MemoryStore()
    store = TieredStore([near, middle, far])
    keys = [f"k{n}" for n in range(10)]
    store.write([entry(key, BLOB[n:] + BLOB[:n]) for n, key in enumerate(keys)])
    for _ in range(3):
        memory = rooms(*[len(BLOB)] * 10)
        assert list(fetch(store, keys, places(memory))) == [True] * 10
        assert memory == [BLOB[n:] + BLOB[:n] for n in range(10)]
        assert 0 < sum(near.sizes(keys)) <= 3 * (len(BLOB) + 10)
        used = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
        assert 0 < used <= 5 * (len(BLOB) + 200)


KEYS = "abcd"


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["write", "lose", "read", "delete"]), st.sampled_from(KEYS),
                  st.integers(0, 2)),
        max_size=30,
    )
)  # fmt: skip
def test_whatever_tiers_lose_what_is_found_is_what_was_written(
    steps: list[tuple[str, str, int]],
) -> None:
    tiers = [MemoryStore(max_bytes=200), MemoryStore(), MemoryStore()]
    store = TieredStore(tiers)
    written: dict[str, bytes] = {}
    for number, (verb, key, level) in enumerate(steps):
        if verb == "write":
            written[key] = bytes([number]) * 90
            store.write([entry(key, written[key])])
        elif verb == "lose":
            tiers[level].delete([key])
        elif verb == "delete":
            store.delete([key])
        there = [any(tier.sizes([name])[0] for tier in tiers) for name in KEYS]
        assert [size > 0 for size in store.sizes(KEYS)] == there
        if verb == "read":
            memory = rooms(90, 90, 90, 90)
            assert list(fetch(store, KEYS, places(memory))) == there
            for name, room, found in zip(KEYS, memory, there, strict=True):
                assert not found or room == written[name]


# ---------------------------------------------------------------------------- metadata


def test_a_near_tier_hides_no_fields_that_others_have_added(redis_server: Server) -> None:
    with RedisStore(redis_server.unix_url) as far:
        one, two = (TieredStore([MemoryStore(), far]) for _ in range(2))
        one.write([Entry("anchor", {"a": "1"}, memoryview(b""), merge=True)])
        assert one.read_metadata(["anchor"]) == [{"a": "1"}]
        two.write([Entry("anchor", {"b": "2", "a": "newer"}, memoryview(b""), merge=True)])
        expected: list[dict[str, str] | None] = [{"a": "newer", "b": "2"}, None]
        assert one.read_metadata(["anchor", "none"]) == expected
        redis_server.stop()
        with calls_of_prompt() as noted:
            assert one.read_metadata(["anchor"]) == [{"a": "1"}]
        assert len(noted.errors) == 1


# ---------------------------------------------------------------------------- tiers that fail


@pytest.mark.parametrize("broken", range(3))
def test_a_tier_that_fails_is_noted_and_the_others_serve(broken: int) -> None:
    tiers = [Scripted(), Scripted(), Scripted()]
    store = TieredStore(tiers)
    store.write([entry("a", b"blob", m="1")])
    tiers[broken].error = StoreError("down")
    with calls_of_prompt() as noted:
        assert store.sizes(["a", "none"]) == [4, 0]
        assert store.read_metadata(["a"]) == [{"m": "1"}]
        memory = rooms(4, 4)
        assert list(fetch(store, ["a", "none"], places(memory))) == [True, False]
        assert memory[0] == b"blob"
        assert store.write([entry("b", b"blob")]) == (0 if broken == 2 else 4)
    assert [str(error) for error in noted.errors] == ["down"] * 4
    assert [("b" in tier.kept) for tier in tiers] == [level != broken for level in range(3)]


def test_if_all_fail_the_error_is_the_stores_own() -> None:
    tiers = [Scripted(), Scripted()]
    store = TieredStore(tiers)
    for tier in tiers:
        tier.error = StoreError("down")
    verbs: list[Callable[[], object]] = [
        lambda: store.sizes(["a"]),
        lambda: store.read_metadata(["a"]),
        lambda: store.write([entry("a", b"1")]),
        lambda: store.delete(["a"]),
    ]
    for verb in verbs:
        with pytest.raises(StoreError, match="down"):
            verb()
    assert list(fetch(store, ["a"], places(rooms(1)))) == [False]


def test_a_far_server_that_is_killed_amid_a_read(redis_server: Server) -> None:
    with RedisStore(redis_server.unix_url) as redis:
        redis.write([entry(f"far{n}", BLOB * 40) for n in range(20)])
        near = MemoryStore()
        near.write([entry("near", BLOB)])
        store = TieredStore([near, CircuitBreaker(redis)])
        keys = [*(f"far{n}" for n in range(20)), "near"]
        memory = rooms(*[40 * len(BLOB)] * 20, len(BLOB))
        with calls_of_prompt() as noted:
            answers = fetch(store, keys, places(memory))
            arrived = [next(answers)]
            redis_server.stop()
            arrived += answers
        assert arrived[0]
        assert not arrived[19]
        assert arrived[20]
        assert memory[20] == BLOB
        assert len(noted.errors) == 1  # not one per key
        read = [key for key, there in zip(keys, arrived, strict=True) if there]
        assert near.sizes(read) == [40 * len(BLOB)] * (len(read) - 1) + [len(BLOB)]


def test_a_tier_that_fails_amid_a_read_is_made_up_for_by_those_behind_it() -> None:
    near, far = Scripted(answer=fail_at(1, StoreError("broke"))), Scripted()
    store = TieredStore([near, far])
    store.write([entry(key, key.encode()) for key in "abc"])
    memory = rooms(1, 1, 1)
    with calls_of_prompt() as noted:
        assert list(fetch(store, "abc", places(memory))) == [True] * 3
    assert memory == [b"a", b"b", b"c"]
    assert [str(error) for error in noted.errors] == ["broke"]


# ---------------------------------------------------------------------------- the other verbs


def test_writes_and_deletes_reach_all_tiers_even_behind_one_that_fails() -> None:
    tiers = [Scripted(), Scripted(), Scripted()]
    store = TieredStore(tiers)
    assert store.write([entry("a", b"1"), entry("b", b"22")]) == 3
    assert [set(tier.kept) for tier in tiers] == [{"a", "b"}] * 3
    tiers[1].inner.close()
    assert store.delete(["a", "none"]) == 1
    tiers[0].error = StoreError("down")
    with pytest.raises(StoreError, match="down"):
        store.delete(["b"])
    assert [set(tier.kept) for tier in tiers] == [{"b"}, set(), set()]


def test_a_flush_waits_for_all_tiers_together() -> None:
    shelves = [Scripted(), Scripted()]
    store = TieredStore([WriteBehind(scripted) for scripted in shelves])
    for scripted in shelves:
        scripted.gate.clear()
    store.write([entry("a", b"1")])
    shelves[0].gate.set()
    assert not store.flush(0.05)
    shelves[1].gate.set()
    assert store.flush(10)
    assert all("a" in scripted.kept for scripted in shelves)


def test_close_closes_all_but_the_memory() -> None:
    memory, other = MemoryStore(), Scripted()
    stuck = Scripted(close=StoreError("cannot close"))
    memory.write([entry("a", b"1")])
    with pytest.raises(StoreError, match="cannot close"):
        TieredStore([memory, stuck, other]).close()
    assert stuck.closed
    assert other.closed
    assert memory.sizes(["a"]) == [1]


# ---------------------------------------------------------------------------- opened by URLs


def test_a_list_of_urls_opens_tiers_that_fill_each_other(
    tmp_path: Path, redis_server: Server
) -> None:
    urls = ["memory://?bytes=1MB", f"file://{tmp_path}?bytes=10MB", redis_server.unix_url]
    with open_store([redis_server.unix_url]) as far:
        assert isinstance(far, WriteBehind)
        far.write([entry("a", b"blob", m="1")])
        assert far.flush(10)
    with open_store(urls) as store:
        assert list(fetch(store, ["a"], places(rooms(4)))) == [True]
        assert store.flush(10)
        store.write([entry("b", b"new")])
        assert store.flush(10)
    redis_server.stop()
    with open_store(f"file://{tmp_path}") as disk:
        assert disk.sizes(["a", "b"]) == [4, 3]
    with open_store(urls) as store, calls_of_prompt() as noted:
        assert blobs(store, "a", "b") == [b"blob", b"new"]
        assert store.sizes(["a", "c"]) == [4, 0]
        assert "check that the server runs" in str(noted.errors[-1])


def test_the_environment_may_name_tiers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CHUNKCACHE_URL", f"memory://?bytes=1MB  file://{tmp_path}")
    with open_store() as store:
        assert isinstance(store, TieredStore)
        store.write([entry("a", b"1")])
        assert store.flush(10)
    assert DiskStore(tmp_path).sizes(["a"]) == [1]


@pytest.mark.parametrize("urls", [[], [None], ["memory://", 3], [["memory://"]]])
def test_a_list_that_names_no_tiers(urls: list[str]) -> None:
    with pytest.raises(SettingError, match="one URL per tier"):
        open_store(urls)


def test_a_tier_that_cannot_be_opened_leaves_none_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[ChunkStore] = []
    monkeypatch.setattr(WriteBehind, "close", lambda self: closed.append(self))
    with pytest.raises(SettingError, match="unknown scheme"):
        open_store(["memory://", f"file://{tmp_path}", "http://x"])
    assert len(closed) == 1


def memory_of(store: ChunkStore) -> MemoryStore:
    assert isinstance(store, TieredStore)
    found = store._tiers[0]
    assert isinstance(found, MemoryStore)
    return found


def test_the_memory_is_shared_by_those_that_open_the_same_list(tmp_path: Path) -> None:
    urls = ["memory://?bytes=1MB", f"file://{tmp_path}/one"]
    one, two = open_store(urls), open_store(urls)
    assert memory_of(one) is memory_of(two)
    other = open_store(["memory://?bytes=1MB", f"file://{tmp_path}/other"])
    assert memory_of(other) is not memory_of(one)  # not whom this list trusts
    assert memory_of(open_store(urls, ttl=5)) is not memory_of(one)
    one.write([entry("a", b"1")])
    one.close()
    assert memory_of(two).sizes(["a"]) == [1]
    two.close()
    del one, two
    gc.collect()
    assert memory_of(open_store(urls)).sizes(["a"]) == [0]


def test_times_and_pins_reach_the_tiers(tmp_path: Path) -> None:
    with open_store(["memory://", f"file://{tmp_path}"], ttl=1e-9) as store:
        store.write([entry("a", b"1"), Entry("p", {}, memoryview(b"1"), pinned=True)])
        assert store.flush(10)
        assert store.sizes(["a", "p"]) == [0, 1]
        assert DiskStore(tmp_path, ttl=1e-9).sizes(["a", "p"]) == [0, 1]
    for ttl in (-1, float("nan"), float("inf")):
        with pytest.raises(SettingError, match="ttl"):
            open_store("memory://", ttl=ttl)
    with pytest.raises(SettingError, match="max_delay"):
        open_store("memory://", max_delay=0)


def write_for_ever(urls: list[str]) -> None:
    store = open_store(urls)
    for n in itertools.count():
        store.write([entry(f"k{n}", bytes([n % 256]) * 100_000)])
        store.flush()


def test_the_disk_of_a_killed_process_serves_another(tmp_path: Path) -> None:
    urls = ["memory://", f"file://{tmp_path}/near", f"file://{tmp_path}/far"]
    process = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(urls,))
    process.start()
    disk = DiskStore(tmp_path / "near")
    until(lambda: disk.sizes(["k9"]) == [100_000])
    process.kill()
    process.join()
    with open_store(urls) as store:
        keys = [f"k{n}" for n in range(10)]
        memory = rooms(*[100_000] * 10)
        assert all(fetch(store, keys, places(memory)))
        assert memory == [bytes([n]) * 100_000 for n in range(10)]


def test_generation_goes_on_from_near_when_the_far_server_dies(redis_server: Server) -> None:
    urls = ["memory://?bytes=100MB", redis_server.tcp_url]
    ids = tokens(300)
    expected = tiny().generate(ids, max_new_tokens=4, do_sample=False)

    def ask() -> RedisChunkCache:
        model = tiny()
        cache = RedisChunkCache(model, urls)
        out = model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
        assert (out == expected).all()
        assert cache.flush(10)
        return cache

    first = ask()
    assert first.report.reused == 0
    second = ask()  # another model object, the same memory
    assert second.report.reused == 299
    assert second.report.store_errors == 0
    redis_server.stop()
    third = ask()
    assert third.report.reused == 299
    assert third.report.store_errors == 0  # it was not needed
    longer = torch.cat([ids, tokens(200, seed=1)], dim=1)
    model = tiny()
    cache = RedisChunkCache(model, urls)
    out = model.generate(longer, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert (out == tiny().generate(longer, max_new_tokens=4, do_sample=False)).all()
    assert cache.report.reused == 300  # all that is shared, from near
    assert cache.report.store_errors == 3  # a lookup and a write
    assert "check that the server runs" in str(cache.report)
    strict = RedisChunkCache(model, urls, on_error="raise")
    with pytest.raises(StoreError, match="check that the server runs"):
        model.generate(longer[:, 1:], past_key_values=strict, max_new_tokens=1)

"""Copies: what one store has is found in another, however often a copy is begun."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from chunkcache import RedisChunkCache, SettingError, StoreError, catalog, open_store
from chunkcache.errors import BlobError
from chunkcache.inventory import copy
from chunkcache.inventory.catalog import Filter
from chunkcache.inventory.copy import copy_chunks
from chunkcache.inventory.inspection import check_blob
from chunkcache.stores.base import EXTRAS, OUTPUTS, STATE, Entry, Listed
from chunkcache.stores.memory import MemoryStore
from tests.models import tiny, tokens
from tests.scripted import Scripted
from tests.scripted import blobs as blobs_in

IDS = tokens(300)


@pytest.fixture(scope="module")
def model():
    return tiny()


def prefill(model, store, ids=IDS, **settings):
    with RedisChunkCache(model, store, **settings) as cache:
        model.generate(ids, past_key_values=cache, max_new_tokens=2, do_sample=False)
        return cache.report


@pytest.fixture
def source(model):
    """Five chunks, three of them with an index."""
    with MemoryStore() as store:
        prefill(model, store, reuse="anywhere", tags="project=x")
        prefill(model, store, tokens(200, seed=5), namespace="b", pin=True)
        yield store


def kept(store) -> dict[str, tuple]:
    """All chunks, bit by bit, and the index."""
    listed = [entry for page in store.scan() for entry in page]
    listed = [e for e in listed if e.key.startswith(("safetensors", "anchor"))]
    blobs = [bytes(blob or b"") for blob in blobs_in(store, *(e.key for e in listed))]
    return {e.key: (e.metadata, blob) for e, blob in zip(listed, blobs, strict=True)}


def entry_of(store, number=0) -> tuple[Listed, bytes]:
    """One of the chunks, and its blob."""
    listed = sorted(catalog.entries(store), key=lambda entry: entry.key)[number]
    (blob,) = (bytes(blob) for blob in blobs_in(store, listed.key))
    return listed, blob


def put(store, key, metadata, blob=b"", **more):
    store.write([Entry(key, metadata, memoryview(blob), **more)])
    store.flush()


def test_from_store_to_store_and_found_there(model, source, redis_server, valkey_server, tmp_path):
    """Memory, files, a server, another one, memory: all is there, bit by bit, and found."""
    places = [tmp_path.as_uri(), redis_server.unix_url, valkey_server.tcp_url, "memory://"]
    before = source
    for place in places:
        target = open_store(place)
        done = copy_chunks(before, target, verify=True)
        assert (done.chunks, done.tokens, done.present, done.left_out) == (5, 500, 0, 0)
        assert done.mentions > 50
        assert kept(target) == kept(source)
        before = target
    with redis_server.client() as client:  # pinned ones do not expire, wherever they are
        assert {client.ttl(key) for key in client.scan_iter()} == {-1}
    assert prefill(model, target).reused == 299
    moved = torch.cat([tokens(40, seed=9), IDS[:, :256]], dim=1)
    assert prefill(model, target, moved, reuse="anywhere").moved > 200


def test_pinned_chunks_stay_pinned(source, redis_server):
    with open_store(redis_server.unix_url, ttl=1000) as target:
        copy_chunks(source, target)
        pinned = {entry.key: entry.metadata["pinned"] for entry in catalog.entries(target)}
    with redis_server.client() as client:
        for key, said in pinned.items():
            assert (client.ttl(f"{key}@kv_bytes") == -1) == (said == "yes")
    assert sorted(pinned.values()) == ["no"] * 3 + ["yes"] * 2


@pytest.mark.parametrize(
    "settings",
    [{"codec": "safetensors-int8"}, {"codec": "safetensors-bf16+zstd"},
     {"codec": "safetensors+zstd"}, {"codec": "safetensors-int8+zstd"}, {"seal": "ab" * 32}],
    ids=str,
)  # fmt: skip
def test_all_codecs_are_copied_and_checked(model, settings):
    with MemoryStore() as source, MemoryStore() as target:
        prefill(model, source, **settings)
        listed, blob = entry_of(source)
        damaged = blob[:-1] if "seal" in settings else blob[:-1] + bytes([blob[-1] ^ 1])
        put(source, listed.key, listed.metadata, damaged)
        done = copy_chunks(source, target, verify=True)
        assert (done.chunks, done.left_out, set(done.reasons)) == (2, 1, {listed.key})
        put(source, listed.key, listed.metadata, blob)
        assert copy_chunks(source, target, verify=True).chunks == 1
        assert prefill(model, target, **settings).reused == 299


@pytest.mark.parametrize(
    "settings", [{}, {"codec": "safetensors+zstd"}, {"seal": "ab" * 32}], ids=str
)
@pytest.mark.parametrize("damaged", EXTRAS)
def test_extras_are_checked_each_by_itself(model, settings, damaged):
    with MemoryStore() as source, MemoryStore() as target:
        with torch.no_grad(), RedisChunkCache(model, source, **settings) as cache:
            model(IDS, past_key_values=cache)
        listed, _ = entry_of(source)
        (blob,) = (bytes(blob) for blob in blobs_in(source, listed.key + OUTPUTS))
        for ending in EXTRAS:  # states have the same header, with other tensors
            wrong = blob[:-1] if "seal" in settings else blob[:-1] + bytes([blob[-1] ^ 1])
            told = {"positions": listed.metadata["positions"], ending[1:]: str(len(blob))}
            data = wrong if ending == damaged else blob
            put(source, listed.key + ending, told, data, merge=True)
        done = copy_chunks(source, target, verify=True)
        (why,) = done.reasons.values()
        assert why.startswith(f"{damaged[1:]}: ")
        assert (done.chunks, done.left_out) == (3, 1)
        there = target.sizes([listed.key, listed.key + OUTPUTS, listed.key + STATE])
        assert [bool(size) for size in there] == [True, damaged == STATE, damaged == OUTPUTS]


def changed_header(blob: bytes, **fields: str) -> bytes:
    size = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + size])
    header["__metadata__"] |= fields
    text = json.dumps(header, separators=(",", ":")).encode().ljust(size)
    return len(text).to_bytes(8, "little") + text + blob[8 + size :]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda e, b: (e, b[:-1] + bytes([b[-1] ^ 1])), "checksum"),
        (lambda e, b: (e, b[:-4]), "length"),
        (lambda e, b: (e, b[:-4] + b"\0" * 4), "checksum"),
        (lambda e, b: (replace(e, key=e.key[:-4] + "abcd"), b), "chunk hash"),
        (lambda e, b: (e, changed_header(b, positions="8-136")), "positions"),
        (lambda e, b: (e, changed_header(b, tokens="[7]")), "tokens, shapes"),
        (lambda e, b: (e, changed_header(b, tokens="[" * 9999)), "be read"),
        (lambda e, b: (e, bytes(100)), "be read"),
        (lambda e, b: (e, b"\xff" * 100), "be read"),
        (lambda e, b: (replace(e, metadata={**e.metadata, "tokens": "127"}), b), "shapes"),
        (lambda e, b: (replace(e, metadata={**e.metadata, "tokens": "many"}), b), "be read"),
        (lambda e, b: (replace(e, metadata={**e.metadata, "token_ids": "x"}), b), "be read"),
        (lambda e, b: (replace(e, metadata={"tokens": "127"}), b), "length"),
    ],
)  # fmt: skip
def test_what_is_not_what_it_says_is_found_out(source, change, said):
    entry, blob = entry_of(source)
    check_blob(entry, memoryview(blob))
    entry, blob = change(entry, blob)
    if "length" not in said:
        entry = replace(entry, metadata={**entry.metadata, "bytes": str(len(blob))})
    with pytest.raises(BlobError, match=said):
        check_blob(entry, memoryview(blob))


def test_a_copy_that_was_interrupted_is_run_again(source, redis_server, monkeypatch):
    def interrupt(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(copy, "AT_ONCE", 2)
    with open_store(redis_server.unix_url) as target:
        with pytest.raises(KeyboardInterrupt):
            copy_chunks(source, target, progress=interrupt)
        target.flush()
        there = len(list(catalog.entries(target)))
        assert 0 < there < 5
        done = copy_chunks(source, target)
        assert (done.present, done.chunks) == (there, 5 - there)
        assert kept(target) == kept(source)
        again = copy_chunks(source, target)
        assert (again.present, again.chunks, again.bytes, again.mentions) == (5, 0, 0, 0)


def test_other_metadata_are_replaced(source, redis_server):
    """Also where the blob is there already, which a server does not take again."""
    with open_store(redis_server.unix_url) as target:
        copy_chunks(source, target)
        entry, blob = entry_of(source)
        put(source, entry.key, {**entry.metadata, "tags": "new", "pinned": "yes"}, blob)
        done = copy_chunks(source, target)
        assert (done.chunks, done.present) == (1, 4)
        assert kept(target) == kept(source)


def test_terms_and_a_dry_run(source):
    with MemoryStore() as target:
        dry = copy_chunks(source, target, Filter(tags="project=x"), dry_run=True)
        assert (dry.chunks, kept(target)) == (3, {})
        assert "would be copied" in str(dry)
        steps: list[tuple[int, int]] = []
        done = copy_chunks(
            source, target, Filter(namespace="b"), progress=lambda *step: steps.append(step)
        )
        assert (done.chunks, done.mentions) == (2, 2)
        assert steps[-1][0] == steps[-1][1] == done.bytes
        rest = copy_chunks(source, target, Filter(tags="project=x"))
        assert (rest.chunks, rest.mentions) == (dry.chunks, dry.mentions)
        with pytest.raises(SettingError, match="no chunk of the source"):
            copy_chunks(source, target, Filter(namespace="c"))


def test_what_others_have_written_badly_stops_nothing(source, redis_server):
    entry, blob = entry_of(source)
    good = kept(source)
    hash_ = entry.key[-64:]
    begin = entry.key[:-64]
    bad = {
        begin + "1" * 64: ({**entry.metadata, "note": "\ud800"}, blob),
        begin + "2" * 64: ({**entry.metadata, "note": "x" * (1 << 20)}, blob),
    }
    anchor = next(key for key in good if key.startswith("anchor"))[:-64] + "4" * 64
    junk = {
        "safetensors@no key": ({"x": "y"}, b"blob"),
        begin + "3" * 64: (entry.metadata, b""),
        begin + "x": ({}, b"blob"),
        "anchor@junk": ({hash_: "0 2026-01-01T00:00:00+00:00"}, b""),
        anchor: (
            {hash_: "0 9999-01-01T00:00:00+00:00", "x": "0 2026-01-01", "y": "\ud800"}, b""
        ),
    }  # fmt: skip
    for key, (metadata, data) in {**bad, **junk}.items():
        put(source, key, metadata, data)
    with open_store(redis_server.unix_url) as target:
        with redis_server.client() as client:  # the destination has its own
            client.set(f"{entry.key}@metadata", "no hash")
        done = copy_chunks(source, target)
        assert (done.chunks, done.left_out) == (5, 2)
        assert set(done.reasons) == set(bad)
        assert kept(target) == good


def test_what_leaves_while_it_is_copied(source):
    losing = Scripted(source, answer=lambda number, part, there: there and number > 0)
    with MemoryStore() as target:
        done = copy_chunks(losing, target)
        assert (done.chunks, done.left_out) == (4, 1)
        assert "left the source" in next(iter(done.reasons.values()))


@pytest.mark.parametrize("kind", ["memory", "file", "redis"])
def test_a_destination_that_is_full(source, kind, redis_server, tmp_path):
    url = {"memory": "memory://?bytes=250KB", "file": f"{tmp_path.as_uri()}?bytes=250KB"}.get(kind)
    with redis_server.client() as client, open_store(url or redis_server.unix_url) as target:
        if kind == "redis":
            client.config_set("maxmemory", client.info("memory")["used_memory"] + 150_000)
        try:
            with pytest.raises(StoreError, match=r"it is full|used memory > 'maxmemory'"):
                copy_chunks(source, target)
        finally:
            client.config_set("maxmemory", 0)


def test_few_blobs_wait_to_be_written(source, monkeypatch):
    class Slow(MemoryStore):
        waiting = most = 0

        def write(self, entries):
            self.waiting += sum(entry.nbytes for entry in entries)
            self.most = max(self.most, self.waiting)
            return super().write(entries)

        def flush(self, timeout=None):
            self.waiting = 0
            return super().flush(timeout)

    largest = max(entry.nbytes for entry in catalog.entries(source))
    monkeypatch.setattr(copy, "MOST_WAITING", largest)
    with Slow() as target:
        assert copy_chunks(source, target).chunks == 5
        assert target.most == largest

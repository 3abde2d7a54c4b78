"""Packs: what goes out comes in, is found, and nothing else does."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import xxhash
from safetensors import safe_open
from safetensors.numpy import save_file

from chunkcache import RedisChunkCache, SettingError, StoreError, catalog, open_store
from chunkcache.inventory.catalog import Filter
from chunkcache.library.pack import export_pack
from chunkcache.library.unpack import import_pack
from chunkcache.stores.base import KV_BYTES, METADATA, Entry
from chunkcache.stores.memory import MemoryStore
from tests.models import tiny, tokens
from tests.scripted import Scripted, blobs

IDS = tokens(300)
SEAL = "ab" * 32


@pytest.fixture(scope="module")
def model():
    return tiny()


def prefill(model, store, ids=IDS, **settings):
    with RedisChunkCache(model, store, **settings) as cache:
        model.generate(ids, past_key_values=cache, max_new_tokens=2, do_sample=False)
        return cache.report


@pytest.fixture
def source(model):
    with MemoryStore() as store:
        prefill(model, store, reuse="anywhere", tags="project=x")
        prefill(model, store, tokens(200, seed=5), namespace="b")
        yield store


@pytest.fixture
def pack(source, tmp_path):
    path = tmp_path / "pack.safetensors"
    export_pack(source, path)
    return path


def kept(store) -> dict[str, tuple]:
    ignored = ("pinned",)
    return {
        e.key: (e.nbytes, {k: v for k, v in (e.metadata or {}).items() if k not in ignored})
        for page in store.scan()
        for e in page
        if not e.key.startswith(("proof@", "moving@"))
    }


def tensors(pack) -> dict[str, np.ndarray]:
    with safe_open(pack, framework="numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def rewrite(pack, parts, form="chunkcache-pack/1") -> None:
    save_file(parts, pack, metadata={"format": form})


def bytes_of(text: object) -> np.ndarray:
    return np.frombuffer(json.dumps(text).encode(), dtype=np.uint8)


def test_all_comes_in_and_is_found(model, source, pack, redis_server):
    with open_store(redis_server.unix_url) as target:
        done = import_pack(target, pack)
        assert (done.chunks, done.tokens, done.bad, done.skipped) == (5, 500, 0, 0)
        assert kept(target) == kept(source)
        again = import_pack(target, pack)
        assert (again.chunks, again.skipped) == (0, 5)
        assert prefill(model, target).reused == 299
        moved = torch.cat([tokens(40, seed=9), IDS[:, :256]], dim=1)
        assert prefill(model, target, moved, reuse="anywhere").moved > 200


def test_a_pack_is_an_ordinary_file(pack, tmp_path):
    assert [path.name for path in tmp_path.iterdir()] == [pack.name]
    parts = tensors(pack)
    assert len(parts) == 10
    key = min(parts).removesuffix(KV_BYTES)
    told = json.loads(parts[key + METADATA].tobytes())
    assert told["metadata"]["bytes"] == str(parts[key + KV_BYTES].nbytes)


def test_some_of_it(source, tmp_path):
    path = tmp_path / "a"
    said: list[tuple[int, int]] = []
    done = export_pack(
        source, path, Filter(namespace="b"), progress=lambda *done: said.append(done)
    )
    assert (done.chunks, done.tokens, done.left_out) == (2, 200, 0)
    assert done.bytes == path.stat().st_size
    assert said[-1][0] == said[-1][1] > 0
    export_pack(source, path, overwrite=True)
    with MemoryStore() as target:
        assert import_pack(target, path, Filter(tags="project=x")).chunks == 3
        assert catalog.stats(target).total.chunks == 3


@pytest.mark.parametrize(
    "settings",
    [{"codec": "safetensors-int8"}, {"codec": "safetensors-bf16+zstd"}, {"seal": SEAL}],
)
def test_other_codecs(model, tmp_path, settings):
    with MemoryStore() as source, MemoryStore() as target:
        prefill(model, source, **settings)
        export_pack(source, tmp_path / "a")
        assert import_pack(target, tmp_path / "a").chunks == 3
        assert prefill(model, target, **settings).reused == 299
        for part in (parts := tensors(tmp_path / "a")):
            if part.endswith(KV_BYTES):
                parts[part][-1] ^= 1
        rewrite(tmp_path / "a", parts)
        assert import_pack(MemoryStore(), tmp_path / "a").bad == 3


def test_pins(source, pack):
    for pin in (False, True):
        with MemoryStore() as target:
            import_pack(target, pack, pin=pin)
            pinned = {(e.metadata or {})["pinned"] for e in catalog.entries(target)}
            assert pinned == {"yes" if pin else "no"}


def test_what_goes_while_it_is_exported(source, tmp_path):
    def lose(number, part, there):
        part.place[-1][-1] ^= number == 1
        return there and number > 0

    done = export_pack(Scripted(source, lose), tmp_path / "a")
    assert (done.chunks, done.left_out) == (3, 2)
    assert import_pack(MemoryStore(), tmp_path / "a").chunks == 3


def _put(parts, key, told):
    parts[key + METADATA] = bytes_of(told)


def _change_metadata(**fields):
    def change(parts, key, told):
        told["metadata"] |= fields
        _put(parts, key, told)

    return change


def _flip(parts, key, told):
    parts[key + KV_BYTES][-1] ^= 1


def _flip_with_checksum(parts, key, told):
    _flip(parts, key, told)
    told["checksum"] = xxhash.xxh3_128_hexdigest(parts[key + KV_BYTES])
    _put(parts, key, told)


def _swap_blobs(parts, key, told):
    other = sorted(name for name in parts if name.endswith(KV_BYTES))[1].removesuffix(KV_BYTES)
    their = json.loads(parts[other + METADATA].tobytes())
    parts[key + KV_BYTES] = parts[other + KV_BYTES]
    told["checksum"] = their["checksum"]
    _put(parts, key, told)


def _mention(**mentions):
    def change(parts, key, told):
        told["mentions"] = mentions
        _put(parts, key, told)

    return change


def _rename(new):
    def change(parts, key, told):
        for half in (KV_BYTES, METADATA):
            parts[new(key) + half] = parts.pop(key + half)

    return change


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (_flip, "blob is damaged"),
        (_flip_with_checksum, "blob is damaged"),
        (_swap_blobs, "of another key|is damaged"),
        (_rename(lambda key: key[:-4] + "abcd"), "of another key"),
        (_rename(lambda key: key.replace("safetensors@", "anchor@")), "no chunk's"),
        (_rename(lambda key: key.replace("safetensors@", "safetensors-int8@")), "another key"),
        (_rename(lambda key: "x"), "no chunk's"),
        (_change_metadata(identity="other"), "another key"),
        (_change_metadata(tokens="9" * 30), "metadata are damaged"),
        (_change_metadata(positions="5"), "metadata are damaged"),
        (_change_metadata(context="good"), "metadata are damaged"),
        (_change_metadata(token_ids="[1]"), "other tokens"),
        (_change_metadata(token_ids="[" * 9999), "damaged"),
        (_change_metadata(x=3), "metadata are damaged"),
        (_mention(x="0 2026-01-01"), "mentions"),
        (_mention(**{"a" * 64: "everywhere"}), "mentions"),
        (lambda parts, key, told: parts.pop(key + METADATA), "missing"),
        (lambda parts, key, told: parts.pop(key + KV_BYTES), "missing"),
        (lambda parts, key, told: parts.update({key + METADATA: bytes_of([1])}), "damaged"),
        (
            lambda parts, key, told: parts.update(
                {key + METADATA: np.frombuffer(b"[" * 9999, dtype=np.uint8)}
            ),
            "damaged",
        ),
        (
            lambda parts, key, told: parts.update({key + METADATA: np.zeros(2 << 20, np.uint8)}),
            "too long",
        ),
        (
            lambda parts, key, told: parts.update({key + KV_BYTES: np.zeros((2, 2), np.uint8)}),
            "no row of bytes",
        ),
        (
            lambda parts, key, told: parts.update({key + KV_BYTES: np.zeros(4, np.float32)}),
            "no row of bytes",
        ),
    ],
)
def test_bad_entries_are_left_out(pack, change, why):
    parts = tensors(pack)
    key = min(parts).removesuffix(KV_BYTES)
    change(parts, key, json.loads(parts[key + METADATA].tobytes()))
    rewrite(pack, parts)
    with MemoryStore() as target:
        done = import_pack(target, pack)
        assert (done.chunks, done.bad) == (4, 1)
        assert len(catalog.stats(target).namespaces) == 2
        assert catalog.stats(target).total.chunks == 4
    (reason,) = done.reasons.values()
    assert any(part in reason for part in why.split("|"))


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff" * 100, (1 << 62).to_bytes(8, "little") + b"{}", b"\2" + b"\0" * 7 + b"{}"],
)
def test_files_that_are_no_packs(tmp_path, content):
    path = tmp_path / "a"
    path.write_bytes(content)
    with pytest.raises(SettingError, match="is no pack"):
        import_pack(MemoryStore(), path)


def test_a_pack_that_was_cut_off_or_is_of_another_release(pack):
    whole = pack.read_bytes()
    parts = tensors(pack)
    pack.write_bytes(whole[:-1])
    with pytest.raises(SettingError, match="is no pack"):
        import_pack(MemoryStore(), pack)
    rewrite(pack, parts, "chunkcache-pack/2")
    with pytest.raises(SettingError, match="another release"):
        import_pack(MemoryStore(), pack)
    with pytest.raises(SettingError, match="is no pack"):
        import_pack(MemoryStore(), pack.with_name("nowhere"))


def test_a_store_that_is_too_small(pack):
    with MemoryStore(60_000) as target, pytest.raises(StoreError, match="lower chunk_size"):
        import_pack(target, pack)
    with MemoryStore(250_000) as target:
        done = import_pack(target, pack)
    assert done.lost == 5 - done.chunks > 0


def test_what_cannot_be_exported(source, tmp_path, monkeypatch):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(SettingError, match="--force"):
        export_pack(source, tmp_path / "a")
    assert (tmp_path / "a").read_text() == "mine"
    with pytest.raises(SettingError, match="check the terms"):
        export_pack(source, tmp_path / "b", Filter(namespace="c"))
    with pytest.raises(SettingError, match="cannot be written"):
        export_pack(source, tmp_path / "nowhere" / "b")
    monkeypatch.setattr("chunkcache.library.pack.MAX_HEADER", 1000)
    with pytest.raises(SettingError, match="in parts"):
        export_pack(source, tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def entry_of(parts):
    key = min(parts).removesuffix(KV_BYTES)
    return key, json.loads(parts[key + METADATA].tobytes())


@pytest.mark.parametrize(
    "fields", [{"tags": "\ud800"}, {"\ud800": "x"}, {"created": "9999-01-01T00:00:00+00:00"}]
)
def test_what_no_store_can_keep_or_no_clock_said_is_left_out(pack, tmp_path, fields):
    parts = tensors(pack)
    key, told = entry_of(parts)
    _change_metadata(**fields)(parts, key, told)
    rewrite(pack, parts)
    with open_store(f"{(tmp_path / 'store').as_uri()}") as target:
        assert import_pack(target, pack).bad == 1
        assert catalog.stats(target).total.chunks == 4


def anchors_in(store) -> int:
    return sum(len(page) for page in store.scan("anchor@"))


@pytest.mark.parametrize("metadata", [{}, None])
def test_a_known_chunk_gets_no_mentions_and_is_checked(source, pack, metadata):
    parts = tensors(pack)
    key, told = entry_of(parts)
    told["metadata"] = told["metadata"] if metadata is None else metadata
    told["mentions"] = {f"{n:064x}": "0 2026-01-01T00:00:00+00:00" for n in range(100)}
    _put(parts, key, told)
    rewrite(pack, parts)
    before = anchors_in(source)
    done = import_pack(source, pack)
    assert (done.chunks, done.bad) == (0, 1 if metadata == {} else 0)
    assert anchors_in(source) == before


@pytest.mark.parametrize(
    ("count", "date", "why"),
    [(9000, "2026-01-01T00:00:00+00:00", "more than"), (1, "9999-01-01T00:00:00+00:00", "mentions"),
     (1, "20", "mentions")],
)  # fmt: skip
def test_mentions_that_would_crowd_out_others(pack, count, date, why):
    parts = tensors(pack)
    key, told = entry_of(parts)
    told["mentions"] = {f"{n:064x}": f"0 {date}" for n in range(count)}
    _put(parts, key, told)
    rewrite(pack, parts)
    done = import_pack(MemoryStore(), pack)
    assert done.bad == 1
    assert why in done.reasons[key]


def test_metadata_and_blob_that_count_other_tokens(pack):
    parts = tensors(pack)
    key, told = entry_of(parts)
    raw = parts[key + KV_BYTES].tobytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header["__metadata__"]["tokens"] = "[1, 2, 3]"
    head = json.dumps(header).encode()
    blob = len(head).to_bytes(8, "little") + head + raw[8 + size :]
    parts[key + KV_BYTES] = np.frombuffer(blob, dtype=np.uint8)
    told["metadata"] |= {"token_ids": "[1, 2, 3]", "bytes": str(len(blob))}
    told["checksum"] = xxhash.xxh3_128_hexdigest(blob)
    _put(parts, key, told)
    rewrite(pack, parts)
    done = import_pack(MemoryStore(), pack)
    assert "other tokens" in done.reasons[key]


def test_what_export_writes_import_takes(source, tmp_path):
    index = [entry for page in source.scan("anchor@") for entry in page]
    for entry in index:
        names = dict.fromkeys(entry.metadata, "junk")
        source.write([Entry(entry.key, names, memoryview(b""), merge=True)])
    name = next(iter(index[0].metadata))
    for n in range(1000):
        key = f"{index[0].key[:-64]}{n:064x}"
        place = {name: "0 2026-01-01T00:00:00+00:00"}
        source.write([Entry(key, place, memoryview(b""), merge=True)])
    first, second, *_ = sorted(catalog.entries(source), key=lambda entry: entry.key)
    for entry, note in ((first, "x" * (1 << 20)), (second, "\ud800")):
        (blob,) = blobs(source, entry.key)
        source.write([Entry(entry.key, {**entry.metadata, "note": note}, memoryview(blob))])
    done = export_pack(source, tmp_path / "a")
    assert (done.chunks, done.left_out) == (3, 2)
    assert "too large" in str(done)
    into = import_pack(MemoryStore(), tmp_path / "a")
    assert (into.chunks, into.bad) == (3, 0)


def test_few_blobs_wait_to_be_written(pack, monkeypatch):
    waiting, most = [], []

    def write(entries):
        waiting.extend(entry.nbytes for entry in entries)
        most.append(sum(waiting))

    largest = max(part.nbytes for name, part in tensors(pack).items() if name.endswith(KV_BYTES))
    monkeypatch.setattr("chunkcache.library.unpack.MOST_WAITING", largest)
    with Scripted(write=write, flush=lambda timeout: waiting.clear()) as target:
        assert import_pack(target, pack).chunks == 5
        assert max(most) == largest

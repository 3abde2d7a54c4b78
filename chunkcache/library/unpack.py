"""Unpack: the chunks of a pack into a store, each checked; nothing in the file is believed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from chunkcache.errors import BlobError, SettingError
from chunkcache.inventory.filters import Filter
from chunkcache.keys import ANCHOR_FORMAT, ChunkKey
from chunkcache.library.pack_entry import FORMAT, MAX_METADATA, PackEntry, check, check_metadata
from chunkcache.stores.base import KV_BYTES, METADATA, ChunkStore, Entry
from chunkcache.stores.redis import MAX_BLOB_BYTES
from chunkcache.stores.writer import PatientStore

AT_ONCE = 64  # chunks looked up together
MOST_WAITING = 64_000_000  # bytes of blobs that wait to be written
MOST_TOLD = 20  # reasons that are kept


@dataclass(slots=True)
class Imported:
    """What came of a pack.

    Attributes:
        chunks: Chunks written.
        tokens: Their tokens.
        bytes: Bytes of their blobs.
        skipped: Chunks that the store had already.
        bad: Chunks left out because they are damaged, or of another key.
        lost: Chunks that the store has not kept.
        reasons: Why the first of those that are bad were left out, by key.
    """

    chunks: int = 0
    tokens: int = 0
    bytes: int = 0
    skipped: int = 0
    bad: int = 0
    lost: int = 0
    reasons: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        said = [f"{self.chunks:,} chunks, {self.tokens:,} tokens, {self.bytes / 1e6:,.1f} MB"]
        said += [f"{self.skipped:,} skipped as known"] if self.skipped else []
        said += [f"{self.bad:,} bad ones left out"] if self.bad else []
        if self.lost:
            said.append(f"{self.lost:,} not kept by the store: make it larger")
        return ", ".join(said)


def import_pack(
    store: ChunkStore,
    path: Path,
    chosen: Filter | None = None,
    *,
    pin: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Imported:
    """Put the chunks of a pack that are meant into a store, with what leads to them.

    Args:
        store: An open store.
        path: The file.
        chosen: Which chunks; `None` means all of them.
        pin: Whether they are pinned there, whatever they were.
        progress: Told how many chunks are done, and how many there are.

    Raises:
        SettingError: The file is no pack.
        StoreError: The store failed, or takes nothing.
    """
    patient = PatientStore(store)
    told = Imported()
    with _opened(path) as pack:
        keys = _keys(pack, path)
        for at in range(0, len(keys), AT_ONCE):
            _import_some(pack, keys[at : at + AT_ONCE], chosen or Filter(), pin, patient, told)
            progress(min(at + AT_ONCE, len(keys)), len(keys))
    return told


def _import_some(
    pack: Any, keys: Sequence[str], chosen: Filter, pin: bool, store: PatientStore, told: Imported
) -> None:
    sizes, fields = store.sizes(keys), store.read_metadata(keys)
    known = {key for key, size, there in zip(keys, sizes, fields, strict=True) if size and there}
    written: list[PackEntry] = []
    waiting = 0
    for key in keys:
        try:
            entry = _entry(pack, key)
            if not chosen.matches(ChunkKey.parse(key), entry.metadata):
                continue
            blob = None if key in known else _bytes(pack, key + KV_BYTES, MAX_BLOB_BYTES)
            if blob is None:
                check_metadata(entry)
            else:
                check(entry, blob)
        except BlobError as error:
            told.bad += 1
            if len(told.reasons) < MOST_TOLD:
                told.reasons[key] = str(error)
            continue
        if blob is None:
            told.skipped += 1
            continue
        if waiting + blob.nbytes > MOST_WAITING:
            store.flush()
            waiting = 0
        store.write([_pinned(entry, blob, pin), *_index(entry, pin)])
        written.append(entry)
        waiting += blob.nbytes
        told.bytes += blob.nbytes
    store.flush()
    there = store.sizes([entry.key for entry in written]) if written else []
    told.chunks += sum(size > 0 for size in there)
    told.lost += sum(not size for size in there)
    told.tokens += sum(
        int(e.metadata["tokens"]) for e, size in zip(written, there, strict=True) if size
    )


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except (OSError, SafetensorError) as error:
        raise SettingError(
            f"{str(path)!r} is no pack: {error}. Name a file that chunkcache export wrote"
        ) from error


def _keys(pack: Any, path: Path) -> list[str]:
    """The chunks of a pack, in the order of the file."""
    if (pack.metadata() or {}).get("format") != FORMAT:
        raise SettingError(
            f"{str(path)!r} is no pack, or one of another release: name a file that this release's "
            "chunkcache export wrote"
        )
    halves = (name.removesuffix(KV_BYTES).removesuffix(METADATA) for name in pack.offset_keys())
    return list(dict.fromkeys(halves))


def _entry(pack: Any, key: str) -> PackEntry:
    try:
        ChunkKey.parse(key)
    except SettingError:
        raise BlobError("its key is no chunk's") from None
    return PackEntry.read(key, bytes(_bytes(pack, key + METADATA, MAX_METADATA)))


def _bytes(pack: Any, name: str, most: int) -> memoryview:
    """A tensor of bytes, looked at before it is read."""
    try:
        part = pack.get_slice(name)
        shape, dtype = part.get_shape(), part.get_dtype()
        if dtype != "U8" or len(shape) != 1 or not 0 < shape[0] <= most:
            raise BlobError("a half of it is no row of bytes, or too long")
        return memoryview(pack.get_tensor(name))
    except SafetensorError:
        raise BlobError("a half of it is missing") from None


def _pinned(entry: PackEntry, blob: memoryview, pin: bool) -> Entry:
    fields = {**entry.metadata, "pinned": "yes" if pin else "no"}
    return Entry(entry.key, fields, blob, pinned=pin)


def _index(entry: PackEntry, pin: bool) -> Iterator[Entry]:
    """The index entries that lead to a chunk."""
    key = ChunkKey.parse(entry.key)
    for anchor, place in entry.mentions.items():
        name = str(replace(key, format=ANCHOR_FORMAT, chunk_hash=anchor))
        yield Entry(name, {key.chunk_hash: place}, memoryview(b""), merge=True, pinned=pin)

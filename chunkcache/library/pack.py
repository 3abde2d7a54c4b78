"""Packs: the chunks of a store in one file, to be kept, copied, and put into another store.

A pack is a safetensors file. Each chunk has two tensors of bytes, named as its halves are in a
store: `<key>@kv_bytes` is the blob, and `<key>@metadata` a JSON object of `metadata`, `checksum`
(xxh3-128 of the blob) and `mentions`, the index entries that lead to it: for each anchor's hash
what the entry says of the chunk. Export has one blob in memory at a time, import a few.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import xxhash

from chunkcache.errors import BlobError, SettingError
from chunkcache.inventory import catalog
from chunkcache.inventory.filters import NO_MATCH, Filter
from chunkcache.keys import ANCHOR_FORMAT, ChunkKey
from chunkcache.library.pack_entry import (
    FORMAT,
    MAX_METADATA,
    PackEntry,
    check,
    is_mention,
    most_mentions,
)
from chunkcache.stores.base import KV_BYTES, METADATA, ChunkStore, Listed, read_blobs

MAX_HEADER = 100_000_000  # what the safetensors library reads
AT_ONCE = 64  # blobs asked for together


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written.

    Attributes:
        chunks: Chunks in the pack.
        tokens: Their tokens.
        bytes: Bytes of the file.
        left_out: Chunks that are damaged or incomplete, have metadata above 1 MiB, or
            went from the store meanwhile.
    """

    chunks: int
    tokens: int
    bytes: int
    left_out: int

    def __str__(self) -> str:
        said = f"{self.chunks:,} chunks, {self.tokens:,} tokens, {self.bytes / 1e6:,.1f} MB"
        if self.left_out:
            said += f"; {self.left_out:,} left out as damaged, too large or gone"
        return said


def export_pack(
    store: ChunkStore,
    path: Path,
    chosen: Filter | None = None,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Exported:
    """Write the chunks that are meant to a file. It appears whole or not at all.

    Args:
        store: An open store.
        path: The file, by convention `*.safetensors`.
        chosen: Which chunks; `None` means all of them.
        overwrite: Replace the file if it is there.
        progress: Told the bytes of blobs that are done, and of all of them.

    Raises:
        SettingError: No chunk matches, or the file is there, cannot be written or would have too
            many chunks.
        StoreError: The store failed.
    """
    _check_target(path, overwrite)
    found = [e for e in catalog.entries(store, chosen or Filter()) if e.metadata and e.nbytes]
    if not found:
        raise SettingError(NO_MATCH)
    found.sort(key=lambda entry: entry.key)
    writer = _Writer(found, _mentions(store, {_hash(entry.key) for entry in found}))
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(8)}")
    try:
        with partial.open("xb") as file:  # follows no link that somebody has put there
            exported = writer.write(store, file, progress)
        os.replace(partial, path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with suppress(OSError):
            partial.unlink()
    return exported


def _check_target(path: Path, overwrite: bool) -> None:
    """Raise SettingError, before the store is gone through, if there can be no such file."""
    try:
        path.lstat()
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise _unwritable(path, "there is no such folder") from None
    except OSError as error:
        raise _unwritable(path, error) from None
    else:
        if path.is_dir():
            raise _unwritable(path, "it is a folder")
        if not overwrite:
            raise SettingError(f"{str(path)!r} is there already: name another file, or use --force")


def _unwritable(path: Path, why: object) -> SettingError:
    return SettingError(
        f"{str(path)!r} cannot be written: {why}. Name a file in a folder with room that you may "
        "write to"
    )


class _Writer:
    """Writes data first, into the room behind a header of the largest size that it can have."""

    def __init__(self, found: Sequence[Listed], mentions: dict[str, dict[str, str]]) -> None:
        self._found = found
        self._mentions = mentions
        self._tensors: dict[str, object] = {"__metadata__": {"format": FORMAT}}
        # No offset has more digits than their sum.
        most = sum(e.nbytes for e in found) + (1 << 20) * len(found)
        longest = sum(2 * len(e.key) + 200 + 6 * len(str(most)) for e in found)
        self._room = 8 + -(-(longest + 100) // 64) * 64
        if self._room > MAX_HEADER:
            raise SettingError(
                f"{len(found):,} chunks are too many for one pack: export them in parts, by terms "
                "such as tags=… or 'age>7d'"
            )

    def write(
        self, store: ChunkStore, file: BinaryIO, progress: Callable[[int, int], object]
    ) -> Exported:
        total, done, chunks, tokens = sum(e.nbytes for e in self._found), 0, 0, 0
        file.seek(self._room)
        for entry, blob in _blobs(store, self._found):
            done += entry.nbytes
            if blob is not None and (told := self._told(entry, blob)):
                self._add(file, entry.key, told, blob)
                chunks += 1
                tokens += int((entry.metadata or {})["tokens"])
            progress(done, total)
        end = file.tell()
        header = json.dumps(self._tensors, separators=(",", ":")).encode()
        file.seek(0)
        file.write((self._room - 8).to_bytes(8, "little") + header.ljust(self._room - 8))
        return Exported(chunks, tokens, end, len(self._found) - chunks)

    def _told(self, entry: Listed, blob: memoryview) -> bytes | None:
        """What the pack will say of a chunk; None if whoever imports it would refuse it."""
        fields = entry.metadata or {}
        tokens = fields.get("tokens", "")
        most = most_mentions(int(tokens)) if re.fullmatch("[0-9]{1,9}", tokens) else 0
        mentions = dict(list(self._mentions.get(_hash(entry.key), {}).items())[:most])
        checksum = xxhash.xxh3_128_hexdigest(blob)
        told = PackEntry(entry.key, fields, checksum, mentions).to_json()
        try:
            check(PackEntry.read(entry.key, told), blob)
        except BlobError:
            return None
        return told if len(told) <= MAX_METADATA else None

    def _add(self, file: BinaryIO, key: str, told: bytes, blob: memoryview) -> None:
        halves = ((KV_BYTES, blob), (METADATA, told))
        for half, data in halves:
            begin = file.tell() - self._room
            file.write(data)
            self._tensors[key + half] = {
                "dtype": "U8",
                "shape": [len(data)],
                "data_offsets": [begin, begin + len(data)],
            }


def _blobs(
    store: ChunkStore, found: Sequence[Listed]
) -> Iterator[tuple[Listed, memoryview | None]]:
    """Each entry with its blob, valid until the next one."""
    for at in range(0, len(found), AT_ONCE):
        part = found[at : at + AT_ONCE]
        with closing(read_blobs(store, [entry.key for entry in part])) as blobs:
            yield from zip(part, blobs, strict=True)


def _mentions(store: ChunkStore, wanted: set[str]) -> dict[str, dict[str, str]]:
    """What the index says of these chunks: by chunk, for each anchor."""
    found: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for page in store.scan(f"{ANCHOR_FORMAT}@"):
        for entry in page:
            for name, place in (entry.metadata or {}).items():
                if name in wanted:
                    with suppress(SettingError):  # not ours
                        anchor = ChunkKey.parse(entry.key).chunk_hash
                        if is_mention(anchor, place):
                            found[name][anchor] = place
    return found


def _hash(key: str) -> str:
    return ChunkKey.parse(key).chunk_hash

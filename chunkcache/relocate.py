"""Relocation: texts met before, wherever they stood, brought to where they stand now.

Two round trips more than an exact lookup: one asks for the anchors of the unknown part of the
prompt, one for the tokens of the chunks that hold them. Then blobs are read, checked, turned to
their new positions and put into the layers.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from chunkcache.anchors import WINDOW, anchors
from chunkcache.chunking import Chunk, Tokens
from chunkcache.codec import BlobForm, KVLayout, LayerKV
from chunkcache.errors import BlobError, StoreError
from chunkcache.identity import ModelIdentity
from chunkcache.matching import Piece, StoredChunk, cover
from chunkcache.rope import KeyMover
from chunkcache.stores.base import ChunkStore, Entry

ANCHOR_FORMAT = "anchor"
# Texts that every prompt has (a system prompt) collect variants; the newest are enough.
MOST_VARIANTS = 8


@dataclass(frozen=True, slots=True)
class Origin:
    """Where chunks of one model and namespace are found, and under which format."""

    store: ChunkStore
    identity: ModelIdentity
    salt: bytes
    format: str

    def key(self, chunk_hash: str) -> str:
        """The store's key of a chunk."""
        return str(self.identity.key(chunk_hash, self.format))

    def anchor_key(self, anchor_hash: str) -> str:
        """The store's key of an anchor's entry."""
        return str(self.identity.key(anchor_hash, ANCHOR_FORMAT))


def index_entries(origin: Origin, chunk: Chunk, row: Tokens, created: str) -> list[Entry]:
    """The anchor entries by which a chunk of a row of tokens will be found.

    Windows that reach over its borders count too: a text may begin with the chunk's last tokens.
    """
    begin = max(chunk.start - WINDOW + 1, 0)
    return [
        Entry(
            origin.anchor_key(anchor.hash),
            {chunk.hash: f"{begin + anchor.start - chunk.start} {created}"},
            memoryview(b""),
            merge=True,
        )
        for anchor in anchors(row[begin : chunk.stop + WINDOW - 1], origin.salt)
    ]


def find_pieces(origin: Origin, tokens: Tokens, start: int, stop: int) -> list[Piece]:
    """Which parts of positions `start` to `stop` the store has K/V for, computed anywhere.

    Raises:
        StoreError: The store failed.
    """
    windows = anchors(tokens[start:stop], origin.salt)
    if not windows:
        return []
    answers = origin.store.read_metadata([origin.anchor_key(window.hash) for window in windows])
    shifts: set[tuple[str, int]] = set()
    for window, variants in zip(windows, answers, strict=True):
        newest = sorted((variants or {}).items(), key=lambda item: item[1].partition(" ")[2])
        for chunk_hash, place in newest[-MOST_VARIANTS:]:
            offset = place.partition(" ")[0]
            if offset.removeprefix("-").isdecimal() and len(offset) < 8:
                shifts.add((chunk_hash, start + window.start - int(offset)))
    hashes = sorted({chunk_hash for chunk_hash, _ in shifts})
    records = origin.store.read_metadata([origin.key(chunk_hash) for chunk_hash in hashes])
    chunks = {
        chunk_hash: chunk
        for chunk_hash, fields in zip(hashes, records, strict=True)
        if fields and (chunk := _read_record(chunk_hash, fields))
    }
    candidates = [(chunks[name], shift) for name, shift in sorted(shifts) if name in chunks]
    return cover(tokens, candidates, start, stop)


def _read_record(chunk_hash: str, fields: dict[str, str]) -> StoredChunk | None:
    """A chunk's metadata as a candidate. Only a hint: the blob is checked against it later."""
    try:
        ids = np.array(json.loads(fields["token_ids"]), dtype=np.int64)
        start = int(fields["positions"].partition("-")[0])
    except (KeyError, ValueError, TypeError, OverflowError, RecursionError):
        return None
    if ids.ndim != 1 or not 0 < len(ids) < 1 << 20 or not 0 <= start < 1 << 31:
        return None
    return StoredChunk(
        chunk_hash,
        start,
        ids,
        parent=fields.get("parent", ""),
        clean=fields.get("context") == "exact",
        created=fields.get("created", ""),
    )


def fill_pieces(
    origin: Origin,
    layers: Sequence[Any],
    layout: KVLayout,
    mover: KeyMover,
    pieces: Sequence[Piece],
    rows: int,
    trouble: Callable[[Exception], None],
) -> tuple[list[Piece], int]:
    """Read the pieces' chunks, turn their keys, and put them into every row of the layers' room.

    Returns:
        The pieces that are in place (others stay holes), and the bytes read.
    """
    uses: defaultdict[StoredChunk, list[Piece]] = defaultdict(list)
    for piece in pieces:
        uses[piece.chunk].append(piece)
    forms = [BlobForm.of(layout, c.tokens.tolist(), c.start, c.hash) for c in uses]
    blobs = [np.empty(form.size, dtype=np.uint8).data for form in forms]
    placed: list[Piece] = []
    bytes_read = 0
    try:
        answers = origin.store.read_into(
            [origin.key(chunk.hash) for chunk in uses], [[blob] for blob in blobs]
        )
        with closing(answers):
            for form, blob, chunk, arrived in zip(forms, blobs, uses, answers, strict=True):
                if not arrived:
                    continue
                bytes_read += form.size
                head = len(form.header)
                try:
                    form.check(blob[:head], [blob[head:]])
                except BlobError as error:
                    trouble(error)
                    continue
                kv = form.views(blob)
                for piece in uses[chunk]:
                    _place(layers, kv, mover, piece, rows)
                    placed.append(piece)
    except StoreError as error:
        trouble(error)
    return sorted(placed, key=lambda piece: piece.start), bytes_read


def _place(
    layers: Sequence[Any],
    kv: Sequence[LayerKV | None],
    mover: KeyMover,
    piece: Piece,
    rows: int,
) -> None:
    inside = slice(piece.offset, piece.offset + piece.stop - piece.start)
    part = [(pair[0][:, inside], pair[1][:, inside]) if pair else None for pair in kv]
    old = torch.arange(piece.old_start, piece.old_start + piece.stop - piece.start)
    moved = mover.move_all(part, old, torch.arange(piece.start, piece.stop))
    for layer, pair in zip(layers, moved, strict=True):
        if pair is not None:
            for row in range(rows):
                layer.place(row, piece.start, *pair)


def approximate_chunks(
    tokens: Tokens, holes: Sequence[tuple[int, int]], size: int, salt: bytes
) -> list[Chunk]:
    """Chunks for tokens that were computed behind moved ones.

    Their K/V are not those of their prefix, so their hashes can never be those of exact chunks:
    they are found by their anchors alone.
    """
    chunks = []
    for start, stop in holes:
        for begin in range(start, stop, size):
            end = min(begin + size, stop)
            digest = hashlib.sha256(b"chunkcache/approximate/1" + salt)
            digest.update(begin.to_bytes(8, "little"))
            digest.update(np.ascontiguousarray(tokens[:end], dtype="<i8").tobytes())
            chunks.append(Chunk(begin, end, digest.hexdigest()))
    return chunks

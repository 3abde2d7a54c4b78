"""Relocation: chunks brought to where their text stands now.

Blobs are read, checked, turned to their new positions and put into the layers, each once for all
rows and places that need it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from chunkcache.errors import BlobError, SealedBlobError, StoreError
from chunkcache.kv.codec import KVLayout, LayerKV
from chunkcache.kv.layers import peek_all
from chunkcache.kv.rope import KeyMover
from chunkcache.reuse.index import Origin, Passage
from chunkcache.reuse.restore import discard
from chunkcache.stores.base import end_iteration, read_blobs
from chunkcache.tokens.matching import Piece, StoredChunk


def fill_pieces(
    origin: Origin,
    layers: Sequence[Any],
    layout: KVLayout,
    mover: KeyMover,
    wanted: Iterable[tuple[Passage, Sequence[Piece]]],
    at_hand: Mapping[str, tuple[int, int]],
    trouble: Callable[[Exception], None],
) -> tuple[set[Piece], int, int]:
    """Put pieces into the layers' room, their keys turned. Each chunk is read once.

    Args:
        origin: Where chunks are read.
        layers: Cache layers with room for the whole prompt.
        layout: What they cache.
        mover: The model's proven rotation.
        wanted: Passages and their pieces.
        at_hand: Row and column of chunks whose K/V are in the layers already, by hash.
        trouble: Told of a failing store and of damaged blobs.

    Returns:
        The pieces that are in place (others stay holes), the bytes read, and how many more they
        would be as the model has them.
    """
    uses: defaultdict[StoredChunk, list[tuple[Passage, Piece]]] = defaultdict(list)
    for passage, pieces in wanted:
        for piece in pieces:
            uses[piece.chunk].append((passage, piece))
    placed: set[Piece] = set()
    reads = []
    for chunk, users in uses.items():
        if chunk.hash in at_hand:
            _place(layers, peek_all(layers, *at_hand[chunk.hash], len(chunk.tokens)), mover, users)
            placed |= {piece for _, piece in users}
        else:
            reads.append(chunk)
    bytes_read = bytes_spared = 0
    damaged: list[str] = []
    answers: Iterator[memoryview | None] = iter(())
    try:
        if reads:
            answers = read_blobs(origin.store, [origin.key(chunk.hash) for chunk in reads])
        for chunk, blob in zip(reads, answers, strict=True):
            if blob is None:
                continue
            bytes_read += blob.nbytes
            form = origin.form(layout, chunk.tokens.tolist(), chunk.start, chunk.hash)
            bytes_spared += form.spared(blob.nbytes)
            try:
                kv = form.decode(blob)
            except BlobError as error:
                trouble(error)
                if not isinstance(error, SealedBlobError):
                    damaged.append(form.key)
                continue
            _place(layers, kv, mover, uses[chunk])
            placed |= {piece for _, piece in uses[chunk]}
    except StoreError as error:
        trouble(error)
    finally:
        end_iteration(answers)
    discard(origin.store, damaged, trouble)
    return placed, bytes_read, bytes_spared


def _place(
    layers: Sequence[Any],
    kv: Sequence[LayerKV | None],
    mover: KeyMover,
    users: Sequence[tuple[Passage, Piece]],
) -> None:
    for passage, piece in users:
        tokens = piece.stop - piece.start
        inside = slice(piece.offset, piece.offset + tokens)
        part = [(pair[0][:, inside], pair[1][:, inside]) if pair else None for pair in kv]
        old, new = (torch.arange(p, p + tokens) for p in (piece.old_start, piece.start))
        for row in passage.rows:
            target = peek_all(layers, row, passage.pad + piece.start, tokens)
            mover.move_into(target, part, old, new)

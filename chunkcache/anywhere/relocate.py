"""Relocation: chunks brought to where their text stands now.

Each blob is read and checked once, for all rows and places that need it. Its keys are rotated to
their new positions on the way into the layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from chunkcache.anywhere.index import Passage
from chunkcache.anywhere.matching import Match, StoredChunk
from chunkcache.kv.codec import BlobForm
from chunkcache.kv.layers import growing, peek_all
from chunkcache.kv.layout import LayerKV
from chunkcache.kv.rope import KeyRotation
from chunkcache.reuse.blobs import BlobReader, PendingChunk


def fill_matches(
    reader: BlobReader,
    layers: Sequence[Any],
    rotation: KeyRotation,
    wanted: Iterable[tuple[Passage, Sequence[Match]]],
    sizes: Mapping[str, int],
    forms: Mapping[str, BlobForm],
    at_hand: Mapping[str, tuple[int, int]],
) -> set[Match]:
    """Put matches into the layers' room, their keys turned. Each chunk is read once.

    Args:
        reader: Reads and checks the blobs.
        layers: Cache layers with room for the whole prompt.
        rotation: The model's rotation, as verified.
        wanted: Passages and their matches.
        sizes: Bytes of each chunk's blob, by hash.
        forms: The forms of these blobs, likewise.
        at_hand: Row and column of chunks whose K/V are in the layers already, by hash.

    Returns:
        The matches that are in place; the tokens of the others must be computed.
    """
    uses: defaultdict[StoredChunk, list[tuple[Passage, Match]]] = defaultdict(list)
    for passage, matches in wanted:
        for match in matches:
            uses[match.chunk].append((passage, match))
    placed: set[Match] = set()
    reads = {}
    for chunk, users in uses.items():
        if chunk.hash in at_hand:
            _place(
                layers, peek_all(layers, *at_hand[chunk.hash], len(chunk.tokens)), rotation, users
            )
            placed |= {match for _, match in users}
        else:
            name = chunk.hash
            device = growing(layers)[0].device
            reads[chunk] = PendingChunk(name, forms[name], sizes[name], device=device)
    for chunk, pending in zip(reads, reader.read(list(reads.values())), strict=True):
        if not pending.failure:
            _place(layers, pending.kv, rotation, uses[chunk])
            placed |= {match for _, match in uses[chunk]}
        pending.kv = []
    reader.discard()
    return placed


def _place(
    layers: Sequence[Any],
    kv: Sequence[LayerKV | None],
    rotation: KeyRotation,
    users: Sequence[tuple[Passage, Match]],
) -> None:
    for passage, match in users:
        tokens = match.stop - match.start
        inside = slice(match.offset, match.offset + tokens)
        part = [(pair[0][:, inside], pair[1][:, inside]) if pair else None for pair in kv]
        old, new = (torch.arange(p, p + tokens) for p in (match.old_start, match.start))
        for row in passage.rows:
            target = peek_all(layers, row, passage.pad + match.start, tokens)
            rotation.move_into(target, part, old, new)

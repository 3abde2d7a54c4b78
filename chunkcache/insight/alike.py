"""Alike: which tokens of a prompt's rows a stored chunk holds, wherever it was computed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from chunkcache.anywhere.matching import StoredChunk, grow
from chunkcache.errors import BlobError
from chunkcache.keys import ChunkKey
from chunkcache.repair import Mask
from chunkcache.reuse.keyspace import KeySpace
from chunkcache.stores.base import Listed, first_position
from chunkcache.tokens.chunking import Tokens, from_text
from chunkcache.tokens.plan import stretches

WINDOW = 32  # tokens that must be alike


@dataclass(frozen=True, slots=True)
class Match:
    """Tokens `start` to `stop` of a row, equal to those of a chunk from `offset` on.

    `at` is where the chunk stood when it was computed, -1 if nothing tells; `size` how many tokens
    it has.
    """

    key: ChunkKey
    fields: Mapping[str, str]
    row: int
    start: int
    stop: int
    offset: int
    at: int
    size: int

    @property
    def whole(self) -> bool:
        """Whether the chunk is alike from its first token to its last."""
        return self.stop - self.start == self.size

    @property
    def stands(self) -> bool:
        """Whether the text stands where it stood."""
        return self.at >= 0 and self.start - self.offset == self.at


def windows(rows: Sequence[Tokens], wanted: Sequence[Mask]) -> dict[bytes, dict[int, int]]:
    """For all windows of wanted tokens, in which rows they are, and where first."""
    places: defaultdict[bytes, dict[int, int]] = defaultdict(dict)
    for number, (row, mask) in enumerate(zip(rows, wanted, strict=True)):
        ids = np.ascontiguousarray(row, dtype="<i8")
        whole = np.convolve(mask, np.ones(WINDOW), "valid") == WINDOW if len(row) >= WINDOW else []
        for start in np.flatnonzero(whole).tolist():
            places[ids[start : start + WINDOW].tobytes()].setdefault(number, start)
    return places


def repeats(row: Tokens, wanted: Mask) -> list[tuple[int, int]]:
    """Start and stop of stretches of wanted tokens whose text stands earlier in the row."""
    ids, seen = np.ascontiguousarray(row, dtype="<i8"), set()
    again = np.zeros(len(row), dtype=bool)
    for start in range(len(row) - WINDOW + 1):
        window = ids[start : start + WINDOW].tobytes()
        if window in seen:
            again[start : start + WINDOW] = True
        seen.add(window)
    return [(a, b) for a, b, value in stretches(again & wanted) if value]


def text_of(keys: KeySpace, entry: Listed) -> Tokens | None:
    """`[tokens]`, the text of a chunk, if its metadata tell it."""
    text = (entry.metadata or {}).get("token_ids", "")
    try:
        if not text.startswith("["):  # it is sealed
            text = keys.codec.reveal(text, entry.key)
    except BlobError:
        return None
    tokens = from_text(text)
    return tokens if tokens is not None and len(tokens) >= WINDOW else None


def matches(
    entry: Listed,
    tokens: Tokens,
    rows: Sequence[Tokens],
    places: Mapping[bytes, Mapping[int, int]],
) -> list[Match]:
    """What is alike of a chunk and of each row: one match per row, where it stood if it is there.

    Only one place per row and window is tried: texts that repeat a token would have thousands.
    """
    fields, key = entry.metadata or {}, ChunkKey.parse(entry.key)
    start = first_position(fields.get("positions", ""))
    at = -1 if start is None else start
    chunk = StoredChunk(key.chunk_hash, at, tokens)
    found: dict[int, Match] = {}
    for offset in range(0, len(tokens) - WINDOW + 1, WINDOW):
        window = tokens[offset : offset + WINDOW]
        for number, first in places.get(window.tobytes(), {}).items():
            if number in found:
                continue
            row, own = rows[number], at + offset
            is_there = at >= 0 and np.array_equal(row[own : own + WINDOW], window)
            place = own if is_there else first
            part = next(p for p in grow(row, chunk, place - offset) if p.start <= place < p.stop)
            found[number] = Match(
                key, fields, number, part.start, part.stop, part.offset, at, len(tokens)
            )
        if len(found) == len(rows):
            break
    return list(found.values())

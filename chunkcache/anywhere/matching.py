"""Matching: which parts of a prompt are texts met before, and which stored chunk serves each part.

Pure: candidates in, pieces out. A candidate's tokens are compared one by one, so an anchor's hash
only suggests. Of several stored variants of the same text the one whose old context looks most like
the new one is taken, since what a moved token remembers of its old context is the error.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from chunkcache.tokens.chunking import Tokens

# Shorter finds are not worth moving: repairing them costs as much as computing them.
SHORTEST_RUN = 32


@dataclass(frozen=True, eq=False, slots=True)
class StoredChunk:
    """A chunk that the store has, wherever it was computed.

    Attributes:
        hash: Its hash, as in its key.
        start: Position of its first token when it was computed.
        tokens: Its token ids.
        parent: Hash of the chunk that stood before it, or `""`.
        clean: Whether its own context was exact.
        created: When it was stored; later is larger.
        pinned: Whether it was stored to stay.
    """

    hash: str
    start: int
    tokens: Tokens
    parent: str = ""
    clean: bool = True
    created: str = ""
    pinned: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class Piece:
    """Tokens `start` to `stop` of the prompt, equal to those of a chunk from `offset` on."""

    start: int
    stop: int
    chunk: StoredChunk
    offset: int
    # Pieces that continue each other, in the prompt as where they were computed, form one run.
    continues: bool = False
    # Tokens right before it that stood there then, too, and where such a run may end.
    before: int = 0
    run_stop: int = 0

    @property
    def old_start(self) -> int:
        """Position of the first token when it was computed."""
        return self.chunk.start + self.offset

    def part(self, start: int, stop: int) -> Piece:
        """The piece between two positions of the prompt."""
        before = self.before + start - self.start
        offset = self.offset + start - self.start
        return replace(self, start=start, stop=stop, offset=offset, before=before)


def grow(tokens: Tokens, chunk: StoredChunk, shift: int) -> list[Piece]:
    """All maximal equal parts when token `i` of the chunk is laid on token `shift + i`."""
    begin, end = max(shift, 0), min(shift + len(chunk.tokens), len(tokens))
    if begin >= end:
        return []
    equal = tokens[begin:end] == chunk.tokens[begin - shift : end - shift]
    edges = np.flatnonzero(np.diff(np.concatenate(([False], equal, [False]))))
    return [
        Piece(begin + int(a), begin + int(b), chunk, begin + int(a) - shift)
        for a, b in zip(edges[::2], edges[1::2], strict=True)
    ]


def cover(
    tokens: Tokens, candidates: Iterable[tuple[StoredChunk, int]], start: int, stop: int
) -> list[Piece]:
    """Cover positions `start` to `stop` with pieces of known chunks, without overlap.

    As `laid`; runs shorter than `SHORTEST_RUN` are left out.
    """
    return long_enough(laid(tokens, candidates, start, stop))


def laid(
    tokens: Tokens, candidates: Iterable[tuple[StoredChunk, int]], start: int, stop: int
) -> list[Piece]:
    """Pieces of known chunks between positions `start` and `stop`, in order, without overlap.

    Args:
        tokens: The whole prompt.
        candidates: Chunks, and where in the prompt their first token would lie.
        start: Where to begin; what stands before is known exactly.
        stop: Where to end.
    """
    found = _linked([piece for chunk, shift in candidates for piece in grow(tokens, chunk, shift)])
    found = [piece for piece in found if piece.stop > start and piece.start < stop]
    chosen: list[Piece] = []
    position, at = start, 0
    open_pieces: list[Piece] = []
    while position < stop:
        while at < len(found) and found[at].start <= position:
            open_pieces.append(found[at])
            at += 1
        open_pieces = [piece for piece in open_pieces if piece.stop > position]
        if not open_pieces:
            if at == len(found):
                break
            position = max(position, found[at].start)
            continue
        last = chosen[-1] if chosen else None
        best = max(open_pieces, key=lambda piece: _merit(piece, position, last))
        piece = best.part(position, min(best.stop, stop))
        chosen.append(replace(piece, continues=_continues(piece, last)))
        position = piece.stop
    return chosen


def _merit(piece: Piece, position: int, last: Piece | None) -> tuple[object, ...]:
    part = piece.part(position, piece.stop)
    return (
        _continues(part, last),  # the whole run before it was its context then, too
        part.before,
        piece.run_stop,
        piece.stop,
        piece.chunk.clean,
        piece.chunk.created,
    )


def _linked(pieces: list[Piece]) -> list[Piece]:
    """The pieces by their start, with `before` and `run_stop`.

    Those that belong together are the last part of a chunk and the first of the one that stood
    behind it then.
    """
    order = sorted(pieces, key=lambda piece: (piece.start, piece.stop))
    ends: dict[tuple[str, int], int] = {}
    for number, piece in enumerate(order):
        before = ends.get((piece.chunk.parent, piece.start), 0) if not piece.offset else 0
        order[number] = replace(piece, before=before)
        if piece.offset + piece.stop - piece.start == len(piece.chunk.tokens):
            ends[piece.chunk.hash, piece.stop] = before + piece.stop - piece.start
    starts: dict[tuple[str, int], int] = {}
    for number in reversed(range(len(order))):
        piece = order[number]
        run_stop = piece.stop
        if piece.offset + piece.stop - piece.start == len(piece.chunk.tokens):
            run_stop = starts.get((piece.chunk.hash, piece.stop), piece.stop)
        order[number] = replace(piece, run_stop=run_stop)
        if not piece.offset and piece.chunk.parent:
            place = piece.chunk.parent, piece.start
            starts[place] = max(starts.get(place, 0), run_stop)
    return order


def _continues(piece: Piece, last: Piece | None) -> bool:
    """Whether the piece stood right behind the last one when both were computed."""
    if last is None or last.stop != piece.start:
        return False
    if last.chunk is piece.chunk:
        return last.offset + last.stop - last.start == piece.offset
    ended = last.offset + last.stop - last.start == len(last.chunk.tokens)
    return ended and piece.offset == 0 and piece.chunk.parent == last.chunk.hash


def runs(pieces: list[Piece]) -> list[list[Piece]]:
    """Pieces grouped into runs that moved together."""
    grouped: list[list[Piece]] = []
    for piece in pieces:
        # One before it may have been lost on the way.
        if piece.continues and grouped and grouped[-1][-1].stop == piece.start:
            grouped[-1].append(piece)
        else:
            grouped.append([piece])
    return grouped


def long_enough(pieces: list[Piece], tokens: int = SHORTEST_RUN) -> list[Piece]:
    """The pieces of runs of so many tokens and more."""
    return [piece for run in runs(pieces) if run[-1].stop - run[0].start >= tokens for piece in run]

"""MovedText: what is known of a passage by its text, and what becomes of each of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from chunkcache.anywhere.index import Passage
from chunkcache.anywhere.matching import Piece
from chunkcache.repair import Mask
from chunkcache.tokens.plan import (
    NOT_IN_STORE,
    OTHER_ROW,
    TOO_SHORT,
    Kind,
    Span,
    computed_too,
    stretches,
)

UNREADABLE = "its chunk could not be read"


@dataclass
class MovedText:
    """A passage on its way into the layers.

    Attributes:
        passage: The passage.
        found: Pieces whose blob the store has, long enough to be moved.
        lost: Pieces of chunks whose blob is gone or damaged.
        short: Pieces too short to be moved.
        exact: Pieces of `found` and `lost` whose K/V are exact where they stand.
        wanted: Pieces of `found` that save the model a column: these are read.
        placed: Pieces of `wanted` whose K/V are in place.
        again: `[tokens]`, True for moved tokens to compute again.
    """

    passage: Passage
    found: list[Piece]
    lost: list[Piece]
    short: list[Piece]
    exact: set[Piece]
    wanted: list[Piece] = field(default_factory=list)
    placed: list[Piece] = field(default_factory=list)
    again: Mask = field(default_factory=lambda: np.zeros(0, dtype=bool))

    def known(self) -> list[Piece]:
        """All pieces whose text the store has, in order, whether their blobs are there or not."""
        return sorted([*self.found, *self.lost], key=lambda piece: piece.start)

    def moving(self) -> list[Piece]:
        """Pieces in place whose K/V are approximate there."""
        return [piece for piece in self.placed if piece not in self.exact]

    def moved(self) -> Mask:
        """`[tokens]`, True where such a piece is."""
        return self._covered(self.moving())

    def unknown(self, pieces: Sequence[Piece]) -> Mask:
        """`[tokens]`, True where neither the exact beginning nor one of these pieces is."""
        mask = ~self._covered(pieces)
        mask[: self.passage.start] = False
        return mask

    def _covered(self, pieces: Sequence[Piece]) -> Mask:
        mask = np.zeros(len(self.passage.tokens), dtype=bool)
        for piece in pieces:
            mask[piece.start : piece.stop] = True
        return mask

    def not_found(self) -> list[tuple[int, int]]:
        """Start and stop of each stretch of tokens that are in place nowhere, in positions."""
        return [(a, b) for a, b, value in stretches(self.unknown(self.placed)) if value]

    def inexact_from(self, computed: Mask) -> int | None:
        """Column from which on K/V are not those of a full run, `None` if all are.

        `computed` is `[tokens]`, True for those that the model computes.
        """
        kept = np.flatnonzero(self.moved() & ~computed)
        return self.passage.pad + int(kept[0]) if len(kept) else None

    def spans(self, computed: Mask) -> list[Span]:
        """What becomes of the tokens from `passage.start` on when these are computed."""
        spans: list[Span] = []
        position, end = self.passage.start, len(self.passage.tokens)
        for piece in self.found:
            if piece.start > position:
                spans += self._gap(position, piece.start)
            position, key = piece.stop, piece.chunk.hash
            if piece not in self.placed:
                why = UNREADABLE if piece in self.wanted else OTHER_ROW
                spans.append(Span(piece.start, piece.stop, Kind.COMPUTED, key, reason=why))
                continue
            if piece in self.exact:
                reused = Span(piece.start, piece.stop, Kind.REUSED, key, "store")
                spans += computed_too([reused], computed)
                continue
            for begin, stop, value in stretches(computed[piece.start : piece.stop]):
                kind = Kind.RECOMPUTED if value else Kind.MOVED
                origin = f"position {piece.old_start + begin}"
                spans.append(Span(piece.start + begin, piece.start + stop, kind, key, origin))
        if position < end:
            spans += self._gap(position, end)
        return spans

    def _gap(self, start: int, stop: int) -> list[Span]:
        """Tokens between pieces, and which of them were found but cannot be moved."""
        spans: list[Span] = []
        known = [(p, TOO_SHORT) for p in self.short] + [(p, UNREADABLE) for p in self.lost]
        for piece, why in sorted(known, key=lambda item: item[0].start):
            if start <= piece.start < stop:
                if piece.start > start:
                    spans.append(Span(start, piece.start, Kind.COMPUTED, reason=NOT_IN_STORE))
                spans.append(Span(piece.start, piece.stop, Kind.COMPUTED, reason=why))
                start = piece.stop
        if start < stop:
            spans.append(Span(start, stop, Kind.COMPUTED, reason=NOT_IN_STORE))
        return spans

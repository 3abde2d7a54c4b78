"""MovedText: what is known of a passage by its text, and what becomes of each of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from chunkcache.anywhere.index import Passage
from chunkcache.anywhere.matching import Match
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
NOT_PREPARED = "not among the prepared documents that the store has"


@dataclass
class MovedText:
    """A passage on its way into the layers.

    Attributes:
        passage: The passage.
        found: Matches whose blob the store has, long enough to be moved.
        lost: Matches of chunks whose blob is gone or damaged.
        short: Matches too short to be moved.
        exact: Matches of `found` and `lost` whose K/V are exact where they stand.
        missing: Why the store has nothing of other tokens.
        wanted: Matches of `found` that save the model a column: these are read.
        placed: Matches of `wanted` whose K/V are in place.
        again: `[tokens]`, True for moved tokens to compute again.
    """

    passage: Passage
    found: list[Match]
    lost: list[Match]
    short: list[Match]
    exact: set[Match]
    missing: str = NOT_IN_STORE
    wanted: list[Match] = field(default_factory=list)
    placed: list[Match] = field(default_factory=list)
    again: Mask = field(default_factory=lambda: np.zeros(0, dtype=bool))

    def known(self) -> list[Match]:
        """All matches whose text the store has, in order, whether their blobs are there or not."""
        return sorted([*self.found, *self.lost], key=lambda match: match.start)

    def moving(self) -> list[Match]:
        """Matches in place whose K/V are approximate there."""
        return [match for match in self.placed if match not in self.exact]

    def moved(self) -> Mask:
        """`[tokens]`, True where such a match is."""
        return self._covered(self.moving())

    def unknown(self, matches: Sequence[Match]) -> Mask:
        """`[tokens]`, True where neither the exact beginning nor one of these matches is."""
        mask = ~self._covered(matches)
        mask[: self.passage.start] = False
        return mask

    def _covered(self, matches: Sequence[Match]) -> Mask:
        mask = np.zeros(len(self.passage.tokens), dtype=bool)
        for match in matches:
            mask[match.start : match.stop] = True
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
        for match in self.found:
            if match.start > position:
                spans += self._gap(position, match.start)
            position, key = match.stop, match.chunk.hash
            if match not in self.placed:
                why = UNREADABLE if match in self.wanted else OTHER_ROW
                spans.append(Span(match.start, match.stop, Kind.COMPUTED, key, reason=why))
                continue
            if match in self.exact:
                reused = Span(match.start, match.stop, Kind.REUSED, key, "store")
                spans += computed_too([reused], computed)
                continue
            for begin, stop, value in stretches(computed[match.start : match.stop]):
                kind = Kind.RECOMPUTED if value else Kind.MOVED
                origin = f"{match.chunk.variant}, position {match.old_start + begin}"
                spans.append(Span(match.start + begin, match.start + stop, kind, key, origin))
        if position < end:
            spans += self._gap(position, end)
        return spans

    def _gap(self, start: int, stop: int) -> list[Span]:
        """Tokens between matches, and which of them were found but cannot be moved."""
        spans: list[Span] = []
        known = [(p, TOO_SHORT) for p in self.short] + [(p, UNREADABLE) for p in self.lost]
        for match, why in sorted(known, key=lambda item: item[0].start):
            if start <= match.start < stop:
                if match.start > start:
                    spans.append(Span(start, match.start, Kind.COMPUTED, reason=self.missing))
                spans.append(Span(match.start, match.stop, Kind.COMPUTED, reason=why))
                start = match.stop
        if start < stop:
            spans.append(Span(start, stop, Kind.COMPUTED, reason=self.missing))
        return spans

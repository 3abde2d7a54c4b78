"""Fates: what would become of each token of a row, and why, from what the store has of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from chunkcache.anywhere.matching import Match, StoredChunk
from chunkcache.anywhere.moved import NOT_PREPARED
from chunkcache.gain import NO_GAIN
from chunkcache.insight.elsewhere import Sighting
from chunkcache.insight.explanation import Finding
from chunkcache.insight.seams import Decode, Seam, find_seams
from chunkcache.repair import Mask
from chunkcache.reuse.blobs import WRONG_SIZE
from chunkcache.reuse.context import CacheContext
from chunkcache.reuse.continuations import Continuation
from chunkcache.tokens.chunking import Chunk, Tokens
from chunkcache.tokens.plan import NOT_IN_STORE, TOO_SHORT, Kind, RowPlan

LAST_TOKEN = "the last token is always computed"
TAIL_NOT_IN_STORE = "not in the store (a shorter last chunk is kept only where a prompt ended)"
GAP_BEFORE = "in the store, but a chunk before it is missing"
OTHER_ROW = "in the store, but another row of the batch needs these columns computed"
OTHER_POSITION = "computed at another position"
OTHER_CUT = "cut into other chunks"
OTHER_CONTEXT = "computed behind other text"
INEXACT_CONTEXT = "computed behind moved text"
BLOB_GONE = "its text is indexed, but its K/V are gone (evicted, expired or deleted)"
REPEATED = "not in the store; it repeats text of this prompt, which can be moved once it is stored"
WOULD_MOVE = ": reuse='anywhere' would find it"


@dataclass(frozen=True, slots=True)
class RowFate:
    """What is known of one row of the batch.

    Attributes:
        row: Its number.
        context: Whether text may move.
        sizes: Bytes of each chunk's blob, by hash.
        pad: Columns of padding before it.
        plan: The row's chunks, and how far they are known.
        known: How many tokens from the start could be reused.
        matches: What was found by its text behind those.
        exact: Those of them whose K/V would be taken as they are.
        damaged: Hashes of chunks whose blob cannot be sound; they count as missing.
        short: What was found by its text too, in runs that are too short to be moved.
        seen: Where the store has the rest of its text, though not for this cache.
        continuation: The stored chunk that goes on from the row's own ones, if there is one.
        repeats: Start and stop of text that nothing has, and that stands earlier in the row too.
    """

    row: int
    context: CacheContext
    sizes: Mapping[str, int]
    pad: int
    plan: RowPlan
    known: int
    matches: list[Match]
    exact: set[Match]
    damaged: Collection[str] = ()
    short: Sequence[Match] = ()
    seen: Sequence[Sighting] = ()
    repeats: Sequence[tuple[int, int]] = ()
    continuation: Continuation | None = None

    @property
    def _may_move(self) -> bool:
        return self.context.settings.reuse == "anywhere"

    def _moving(self) -> list[Match]:
        return [p for p in self.matches if self._may_move and self.sizes[p.chunk.hash]]

    def unknown(self) -> Mask:
        """`[tokens]`, True where this row alone would have to be computed."""
        mask = np.ones(self.plan.tokens, dtype=bool)
        mask[: self.known] = False
        for match in self._moving():
            mask[match.start : match.stop] = False
        return mask

    def missing(self) -> Mask:
        """`[tokens]`, True where nothing in the store is known to be of use."""
        mask = np.ones(self.plan.tokens, dtype=bool)
        mask[: self.known] = False
        for match in self.matches:
            mask[match.start : match.stop] = False
        for chunk in self.plan.chunks:
            if self.sizes[chunk.hash] or chunk.hash in self.damaged:
                mask[chunk.start : chunk.stop] = False
        return mask

    def reads(self, computed: Mask) -> tuple[set[str], set[str], set[str]]:
        """Hashes of the chunks that would be read when these columns are computed.

        Those that serve where they stand, which of them serve whole, and those that are moved.
        """
        here, stop = computed[self.pad :], self.known
        if not self._may_move:
            stop = min(stop, int(here.argmax())) if here.size else 0  # a row may be padding alone
        moved = {p.chunk.hash for p in self._moving() if not here[p.start : p.stop].all()}
        exact = self.plan.reads(stop)
        partial = self.continuation is not None and not self.continuation.is_whole
        whole = {c.hash for c in exact if not (partial and c is self.plan.branch)}
        return {c.hash for c in exact}, whole, moved

    def seams(self, tokens: Tokens, decode: Decode | None) -> list[Seam]:
        """Where the tokens of this row, `[tokens]`, part from stored ones, the text going on."""
        if not decode:
            return []
        matches = list(self.matches)
        if self.continuation:
            chunk, its, *_ = self.continuation
            stored = StoredChunk(chunk.hash, chunk.start, its)
            matches.insert(0, Match(chunk.start, chunk.stop, stored, 0))
        return find_seams(tokens, matches, decode, self.row)

    def findings(self, computed: Mask) -> list[Finding]:
        """The fate of every token, in order, when these columns are computed."""
        end, here = self.plan.tokens, computed[self.pad :]
        chunks = self.plan.chunks[::-1]  # of two that overlap, the first serves
        exact = [c for c in self.plan.known()[::-1] if c.start < self.known]
        absent = NOT_PREPARED if self.context.settings.prepared_only else NOT_IN_STORE
        missing = [self._chunk(c, absent) for c in chunks if not self.sizes[c.hash]]
        gap = NO_GAIN if self.plan.missing == NO_GAIN else self.plan.unread or GAP_BEFORE
        there = [self._chunk(c, gap) for c in chunks if self.sizes[c.hash]]
        by_text = [self._match(match, here) for match in self.matches]
        # What is said later of a token hides what was said before.
        said = [
            self._told(0, end, self.plan.rest or absent),
            *missing,
            *(self._told(a, b, REPEATED) for a, b in self.repeats if self._may_move),
            *(self._told(s.start, s.stop, s.reason) for s in self.seen),
            *(self._told(p.start, p.stop, TOO_SHORT) for p in self.short if self._may_move),
            *([*there, *by_text] if self._may_move else [*by_text, *there]),
            *(self._chunk(chunk, "", Kind.REUSED) for chunk in exact),
            self._told(max(end - 1, 0), end, LAST_TOKEN),
        ]
        speaker = np.zeros(end, dtype=np.int64)
        for number, finding in enumerate(said):
            speaker[finding.start : finding.stop] = number
        changes = (np.diff(speaker) != 0) | np.diff(here)
        edges = [0, *(np.flatnonzero(changes) + 1).tolist(), end]
        findings = [said[speaker[a]].part(a, b) for a, b in pairwise(edges) if a < b]
        return [
            replace(f, kind=Kind.COMPUTED, reason=OTHER_ROW)
            if f.kind is Kind.REUSED and here[f.start]
            else f
            for f in findings
        ]

    def _told(self, start: int, stop: int, why: str) -> Finding:
        return Finding(start, stop, Kind.COMPUTED, reason=why, row=self.row)

    def _chunk(self, chunk: Chunk, why: str, kind: Kind = Kind.COMPUTED) -> Finding:
        if chunk.hash in self.damaged:
            why = WRONG_SIZE
        elif why == NOT_IN_STORE and chunk.stop - chunk.start < self.context.grid.size:
            why = TAIL_NOT_IN_STORE
        size = self.sizes[chunk.hash]
        origin = "store" if size else ""
        return Finding(
            chunk.start, chunk.stop, kind, chunk.hash, origin, why, row=self.row, bytes=size
        )

    def _match(self, match: Match, here: Mask) -> Finding:
        size, why = self.sizes[match.chunk.hash], self._why_not_exact(match)
        kind = Kind.COMPUTED
        if not size:
            why = WRONG_SIZE if match.chunk.hash in self.damaged else BLOB_GONE
        elif not self._may_move:
            why += WOULD_MOVE
        elif here[match.start : match.stop].all():
            why = OTHER_ROW
        elif match in self.exact:
            kind, why = Kind.REUSED, ""
        else:
            kind = Kind.MOVED
        return Finding(
            match.start, match.stop, kind, match.chunk.hash, "", why,
            row=self.row, bytes=size, old_start=match.old_start, variant=match.chunk.variant,
        )  # fmt: skip

    def _why_not_exact(self, match: Match) -> str:
        """Why text that is in the store is not found under a key of this prompt."""
        if match.old_start != match.start:
            return OTHER_POSITION
        if not match.chunk.clean:
            return INEXACT_CONTEXT
        stop = match.chunk.start + len(match.chunk.tokens)
        for chunk in self.plan.chunks:
            if (chunk.start, chunk.stop) == (match.chunk.start, stop):
                return GAP_BEFORE if chunk.hash == match.chunk.hash else OTHER_CONTEXT
        return OTHER_CUT

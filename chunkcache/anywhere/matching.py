"""Matching: which parts of a prompt are texts met before, and which stored chunk serves each part.

Pure: candidates in, matches out. A candidate's tokens are compared one by one, so an anchor's hash
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
PREPARED, MET = "prepared", "met in a prompt"


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
        prepared: Whether `add_documents` computed it, behind its prefix and filler alone.
    """

    hash: str
    start: int
    tokens: Tokens
    parent: str = ""
    clean: bool = True
    created: str = ""
    pinned: bool = False
    prepared: bool = False

    @property
    def variant(self) -> str:
        """Which of the variants of its text it is, as reports say it."""
        return PREPARED if self.prepared else MET


@dataclass(frozen=True, eq=False, slots=True)
class Match:
    """Tokens `start` to `stop` of the prompt, equal to those of a chunk from `offset` on."""

    start: int
    stop: int
    chunk: StoredChunk
    offset: int
    # Matches that continue each other, in the prompt as where they were computed, form one run.
    continues: bool = False
    # Tokens right before it that stood there then, too, and where such a run may end.
    before: int = 0
    run_stop: int = 0

    @property
    def old_start(self) -> int:
        """Position of the first token when it was computed."""
        return self.chunk.start + self.offset

    def part(self, start: int, stop: int) -> Match:
        """The match between two positions of the prompt."""
        before = self.before + start - self.start
        offset = self.offset + start - self.start
        return replace(self, start=start, stop=stop, offset=offset, before=before)


def grow(tokens: Tokens, chunk: StoredChunk, shift: int) -> list[Match]:
    """All maximal equal parts when token `i` of the chunk is laid on token `shift + i`."""
    begin, end = max(shift, 0), min(shift + len(chunk.tokens), len(tokens))
    if begin >= end:
        return []
    equal = tokens[begin:end] == chunk.tokens[begin - shift : end - shift]
    edges = np.flatnonzero(np.diff(np.concatenate(([False], equal, [False]))))
    return [
        Match(begin + int(a), begin + int(b), chunk, begin + int(a) - shift)
        for a, b in zip(edges[::2], edges[1::2], strict=True)
    ]


def cover(
    tokens: Tokens, candidates: Iterable[tuple[StoredChunk, int]], start: int, stop: int
) -> list[Match]:
    """Cover positions `start` to `stop` with matches of known chunks, without overlap.

    As `laid`; runs shorter than `SHORTEST_RUN` are left out.
    """
    return long_enough(laid(tokens, candidates, start, stop))


def laid(
    tokens: Tokens, candidates: Iterable[tuple[StoredChunk, int]], start: int, stop: int
) -> list[Match]:
    """Matches of known chunks between positions `start` and `stop`, in order, without overlap.

    Args:
        tokens: The whole prompt.
        candidates: Chunks, and where in the prompt their first token would lie.
        start: Where to begin; what stands before is known exactly.
        stop: Where to end.
    """
    found = _linked([match for chunk, shift in candidates for match in grow(tokens, chunk, shift)])
    found = [match for match in found if match.stop > start and match.start < stop]
    chosen: list[Match] = []
    position, at = start, 0
    open_matches: list[Match] = []
    while position < stop:
        while at < len(found) and found[at].start <= position:
            open_matches.append(found[at])
            at += 1
        open_matches = [match for match in open_matches if match.stop > position]
        if not open_matches:
            if at == len(found):
                break
            position = max(position, found[at].start)
            continue
        last = chosen[-1] if chosen else None
        best = max(open_matches, key=lambda match: _merit(match, position, last))
        match = best.part(position, min(best.stop, stop))
        chosen.append(replace(match, continues=_continues(match, last)))
        position = match.stop
    return chosen


def _merit(match: Match, position: int, last: Match | None) -> tuple[object, ...]:
    part = match.part(position, match.stop)
    return (
        _continues(part, last),  # the whole run before it was its context then, too
        part.before,
        match.run_stop,
        match.stop,
        match.chunk.clean,
        match.chunk.created,
    )


def _linked(matches: list[Match]) -> list[Match]:
    """The matches by their start, with `before` and `run_stop`.

    Those that belong together are the last part of a chunk and the first of the one that stood
    behind it then.
    """
    order = sorted(matches, key=lambda match: (match.start, match.stop))
    ends: dict[tuple[str, int], int] = {}
    for number, match in enumerate(order):
        before = ends.get((match.chunk.parent, match.start), 0) if not match.offset else 0
        order[number] = replace(match, before=before)
        if match.offset + match.stop - match.start == len(match.chunk.tokens):
            ends[match.chunk.hash, match.stop] = before + match.stop - match.start
    starts: dict[tuple[str, int], int] = {}
    for number in reversed(range(len(order))):
        match = order[number]
        run_stop = match.stop
        if match.offset + match.stop - match.start == len(match.chunk.tokens):
            run_stop = starts.get((match.chunk.hash, match.stop), match.stop)
        order[number] = replace(match, run_stop=run_stop)
        if not match.offset and match.chunk.parent:
            place = match.chunk.parent, match.start
            starts[place] = max(starts.get(place, 0), run_stop)
    return order


def _continues(match: Match, last: Match | None) -> bool:
    """Whether the match stood right behind the last one when both were computed."""
    if last is None or last.stop != match.start:
        return False
    if last.chunk is match.chunk:
        return last.offset + last.stop - last.start == match.offset
    ended = last.offset + last.stop - last.start == len(last.chunk.tokens)
    return ended and match.offset == 0 and match.chunk.parent == last.chunk.hash


def runs(matches: list[Match]) -> list[list[Match]]:
    """Matches grouped into runs that moved together."""
    grouped: list[list[Match]] = []
    for match in matches:
        # One before it may have been lost on the way.
        if match.continues and grouped and grouped[-1][-1].stop == match.start:
            grouped[-1].append(match)
        else:
            grouped.append([match])
    return grouped


def long_enough(matches: list[Match], tokens: int = SHORTEST_RUN) -> list[Match]:
    """The matches of runs of so many tokens and more."""
    return [
        match for run in runs(matches) if run[-1].stop - run[0].start >= tokens for match in run
    ]

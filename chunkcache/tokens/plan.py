"""RowPlan: for each chunk of a row, whether it is reused or computed, and why.

Pure data. A plan is made from what the store says it has, may be revised when a blob turns out
to be bad, and is what the report shows.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from chunkcache.tokens.chunking import Chunk

NOT_IN_STORE = "not in the store"
OFF = "reuse is off"
WANTED = "its output is wanted"
HELD = "held"  # by this cache object, from a turn before
GAPS = (
    "tokens behind the first gap in the attention mask are computed and not stored (where "
    "that gap is padding on the right, set tokenizer.padding_side = 'left')"
)
TOO_SHORT = "in the store, but too few tokens in a row to be moved"
OTHER_ROW = "another row of the batch needs these columns computed"


class Kind(StrEnum):
    """What happens to a token of the prompt."""

    REUSED = "reused"
    MOVED = "moved"
    RECOMPUTED = "recomputed"
    COMPUTED = "computed"


COMPUTING = (Kind.RECOMPUTED, Kind.COMPUTED)
"""What the model does itself."""


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring tokens of one row with the same fate.

    `start` and `stop` are positions in the row, `key` is the hash of the chunk. `origin` says where
    reused K/V come from (`"store"`, or `"held"` by this cache object; of moved text, which variant
    and its old position); `reason` why computed ones are not reused.
    """

    start: int
    stop: int
    kind: Kind
    key: str = ""
    origin: str = ""
    reason: str = ""

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class RowPlan:
    """The plan of one row: which chunks to read so that its first `reach` tokens are known.

    Attributes:
        tokens: Tokens in the row, padding not counted.
        held: Tokens from the start that the cache object holds already.
        chunks: All chunks of the row, in order.
        reach: Tokens from the start that are known once the reads have succeeded.
        missing: Why the row is not known any further.
        rest: Why tokens behind the last chunk are computed, where that is another reason.
        branch: A stored chunk that agrees with the row in its first tokens only (a continuation);
            it brings the tokens behind `run`.
        run: How far the row's own chunks are known, where there is a branch.
        unread: Why chunks behind `reach` are not read though the store has them, if that is why.
    """

    tokens: int
    held: int
    chunks: tuple[Chunk, ...]
    reach: int
    missing: str
    rest: str = ""
    branch: Chunk | None = None
    run: int = 0
    unread: str = ""

    def extended(self, branch: Chunk) -> RowPlan:
        """This plan when a stored chunk goes on like the row where its own chunks end."""
        return replace(self, branch=branch, run=self.reach, reach=branch.stop)

    def known(self) -> list[Chunk]:
        """The chunks by which the row is known, in order."""
        end = self.run if self.branch else self.reach
        return [c for c in self.chunks if c.stop <= end] + ([self.branch] if self.branch else [])

    def reads(self, limit: int) -> list[Chunk]:
        """The chunks that bring tokens between what is held and `limit`."""
        return [chunk for chunk in self.known() if self.held < chunk.stop and chunk.start < limit]

    def cut_at(self, position: int, why: str) -> RowPlan:
        """This plan when nothing from `position` on can be read after all."""
        if position >= self.reach:
            return self
        branch = self.branch if position > self.run else None
        return replace(self, reach=position, missing=why, branch=branch)

    def spans(self, used: int) -> list[Span]:
        """What happens to each token when the first `used` are not computed.

        `used` may be less than `reach`: outputs of the last tokens are wanted, or another row of
        the batch is not known as far.
        """
        spans = []
        held = min(self.held, used)
        if held:
            spans.append(Span(0, held, Kind.REUSED, origin=HELD))
        position = held
        for chunk in self.known():
            if position < min(chunk.stop, used):
                stop = min(chunk.stop, used)
                spans.append(Span(position, stop, Kind.REUSED, chunk.hash, "store"))
                position = stop
        for chunk in self.chunks:
            if chunk.stop > position:
                why = self.missing if chunk.stop > self.reach else WANTED
                spans.append(Span(position, chunk.stop, Kind.COMPUTED, chunk.hash, reason=why))
                position = chunk.stop
        if position < self.tokens:
            why = self.rest or (self.missing if self.tokens > self.reach else WANTED)
            spans.append(Span(position, self.tokens, Kind.COMPUTED, reason=why))
        return spans


def plan_row(
    chunks: list[Chunk], tokens: int, held: int, known: Collection[str], missing: str
) -> RowPlan:
    """Follow the run of known chunks from what is held as far as it goes.

    Args:
        chunks: The row's chunks in order, as `chunking.cut` gives them.
        tokens: Tokens in the row.
        held: Tokens from the start whose K/V are there already.
        known: Hashes that the store has.
        missing: The reason to give where the run ends.
    """
    reach = held
    for chunk in chunks:
        if chunk.stop <= reach:
            continue
        if chunk.start > reach or chunk.hash not in known:
            break
        reach = chunk.stop
    return RowPlan(tokens, held, tuple(chunks), reach, missing)


def computed_too(spans: Sequence[Span], computed: npt.NDArray[np.bool_]) -> list[Span]:
    """Spans of reused tokens, with those told apart that another row has computed again.

    Args:
        spans: Spans of one row.
        computed: `[tokens]`, True for the row's tokens that the model computes.
    """
    parts = []
    for span in spans:
        for begin, end, again in stretches(computed[span.start : span.stop]):
            part = replace(span, start=span.start + begin, stop=span.start + end)
            if again:
                part = replace(part, kind=Kind.COMPUTED, origin="", reason=OTHER_ROW)
            parts.append(part)
    return parts


def stretches(mask: npt.NDArray[np.bool_]) -> list[tuple[int, int, bool]]:
    """Start, stop and value of each stretch of equal values."""
    edges = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(mask)]
    return [(a, b, bool(mask[a])) for a, b in pairwise(edges) if a < b]

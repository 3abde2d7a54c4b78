"""Reuse at any position: moved runs found, put in place, and repaired by plan, for all rows.

The result says which columns are left for the model: those that some row does not know or has to
compute again. They go through it in one pass (see `scatter.py`), in every row: what a row knows of
them already is computed again, which is never less exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from chunkcache.errors import RepairError
from chunkcache.kv.layers import GrowingLayer
from chunkcache.kv.rope import KeyMover
from chunkcache.repair import Head, Mask
from chunkcache.report import Report
from chunkcache.reuse.index import Passage, is_exact, search
from chunkcache.reuse.probes import Probes
from chunkcache.reuse.relocate import fill_pieces
from chunkcache.reuse.step import Held, Setup, Step
from chunkcache.tokens.matching import Piece, runs
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


@dataclass(frozen=True)
class Moved:
    """A passage with moved runs in place, and what becomes of it.

    Attributes:
        passage: The passage.
        spans: What happens to each token from `passage.start` on.
        exact_until: Column from which on K/V are not those of a full run, `None` if all are.
        fresh: Start and stop of each stretch of tokens that were not found, in positions.
    """

    passage: Passage
    spans: list[Span]
    exact_until: int | None
    fresh: list[tuple[int, int]]


@dataclass
class _Work:
    """A passage on the way there.

    Attributes:
        passage: The passage.
        found: All pieces that were found and may be moved.
        short: Others, too short for that.
        exact: Those whose K/V are taken as they are.
        wanted: Those that spare the model a column.
        placed: Those whose K/V are in place.
        again: `[tokens]`, True for moved tokens to compute again.
    """

    passage: Passage
    found: list[Piece]
    short: list[Piece]
    exact: set[Piece]
    wanted: list[Piece] = field(default_factory=list)
    placed: list[Piece] = field(default_factory=list)
    again: Mask = field(default_factory=lambda: np.zeros(0, dtype=bool))

    def moved(self) -> Mask:
        """`[tokens]`, True where a piece is in place that is only nearly right there."""
        return self._covered(self.moving())

    def moving(self) -> list[Piece]:
        """Pieces in place that are only nearly right there."""
        return [piece for piece in self.placed if piece not in self.exact]

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


def relocate(
    setup: Setup,
    held: Held,
    step: Step,
    mover: KeyMover,
    passages: Sequence[Passage],
    at_hand: Mapping[str, tuple[int, int]],
    report: Report,
) -> tuple[Tensor, list[Moved]] | None:
    """Bring what is known elsewhere to where it stands in these passages.

    Args:
        setup: Model, repair strategy, and what to do about errors.
        held: Layers with room for the whole prompt, filled up to each passage's start.
        step: Its `stale` takes index entries that are to be put right.
        mover: The model's proven rotation.
        passages: The distinct rows of the batch.
        at_hand: Row and column of chunks whose K/V are in the layers already, by hash.
        report: Takes times, bytes and the charged cost.

    Returns:
        Columns that the model must compute, `[queries]`, in order, and what happens to each
        passage; `None` if nothing is known that would spare the model a column.

    Raises:
        StoreError: The store failed while it was searched.
    """
    begun = perf_counter()
    found = search(held.origin, passages)
    step.stale |= found.stale
    report.lookup_ms += 1e3 * (perf_counter() - begun)
    works = [
        _Work(
            passage,
            pieces,
            short,
            {p for p in pieces if is_exact(p, passage.tokens, setup.grid, held.origin.salt)},
        )
        for passage, pieces, short in zip(passages, found.pieces, found.short, strict=True)
    ]
    begun = perf_counter()
    _fill(setup, held, mover, works, at_hand, report)
    report.move_ms += 1e3 * (perf_counter() - begun)
    if not any(work.placed for work in works):
        return None
    for layer in held.layers:
        if isinstance(layer, GrowingLayer):
            layer.hold(step.total)
            for work in works:
                _blank(layer, work)
    for work in works:
        work.again = _pick(setup, held, work, report)
    computed = _any_row(works, step.total, lambda work: work.again | work.unknown(work.placed))
    moved = [_describe(work, computed[work.passage.pad :]) for work in works]
    for outcome in moved:
        again = sum(span.tokens for span in outcome.spans if span.kind is Kind.RECOMPUTED)
        report.charged += len(outcome.passage.rows) * again
    return torch.from_numpy(np.flatnonzero(computed)), moved


def _any_row(works: Sequence[_Work], columns: int, mask_of: Callable[[_Work], Mask]) -> Mask:
    """`[columns]`, True where a mask is in any of the rows."""
    mask = np.zeros(columns, dtype=bool)
    for work in works:
        mask[work.passage.pad :] |= mask_of(work)
    return mask


def _fill(
    setup: Setup,
    held: Held,
    mover: KeyMover,
    works: Sequence[_Work],
    at_hand: Mapping[str, tuple[int, int]],
    report: Report,
) -> None:
    """Put in place what spares the model a column."""
    columns = max(work.passage.pad + len(work.passage.tokens) for work in works)
    computed = _any_row(works, columns, lambda work: work.unknown(work.found))
    for work in works:
        here = computed[work.passage.pad :]
        work.wanted = [p for p in work.found if not here[p.start : p.stop].all()]
    placed, bytes_read, bytes_spared = fill_pieces(
        held.origin, held.layers, held.layout, mover,
        [(work.passage, work.wanted) for work in works], at_hand,
        lambda error: setup.trouble(error, report),
    )  # fmt: skip
    report.bytes_read += bytes_read
    report.bytes_spared += bytes_spared
    for work in works:
        work.placed = [piece for piece in work.wanted if piece in placed]


def _blank(layer: GrowingLayer, work: _Work) -> None:
    """Zero what is not known: memory may hold anything, and a masked NaN is still a NaN."""
    pad = work.passage.pad
    where = torch.from_numpy(pad + np.flatnonzero(work.unknown(work.placed))).to(layer.device)
    for row in work.passage.rows:
        layer.keys[row].index_fill_(1, where, 0)
        layer.values[row].index_fill_(1, where, 0)


def _pick(setup: Setup, held: Held, work: _Work, report: Report) -> Mask:
    """What the strategy picks; should its probes fail on this model, the heads of the runs."""
    passage, repair = work.passage, setup.settings.strategy
    if not work.moving():
        return work.moved()
    layers = [
        layer.one_row(passage.rows[0], passage.pad, len(passage.tokens))
        if isinstance(layer, GrowingLayer)
        else layer
        for layer in held.layers
    ]
    ids, known = torch.from_numpy(passage.tokens)[None], ~work.unknown(work.placed)
    spans = [(run[0].start, run[-1].stop) for run in runs(work.moving())]
    probes = Probes(setup.model, layers, ids, torch.from_numpy(known), passage.start, spans)
    try:
        picked = repair.pick(probes)
    except Exception as error:  # a probe runs a model in a way that its authors did not foresee
        setup.trouble(RepairError(f"repair {repair} failed, head:4 was used: {error}"), report)
        picked = Head().pick(probes)
    report.charged += probes.charged
    return picked & work.moved()


def _describe(work: _Work, computed: Mask) -> Moved:
    """What becomes of a passage when these of its tokens are computed."""
    kept = np.flatnonzero(work.moved() & ~computed)
    return Moved(
        work.passage,
        _spans(work, computed),
        work.passage.pad + int(kept[0]) if len(kept) else None,
        [(a, b) for a, b, value in stretches(work.unknown(work.placed)) if value],
    )


def _spans(work: _Work, computed: Mask) -> list[Span]:
    spans: list[Span] = []
    position, end = work.passage.start, len(work.passage.tokens)
    for piece in work.found:
        if piece.start > position:
            spans += _gap(work, position, piece.start)
        position, key = piece.stop, piece.chunk.hash
        if piece not in work.placed:
            why = UNREADABLE if piece in work.wanted else OTHER_ROW
            spans.append(Span(piece.start, piece.stop, Kind.COMPUTED, key, reason=why))
            continue
        if piece in work.exact:
            reused = Span(piece.start, piece.stop, Kind.REUSED, key, "store")
            spans += computed_too([reused], computed)
            continue
        for begin, stop, value in stretches(computed[piece.start : piece.stop]):
            kind = Kind.RECOMPUTED if value else Kind.MOVED
            origin = f"position {piece.old_start + begin}"
            spans.append(Span(piece.start + begin, piece.start + stop, kind, key, origin))
    if position < end:
        spans += _gap(work, position, end)
    return spans


def _gap(work: _Work, start: int, stop: int) -> list[Span]:
    """Tokens between pieces, and which of them were found but are too few to be moved."""
    spans: list[Span] = []
    for piece in work.short:
        if start <= piece.start < stop:
            if piece.start > start:
                spans.append(Span(start, piece.start, Kind.COMPUTED, reason=NOT_IN_STORE))
            spans.append(Span(piece.start, piece.stop, Kind.COMPUTED, reason=TOO_SHORT))
            start = piece.stop
    if start < stop:
        spans.append(Span(start, stop, Kind.COMPUTED, reason=NOT_IN_STORE))
    return spans

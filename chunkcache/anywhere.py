"""Reuse at any position: one prompt's moved runs found, put in place, and repaired by plan.

The result says which tokens are left for the model: the holes, and the tokens to compute again.
They go through it in one pass (see `scatter.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from chunkcache.codec import KVLayout
from chunkcache.errors import RepairError
from chunkcache.layers import GrowingLayer
from chunkcache.matching import Piece, runs
from chunkcache.plan import Kind, Span
from chunkcache.probes import Probes
from chunkcache.relocate import Origin, fill_pieces, find_pieces
from chunkcache.repair import Head, Mask, Repair
from chunkcache.report import Report
from chunkcache.rope import KeyMover


@dataclass(frozen=True)
class Moved:
    """A prompt with moved runs in place.

    Attributes:
        columns: `[queries]` positions of the tokens that the model must compute, in order.
        spans: What happens to each token from `start` on.
        start: Where the exact beginning ends.
        holes: Start and stop of each stretch of tokens that were not found.
    """

    columns: Tensor
    spans: list[Span]
    start: int
    holes: list[tuple[int, int]]


def relocate(
    model: nn.Module,
    origin: Origin,
    layers: Sequence[Any],
    layout: KVLayout,
    mover: KeyMover,
    ids: Tensor,
    start: int,
    stop: int,
    repair: Repair,
    report: Report,
    trouble: Callable[[Exception], None],
) -> Moved | None:
    """Bring what is known elsewhere to where it stands in this prompt; `None` if nothing is.

    Args:
        model: The model, for repairs that look before they pick.
        origin: Where to search.
        layers: Cache layers with room for the prompt, filled up to `start`.
        layout: What they cache.
        mover: The model's proven rotation.
        ids: `[rows, tokens]` token ids of the whole prompt, on the CPU; all rows alike.
        start: Where the exact beginning ends.
        stop: Where the tokens begin whose outputs are wanted.
        repair: Which moved tokens to compute again.
        report: Takes times, bytes and the charged cost.
        trouble: Told of a failing store and of damaged blobs.

    Raises:
        StoreError: The store failed while it was searched.
    """
    begun = perf_counter()
    pieces = find_pieces(origin, ids[0].numpy(), start, stop)
    report.lookup_ms += 1e3 * (perf_counter() - begun)
    if not pieces:
        return None
    begun = perf_counter()
    pieces, bytes_read = fill_pieces(origin, layers, layout, mover, pieces, ids.shape[0], trouble)
    report.bytes_read += bytes_read
    report.move_ms += 1e3 * (perf_counter() - begun)
    if not pieces:
        return None
    total = ids.shape[1]
    moved = np.zeros(total, dtype=bool)
    for piece in pieces:
        moved[piece.start : piece.stop] = True
    known = torch.from_numpy(moved.copy())
    known[:start] = True
    for layer in layers:
        if isinstance(layer, GrowingLayer):
            layer.hold(total)
            _blank(layer, ~known)
    probes = Probes(
        model, layers, ids, known, start, [(run[0].start, run[-1].stop) for run in runs(pieces)]
    )
    again = _pick(repair, probes, trouble) & moved
    report.charged += float(again.sum()) + probes.charged
    columns = np.flatnonzero(again | ~known.numpy())
    return Moved(
        torch.from_numpy(columns),
        _spans(pieces, again, start, total),
        start,
        _stretches(~known.numpy()),
    )


def _pick(repair: Repair, probes: Probes, trouble: Callable[[Exception], None]) -> Mask:
    """What the strategy picks; should its probes fail on this model, the heads of the runs."""
    try:
        return repair.pick(probes)
    except Exception as error:  # a probe runs a model in a way that its authors did not foresee
        trouble(RepairError(f"repair {repair} failed, head:4 was used: {error}"))
        return Head().pick(probes)


def _blank(layer: GrowingLayer, unknown: Tensor) -> None:
    """Zero what is not known: memory may hold anything, and a masked NaN is still a NaN."""
    where = unknown.to(layer.device).nonzero()[:, 0]
    layer.keys.index_fill_(2, where, 0)
    layer.values.index_fill_(2, where, 0)


def _spans(pieces: list[Piece], again: Mask, start: int, total: int) -> list[Span]:
    spans: list[Span] = []
    position = start
    for piece in pieces:
        if piece.start > position:
            spans.append(Span(position, piece.start, Kind.COMPUTED, reason="not in the store"))
        key = piece.chunk.hash
        for begin, end, value in _groups(again[piece.start : piece.stop]):
            kind = Kind.RECOMPUTED if value else Kind.MOVED
            origin = f"position {piece.old_start + begin}"
            spans.append(Span(piece.start + begin, piece.start + end, kind, key, origin))
        position = piece.stop
    if position < total:
        spans.append(Span(position, total, Kind.COMPUTED, reason="not in the store"))
    return spans


def _groups(mask: Mask) -> list[tuple[int, int, bool]]:
    """Stretches of equal values."""
    edges = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(mask)]
    return [(a, b, bool(mask[a])) for a, b in pairwise(edges) if a < b]


def _stretches(mask: Mask) -> list[tuple[int, int]]:
    """Stretches of True."""
    return [(a, b) for a, b, value in _groups(mask) if value]

"""ChunkLoader: planned chunks from the store into the layers of one prompt.

A blob that is missing or fails its check ends the reuse of its rows there: the plans are revised,
and what was copied behind it will be written over.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, suppress
from typing import Any, NamedTuple

from chunkcache.kv.codec import BlobForm
from chunkcache.kv.layers import all_runs, growing, peek_all, place_all
from chunkcache.kv.transfer import is_host
from chunkcache.reuse.background import LEAST_BYTES, BackgroundLoad
from chunkcache.reuse.blobs import BlobReader, PendingChunk, StagedChunk
from chunkcache.reuse.staging import Staging, Target
from chunkcache.tokens.chunking import Chunk
from chunkcache.tokens.plan import RowPlan

# The share of a prompt that may be left to compute when the model begins before all K/V are there:
# should a blob be damaged, it is computed twice.
MOST_LEFT = 1 / 3


class ChunkLoader:
    """See the module.

    Args:
        reader: Reads and checks the blobs.
        layers: Cache layers with room for the whole prompt.
        pads: Columns of left padding of each row.
        together: No row is read further than the row known least far.

    Attributes:
        at_hand: Row and column of whole chunks in the layers, by hash: moved text uses them too.
        failed: Whether a row is known less far than was planned.
    """

    def __init__(
        self, reader: BlobReader, layers: Sequence[Any], pads: Sequence[int], together: bool
    ) -> None:
        self.at_hand: dict[str, tuple[int, int]] = {}
        self.failed = False
        self._reader, self._layers = reader, layers
        self._growing = growing(layers)
        self._pads, self._together = pads, together

    def load(
        self,
        plans: list[RowPlan],
        stops: list[int],
        sizes: Mapping[str, int],
        forms: Mapping[str, BlobForm],
        ahead_of: int = 0,
    ) -> BackgroundLoad | None:
        """Read until all is there, or until something fails.

        Args:
            plans: One per row; replaced where a read fails.
            stops: Up to which column K/V are wanted of each row; afterwards, up to which they are
                there.
            sizes: Bytes of each chunk's blob, by hash.
            forms: The forms of these blobs, likewise.
            ahead_of: Columns of the prompt, if the model may begin before all is here.

        Returns:
            What is still to come, if the model may and need not wait for it.
        """
        self._plans, self._stops = plans, stops
        self._align()
        # Equal chunks of several rows (beams, few-shot prompts) are read once.
        users: defaultdict[str, list[int]] = defaultdict(list)
        chunks: dict[str, Chunk] = {}
        for row, plan in enumerate(plans):
            stop = stops[row] - self._pads[row]
            for chunk in plan.reads(stop) if stop > plan.held else ():
                users[chunk.hash].append(row)
                there = chunks.get(chunk.hash, chunk)
                chunks[chunk.hash] = max(chunk, there, key=lambda each: each.stop)
        # Nearest the start first: what follows a failure need not be read.
        reads = [
            self._open(chunk, users[chunk.hash], forms[chunk.hash], sizes[chunk.hash])
            for chunk in sorted(chunks.values(), key=lambda c: self._first_column(c, users))
        ]
        if reads and self._may_come_later(reads, ahead_of):
            with suppress(RuntimeError):  # no more threads, or the interpreter is ending
                return self._begin(reads)
        self._read(reads)
        self._reader.discard()
        return None

    def covered(self, rows: Iterable[int]) -> int:
        """Columns filled in all of these rows: more than `stops` where the last chunk has more."""
        return min(
            self._pads[row]
            + max((c.stop for c in plan.reads(self._stops[row] - self._pads[row])), default=0)
            for row, plan in enumerate(self._plans)
            if row in rows
        )

    def _first_column(self, chunk: Chunk, users: dict[str, list[int]]) -> int:
        return min(self._pads[row] for row in users[chunk.hash]) + chunk.start

    def _begin(self, reads: Sequence[_Read]) -> BackgroundLoad:
        """Begin to read in the background. Raises RuntimeError where that cannot be done."""
        pending = [read.pending for read in reads]
        if is_host(self._growing[0].device):
            return BackgroundLoad(self._reader, pending, self._growing)
        staging = Staging(self._growing, [read.target for read in reads if read.target])
        staged = [
            StagedChunk(chunk.chunk_hash, chunk.form, chunk.nbytes, runs)
            for chunk, runs in zip(pending, staging.runs, strict=True)
        ]
        return BackgroundLoad(self._reader, staged, self._growing, staging)

    def _open(self, chunk: Chunk, rows: list[int], form: BlobForm, nbytes: int) -> _Read:
        """A chunk to read, straight into its place in its first row where that is possible."""
        device = self._growing[0].device
        row, tokens = rows[0], form.file.tokens  # a continuation has more than the row takes of it
        column = self._pads[row] + chunk.start
        has_place = (
            form.is_direct
            and column + tokens <= self._growing[0].capacity
            # What is held already must not be overwritten by bytes that are not checked yet.
            and chunk.start >= self._plans[row].held
        )
        is_here = has_place and is_host(device)
        runs = all_runs(self._growing, row, column, tokens) if is_here else ()
        pending = PendingChunk(chunk.hash, form, nbytes, runs, device)
        return _Read(chunk, rows, pending, Target(row, column, tokens) if has_place else None)

    def _may_come_later(self, reads: Sequence[_Read], columns: int) -> bool:
        """Whether a thread may read these chunks while the model computes, and it is worth it."""
        alone = all(read.target and len(read.rows) == 1 for read in reads)
        return (
            alone
            and columns > 0
            and columns - min(self._stops) <= MOST_LEFT * columns
            and sum(read.pending.nbytes for read in reads) >= LEAST_BYTES
            and self._reader.store.reads_parts
        )

    def _read(self, reads: Sequence[_Read]) -> None:
        with closing(self._reader.read([read.pending for read in reads])) as answers:
            for number, (read, pending) in enumerate(zip(reads, answers, strict=True)):
                if pending.failure:
                    self._cut(read, pending.failure)
                elif self._is_wanted(read):
                    self._spread(read)
                rest = reads[number + 1 :]
                if rest and not any(map(self._is_wanted, rest)):
                    break

    def _is_wanted(self, read: _Read) -> bool:
        """Whether a row is still to be filled as far as this chunk."""
        start = read.chunk.start
        return any(self._pads[row] + start < self._stops[row] for row in read.rows)

    def _spread(self, read: _Read) -> None:
        """Copy the checked K/V to where they are wanted and not yet."""
        chunk, rows, kv = read.chunk, read.rows, read.pending.kv
        if read.pending.is_direct:
            column = self._pads[rows[0]] + chunk.start
            if chunk.stop - chunk.start == read.pending.form.file.tokens:
                # What a continuation has more lies where other text will be put.
                self.at_hand[chunk.hash] = rows[0], column
            kv = peek_all(self._layers, rows[0], column, chunk.stop - chunk.start)
            rows = rows[1:]
        for row in rows:
            begin = max(chunk.start, self._plans[row].held)
            # One token more than is wanted, where the chunk has it: see `covered`.
            stop = min(chunk.stop, self._stops[row] - self._pads[row] + 1)
            inside = slice(begin - chunk.start, stop - chunk.start)
            if begin < stop:
                part = [pair and (pair[0][:, inside], pair[1][:, inside]) for pair in kv]
                place_all(self._layers, row, self._pads[row] + begin, part)
                if stop - begin == read.pending.form.file.tokens:
                    self.at_hand.setdefault(chunk.hash, (row, self._pads[row] + begin))
        read.pending.kv = []  # what was made of many blobs need not be kept

    def _cut(self, read: _Read, why: str) -> None:
        self.failed = True
        for row in read.rows:
            plan = self._plans[row]
            self._plans[row] = plan.cut_at(max(read.chunk.start, plan.held), why)
            self._stops[row] = min(self._stops[row], self._pads[row] + self._plans[row].reach)
        self._align()

    def _align(self) -> None:
        if self._together:
            self._stops[:] = [min(self._stops)] * len(self._stops)


class _Read(NamedTuple):
    """A chunk on its way to these rows; `target` is its place in the first if it fits there."""

    chunk: Chunk
    rows: list[int]
    pending: PendingChunk
    target: Target | None

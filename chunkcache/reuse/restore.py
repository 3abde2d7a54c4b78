"""From the store into the layers: which chunks of a prompt are known, and their K/V in place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from chunkcache.errors import BlobError, SealedBlobError, StoreError
from chunkcache.kv.codec import BlobForm, Checksum, KVLayout, LayerKV
from chunkcache.kv.layers import GrowingLayer, peek_all
from chunkcache.reuse.arrival import LEAST_BYTES, Arrival, Incoming
from chunkcache.reuse.index import Origin
from chunkcache.stores.base import ChunkStore, Part, Place
from chunkcache.tokens.chunking import Chunk
from chunkcache.tokens.plan import RowPlan

# The share of a prompt that may be left to compute when the model runs ahead.
MOST_LEFT = 1 / 3

KeyOf = Callable[[str], str]


def blob_sizes(store: ChunkStore, hashes: Iterable[str], key_of: KeyOf) -> dict[str, int]:
    """Bytes of each chunk's blob, 0 where there is none, in one round trip.

    Raises:
        StoreError: The store failed.
    """
    keys = {hash: key_of(hash) for hash in hashes}
    sizes = store.sizes(list(keys.values())) if keys else []
    return dict(zip(keys, sizes, strict=True))


def known_chunks(
    store: ChunkStore, rows: Sequence[list[Chunk]], held: Sequence[int], key_of: KeyOf
) -> dict[str, int]:
    """Ask the store, in one round trip, which chunks it has.

    Args:
        store: Where to look.
        rows: Chunks of each row, in order.
        held: Tokens from the start of each row that need not be looked up.
        key_of: The store's key of a chunk's hash.

    Returns:
        Bytes of the blobs that the store has, by hash.

    Raises:
        StoreError: The store failed.
    """
    wanted = [
        chunk.hash
        for chunks, h in zip(rows, held, strict=True)
        for chunk in chunks
        if chunk.stop > h
    ]
    return {hash: size for hash, size in blob_sizes(store, wanted, key_of).items() if size}


@dataclass
class Filling:
    """The reading of planned chunks into the layers of one prompt.

    Attributes:
        origin: Where to read, and in which form.
        sizes: Bytes of each chunk's blob, by hash.
        layers: Cache layers with room for the whole prompt.
        layout: What they cache.
        ids: `[batch, columns]` token ids, on the CPU.
        pads: Columns of left padding of each row.
        plans: One plan per row; replaced where a read fails.
        stops: Up to which column K/V are wanted of each row; after `run`, up to which they are
            there.
        together: A row is not read further than the one that is known least far.
        ahead: Whether the model may begin before all is here; then `arrival` is to be waited for.
        trouble: Told of a failing store and of damaged blobs.
        bytes_read: Bytes of blobs read.
        bytes_spared: How many more they would be as the model has them.
        bad: Hashes of chunks whose blob is missing or damaged.
        damaged: Keys of those that are damaged.
        at_hand: Row and column of whole chunks that are in the layers now, by hash.
    """

    origin: Origin
    sizes: Mapping[str, int]
    layers: Sequence[Any]
    layout: KVLayout
    ids: Tensor
    pads: Sequence[int]
    plans: list[RowPlan]
    stops: list[int]
    together: bool
    trouble: Callable[[Exception], None]
    ahead: bool = False
    arrival: Arrival | None = None
    bytes_read: int = 0
    bytes_spared: int = 0
    bad: set[str] = field(default_factory=set)
    damaged: list[str] = field(default_factory=list)
    at_hand: dict[str, tuple[int, int]] = field(default_factory=dict)

    def run(self) -> None:
        """Read until all is there, or until something fails.

        A blob that is missing or fails its check ends its rows there: the plans are revised, and
        what was copied behind it is room that will be written over.
        """
        self._align()
        # Equal chunks of several rows (beams, few-shot prompts) are read once.
        users: defaultdict[str, list[int]] = defaultdict(list)
        chunks: dict[str, Chunk] = {}
        for row, plan in enumerate(self.plans):
            stop = self.stops[row] - self.pads[row]
            for chunk in plan.reads(stop) if stop > plan.held else ():
                users[chunk.hash].append(row)
                chunks[chunk.hash] = chunk
        # Nearest the start first: what follows a failure need not be read.
        reads = [_Read(self, chunk, users[chunk.hash]) for chunk in chunks.values()]
        reads.sort(key=lambda read: read.first_column)
        reads = [read for read in reads if self._can_be_sound(read)]
        reads = [read for read in reads if read.is_wanted()]
        if self.ahead and self._may_come_later(reads):
            incoming = [read.incoming() for read in reads]
            with suppress(RuntimeError):  # no more threads, or the interpreter is ending
                self.arrival = Arrival(self.origin.store, incoming, reads[0].growing)
        if self.arrival is None:
            self._read(reads)
        discard(self.origin.store, self.damaged, self.trouble)

    def covered(self, rows: Iterable[int]) -> int:
        """Columns whose K/V are in these rows' room: more than `stops` where a chunk has more."""
        return min(
            self.pads[row]
            + max((chunk.stop for chunk in plan.reads(self.stops[row] - self.pads[row])), default=0)
            for row, plan in enumerate(self.plans)
            if row in rows
        )

    def _may_come_later(self, reads: Sequence[_Read]) -> bool:
        """Whether nobody but the layers waits for these chunks, and it is worth a thread.

        And the risk: should something be wrong, what is left to compute is computed twice.
        """
        left = self.ids.shape[1] - min(self.stops, default=0)
        if left > MOST_LEFT * self.ids.shape[1]:
            return False
        nbytes = sum(self.sizes[read.chunk.hash] for read in reads)
        alone = all(read.direct and len(read.rows) == 1 for read in reads)
        return alone and nbytes >= LEAST_BYTES and self.origin.store.reads_parts

    def _read(self, reads: Sequence[_Read]) -> None:
        if not reads:
            return
        done = 0
        try:
            answers = self.origin.store.fetch(
                [Part(read.form.key, 0, read.open_place()) for read in reads]
            )
            with closing(answers):
                for read, arrived in zip(reads, answers, strict=True):
                    if read.is_wanted():
                        self._take(read, arrived)
                    elif not any(other.is_wanted() for other in reads[done:]):
                        break
                    done += 1
        except StoreError as error:
            for read in reads[done:]:
                self._cut(read, str(error))
            self.trouble(error)

    def _can_be_sound(self, read: _Read) -> bool:
        """Whether a blob has a length that it may have: no memory is taken for others."""
        if read.form.may_have(self.sizes[read.chunk.hash]):
            return True
        self._reject(
            read, BlobError("the blob is damaged: it has not the length that it must have")
        )
        return False

    def _align(self) -> None:
        if self.together:
            self.stops = [min(self.stops)] * len(self.stops)

    def _take(self, read: _Read, arrived: bool) -> None:
        if not arrived:
            self.bad.add(read.chunk.hash)
            self._cut(read, "it went from the store before it was read")
            return
        nbytes = self.sizes[read.chunk.hash]
        self.bytes_read += nbytes
        self.bytes_spared += read.form.spared(nbytes)
        try:
            read.check()
        except BlobError as error:
            self._reject(read, error)
            return
        read.spread()
        if read.direct:
            row = read.rows[0]
            self.at_hand[read.chunk.hash] = row, self.pads[row] + read.chunk.start

    def _reject(self, read: _Read, error: BlobError) -> None:
        self.trouble(error)
        if not isinstance(error, SealedBlobError):  # which is good for others
            self.bad.add(read.chunk.hash)
            self.damaged.append(read.form.key)
        self._cut(read, str(error))

    def _cut(self, read: _Read, why: str) -> None:
        for row in read.rows:
            position = max(read.chunk.start, self.plans[row].held)
            self.plans[row] = self.plans[row].cut_at(position, why)
            self.stops[row] = min(self.stops[row], self.pads[row] + self.plans[row].reach)
        self._align()


def discard(store: ChunkStore, keys: Sequence[str], trouble: Callable[[Exception], None]) -> None:
    """Remove damaged blobs: others would read them too, or take them for what is written anew."""
    try:
        if keys:
            store.delete(keys)
    except StoreError as error:
        trouble(error)


class _Place(Place):
    """Where a blob goes that is a header of `head` bytes and then the bytes of the layers.

    Stores that tell what has come let the checksum be taken of bytes in the processor's cache.
    """

    def __init__(self, views: Iterable[memoryview], head: int) -> None:
        super().__init__(views)
        self._head = head
        self._seen = 0
        self._checksum = Checksum()

    def filled(self, pieces: Sequence[memoryview]) -> None:
        """Take the sum of what is behind the header."""
        for piece in pieces:
            header = self._head - self._seen
            self._checksum.update(piece if header <= 0 else piece[header:])
            self._seen += piece.nbytes

    def check(self, form: BlobForm) -> None:
        """Raise BlobError unless the form's blob is here."""
        if self._seen == self.nbytes:
            with suppress(BlobError):  # filled twice, perhaps: only all of it together tells
                return form.check_sum(self[0], self._checksum)
        return form.check(self[0], self[1:])


class _Read:
    """One blob on its way into the layers.

    A blob that is a header and then the very bytes of the layers is read straight to where they
    belong in the first row, if that may be; any other into memory of its own.
    """

    def __init__(self, filling: Filling, chunk: Chunk, rows: list[int]) -> None:
        self.filling, self.chunk, self.rows = filling, chunk, rows
        first = rows[0]
        self.column = filling.pads[first] + chunk.start
        self.first_column = min(filling.pads[row] for row in rows) + chunk.start
        self.tokens = chunk.stop - chunk.start
        ids = filling.ids[first, self.column : self.column + self.tokens].tolist()
        self.form = filling.origin.form(filling.layout, ids, chunk.start, chunk.hash)
        self.growing = [layer for layer in filling.layers if isinstance(layer, GrowingLayer)]
        # What is held already must not be overwritten by bytes that are not checked yet.
        self.direct = (
            self.form.is_direct
            and chunk.start >= filling.plans[first].held
            and self.growing[0].device.type == "cpu"
        )
        self.place: _Place = _Place([], 0)
        self.kv: list[LayerKV | None] = []

    def open_place(self) -> Place:
        """The memory that the blob is to be read into."""
        head = len(self.form.file.header) if self.direct else self.filling.sizes[self.chunk.hash]
        views = [np.empty(head, dtype=np.uint8).data]
        if self.direct:
            for layer in self.growing:
                views += layer.runs(self.rows[0], self.column, self.tokens)
        self.place = _Place(views, head)
        return self.place

    def incoming(self) -> Incoming:
        """The same for a chunk that the layers wait for, each for its own part."""
        runs = [layer.runs(self.rows[0], self.column, self.tokens) for layer in self.growing]
        header = np.empty(len(self.form.file.header), dtype=np.uint8).data
        return Incoming(self.form, header, runs)

    def check(self) -> None:
        """Make K/V of the bytes that have arrived. Raises BlobError if that cannot be done."""
        if self.direct:
            self.place.check(self.form.file)
        else:
            self.kv = self.form.decode(self.place[0])

    def is_wanted(self) -> bool:
        """Whether a row is still to be filled as far as this chunk."""
        pads, stops = self.filling.pads, self.filling.stops
        return any(pads[row] + self.chunk.start < stops[row] for row in self.rows)

    def spread(self) -> None:
        """Copy the checked K/V to where they are wanted and not yet."""
        filling, chunk = self.filling, self.chunk
        rows = self.rows[1:] if self.direct else self.rows
        if self.direct and rows:
            self.kv = peek_all(filling.layers, self.rows[0], self.column, self.tokens)
        for row in rows:
            begin = max(chunk.start, filling.plans[row].held)
            # One token more than is wanted, where the chunk has it: see `covered`.
            stop = min(chunk.stop, filling.stops[row] - filling.pads[row] + 1)
            inside = slice(begin - chunk.start, stop - chunk.start)
            for layer, kv in zip(filling.layers, self.kv, strict=True):
                if kv is not None and begin < stop:
                    column = filling.pads[row] + begin
                    layer.place(row, column, kv[0][:, inside], kv[1][:, inside])
        self.place, self.kv = _Place([], 0), []  # what was made of many blobs need not be kept

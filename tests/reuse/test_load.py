"""ChunkLoader: known chunks into the layers, row by row or together, as far as blobs are good."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

from chunkcache.errors import StoreError
from chunkcache.kv.codec import Codec
from chunkcache.kv.layers import GrowingLayer, allocate_all
from chunkcache.kv.layout import KVLayout, LayerKV, LayerShape
from chunkcache.reuse.blobs import BlobReader
from chunkcache.reuse.keyspace import KeySpace
from chunkcache.reuse.load import ChunkLoader
from chunkcache.stores.base import Entry, Part
from chunkcache.tokens.chunking import Chunk, Grid, cut
from chunkcache.tokens.plan import RowPlan, plan_row
from tests.anywhere.test_index import Identity
from tests.scripted import Scripted, blobs, fail_at

LAYOUT = KVLayout(torch.float32, (LayerShape(2, 4, 2, 4), None, LayerShape(1, 4, 1, 2)))
GRID = Grid(4)
CODEC = Codec()


def truth(tokens: list[int], start: int) -> list[LayerKV | None]:
    """K/V that tell which token and position they are of."""
    x = torch.tensor([[t + 100.0 * (start + i)] for i, t in enumerate(tokens)])
    return [
        (x.expand(s.key_heads, -1, s.key_dim), -x.expand(s.value_heads, -1, s.value_dim))
        if s
        else None
        for s in LAYOUT.layers
    ]


class Filled(NamedTuple):
    plans: list[RowPlan]
    stops: list[int]
    bytes_read: int
    bad: set[str]
    at_hand: dict[str, tuple[int, int]]


class Batch:
    """Padded rows, their chunks in a store, and layers to fill."""

    def __init__(self, rows: list[list[int]], codec: Codec = CODEC) -> None:
        self.store = Scripted()
        self.keys = KeySpace(Identity(), LAYOUT, b"", codec)  # type: ignore[arg-type]
        self.rows = rows
        width = max(map(len, rows))
        self.pads = [width - len(row) for row in rows]
        self.ids = torch.tensor([[0] * p + r for p, r in zip(self.pads, rows, strict=True)])
        self.chunks = [cut(row, GRID, b"", tail=True) for row in rows]
        for row, chunks in zip(rows, self.chunks, strict=True):
            for chunk in chunks:
                tokens = row[chunk.start : chunk.stop]
                form = self.keys.form(tokens, chunk.start, chunk.hash)
                self.store.write([Entry(form.key, {}, form.encode(truth(tokens, chunk.start)))])
        self.layers: list[Any] = [GrowingLayer() if s else object() for s in LAYOUT.layers]
        allocate_all(self.layers, LAYOUT, len(rows), width, torch.device("cpu"))
        self.troubles: list[Exception] = []

    def fill(self, limit: int, held: int = 0, together: bool = True) -> Filled:
        chunks = {
            c.hash: (c, row) for row, cs in enumerate(self.chunks) for c in cs if c.stop > held
        }
        sizes = dict(
            zip(chunks, self.store.inner.sizes(list(map(self.keys.key, chunks))), strict=True)
        )
        known = {name: size for name, size in sizes.items() if size}
        plans = [
            plan_row(chunks, len(row), max(held - pad, 0), known, "not in the store")
            for chunks, row, pad in zip(self.chunks, self.rows, self.pads, strict=True)
        ]
        stops = [
            max(min(limit, p + plan.reach), held) for p, plan in zip(self.pads, plans, strict=True)
        ]
        forms = {
            name: self.keys.form(self.rows[row][c.start : c.stop], c.start, name)
            for name, (c, row) in chunks.items()
        }
        reader = BlobReader(self.store, self.troubles.append)
        loader = ChunkLoader(reader, self.layers, self.pads, together)
        assert loader.load(plans, stops, known, forms) is None
        return Filled(plans, stops, reader.bytes_read, reader.bad, loader.at_hand)

    def holds(self, row: int, start: int, stop: int) -> bool:
        expected = truth(self.rows[row][start:stop], start)
        column = self.pads[row] + start
        return all(
            torch.equal(mine, its)
            for layer, kv in zip(self.layers, expected, strict=True)
            if kv is not None
            for mine, its in zip(layer.peek(row, column, stop - start), kv, strict=True)
        )

    def lose(self, *chunks: Chunk) -> None:
        self.store.delete([self.keys.key(chunk.hash) for chunk in chunks])

    def spoil(self, chunk: Chunk) -> None:
        key = self.keys.key(chunk.hash)
        blob = bytearray(blobs(self.store.inner, key)[0])
        blob[-1] ^= 1
        self.store.write([Entry(key, {}, memoryview(blob))])


def rows_of(*lengths: int) -> list[list[int]]:
    return [[100 * n + i for i in range(length)] for n, length in enumerate(lengths, 1)]


def test_rows_are_filled_together() -> None:
    batch = Batch(rows_of(12, 9))
    batch.lose(batch.chunks[1][1])
    filling = batch.fill(11)
    assert filling.stops == [7, 7]
    assert batch.holds(0, 0, 7)
    assert batch.holds(1, 0, 4)
    assert filling.bytes_read == sum(batch.store.sizes(batch.store.asked("fetch")))
    assert len(batch.store.asked("fetch")) == 3  # the first row's last chunk is of no use


def test_or_each_as_far_as_it_is_known() -> None:
    batch = Batch(rows_of(12, 9))
    batch.lose(batch.chunks[1][1])
    filling = batch.fill(11, together=False)
    assert filling.stops == [11, 7]
    assert batch.holds(0, 0, 11)
    assert batch.holds(1, 0, 4)


@pytest.mark.parametrize("together", [True, False])
def test_a_bad_blob_ends_its_row(together: bool) -> None:
    batch = Batch(rows_of(12, 12))
    batch.spoil(batch.chunks[0][1])
    filling = batch.fill(11, together=together)
    assert filling.stops == ([4, 4] if together else [4, 11])
    assert filling.plans[0].reach == 4
    assert "damaged" in filling.plans[0].missing
    assert filling.bad == {batch.chunks[0][1].hash}
    assert batch.holds(0, 0, 4)
    assert batch.holds(1, 0, filling.stops[1])
    assert len(batch.troubles) == 1
    assert batch.store.sizes([batch.keys.key(batch.chunks[0][1].hash)]) == [
        0
    ]  # nobody shall meet it again


@pytest.mark.parametrize("together", [True, False])
def test_a_store_that_fails_on_the_way_ends_all(together: bool) -> None:
    batch = Batch(rows_of(12, 12))
    batch.store.answer = fail_at(3, StoreError("gone"))
    filling = batch.fill(11, together=together)
    assert filling.stops == ([4, 4] if together else [8, 4])
    assert batch.holds(0, 0, filling.stops[0])
    assert batch.holds(1, 0, 4)
    assert [str(error) for error in batch.troubles] == ["gone"]
    assert filling.bad == set()


def test_equal_chunks_are_read_once_and_stand_in_every_row() -> None:
    row, other = rows_of(12, 9)
    batch = Batch([row, row[:8] + other, row[:10]])
    filling = batch.fill(16, together=False)
    assert filling.stops == [16, 16, 16]
    assert len(batch.store.asked("fetch")) == len(set(batch.store.asked("fetch")))
    for number, tokens in enumerate(batch.rows):
        assert batch.holds(number, 0, min(len(tokens), 16 - batch.pads[number]))
    for name, (at, column) in filling.at_hand.items():
        chunk = next(c for c in batch.chunks[at] if c.hash == name)
        assert column == batch.pads[at] + chunk.start
        assert batch.holds(at, chunk.start, chunk.stop)


def test_what_is_held_is_neither_read_nor_touched() -> None:
    batch = Batch(rows_of(12))
    for layer in batch.layers:
        if isinstance(layer, GrowingLayer):
            layer.hold(6)
            layer.keys.fill_(7)
            layer.values.fill_(7)
    filling = batch.fill(11, held=6)
    assert filling.stops == [11]
    assert batch.keys.key(batch.chunks[0][0].hash) not in batch.store.asked("fetch")
    assert batch.holds(0, 6, 11)
    assert (batch.layers[0].peek(0, 0, 6)[0] == 7).all()


def test_nothing_to_read_asks_nothing() -> None:
    batch = Batch(rows_of(12))
    assert batch.fill(6, held=6).stops == [6]
    batch.lose(*batch.chunks[0])
    assert batch.fill(11).stops == [0]
    assert batch.store.asked("fetch") == []


def telling(times: int) -> Callable[[int, Part, bool], None]:
    """An answer that tells places what has come, in small pieces: once, or again.

    The latter as if a server had gone, and another one answered.
    """

    def answer(number: int, part: Part, there: bool) -> None:
        for _ in range(times):
            for view in part.place:
                for at in range(0, view.nbytes, 7):
                    part.place.filled([view[at : at + 7]])

    return answer


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("damaged", [False, True])
def test_checksums_of_what_stores_tell(times, damaged):
    batch = Batch([[1, 2, 3, 4, 5, 6, 7, 8]])
    batch.store.answer = telling(times)
    key = batch.keys.key(batch.chunks[0][1].hash)
    if damaged:
        blob = bytearray(blobs(batch.store.inner, key)[0])
        blob[-1] ^= 1
        batch.store.write([Entry(key, {}, memoryview(blob))])
    filling = batch.fill(8)
    assert filling.stops == [4 if damaged else 8]
    assert len(batch.troubles) == damaged


def test_a_sum_of_something_else_is_no_damage():
    """What a store has told may be wrong; what is there decides."""
    batch = Batch([[1, 2, 3, 4]])

    def lie(number: int, part: Part, there: bool) -> None:
        part.place.filled([memoryview(bytes(part.place.nbytes))])

    batch.store.answer = lie
    assert batch.fill(4).stops == [4]
    assert not batch.troubles

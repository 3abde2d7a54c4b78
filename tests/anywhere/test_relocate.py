"""Relocation: each chunk is read once, checked, turned, and put wherever its text stands."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from chunkcache.anywhere.index import Passage
from chunkcache.anywhere.matching import Match, StoredChunk
from chunkcache.anywhere.relocate import fill_matches
from chunkcache.errors import BlobError, SealedBlobError, StoreError
from chunkcache.kv.codec import Codec
from chunkcache.kv.layers import GrowingLayer, allocate_all
from chunkcache.kv.seal import Seal
from chunkcache.model.moving import verify_rotation
from chunkcache.model.self_test import growing_layers, run_self_test
from chunkcache.reuse.blobs import BlobReader
from chunkcache.reuse.keyspace import KeySpace
from chunkcache.stores.base import Entry
from tests.anywhere.test_index import Identity
from tests.models import tiny
from tests.scripted import Scripted, blobs, fail_at

PLAIN = Codec()
MODEL = tiny("deepseek_v3", num_hidden_layers=2)
LAYOUT = run_self_test(MODEL).layout
ROTATION = verify_rotation(MODEL, LAYOUT)


def random_kv(tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(shape.key_heads, tokens, shape.key_dim, generator=generator),
            torch.randn(shape.value_heads, tokens, shape.value_dim, generator=generator),
        )
        for shape in LAYOUT.layers
    ]


def chunk(store, name, start, tokens=20, seed=0, codec=PLAIN):
    """A stored chunk and its K/V."""
    ids = np.arange(tokens) + 100 * seed
    kv = random_kv(tokens, seed)
    form = KeySpace(Identity(), LAYOUT, b"", codec).form(ids.tolist(), start, name)
    store.write([Entry(form.key, {"m": "1"}, form.encode(kv))])
    return StoredChunk(name, start, ids), kv


class Filling:
    """Layers of three rows and 100 columns, full of garbage, and what happens to them."""

    def __init__(self, store):
        self.store = store
        self.layers = growing_layers(MODEL)
        allocate_all(self.layers, LAYOUT, 3, 100, torch.device("cpu"))
        for layer in self.layers:
            layer.hold(100)
            layer.keys.fill_(7.0)
            layer.values.fill_(7.0)
        self.troubles = []

    def fill(self, wanted, at_hand=None, codec=PLAIN):
        keys, reader = (
            KeySpace(Identity(), LAYOUT, b"", codec),
            BlobReader(self.store, self.troubles.append),
        )
        chunks = {match.chunk.hash: match.chunk for _, matches in wanted for match in matches}
        names = [keys.key(name) for name in chunks]
        sizes = dict(zip(chunks, self.store.inner.sizes(names), strict=True))
        forms = {n: keys.form(c.tokens.tolist(), c.start, n) for n, c in chunks.items()}
        placed = fill_matches(reader, self.layers, ROTATION, wanted, sizes, forms, at_hand or {})
        return placed, reader.bytes_read

    def holds(self, row, column, kv, part, old, new):
        """Whether a row has this part of a chunk's K/V, moved, at the column."""
        for index, layer in enumerate(self.layers):
            keys, values = (x[:, part] for x in kv[index])
            count = keys.shape[1]
            keys, values = ROTATION.move(
                (keys, values), index, old + torch.arange(count), new + torch.arange(count)
            )
            place = slice(column, column + count)
            if not torch.allclose(layer.keys[row, :, place], keys, atol=1e-6):
                return False
            if not torch.allclose(layer.values[row, :, place], values, atol=1e-6):
                return False
        return True

    def untouched(self, row, *columns):
        return all((layer.keys[row][:, list(columns)] == 7).all() for layer in self.layers)


def test_a_chunk_is_read_once_for_all_rows_and_places():
    store = Scripted()
    a, kv = chunk(store, "a", 40)
    twins = Passage(np.arange(100), 0, 90, rows=(0, 2))
    other = Passage(np.arange(95), 0, 85, rows=(1,), pad=5)
    matches = [Match(3, 23, a, 0), Match(50, 60, a, 10)]
    moved = Match(30, 45, a, 5)
    filling = Filling(store)
    placed, bytes_read = filling.fill([(twins, matches), (other, [moved])])
    assert store.asked("fetch") == ["safetensors@m@1@0@a"]
    assert bytes_read == store.sizes(["safetensors@m@1@0@a"])[0]
    assert placed == {*matches, moved}
    for row in (0, 2):
        assert filling.holds(row, 3, kv, slice(0, 20), 40, 3)
        assert filling.holds(row, 50, kv, slice(10, 20), 50, 50)
        assert filling.untouched(row, 0, 2, 23, 49, 60, 99)
    assert filling.holds(1, 35, kv, slice(5, 20), 45, 30)  # column and position differ
    assert filling.untouched(1, 30, 34, 50, 99)
    assert filling.troubles == []


def test_what_is_in_the_layers_is_not_read():
    store = Scripted()
    a, kv = chunk(store, "a", 8)
    filling = Filling(store)
    for layer, pair in zip(filling.layers, kv, strict=True):
        layer.place(1, 10, *pair)
    passage = Passage(np.arange(100), 0, 90, rows=(0,))
    placed, bytes_read = filling.fill([(passage, [Match(60, 80, a, 0)])], {"a": (1, 10)})
    assert (len(placed), bytes_read, store.asked("fetch")) == (1, 0, [])
    assert filling.holds(0, 60, kv, slice(0, 20), 8, 60)
    assert filling.holds(1, 10, kv, slice(0, 20), 8, 8)


@pytest.mark.parametrize("harm", ["bit", "short", "long", "other", "empty"])
def test_a_blob_that_is_not_what_it_must_be_is_a_hole(harm):
    store = Scripted()
    (a, _), (b, kv) = chunk(store, "a", 0, seed=1), chunk(store, "b", 20, seed=2)
    blob = bytearray(blobs(store, "safetensors@m@1@0@a")[0])
    if harm == "bit":
        blob[-3] ^= 1
    blob = {"short": blob[:-4], "long": blob + b"1234", "empty": blob[:9]}.get(harm, blob)
    if harm == "other":
        blob = blobs(store, "safetensors@m@1@0@b")[0]
    store.write([Entry("safetensors@m@1@0@a", {}, memoryview(bytes(blob)))])
    filling = Filling(store)
    passage = Passage(np.arange(100), 0, 90)
    matches = [Match(0, 20, a, 0), Match(20, 40, b, 0)]
    placed, _ = filling.fill([(passage, matches)])
    assert placed == {matches[1]}
    assert filling.untouched(0, *range(20))
    assert filling.holds(0, 20, kv, slice(0, 20), 20, 20)
    assert [type(error) for error in filling.troubles] == [BlobError]


def test_a_blob_sealed_with_another_key_is_a_hole_and_stays():
    store = Scripted()
    ours, theirs = (Codec(seal=Seal((key * 32,))) for key in (b"o", b"t"))
    (a, _), (b, kv) = (
        chunk(store, "a", 0, seed=1, codec=theirs),
        chunk(store, "b", 20, seed=2, codec=ours),
    )
    filling = Filling(store)
    matches = [Match(0, 20, a, 0), Match(20, 40, b, 0)]
    placed, _ = filling.fill([(Passage(np.arange(100), 0, 90), matches)], codec=ours)
    assert placed == {matches[1]}
    assert filling.holds(0, 20, kv, slice(0, 20), 20, 20)
    assert [type(error) for error in filling.troubles] == [SealedBlobError]
    assert all(store.sizes([f"safetensors+sealed@m@1@0@{name}" for name in "ab"]))


def test_a_store_that_fails_half_way_leaves_holes():
    store = Scripted(answer=fail_at(1, StoreError("gone")))
    (a, kv), (b, _) = chunk(store, "a", 0, seed=1), chunk(store, "b", 20, seed=2)
    filling = Filling(store)
    matches = [Match(30, 50, a, 0), Match(50, 70, b, 0)]
    placed, _ = filling.fill([(Passage(np.arange(100), 0, 90), matches)])
    assert placed == {matches[0]}
    assert filling.holds(0, 30, kv, slice(0, 20), 0, 30)
    assert filling.untouched(0, *range(50, 70))
    assert [str(error) for error in filling.troubles] == ["gone"]


def test_a_chunk_that_went_is_a_hole_and_no_trouble():
    store = Scripted()
    a, _ = chunk(store, "a", 0)
    store.delete(["safetensors@m@1@0@a"])
    filling = Filling(store)
    assert filling.fill([(Passage(np.arange(100), 0, 90), [Match(3, 23, a, 0)])]) == (set(), 0)
    assert filling.troubles == []
    assert filling.fill([(Passage(np.arange(100), 0, 90), [])]) == (set(), 0)
    assert len(store.asked("fetch")) == 1  # nothing to read, nothing asked


def test_a_move_by_nothing_changes_no_bit():
    store = Scripted()
    a, kv = chunk(store, "a", 30)
    filling = Filling(store)
    filling.fill([(Passage(np.arange(100), 0, 90), [Match(30, 50, a, 0)])])
    for layer, (keys, values) in zip(filling.layers, kv, strict=True):
        assert isinstance(layer, GrowingLayer)
        assert torch.equal(layer.keys[0, :, 30:50], keys)
        assert torch.equal(layer.values[0, :, 30:50], values)

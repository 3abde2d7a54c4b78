"""Index: text is found wherever it stands, in two round trips, and entries do not go bad."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import Scripted

from chunkcache.anywhere.anchors import WINDOW, anchors
from chunkcache.anywhere.index import (
    MOST_PLACES,
    MOST_VARIANTS,
    Passage,
    _anchor_places,
    index_entries,
    is_exact,
    search,
)
from chunkcache.kv.codec import Codec
from chunkcache.kv.layout import KVLayout
from chunkcache.reuse.keyspace import KeySpace
from chunkcache.stores.base import Entry
from chunkcache.stores.memory import MemoryStore
from chunkcache.tokens.chunking import Chunk, Grid, cut

NOTHING = memoryview(b"")
GRID = Grid()


@dataclass(frozen=True)
class Identity:
    """Names keys as a model's identity does."""

    def key(self, chunk_hash, format):
        return f"{format}@m@1@0@{chunk_hash}"


class Place(KeySpace):
    """A key space, and a store with its keys."""

    def __init__(self, store, *args):
        super().__init__(*args)
        object.__setattr__(self, "store", store)


def origin(store=None, salt=b"salt", codec=None):
    layout = KVLayout(torch.float32, ())
    return Place(store or MemoryStore(), Identity(), layout, salt, codec or Codec())


def text(tokens, seed=0):
    return np.random.default_rng(seed).integers(0, 50_000, tokens)


def keep(place, row, *, created="1", salt=None, grid=GRID, **more):
    """Index a row's chunks, as a prompt does."""
    before: Chunk | None = None
    chunks = cut(row, grid, place.salt if salt is None else salt, tail=True)
    for chunk in chunks:
        metadata = {
            "token_ids": json.dumps(row[chunk.start : chunk.stop].tolist()),
            "positions": f"{chunk.start}-{chunk.stop}",
            "parent": before.hash if before and before.stop == chunk.start else "",
            "context": "exact",
            "created": created,
            **more,
        }
        before = chunk
        place.store.write([Entry(place.key(chunk.hash), metadata, memoryview(b"blob"))])
        place.store.write(index_entries(place, chunk, row, created))
    return chunks


def find_matches(place, tokens, start, stop):
    return search(place.store, place, [Passage(tokens, start, stop)]).matches[0]


def covered(matches):
    return sum(match.stop - match.start for match in matches)


@given(
    st.integers(0, 1 << 30),
    st.permutations(range(3)),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 300)), min_size=1, max_size=6),
    st.sampled_from([64, 128, 200]),
)
@settings(deadline=None, max_examples=60)
def test_nearly_all_of_a_repeated_text_is_found(seed, order, later, size):
    """In any order, at any offset, any number of times: at least 97 % of runs of 256 tokens."""
    documents = [text(256 + 17 * n, seed=seed + n) for n in range(3)]
    place = origin()
    noise = np.random.default_rng(seed + 99)
    first = [part for n in order for part in (noise.integers(0, 50_000, 1 + 40 * n), documents[n])]
    keep(place, np.concatenate(first), grid=Grid(size))
    parts = [part for n, gap in later for part in (noise.integers(0, 50_000, gap), documents[n])]
    prompt = np.concatenate([*parts, noise.integers(0, 50_000, 20)])
    found = covered(find_matches(place, prompt, 0, len(prompt) - 1))
    assert found >= 0.97 * sum(len(documents[n]) for n, _ in later)


def test_rows_of_a_batch_share_two_round_trips():
    place = origin(Scripted())
    a, b = text(300, 1), text(300, 2)
    keep(place, np.concatenate([a, b]))
    rows = [np.concatenate([text(n, 9), a, b[:200], text(20, 8)]) for n in (5, 17, 120)]
    before = len(place.store.calls)
    found = search(place.store, place, [Passage(row, 0, len(row) - 1) for row in rows])
    assert len(place.store.calls) == before + 2
    assert all(covered(matches) >= 490 for matches in found.matches)
    assert not found.stale
    search(place.store, place, [Passage(text(300, 77), 0, 299)])
    assert len(place.store.calls) == before + 3  # no chunk to ask for
    search(place.store, place, [Passage(rows[0], 320, 320), Passage(rows[0][:10], 0, 9)])
    assert len(place.store.calls) == before + 3  # nothing to look for


def test_only_what_was_asked_for_is_covered():
    place = origin()
    a = text(400, 1)
    keep(place, a)
    prompt = np.concatenate([text(10, 2), a])
    matches = find_matches(place, prompt, 100, 300)
    assert (matches[0].start, matches[-1].stop) == (100, 300)
    assert matches[0].old_start == 90


def test_salts_are_worlds_of_their_own():
    store, a = MemoryStore(), text(300)
    keep(origin(store), a)
    assert find_matches(origin(store), a, 0, 300)
    assert not find_matches(origin(store, b"other"), a, 0, 300)


def test_a_hash_that_lies_about_its_tokens_is_no_match():
    place = origin()
    a = text(300, 1)
    for chunk in keep(place, a):
        fields = place.store.read_metadata([place.key(chunk.hash)])[0]
        wrong = json.dumps(text(chunk.stop - chunk.start, 5).tolist())
        place.store.write([Entry(place.key(chunk.hash), {**fields, "token_ids": wrong}, NOTHING)])
    assert find_matches(place, a, 0, 300) == []


RECORDS = {
    "no tokens": {"token_ids": "[]"},
    "no list": {"token_ids": "7"},
    "deep": {"token_ids": "[" * 100_000},
    "huge": {"token_ids": "[1e400]"},
    "large": {"token_ids": f"[{1 << 70}]"},
    "text": {"token_ids": '["a"]'},
    "nested": {"token_ids": "[[1, 2], [3, 4]]"},
    "position": {"positions": "x-9"},
    "negative": {"positions": "-5-9"},
    "far": {"positions": f"{1 << 40}-9"},
}


@pytest.mark.parametrize("fields", RECORDS.values(), ids=RECORDS.keys())
def test_records_that_make_no_sense_are_misses(fields):
    place = origin()
    a = text(300)
    keep(place, a, **fields)
    found = search(place.store, place, [Passage(a, 0, 299)])
    assert found.matches == [[]]
    assert all(not entry.metadata for entry in found.stale.values())


@pytest.mark.parametrize("place_text", ["", "x 1", "- 1", "--3 1", "1.5 1", "99999999 1", "\x00"])
def test_places_that_make_no_sense_are_misses(place_text):
    place = origin()
    a = text(300)
    for chunk in keep(place, a):
        for entry in index_entries(place, chunk, a, "1"):
            place.store.write([Entry(entry.key, {chunk.hash: place_text}, NOTHING)])
    found = search(place.store, place, [Passage(a, 0, 299)])
    assert found.matches == [[]]
    assert found.stale
    assert all(not entry.metadata for entry in found.stale.values())


@pytest.mark.parametrize("overlap", [0, 16])
def test_what_stands_where_it_stood_behind_the_same_text_is_exact(overlap):
    grid = Grid(64, overlap)
    place, a = origin(), text(400, 1)
    keep(place, a, grid=grid)

    def exact(prompt, start=0):
        matches = find_matches(place, prompt, start, len(prompt))
        return [(p.start, p.stop) for p in matches if is_exact(p, prompt, grid, b"salt")]

    ends = np.concatenate([a[:245], text(90, 2)])
    assert max(stop for _, stop in exact(ends)) == 245
    assert exact(ends, 210) == [(210, 245)]
    assert max(stop for _, stop in exact(a, 40)) == 400
    other = ends.copy()
    other[10] += 1
    assert exact(other, 64) == []  # one token before it is another
    assert exact(np.concatenate([text(5, 3), a])) == []
    assert not any(is_exact(p, ends, grid, b"other") for p in find_matches(place, ends, 0, 245))


# ------------------------------------------------------------------------ entries stay good


def entries_of(store):
    return {key: kept for key, kept in entries_in(store).items() if key.startswith("anchor@")}


def entries_in(store):
    keys = [*store._free, *store._pinned]
    return dict(zip(keys, store.read_metadata(keys), strict=True))


def searched(place, passages):
    found = search(place.store, place, passages)
    place.store.write(list(found.stale.values()))
    return found


def test_entries_of_lost_chunks_are_put_right():
    place = origin()
    a = text(400, 1)
    keep(place, a, created="1")
    kept = keep(place, np.concatenate([text(30, 2), a]), created="2")
    lost = [chunk.hash for chunk in kept[1:3]]
    place.store.delete([place.key(name) for name in lost])
    found = searched(place, [Passage(a, 0, 399)])
    assert covered(found.matches[0]) == 399
    names = {name for fields in entries_of(place.store).values() for name in fields or {}}
    assert names.isdisjoint(lost)
    assert not search(place.store, place, [Passage(a, 0, 399)]).stale
    # And when all are gone, so are the entries.
    place.store.delete([key for key in entries_in(place.store) if key.startswith("safetensors")])
    assert searched(place, [Passage(a, 0, 399)]).matches == [[]]
    asked = {e.key for c in cut(a, Grid(), b"salt") for e in index_entries(place, c, a, "")}
    assert not any(place.store.read_metadata(sorted(asked)))


def test_entries_with_too_many_variants_keep_the_newest():
    place = origin()
    a = text(100)
    for n in range(3 * MOST_VARIANTS):
        keep(place, a, created=f"{n:03}", salt=b"%d" % n)
        if n == 2 * MOST_VARIANTS - 1:
            assert not search(place.store, place, [Passage(a, 0, 100)]).stale
    found = searched(place, [Passage(a, 0, 100)])
    assert covered(found.matches[0]) == 100
    for fields in entries_of(place.store).values():
        newest = sorted(int(value.split()[1]) for value in fields.values())
        assert newest == list(range(2 * MOST_VARIANTS, 3 * MOST_VARIANTS))


def test_what_replaces_a_pinned_entry_is_pinned():
    place = origin()
    a = text(200)
    keep(place, a, created="1", salt=b"x", pinned="yes")
    kept = keep(place, a, created="2", salt=b"y", pinned="no")
    place.store.delete([place.key(chunk.hash) for chunk in kept])
    stale = search(place.store, place, [Passage(a, 0, 199)]).stale
    assert stale
    assert all(entry.pinned and entry.metadata and not entry.merge for entry in stale.values())


def test_one_window_over_and_over_is_looked_for_in_a_few_places():
    place = origin()
    same = next(n for n in range(99) if anchors(np.full(WINDOW, n), b"salt"))
    prompt = np.concatenate([text(20, 1), np.full(3000, same)])
    keep(place, np.concatenate([text(100, 3), prompt[20:320]]))
    assert covered(find_matches(place, prompt, 0, 3000)) >= 100
    for rows in (1, 2):
        places = _anchor_places(place, [Passage(prompt, 0, 3000)] * rows)
        assert max(map(len, places.values())) == MOST_PLACES * rows

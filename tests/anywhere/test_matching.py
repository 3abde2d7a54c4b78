"""Matching: covers are made of equal tokens, do not overlap, and prefer the likelier context."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from chunkcache.anywhere.matching import SHORTEST_RUN, StoredChunk, cover, grow, runs

small = st.lists(st.integers(0, 3), min_size=0, max_size=200).map(lambda x: np.array(x, np.int64))


@given(small, st.lists(st.tuples(small, st.integers(-150, 200)), max_size=6), st.integers(0, 50))
def test_covers_are_sound(tokens, given_chunks, start):
    stop = len(tokens)
    start = min(start, stop)
    candidates = [(StoredChunk(str(i), 7 * i, c), s) for i, (c, s) in enumerate(given_chunks)]
    matches = cover(tokens, candidates, start, stop)
    position = start
    for match in matches:
        assert position <= match.start < match.stop <= stop
        position = match.stop
        length = match.stop - match.start
        theirs = match.chunk.tokens[match.offset : match.offset + length]
        assert (tokens[match.start : match.stop] == theirs).all()
    assert all(run[-1].stop - run[0].start >= SHORTEST_RUN for run in runs(matches))


@given(small, small, st.integers(-150, 200))
def test_growing_finds_every_equal_token(tokens, chunk, shift):
    matches = grow(tokens, StoredChunk("x", 0, chunk), shift)
    found = {i for match in matches for i in range(match.start, match.stop)}
    assert found == {
        i
        for i in range(len(tokens))
        if 0 <= i - shift < len(chunk) and tokens[i] == chunk[i - shift]
    }


def test_the_variant_with_the_longer_common_context_wins():
    rng = np.random.default_rng(0)
    before, text = rng.integers(0, 999, 64), rng.integers(0, 999, 64)
    near = StoredChunk("near", 64, text, parent="before")
    other = StoredChunk("other", 0, text, created="9")
    first = StoredChunk("before", 0, before)
    tokens = np.concatenate([before, text])
    matches = cover(tokens, [(other, 64), (near, 64), (first, 0)], 0, 128)
    assert [match.chunk.hash for match in matches] == ["before", "near"]
    assert matches[1].continues
    assert [p.chunk.hash for p in cover(text, [(other, 0), (near, 0)], 0, 64)] == ["other"]


def chain(*texts, start=0, name="", created=""):
    """Chunks that stood one behind the other."""
    chunks, parent = [], ""
    for number, text in enumerate(texts):
        chunks.append(StoredChunk(f"{name}{number}", start, text, parent, created=created))
        start, parent = start + len(text), f"{name}{number}"
    return chunks


def test_of_variants_the_one_with_the_longest_common_left_context_wins():
    """Also where what stood before it is served by another chunk."""
    rng = np.random.default_rng(1)
    a, b, c, x, y = (rng.integers(0, 999, 64) for _ in range(5))
    tokens = np.concatenate([a, b, c])
    short = chain(x, np.concatenate([y[:40], b[40:]]), c, name="short", created="9")
    long = chain(y, b, c, name="long", created="1")
    longest = chain(a[10:], b, c, start=500, name="longest", created="0")
    shifts = [(chunk, 64 * n) for chunks in (short, long) for n, chunk in enumerate(chunks)]
    assert [p.chunk.hash for p in cover(tokens, shifts, 100, 192)] == ["long1", "long2"]
    assert [p.chunk.hash for p in cover(tokens, shifts, 128, 192)] == ["long2"]
    shifts += list(zip(longest, (10, 64, 128), strict=True))
    assert [p.chunk.hash for p in cover(tokens, shifts, 128, 192)] == ["longest2"]


def test_the_variant_whose_run_goes_on_wins_then_the_clean_then_the_newest():
    rng = np.random.default_rng(2)
    a, b = rng.integers(0, 999, 64), rng.integers(0, 999, 64)
    tokens = np.concatenate([a, b])
    run = chain(a, b, name="run", created="1")
    alone = StoredChunk("alone", 7, a, created="9")
    rest = StoredChunk("rest", 7, b, created="9")
    candidates = [(alone, 0), (rest, 64), (run[0], 0), (run[1], 64)]
    assert [p.chunk.hash for p in cover(tokens, candidates, 0, 128)] == ["run0", "run1"]
    inexact = StoredChunk("inexact", 7, a, clean=False, created="9")
    older, newer = (StoredChunk(str(n), 7, a, created=str(n)) for n in (3, 4))
    candidates = [(older, 0), (inexact, 0), (newer, 0)]
    assert [p.chunk.hash for p in cover(tokens, candidates, 0, 64)] == ["4"]


def test_a_run_ends_where_a_match_was_lost():
    text = np.arange(192)
    matches = cover(text, list(zip(chain(*np.split(text, 3)), (0, 64, 128), strict=True)), 0, 192)
    assert [len(run) for run in runs(matches)] == [3]
    assert [len(run) for run in runs([matches[0], matches[2]])] == [1, 1]


def test_one_chunk_serves_several_places_and_parts():
    """A window of a chunk may stand in a prompt twice, and with a change in the middle."""
    rng = np.random.default_rng(3)
    text = rng.integers(0, 999, 128)
    changed = text.copy()
    changed[60] = 1000
    tokens = np.concatenate([text, changed])
    matches = cover(
        tokens, [(StoredChunk("x", 0, text), 0), (StoredChunk("x", 0, text), 128)], 0, 256
    )
    assert [(p.start, p.stop, p.offset) for p in matches] == [
        (0, 128, 0),
        (128, 188, 0),
        (189, 256, 61),
    ]

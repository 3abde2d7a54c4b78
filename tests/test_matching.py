"""Matching: covers are made of equal tokens, do not overlap, and prefer the likelier context."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkcache.anchors import WINDOW, anchors
from chunkcache.errors import SettingError
from chunkcache.matching import SHORTEST_RUN, StoredChunk, cover, grow, runs
from chunkcache.repair import Head, Several, parse_repair

small = st.lists(st.integers(0, 3), min_size=0, max_size=200).map(lambda x: np.array(x, np.int64))


@given(small, st.lists(st.tuples(small, st.integers(-150, 200)), max_size=6), st.integers(0, 50))
def test_covers_are_sound(tokens, given_chunks, start):
    stop = len(tokens)
    start = min(start, stop)
    candidates = [(StoredChunk(str(i), 7 * i, c), s) for i, (c, s) in enumerate(given_chunks)]
    pieces = cover(tokens, candidates, start, stop)
    position = start
    for piece in pieces:
        assert position <= piece.start < piece.stop <= stop
        position = piece.stop
        length = piece.stop - piece.start
        theirs = piece.chunk.tokens[piece.offset : piece.offset + length]
        assert (tokens[piece.start : piece.stop] == theirs).all()
    assert all(run[-1].stop - run[0].start >= SHORTEST_RUN for run in runs(pieces))


@given(small, small, st.integers(-150, 200))
def test_growing_finds_every_equal_token(tokens, chunk, shift):
    pieces = grow(tokens, StoredChunk("x", 0, chunk), shift)
    found = {i for piece in pieces for i in range(piece.start, piece.stop)}
    assert found == {
        i
        for i in range(len(tokens))
        if 0 <= i - shift < len(chunk) and tokens[i] == chunk[i - shift]
    }


@given(st.integers(0, 40), st.integers(0, 5))
def test_anchors_do_not_depend_on_where_a_text_stands(offset, seed):
    text = np.random.default_rng(seed).integers(0, 1000, 300)
    before = np.random.default_rng(seed + 9).integers(0, 1000, offset)
    alone = {a.hash for a in anchors(text, b"s")}
    inside = {a.hash for a in anchors(np.concatenate([before, text]), b"s")}
    assert alone
    assert alone <= inside
    assert not alone & {a.hash for a in anchors(text, b"other")}
    assert len(alone) < 2 * len(text) / 4


def test_short_texts_have_no_anchor():
    assert anchors(np.arange(WINDOW - 1), b"") == []


def test_the_variant_with_the_longer_common_context_wins():
    rng = np.random.default_rng(0)
    before, text = rng.integers(0, 999, 64), rng.integers(0, 999, 64)
    near = StoredChunk("near", 64, text, parent="before")
    other = StoredChunk("other", 0, text, created="9")
    first = StoredChunk("before", 0, before)
    tokens = np.concatenate([before, text])
    pieces = cover(tokens, [(other, 64), (near, 64), (first, 0)], 0, 128)
    assert [piece.chunk.hash for piece in pieces] == ["before", "near"]
    assert pieces[1].continues
    assert [p.chunk.hash for p in cover(text, [(other, 0), (near, 0)], 0, 64)] == ["other"]


def test_repairs_by_name():
    assert parse_repair("head:4") == Head(4)
    assert isinstance(parse_repair("head:4 + query:0.1"), Several)
    for wrong in ("", "tail:3", "head:x", "head:-1", "query:2", "query:nan", "full:1", "none+"):
        with pytest.raises(SettingError, match="use none, full, head"):
            parse_repair(wrong)

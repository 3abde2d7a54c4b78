from __future__ import annotations

import hashlib
import hmac
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkcache.tokens.chunking import Chunk, Grid, as_text, cut, from_text

SALT = b"salt of some model"
ROWS = st.lists(st.integers(0, 2**40), max_size=60)


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    size = draw(st.integers(1, 12))
    return Grid(size, draw(st.integers(0, size - 1)))


def slow_spans(tokens: int, grid: Grid, tail: bool) -> list[tuple[int, int]]:
    """Where a row is cut, by trying every position."""
    step = grid.size - grid.overlap
    starts = [s for s in range(tokens) if s % step == 0 and s + grid.size <= tokens]
    spans = [(s, s + grid.size) for s in starts]
    covered = max((stop for _, stop in spans), default=0)
    if tail and tokens - covered >= 2:
        spans.append((len(starts) * step, tokens))
    return spans


def slow_hash(tokens: list[int], start: int, stop: int, grid: Grid, salt: bytes) -> str:
    """The hash of one chunk, the chain walked anew from the first token."""

    def encoded(part: list[int]) -> bytes:
        return b"".join(token.to_bytes(8, "little", signed=True) for token in part)

    def hashed(message: bytes) -> bytes:
        return hmac.new(salt, message, hashlib.sha256).digest()

    link = hashed(b"chunkcache/chain/2")
    for at in range(0, start, grid.stride):
        link = hashed(b"chunkcache/link/2" + link + encoded(tokens[at : at + grid.stride]))
    return hashed(b"chunkcache/chunk/2" + link + encoded(tokens[start:stop])).hex()


@given(ROWS, grids(), st.booleans())
def test_equal_to_a_slow_reference(tokens: list[int], grid: Grid, tail: bool) -> None:
    spans = slow_spans(len(tokens), grid, tail)
    expected = [Chunk(a, b, slow_hash(tokens, a, b, grid, SALT)) for a, b in spans]
    assert cut(tokens, grid, SALT, tail) == expected
    assert grid.spans(len(tokens), tail) == spans
    assert grid.complete(len(tokens)) == len(slow_spans(len(tokens), grid, tail=False))


@given(st.integers(0, 200), grids(), st.booleans())
def test_spans_cover_the_row_and_each_brings_new_tokens(
    tokens: int, grid: Grid, tail: bool
) -> None:
    covered = 0
    for start, stop in grid.spans(tokens, tail):
        assert start <= covered < stop <= tokens
        covered = stop
    # What is left over is less than a chunk brings; with a tail, the last token at most.
    assert tokens - covered <= (1 if tail else max(grid.stride, grid.size) - 1)


@given(ROWS, ROWS, grids(), st.booleans())
def test_a_longer_row_begins_with_the_whole_chunks_of_a_shorter_one(
    tokens: list[int], more: list[int], grid: Grid, tail: bool
) -> None:
    whole = cut(tokens, grid, SALT)
    assert cut(tokens + more, grid, SALT, tail)[: len(whole)] == whole


@given(st.lists(st.integers(0, 500), min_size=1, max_size=60), grids(), st.data())
def test_a_token_changes_the_chunks_from_its_own_on_and_none_before(
    tokens: list[int], grid: Grid, data: st.DataObject
) -> None:
    at = data.draw(st.integers(0, len(tokens) - 1))
    other = list(tokens)
    other[at] += 1
    for mine, theirs in zip(
        cut(tokens, grid, SALT, tail=True), cut(other, grid, SALT, tail=True), strict=True
    ):
        assert (mine.start, mine.stop) == (theirs.start, theirs.stop)
        assert (mine.hash == theirs.hash) == (mine.stop <= at)


@given(ROWS, grids())
def test_the_salt_is_in_every_hash(tokens: list[int], grid: Grid) -> None:
    mine = {chunk.hash for chunk in cut(tokens, grid, b"one", tail=True)}
    theirs = {chunk.hash for chunk in cut(tokens, grid, b"two", tail=True)}
    assert not mine & theirs


@given(ROWS, grids())
def test_all_hashes_of_a_row_differ(tokens: list[int], grid: Grid) -> None:
    hashes = [chunk.hash for chunk in cut([0] * len(tokens), grid, SALT, tail=True)]
    assert len(set(hashes)) == len(hashes)


def test_equal_chunks_at_other_places_differ() -> None:
    first, second = cut([1, 2, 3] * 2, Grid(3), SALT)
    assert first.hash != second.hash


@pytest.mark.parametrize("dtype", [np.int32, np.int64, ">i8"])
def test_the_integer_type_does_not_matter(dtype: str | type[np.integer]) -> None:
    tokens = [5, 1, 7, 0, 3, 2**30]
    assert cut(np.array(tokens).astype(dtype), Grid(2), SALT) == cut(tokens, Grid(2), SALT)


def test_a_view_with_gaps_is_read_right() -> None:
    table = np.arange(40).reshape(10, 4)
    assert cut(table[:, 1], Grid(4, 2), SALT) == cut(list(range(1, 40, 4)), Grid(4, 2), SALT)


def test_hashes_stay_the_same_from_release_to_release() -> None:
    # Changing them empties every store: change the marks in the chain then, and this.
    (chunk,) = cut([1, 2, 3], Grid(3), b"")
    assert chunk.hash == slow_hash([1, 2, 3], 0, 3, Grid(3), b"")
    assert chunk.hash == "2e6d4cf5d310c0b8078a3dbf23941c4a0d7b39337bbba28bc65dd4366adbdfde"


@given(st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=300))
def test_ids_come_back(ids: list[int]) -> None:
    found = from_text(as_text(ids))
    assert found is not None
    assert found.dtype == "int64"
    assert found.tolist() == ids == json.loads(as_text(ids))


@pytest.mark.parametrize(
    "text",
    ["", "[]", "7", "[1", "[-1]", "[1.5]", "[1.0]", '["1"]', '"12"', "[null]", "[[1],[2]]",
     "[[1],2]", "{}", '{"1":2}', "[true]", "[NaN]", "[1e400]", f"[{2**63}]", f"[{2**70}]",
     f"[1,{2**63}]", "[" * 100_000, "[1]x"],
)  # fmt: skip
def test_anything_else_is_nothing(text: str) -> None:
    assert from_text(text) is None


def test_no_chunk_has_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chunkcache.tokens.chunking.MOST_TOKENS", 3)
    assert from_text("[1,2]") is not None
    assert from_text("[1,2,3]") is None


@given(st.text())
def test_no_text_raises(text: str) -> None:
    from_text(text)
    from_text(f"[{text}]")

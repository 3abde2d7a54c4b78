"""Anchors: the same in every text, wherever it stands, and few."""

from __future__ import annotations

import hashlib
import hmac

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from chunkcache.anywhere.anchors import ONE_IN, WINDOW, Anchor, anchors


@given(st.integers(0, 40), st.integers(0, 5))
def test_anchors_do_not_depend_on_where_a_text_stands(offset, seed):
    text = np.random.default_rng(seed).integers(0, 1000, 300)
    before = np.random.default_rng(seed + 9).integers(0, 1000, offset)
    alone = anchors(text, b"s")
    inside = anchors(np.concatenate([before, text]), b"s")
    assert alone
    assert {Anchor(a.start + offset, a.hash) for a in alone} <= set(inside)
    assert [a.start for a in alone] == sorted({a.start for a in alone})


def test_one_in_four_windows_is_an_anchor():
    text = np.random.default_rng(0).integers(0, 50_000, 20_000)
    assert abs(len(anchors(text, b"")) * ONE_IN / len(text) - 1) < 0.05


def test_text_of_a_few_tokens_has_anchors_too():
    """Which windows are chosen must not follow a pattern of small or alike ids."""
    text = np.random.default_rng(0).integers(0, 3, 20_000)
    assert abs(len(anchors(text, b"")) * ONE_IN / len(text) - 1) < 0.1
    ascending = anchors(np.arange(20_000), b"")
    assert max(np.diff([a.start for a in ascending])) < 20 * ONE_IN


def test_a_hash_is_that_of_salt_and_tokens():
    text = np.arange(100)
    first = anchors(text, b"salt")[0]
    window = text[first.start : first.start + WINDOW].astype("<i8").tobytes()
    expected = hmac.new(b"salt", b"chunkcache/anchor/2" + window, hashlib.sha256).hexdigest()
    assert first.hash == expected
    assert not {a.hash for a in anchors(text, b"salt")} & {a.hash for a in anchors(text, b"other")}


def test_any_memory_order_and_integer_type_gives_the_same():
    text = np.random.default_rng(1).integers(0, 1000, 200)
    wanted = anchors(text, b"")
    assert anchors(np.repeat(text, 2)[::2], b"") == wanted
    assert anchors(text.astype(np.int32), b"") == wanted


def test_short_texts_have_no_anchor():
    assert anchors(np.arange(WINDOW - 1), b"") == []
    assert anchors(np.arange(0), b"") == []

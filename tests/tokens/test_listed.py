from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkcache.tokens import listed
from chunkcache.tokens.listed import as_text, from_text


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
    monkeypatch.setattr(listed, "MOST_TOKENS", 3)
    assert from_text("[1,2]") is not None
    assert from_text("[1,2,3]") is None


@given(st.text())
def test_no_text_raises(text: str) -> None:
    from_text(text)
    from_text(f"[{text}]")

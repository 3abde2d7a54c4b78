from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from chunkcache.tokens.chunking import Chunk, Grid, cut
from chunkcache.tokens.plan import OTHER_ROW, Kind, RowPlan, Span, computed_too, plan_row, stretches


@st.composite
def plans(draw: st.DrawFn) -> tuple[RowPlan, set[str]]:
    """A plan of a row with any grid, any of whose chunks are known, and what is known."""
    size = draw(st.integers(1, 6))
    grid = Grid(size, draw(st.integers(0, size - 1)))
    tokens = draw(st.integers(0, 30))
    chunks = cut(list(range(tokens)), grid, b"", tail=draw(st.booleans()))
    known = {chunk.hash for chunk in chunks if draw(st.booleans())}
    held = draw(st.integers(0, tokens))
    return plan_row(chunks, tokens, held, known, "unknown"), known


@given(plans())
def test_the_reach_is_as_far_as_known_chunks_follow_each_other(
    planned: tuple[RowPlan, set[str]],
) -> None:
    plan, known = planned
    covered = set(range(plan.held))
    for chunk in plan.chunks:
        if chunk.stop > plan.held:
            if chunk.hash not in known:
                break
            covered |= set(range(chunk.start, chunk.stop))
    reach = next(at for at in range(plan.tokens + 1) if at == plan.tokens or at not in covered)
    assert plan.reach == reach


@given(plans(), st.data())
def test_the_reads_bring_all_tokens_up_to_the_limit_and_none_is_needless(
    planned: tuple[RowPlan, set[str]], data: st.DataObject
) -> None:
    plan, known = planned
    limit = data.draw(st.integers(0, plan.tokens))
    reads = plan.reads(limit)
    assert {chunk.hash for chunk in reads} <= known
    brought = set(range(plan.held)).union(*(range(c.start, c.stop) for c in reads))
    assert set(range(min(limit, plan.reach))) <= brought
    for chunk in reads:
        assert chunk.stop > plan.held
        assert chunk.start < limit


@given(plans(), st.data())
def test_spans_cover_each_token_once_in_order(
    planned: tuple[RowPlan, set[str]], data: st.DataObject
) -> None:
    plan, known = planned
    used = data.draw(st.integers(0, plan.reach))
    position = 0
    for span in plan.spans(used):
        assert span.start == position < span.stop
        position = span.stop
        if span.kind is Kind.REUSED:
            assert span.stop <= used
            assert not span.reason
            assert span.origin == ("held" if span.start < plan.held else "store")
            assert span.origin == "held" or span.key in known
        else:
            assert span.start >= used
            assert span.kind is Kind.COMPUTED
            assert span.reason
            assert not span.origin
    assert position == plan.tokens


@given(plans(), st.data())
def test_cut_short_a_plan_reaches_less_and_says_why(
    planned: tuple[RowPlan, set[str]], data: st.DataObject
) -> None:
    plan, _ = planned
    at = data.draw(st.integers(0, plan.tokens))
    shorter = plan.cut_at(at, "damaged")
    assert shorter.reach == min(at, plan.reach)
    assert shorter.missing == ("damaged" if at < plan.reach else plan.missing)
    assert (shorter.tokens, shorter.held, shorter.chunks) == (plan.tokens, plan.held, plan.chunks)


CHUNKS = [Chunk(0, 4, "a"), Chunk(4, 8, "b"), Chunk(8, 12, "c"), Chunk(12, 14, "d")]


def test_a_gap_ends_the_run() -> None:
    plan = plan_row(CHUNKS, 15, 0, {"a", "b", "d"}, "not in the store")
    assert plan.spans(8) == [
        Span(0, 4, Kind.REUSED, "a", "store"),
        Span(4, 8, Kind.REUSED, "b", "store"),
        Span(8, 12, Kind.COMPUTED, "c", reason="not in the store"),
        Span(12, 14, Kind.COMPUTED, "d", reason="not in the store"),
        Span(14, 15, Kind.COMPUTED, reason="not in the store"),
    ]


def test_chunks_that_leave_a_gap_are_not_joined() -> None:
    plan = plan_row([CHUNKS[0], CHUNKS[2]], 15, 0, {"a", "c"}, "not in the store")
    assert plan.reach == 4


def test_tokens_that_are_known_but_wanted_say_so() -> None:
    plan = plan_row(CHUNKS, 14, 0, {"a", "b", "c", "d"}, "not in the store")
    assert plan.spans(13)[-2:] == [
        Span(12, 13, Kind.REUSED, "d", "store"),
        Span(13, 14, Kind.COMPUTED, "d", reason="its output is wanted"),
    ]


def test_what_is_held_is_not_read() -> None:
    plan = plan_row(CHUNKS, 15, 6, {"b", "c"}, "not in the store")
    assert plan.reads(15) == CHUNKS[1:3]
    assert plan.spans(12)[:3] == [
        Span(0, 6, Kind.REUSED, origin="held"),
        Span(6, 8, Kind.REUSED, "b", "store"),
        Span(8, 12, Kind.REUSED, "c", "store"),
    ]


@given(st.lists(st.booleans(), max_size=30))
def test_stretches_are_those_of_equal_values(values: list[bool]) -> None:
    found = stretches(np.array(values, dtype=bool))
    assert [value for start, stop, value in found for _ in range(start, stop)] == values
    assert all(a[2] != b[2] and a[1] == b[0] for a, b in pairwise(found))


def test_what_another_row_has_computed_again_is_told_apart() -> None:
    spans = [Span(0, 4, Kind.REUSED, "a", "store"), Span(4, 8, Kind.REUSED, "b", "store")]
    computed = np.array([0, 0, 0, 1, 1, 1, 0, 0, 1], dtype=bool)
    assert computed_too(spans, computed) == [
        Span(0, 3, Kind.REUSED, "a", "store"),
        Span(3, 4, Kind.COMPUTED, "a", reason=OTHER_ROW),
        Span(4, 6, Kind.COMPUTED, "b", reason=OTHER_ROW),
        Span(6, 8, Kind.REUSED, "b", "store"),
    ]

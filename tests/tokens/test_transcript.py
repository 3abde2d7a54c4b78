from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from chunkcache.tokens.transcript import Transcript


def row_of(*ids: int) -> torch.Tensor:
    return torch.tensor([ids])


class FollowsAList(RuleBasedStateMachine):
    """The transcript against the plainest model: a list of lists."""

    def __init__(self) -> None:
        super().__init__()
        self.transcript = Transcript()
        self.rows: list[list[int]] = [[], []]
        self.pads = [0, 1]
        self.transcript.start(self.pads)

    @rule(data=st.data(), columns=st.integers(0, 4))
    def append(self, data: st.DataObject, columns: int) -> None:
        ids = [[data.draw(st.integers(0, 3)) for _ in range(columns)] for _ in self.rows]
        self.transcript.append(torch.tensor(ids, dtype=torch.long).reshape(len(ids), columns))
        for row, new in zip(self.rows, ids, strict=True):
            row += new

    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        columns = data.draw(st.integers(0, len(self.rows[0]) + 2))
        self.transcript.crop(columns)
        self.rows = [row[:columns] for row in self.rows]

    @rule(data=st.data())
    def take_rows(self, data: st.DataObject) -> None:
        index = st.integers(-len(self.rows), len(self.rows) - 1)
        rows = data.draw(st.lists(index, min_size=1, max_size=4))
        self.transcript.take_rows(torch.tensor(rows))
        self.rows = [list(self.rows[i]) for i in rows]
        self.pads = [self.pads[i] for i in rows]

    @rule(data=st.data())
    def take_rows_by_mask(self, data: st.DataObject) -> None:
        mask = [data.draw(st.booleans()) for _ in self.rows]
        mask[0] = True
        self.transcript.take_rows(torch.tensor(mask))
        self.rows = [row for row, taken in zip(self.rows, mask, strict=True) if taken]
        self.pads = [pad for pad, taken in zip(self.pads, mask, strict=True) if taken]

    @precondition(lambda self: self.rows[0])
    @rule(pads=st.lists(st.integers(0, 2), min_size=1, max_size=3))
    def start(self, pads: list[int]) -> None:
        self.transcript.start(pads)
        self.rows, self.pads = [[] for _ in pads], list(pads)

    @invariant()
    def same(self) -> None:
        assert self.transcript.pads == self.pads
        assert self.transcript.columns == len(self.rows[0])

    def teardown(self) -> None:
        assert self.transcript.ids().tolist() == self.rows


TestFollowsAList = FollowsAList.TestCase
TestFollowsAList.settings = settings(max_examples=60, stateful_step_count=12, deadline=None)


@given(
    st.lists(st.lists(st.integers(0, 1), min_size=6, max_size=6), min_size=1, max_size=3),
    st.data(),
)
def test_common_columns(mine: list[list[int]], data: st.DataObject) -> None:
    length = data.draw(st.integers(0, 8))
    other = [[data.draw(st.integers(0, 1)) for _ in range(length)] for _ in mine]
    transcript = Transcript()
    transcript.start([0] * len(mine))
    transcript.append(torch.tensor(mine))
    expected = 0
    while expected < min(6, length) and all(
        a[expected] == b[expected] for a, b in zip(mine, other, strict=True)
    ):
        expected += 1
    ids = torch.tensor(other, dtype=torch.long).reshape(len(mine), length)
    assert transcript.common_columns(ids, [0] * len(mine)) == expected


def test_other_padding_or_another_batch_has_nothing_in_common() -> None:
    transcript = Transcript()
    transcript.start([1])
    transcript.append(row_of(0, 5, 6))
    assert transcript.common_columns(row_of(0, 5, 6), [1]) == 3
    assert transcript.common_columns(row_of(0, 5, 6), [0]) == 0
    assert transcript.common_columns(row_of(0, 5, 6).repeat(2, 1), [1, 1]) == 0


def test_nothing_recorded() -> None:
    transcript = Transcript()
    assert transcript.columns == 0
    assert transcript.ids().shape == (0, 0)
    assert transcript.common_columns(row_of(1, 2), [0]) == 0
    transcript.crop(0)
    transcript.start([0, 2])
    assert transcript.ids().shape == (2, 0)
    assert transcript.common_columns(row_of(1, 2).repeat(2, 1), [0, 2]) == 0


def test_rows_of_nothing_recorded_can_be_taken() -> None:
    # Beam search reorders the rows also of a cache that computes all and records nothing.
    transcript = Transcript()
    transcript.take_rows(torch.tensor([1, 0, 0]))
    assert transcript.columns == 0


def test_the_caller_may_use_its_memory_again() -> None:
    # A loop that decodes into one buffer gives the same tensor each time.
    transcript = Transcript()
    transcript.start([0])
    buffer = torch.empty(1, 1, dtype=torch.long)
    for token in (5, 6, 7):
        buffer.fill_(token)
        transcript.append(buffer)
    assert transcript.ids().tolist() == [[5, 6, 7]]
    buffer.fill_(8)
    assert transcript.ids().tolist() == [[5, 6, 7]]


def test_a_single_piece_is_not_the_callers_memory_either() -> None:
    transcript = Transcript()
    transcript.start([0])
    prompt = row_of(1, 2, 3)
    transcript.append(prompt)
    prompt.zero_()
    assert transcript.ids().tolist() == [[1, 2, 3]]


def test_where_exactness_ends_is_forgotten_with_what_stood_behind() -> None:
    transcript = Transcript()
    transcript.start([0, 0])
    transcript.append(row_of(1, 2, 3, 4, 5, 6).repeat(2, 1))
    assert transcript.is_exact
    transcript.inexact_from = [4, None]
    assert not transcript.is_exact
    transcript.crop(6)
    transcript.crop(5)
    assert transcript.inexact_from == [4, None]
    transcript.take_rows(torch.tensor([1, 0, 0]))
    assert transcript.inexact_from == [None, 4, 4]
    transcript.crop(4)
    assert transcript.inexact_from == [None] * 3
    transcript.inexact_from = [2, 2, None]
    transcript.start([0])
    assert transcript.inexact_from == [None]


def test_rows_of_padding_alone_may_go_on_with_it() -> None:
    transcript = Transcript()
    transcript.start([0, 2, 3])
    transcript.append(row_of(1, 2, 3).repeat(3, 1))
    transcript.more_padding([5, 5, 5])
    assert transcript.pads == [0, 2, 5]

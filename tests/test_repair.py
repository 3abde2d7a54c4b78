"""Repair: what each strategy picks, and that its name says what it is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from chunkcache.errors import SettingError
from chunkcache.repair import Head, Repair, Several, moved_mask, parse_repair

RUNS = [(3, 10), (12, 14), (14, 20)]
MOVED = 15


@dataclass
class Seen:
    """A prompt of 24 tokens, of which later ones deviate more and earlier ones are looked at."""

    runs: list[tuple[int, int]]
    tokens: int = 24

    def deviation(self):
        return np.arange(self.tokens, dtype=np.float64)

    def query_attention(self):
        return 1 / (1 + np.arange(self.tokens, dtype=np.float64)) ** 2


def picked(name, runs=RUNS):
    return np.flatnonzero(parse_repair(name).pick(Seen(runs))).tolist()


ALL = [*range(3, 10), *range(12, 20)]


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("none", []),
        ("full", ALL),
        ("head:0", []),
        ("head:1", [3, 12, 14]),
        ("head:3", [3, 4, 5, 12, 13, 14, 15, 16]),
        ("seam:1", [3, 9, 12, 13, 14, 19]),
        ("seam:99", ALL),
        ("deviation:0.2", [17, 18, 19]),
        ("query:0.2", [3, 4, 5]),
        ("deviation:1", ALL),
        ("deviation:0", []),
        ("deviation:0.01", []),
        ("head:1+deviation:0.2", [3, 12, 14, 17, 18, 19]),
    ],
)
def test_what_is_picked(name, tokens):
    assert picked(name) == tokens
    assert picked(name, []) == []


def test_random_picks_its_share_of_moved_tokens_and_the_same_each_time():
    found = picked("random:0.4")
    assert len(found) == round(0.4 * MOVED)
    assert set(found) <= set(ALL)
    assert found == picked("random:0.4")
    assert found != ALL[: len(found)]


def test_moved_tokens():
    assert np.flatnonzero(moved_mask(Seen(RUNS))).tolist() == ALL


def test_repairs_by_name():
    assert parse_repair("head:4") == Head(4)
    assert isinstance(parse_repair("head:4 + query:0.1"), Several)


@pytest.mark.parametrize(
    "wrong",
    ["", "tail:3", "head", "head:x", "head:-1", "query:2", "query:nan", "full:1", "none+", "+"],
)
def test_a_name_that_is_not_known_is_a_setting_error(wrong):
    with pytest.raises(SettingError, match="use none, full, head"):
        parse_repair(wrong)


def test_a_strategy_of_ones_own():
    class Last(Repair):
        def pick(self, situation):
            return np.arange(situation.tokens) >= situation.runs[-1][1] - 1

    assert np.flatnonzero(Several((Head(1), Last())).pick(Seen(RUNS)))[-1] == 23

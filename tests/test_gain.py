"""Gain: what is known is read, unless that has been slower than computing lately."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from chunkcache import RedisChunkCache
from chunkcache.gain import ENOUGH, NO_GAIN, TRY_AGAIN, Gauge
from chunkcache.stores.base import Part
from tests.models import tiny, tokens
from tests.scripted import Scripted


def gauge(read: float = 1.0, compute: float = 1.0, size: int = 1000) -> Gauge:
    """One that has timed both, in milliseconds for 1,000 bytes and 1,000 tokens."""
    made = Gauge()
    for _ in range(ENOUGH):
        made.note_read(size, read * size / 1000)
        made.note_computed(size, compute * size / 1000)
    return made


@pytest.mark.parametrize(
    ("read", "compute", "min_gain", "pays"),
    [(1, 2, 1, True), (2, 1, 1, False), (1, 2, 3, False), (2, 1, 0.4, True), (9, 1, 0, True)],
)
def test_the_faster_way_is_taken(read: float, compute: float, min_gain: float, pays: bool) -> None:
    assert gauge(read, compute).pays(1000, 1000, min_gain) is pays
    assert gauge(read, compute).pays(2000, 2000, min_gain) is pays


def test_what_was_not_timed_is_tried() -> None:
    made = Gauge()
    assert made.pays(1000, 1000, 1.0)
    for _ in range(ENOUGH):
        made.note_computed(1000, 1.0)
        assert made.pays(1000, 1000, 1.0)
    for _ in range(ENOUGH - 1):
        made.note_read(1000, 9.0)
        assert made.pays(1000, 1000, 1.0)
    made.note_read(1000, 9.0)
    assert not made.pays(1000, 1000, 1.0)


def test_small_reads_say_nothing_of_large_ones() -> None:
    assert not gauge(read=9, size=1000).pays(4000, 4000, 1.0)
    assert gauge(read=9, size=1000).pays(4001, 4001, 1.0)


def test_one_accident_decides_nothing() -> None:
    made = gauge(read=1, compute=2)
    made.note_read(1000, 1e6)
    assert made.pays(1000, 1000, 1.0)


def test_a_read_is_tried_again_now_and_then() -> None:
    made = gauge(read=9)
    tries = [made.pays(1000, 1000, 1.0) for _ in range(2 * (TRY_AGAIN + 1))]
    assert tries == 2 * ([False] * TRY_AGAIN + [True])


def slowly(number: int, part: Part, there: bool) -> None:
    time.sleep(0.2)  # a loaded machine may take half a second to compute


def test_chunks_that_take_longer_to_read_are_computed_and_the_report_says_so() -> None:
    model, store, ids = tiny("llama"), Scripted(answer=slowly), tokens(400)
    plain = model.generate(ids, max_new_tokens=4, do_sample=False)

    def ask(**settings: Any) -> Any:
        cache = RedisChunkCache(model, store, chunk_size=64, **settings)
        out = model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
        assert torch.equal(out, plain)
        return cache.report

    for _ in range(ENOUGH):  # computing is timed by prompts that nobody knows
        model.generate(
            tokens(400, seed=9),
            past_key_values=RedisChunkCache(model, store, namespace=str(time.time())),
            max_new_tokens=1,
        )
    assert ask(min_gain=1.0).reused == 0, "not known yet"
    for _ in range(ENOUGH):
        assert ask(min_gain=1.0).reused == 399, "nobody knows how slow it is"
    report = ask(min_gain=1.0)
    assert (report.reused, report.computed, report.bytes_read) == (0, 400, 0)
    assert {span["reason"] for span in report.chunks} == {NO_GAIN}
    assert report.bytes_written == 0, "it is in the store already"
    assert "min_gain" in str(report)
    assert ask(min_gain=0).reused == 399
    assert ask(min_gain=1.0, reuse="anywhere").reused == 399

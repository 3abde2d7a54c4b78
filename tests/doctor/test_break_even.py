"""Break-even: what is measured is a hit, and nothing of it stays."""

from __future__ import annotations

import pytest

from chunkcache import StoreError, catalog, open_store
from chunkcache.doctor.break_even import BreakEven, Point, measure_break_even
from chunkcache.stores.memory import MemoryStore
from tests.models import tiny


def points(*faster: bool) -> BreakEven:
    return BreakEven(
        tuple(Point(100 * n, 2.0, 1.0 if fast else 3.0) for n, fast in enumerate(faster, 1))
    )


@pytest.mark.parametrize(
    ("faster", "found"),
    [
        ((True, True), 100),
        ((False, True, True), 200),
        ((True, False, True), 300),
        ((True, False), None),
        ((False, False), None),
        ((), None),
    ],
)
def test_from_what_length_on(faster, found):
    assert points(*faster).from_tokens == found


def test_the_prefill_rate():
    assert BreakEven((Point(100, 50.0, 1.0), Point(500, 250.0, 1.0))).prefill_rate == 2000


def test_a_real_server(redis_server):
    said: list[str] = []
    with open_store(redis_server.unix_url) as store:
        found = measure_break_even(tiny(), store, said.append)
        assert [point.tokens for point in found.points] == [128, 256]  # the model has 512 positions
        assert all(point.compute_ms > 0 < point.read_ms for point in found.points)
        assert said[1] == "computing and reading 256 tokens"
        assert not list(catalog.entries(store))


def test_no_longer_prompts_after_one_that_takes_long(monkeypatch):
    monkeypatch.setattr("chunkcache.doctor.break_even.ENOUGH_MS", 0.0)
    with MemoryStore() as store:
        assert len(measure_break_even(tiny(), store).points) == 1


def test_the_chunk_size_in_force(monkeypatch):
    monkeypatch.setenv("CHUNKCACHE_CHUNK_SIZE", "64")
    with MemoryStore() as store:
        found = measure_break_even(tiny(), store)
    assert [point.tokens for point in found.points] == [64, 128, 256]


def test_a_store_that_keeps_nothing():
    with MemoryStore(1000) as store, pytest.raises(StoreError, match="is not stored"):
        measure_break_even(tiny(), store)


def test_what_would_not_pay_is_read_too(monkeypatch):
    monkeypatch.setenv("CHUNKCACHE_MIN_GAIN", "1e9")
    with MemoryStore() as store:
        assert len(measure_break_even(tiny(), store).points) == 2


def test_a_model_without_positions():
    model = tiny("bloom")
    del model.config.max_position_embeddings  # as in BLOOM's own configuration
    with MemoryStore() as store:
        assert len(measure_break_even(model, store).points) == 5

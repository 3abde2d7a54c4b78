"""Sizing: the arithmetic, by examples that can be done by hand."""

from __future__ import annotations

import pytest

from chunkcache import SettingError
from chunkcache.doctor.sizing import INDEX_BYTES, METADATA_BYTES, Load, Node, allocated, plan

LOAD = Load(corpus_tokens=1000, prompts_per_second=2, prompt_tokens=500, reused=0.8)
NODE = Node(memory=1e6, link=8e6)  # a million bytes, and as many per second


def test_all_of_it():
    # 10 chunks of 100 tokens and 10,000 bytes: 100 bytes per token. 400 of 500 tokens are found.
    found = plan(10_000, 100, LOAD, NODE, prefill_rate=1000)
    assert found.token_bytes == 100
    assert found.memory == 10 * (10_000 + METADATA_BYTES)
    assert found.read == 2 * 400 * 100
    assert found.write == 2 * 100 * 100
    assert found.read_seconds == pytest.approx(0.04)
    assert found.compute_seconds == pytest.approx(0.4)
    assert found.break_even_link == 8 * 100 * 1000
    assert (found.nodes_for_memory, found.nodes_for_network, found.nodes) == (1, 1, 1)


def test_at_the_break_even_link_both_take_the_same_time():
    rate = 1234.0
    link = plan(10_000, 100, LOAD, NODE, prefill_rate=rate).break_even_link
    found = plan(10_000, 100, LOAD, Node(link=link), prefill_rate=rate)
    assert found.read_seconds == pytest.approx(found.compute_seconds)


def test_nodes_by_what_is_scarcer():
    large = Load(corpus_tokens=1_000_000, prompts_per_second=1)
    found = plan(10_000, 100, large, Node(memory=10e6, link=1e12))
    assert found.memory == 120e6
    assert (found.nodes_for_memory, found.nodes) == (15, 15)  # four fifths of each are usable
    busy = Load(corpus_tokens=1000, prompts_per_second=1000, prompt_tokens=100, reused=0.5)
    found = plan(10_000, 100, busy, NODE)
    assert found.read == found.write == 5e6
    assert (found.nodes_for_network, found.nodes) == (8, 8)  # 5 MB/s over 0.7 MB/s


def test_writes_count_where_little_is_found():
    few = Load(corpus_tokens=1000, prompts_per_second=1000, prompt_tokens=100, reused=0.0)
    assert plan(10_000, 100, few, NODE).nodes == 15


def test_the_last_chunk_and_the_index():
    odd = Load(corpus_tokens=101)
    assert plan(10_000, 100, odd, NODE).memory == 2 * (10_000 + METADATA_BYTES)
    assert plan(10_000, 100, odd, NODE, anywhere=True).memory == 2 * (
        10_000 + METADATA_BYTES + INDEX_BYTES
    )


def test_an_unknown_prefill_rate():
    found = plan(10_000, 100, LOAD, NODE)
    assert found.compute_seconds is None
    assert found.break_even_link is None


@pytest.mark.parametrize(
    ("nbytes", "taken"),
    # Less the 48 bytes of the key, what MEMORY USAGE said on Redis 7.0.
    [
        (40_000, 40_960),
        (1_000_000, 1_048_576),
        (1_200_000, 1_310_720),
        (2_955_760, 3_145_728),
        (5_905_536, 6_291_456),
        (16_800_000, 20_971_520),
        (1 << 24, 1 << 24),
        (1_000, 1_000),
    ],
)
def test_what_the_allocator_takes(nbytes, taken):
    assert allocated(nbytes) == taken


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Load(0), "corpus_tokens"),
        (lambda: Load(1, prompts_per_second=-1), "prompts_per_second"),
        (lambda: Load(1, prompt_tokens=float("nan")), "prompt_tokens"),
        (lambda: Load(1, reused=1.5), "between 0 and 1"),
        (lambda: Node(memory=0), "node memory"),
        (lambda: Node(link=float("inf")), "node link"),
        (lambda: plan(1, 1, LOAD, NODE, prefill_rate=0), "prefill rate"),
        (lambda: plan(0, 1, LOAD, NODE), "chunk_bytes"),
        (lambda: plan(1, 0, LOAD, NODE), "chunk_tokens"),
    ],
)
def test_numbers_that_cannot_be(make, named):
    with pytest.raises(SettingError, match=named):
        make()

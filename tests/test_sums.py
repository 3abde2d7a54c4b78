from __future__ import annotations

import multiprocessing
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from chunkcache.sums import SUMS, Sums

FORK = multiprocessing.get_context("fork")
ONE = Counter({("prompts", ""): 1})


def test_threads_add_up() -> None:
    sums = Sums()
    with ThreadPoolExecutor(8) as pool:
        for _ in range(4000):
            pool.submit(sums.add, ONE)
    assert sums.copy() == {("prompts", ""): 4000}


def test_a_copy_stays_as_it_is() -> None:
    sums = Sums()
    sums.add(ONE)
    copy = sums.copy()
    sums.add(ONE)
    assert copy == ONE


def test_a_forked_child_counts_for_itself() -> None:
    SUMS.add(ONE)
    before = SUMS.copy()
    seen = FORK.SimpleQueue()
    child = FORK.Process(target=lambda: seen.put(SUMS.copy()), daemon=True)
    child.start()
    child.join(10)
    assert child.exitcode == 0
    assert seen.get() == {}
    assert SUMS.copy() == before

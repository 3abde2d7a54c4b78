"""Soak: a server that is killed, prompts that are interrupted, forks; see `benchmarks.soak`."""

from __future__ import annotations

from collections import Counter

from benchmarks.soak import soak

TRIALS = (
    "kills", "errors", "evicted keys", "hits amid faults", "moved", "approximate", "interrupts",
    "forks",
)  # fmt: skip


def test_processes_outlive_their_server() -> None:
    """On a busy machine, 30 seconds may pass without some kind of trouble: then once more."""
    seen: Counter[str] = Counter()
    for _ in range(4):
        more, problems = soak(processes=4, seconds=30, memory="12mb")
        assert not problems, "\n".join(problems)
        seen.update(more)
        if all(seen[what] for what in TRIALS):
            return
    assert not [what for what in TRIALS if not seen[what]], "the soak was no trial"

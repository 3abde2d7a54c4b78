"""Soak: several processes, and a server that is killed again and again; see `benchmarks.soak`."""

from __future__ import annotations

from benchmarks.soak import soak


def test_processes_outlive_their_server() -> None:
    seen, problems = soak(processes=4, seconds=30, memory="4mb")
    assert not problems, "\n".join(problems)
    for what in ("kills", "errors", "evicted keys", "hits amid faults", "moved", "approximate"):
        assert seen[what] > 0, f"{what}: the soak was no trial"

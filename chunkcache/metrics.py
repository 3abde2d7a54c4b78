"""Metrics: what all caches of this process have done so far, as plain numbers.

```python
from chunkcache import metrics

print(metrics.snapshot()["tokens"]["reused"])
```

They are sums of the finished reports of prompts: a forward that raised an exception has none. For
Prometheus see `chunkcache.prometheus`.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from typing import Any

from chunkcache.report import Report
from chunkcache.tokens.plan import Kind

STAGES = ("lookup", "read", "move", "prefill")
_BYTES = ("bytes_read", "bytes_written", "bytes_dropped")

Number = tuple[str, str]  # the name of a number, and of its part if it has parts


class Metrics:
    """Sums that only grow. May be added to from several threads."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Start from nothing: at first, and in a forked child, whose parent tells its own part."""
        self._lock = threading.Lock()
        self._sums: Counter[Number] = Counter()

    def add(self, more: Counter[Number]) -> None:
        """Add what has happened since."""
        with self._lock:
            self._sums.update(more)

    def snapshot(self) -> dict[str, Any]:
        """All numbers as they are now; see the function of that name."""
        with self._lock:
            sums = self._sums.copy()
        return {
            "prompts": sums["prompts", ""],
            "skipped": sums["skipped", ""],
            "tokens": {str(kind): sums["tokens", kind] for kind in Kind},
            **{name: sums[name, ""] for name in _BYTES},
            "seconds": {
                stage: {"sum": float(sums["seconds", stage]), "count": sums["count", stage]}
                for stage in STAGES
            },
            "store_errors": {
                cause: n for (name, cause), n in sorted(sums.items()) if name == "store_errors"
            },
        }


METRICS = Metrics()
if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=METRICS.begin)


def snapshot() -> dict[str, Any]:
    """What the caches of this process have done since it began, ready for JSON.

    - `prompts`: prompts that were read, and `skipped`: those at which the cache stood aside;
    - `tokens`: prompt tokens, `reused`, `moved`, `recomputed` and `computed`;
    - `bytes_read`, `bytes_written`, `bytes_dropped`: of blobs, as in `Report`;
    - `seconds`: `sum` (seconds) and `count` (prompts that needed it) of `lookup`, `read`, `move`
      and `prefill`;
    - `store_errors`: how many, by cause (`StoreError.cause`, `damaged` for a bad blob,
      `sealed` for one under another key).
    """
    return METRICS.snapshot()


class Meter:
    """Adds to the metrics what is new in the reports of one cache."""

    def __init__(self) -> None:
        self._report: Report | None = None
        self._told: Counter[Number] = Counter()
        self._traffic: tuple[int, ...] = ()

    def read(self, report: Report, is_prompt: bool) -> None:
        """To be called behind each forward. `is_prompt` says whether it was one of a prompt."""
        traffic = report.bytes_written, report.bytes_dropped, report.store_errors
        if report is self._report and not is_prompt and traffic == self._traffic:
            return  # nearly every step of decoding
        if report is not self._report:
            self._report, self._told = report, Counter()
        self._traffic = traffic
        numbers = _numbers(report)
        METRICS.add(numbers - self._told)
        self._told = numbers


def _numbers(report: Report) -> Counter[Number]:
    numbers: Counter[Number] = Counter({("prompts", ""): 1, ("skipped", ""): bool(report.skipped)})
    for row in report.rows:
        for span in row.spans:
            numbers["tokens", span.kind] += span.tokens
    for name in _BYTES:
        numbers[name, ""] = getattr(report, name)
    idle = {"read": not report.bytes_read, "move": not numbers["tokens", Kind.MOVED]}
    for stage in STAGES:
        milliseconds = getattr(report, f"{stage}_ms")
        if milliseconds and not idle.get(stage):  # a look that finds nothing to do is none
            numbers["seconds", stage] = milliseconds / 1e3
            numbers["count", stage] = 1
    for cause, count in report.causes.items():
        numbers["store_errors", cause] = count
    return numbers

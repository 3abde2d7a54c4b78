"""Metrics: what all caches of this process have done so far, as plain numbers.

```python
from chunkcache import metrics

print(metrics.snapshot()["tokens"]["reused"])
```

They are sums of the finished reports of prompts (a forward that raised an exception has none), and
of what became of chunks that were written in the background. For Prometheus see
`chunkcache.prometheus`.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from chunkcache.report import Report
from chunkcache.stores.queue import OUTCOMES
from chunkcache.sums import SUMS, Number
from chunkcache.tokens.plan import Kind

STAGES = ("lookup", "read", "move", "prefill")
AUDITS = ("rows", "kl", "same_top1", "over_bound", "failed")
_BYTES = ("bytes_read", "bytes_written", "bytes_dropped")


def snapshot() -> dict[str, Any]:
    """What the caches of this process have done since it began, ready for JSON.

    - `prompts`: prompts that were read, and `skipped`: those that were computed by normal prefill;
    - `tokens`: prompt tokens, `reused`, `moved`, `recomputed` and `computed`;
    - `bytes_read`, `bytes_written`, `bytes_dropped`: of blobs, as in `Report`;
    - `seconds`: `sum` (seconds) and `count` (prompts that needed it) of `lookup`, `read`, `move`
      and `prefill`;
    - `store_errors`: how many a prompt met, by cause (`StoreError.cause`, `damaged` for a bad blob,
      `sealed` for one under another key);
    - `writes`: entries (chunks, and lists of them) that were `written` in the background, `dropped`
      since a queue was full or the store would not take them, and `failed`;
    - `write_errors`: how many failed, by cause;
    - `audits`: of sampled prompts (`audit_rate`) how many `rows`, the sum of their `kl` (nats),
      those with the `same_top1` token and those `over_bound`, and how many audits `failed`.
    """
    sums = SUMS.copy()

    def parts(name: str) -> dict[str, int]:
        return {part: n for (whole, part), n in sorted(sums.items()) if whole == name}

    return {
        "prompts": sums["prompts", ""],
        "skipped": sums["skipped", ""],
        "tokens": {str(kind): sums["tokens", kind] for kind in Kind},
        **{name: sums[name, ""] for name in _BYTES},
        "seconds": {
            stage: {"sum": float(sums["seconds", stage]), "count": sums["count", stage]}
            for stage in STAGES
        },
        "store_errors": parts("store_errors"),
        "writes": {outcome: sums["writes", outcome] for outcome in OUTCOMES},
        "write_errors": parts("write_errors"),
        "audits": {part: sums["audits", part] for part in AUDITS},
    }


class Meter:
    """Adds to the metrics what is new in the reports of one cache."""

    def __init__(self) -> None:
        self._report: Report | None = None
        self._told: Counter[Number] = Counter()
        self._traffic: tuple[float, ...] = ()

    def read(self, report: Report, is_prompt: bool) -> None:
        """To be called behind each forward. `is_prompt` says whether it was one of a prompt."""
        late = report.prefill_ms  # of a device, which tells it when it is done
        traffic = report.bytes_written, report.bytes_dropped, report.store_errors, late
        if report is self._report and not is_prompt and traffic == self._traffic:
            return  # nearly every step of decoding
        if report is not self._report:
            self._report, self._told = report, Counter()
        self._traffic = traffic
        numbers = _numbers(report)
        SUMS.add(numbers - self._told)
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

"""The metrics of this process for Prometheus. Needs `pip install "chunkcache[prometheus]"`.

```python
from prometheus_client import REGISTRY, start_http_server
from chunkcache.prometheus import Collector

REGISTRY.register(Collector())
start_http_server(9000)
```
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector as BaseCollector

from chunkcache import metrics


class Collector(BaseCollector):
    """Reads `chunkcache.metrics.snapshot()` when Prometheus asks.

    Counters `chunkcache_prompts`, `chunkcache_skipped`, `chunkcache_tokens{kind}`,
    `chunkcache_bytes_read`, `…_written`, `…_dropped`, `chunkcache_store_errors{cause}`,
    `chunkcache_writes{outcome}` and `chunkcache_write_errors{cause}`, each with `_total` behind it,
    and the summary `chunkcache_seconds{stage}`. Of sampled audits the summary `chunkcache_audit_kl`
    (nats; its count is that of audited rows) and the counter `chunkcache_audits{result}`:
    `same_top1`, `over_bound`, `failed`.
    """

    def collect(self) -> Iterator[Metric]:
        """One family per number."""
        now = metrics.snapshot()
        for name, text in (
            ("prompts", "Prompts that went through a cache"),
            ("skipped", "Prompts at which the cache fell back to normal prefill"),
            ("bytes_read", "Bytes of blobs read from the store"),
            ("bytes_written", "Bytes of blobs handed to the store"),
            ("bytes_dropped", "Bytes of blobs that the store did not take"),
        ):
            yield CounterMetricFamily(f"chunkcache_{name}", text, value=now[name])
        for name, label, text in (
            ("tokens", "kind", "Prompt tokens by what happened to them"),
            ("store_errors", "cause", "Failed calls to the store"),
            ("writes", "outcome", "Entries written in the background, by what became of them"),
            ("write_errors", "cause", "Entries whose writing failed"),
        ):
            counter = CounterMetricFamily(f"chunkcache_{name}", text, labels=[label])
            for value, number in now[name].items():
                counter.add_metric([value], number)
            yield counter
        audits = now["audits"]
        counter = CounterMetricFamily("chunkcache_audits", "Sampled audits", labels=["result"])
        for result in ("same_top1", "over_bound", "failed"):
            counter.add_metric([result], audits[result])
        yield counter
        text = "KL of sampled prompts to full runs, nats"
        yield SummaryMetricFamily("chunkcache_audit_kl", text, audits["rows"], audits["kl"])
        text = "Seconds per prompt by stage"
        summary = SummaryMetricFamily("chunkcache_seconds", text, labels=["stage"])
        for stage, spent in now["seconds"].items():
            summary.add_metric([stage], spent["count"], spent["sum"])
        yield summary

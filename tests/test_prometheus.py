from __future__ import annotations

from collections import Counter

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from chunkcache import metrics
from chunkcache.errors import StoreError
from chunkcache.prometheus import Collector
from chunkcache.report import Report, RowReport
from chunkcache.sums import SUMS
from chunkcache.tokens.plan import Kind, Span


def test_what_prometheus_reads() -> None:
    SUMS.begin()
    SUMS.add(Counter({("writes", "failed"): 8, ("write_errors", "full"): 8}))
    SUMS.add(Counter({("audits", "rows"): 3, ("audits", "kl"): 0.5, ("audits", "same_top1"): 2}))
    registry = CollectorRegistry()
    registry.register(Collector())  # before there is anything
    spans = [Span(0, 7, Kind.REUSED), Span(7, 10, Kind.COMPUTED)]
    report = Report([RowReport(spans)], bytes_read=5, bytes_written=6, bytes_dropped=7)
    report.lookup_ms, report.skipped = 250.0, "why"
    report.note_error(StoreError("gone", "timeout"))
    metrics.Meter().read(report, True)
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for sample in family.samples
    }
    assert found == {
        ("chunkcache_prompts_total",): 1,
        ("chunkcache_skipped_total",): 1,
        ("chunkcache_bytes_read_total",): 5,
        ("chunkcache_bytes_written_total",): 6,
        ("chunkcache_bytes_dropped_total",): 7,
        ("chunkcache_tokens_total", "reused"): 7,
        ("chunkcache_tokens_total", "moved"): 0,
        ("chunkcache_tokens_total", "recomputed"): 0,
        ("chunkcache_tokens_total", "computed"): 3,
        ("chunkcache_store_errors_total", "timeout"): 1,
        ("chunkcache_writes_total", "written"): 0,
        ("chunkcache_writes_total", "dropped"): 0,
        ("chunkcache_writes_total", "failed"): 8,
        ("chunkcache_write_errors_total", "full"): 8,
        ("chunkcache_audits_total", "same_top1"): 2,
        ("chunkcache_audits_total", "over_bound"): 0,
        ("chunkcache_audits_total", "failed"): 0,
        ("chunkcache_audit_kl_count",): 3,
        ("chunkcache_audit_kl_sum",): 0.5,
        ("chunkcache_seconds_count", "lookup"): 1,
        ("chunkcache_seconds_sum", "lookup"): 0.25,
        **{
            (f"chunkcache_seconds_{part}", stage): 0
            for part in ("count", "sum")
            for stage in ("read", "move", "prefill")
        },
    }

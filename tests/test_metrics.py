from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import tiny, tokens
from scripted import Scripted, entry

from chunkcache import RedisChunkCache, metrics
from chunkcache.errors import BlobError, SettingError, StoreError
from chunkcache.report import Report, RowReport
from chunkcache.stores.memory import MemoryStore
from chunkcache.stores.redis import RedisStore
from chunkcache.stores.writer import WriteBehind
from chunkcache.sums import SUMS
from chunkcache.tokens.plan import Kind, Span


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


@pytest.fixture(autouse=True)
def from_nothing() -> None:
    """Sums of this test alone."""
    SUMS.begin()


def flat(report: Report) -> dict[str, float]:
    """What the metrics must say if this was the only prompt."""
    return {
        **{str(kind): report.count(kind) for kind in Kind},
        **{
            name: getattr(report, name) for name in ("bytes_read", "bytes_written", "bytes_dropped")
        },
        "lookup": report.lookup_ms / 1e3,
        "read": report.read_ms / 1e3 if report.bytes_read else 0,
        "move": report.move_ms / 1e3 if report.moved else 0,
        "prefill": report.prefill_ms / 1e3,
    }


def told() -> dict[str, float]:
    now = metrics.snapshot()
    return {
        **now["tokens"],
        **{name: now[name] for name in ("bytes_read", "bytes_written", "bytes_dropped")},
        **{stage: now["seconds"][stage]["sum"] for stage in metrics.STAGES},
    }


def test_nothing_yet() -> None:
    now = metrics.snapshot()
    assert now["prompts"] == now["skipped"] == now["bytes_read"] == 0
    assert set(now["tokens"]) == {"reused", "moved", "recomputed", "computed"}
    assert now["seconds"]["read"] == {"sum": 0.0, "count": 0}
    assert now["store_errors"] == now["write_errors"] == {}
    assert now["writes"] == {"written": 0, "dropped": 0, "failed": 0}
    assert json.loads(json.dumps(now)) == now


def test_prompts_are_summed(model: Any) -> None:
    store, expected = MemoryStore(), Counter[str]()
    for number, ids in enumerate([tokens(300), tokens(300), tokens(300, rows=2, seed=1)], start=1):
        cache = RedisChunkCache(model, store)
        model.generate(ids, past_key_values=cache, max_new_tokens=100, do_sample=False)
        expected.update(flat(cache.report))
        assert told() == pytest.approx(dict(expected))
        now = metrics.snapshot()
        assert now["prompts"] == now["seconds"]["lookup"]["count"] == number
        assert now["seconds"]["prefill"]["count"] == number
    assert told()["reused"] == 299
    assert now["seconds"]["read"]["count"] == 1
    assert now["seconds"]["move"]["count"] == 0


def test_a_conversation_is_several_prompts(model: Any) -> None:
    cache, expected = RedisChunkCache(model, MemoryStore()), Counter[str]()
    ids = tokens(140)
    for _ in range(3):
        ids = model.generate(ids, past_key_values=cache, max_new_tokens=130, do_sample=False)
        expected.update(flat(cache.report))
    assert metrics.snapshot()["prompts"] == 3
    assert told() == pytest.approx(dict(expected))


def test_a_prompt_in_parts_is_one(model: Any) -> None:
    cache, ids = RedisChunkCache(model, MemoryStore()), tokens(300)
    for part in (ids[:, :200], ids[:, 200:]):
        model(part, past_key_values=cache, logits_to_keep=1)
    assert metrics.snapshot()["prompts"] == 1
    assert told() == pytest.approx(flat(cache.report))
    assert told()["computed"] == 300


def test_moved_text(model: Any) -> None:
    store = MemoryStore()
    for ids in (tokens(200), torch.cat([tokens(9, seed=1), tokens(200)], dim=1)):
        cache = RedisChunkCache(model, store, reuse="anywhere")
        model.generate(ids, past_key_values=cache, max_new_tokens=1, do_sample=False)
    assert told()["moved"] == cache.report.moved > 0
    assert metrics.snapshot()["seconds"]["move"]["count"] == 1


def test_an_audit_between_two_answers_counts_nothing_twice(model: Any) -> None:
    cache, ids = RedisChunkCache(model, MemoryStore()), tokens(200)
    model.generate(ids, past_key_values=cache, max_new_tokens=1, do_sample=False)
    report = cache.audit(ids, new_tokens=1).report
    model(tokens(1, seed=1), past_key_values=cache)  # one more token of the answer
    assert metrics.snapshot()["prompts"] == 2
    assert told()["reused"] == report.reused == 199
    assert told()["computed"] == 200 + 1


def test_prompts_that_are_skipped(model: Any) -> None:
    cache = RedisChunkCache(model, MemoryStore())
    model.train()
    try:
        model(tokens(20), past_key_values=cache)
    finally:
        model.eval()
    now = metrics.snapshot()
    assert (now["prompts"], now["skipped"], now["tokens"]["computed"]) == (1, 1, 20)


def test_errors_by_cause(model: Any) -> None:
    with RedisStore("redis://127.0.0.1:1/0") as store:
        cache = RedisChunkCache(model, store)
        model.generate(tokens(200), past_key_values=cache, max_new_tokens=1, do_sample=False)
    assert cache.report.store_errors == 2
    assert cache.report.causes == {"connection": 2}
    assert cache.report.to_dict()["causes"] == {"connection": 2}
    assert metrics.snapshot()["store_errors"] == {"connection": 2}
    assert told()["bytes_dropped"] == cache.report.bytes_dropped > 0


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (StoreError("x", "timeout"), "timeout"),
        (StoreError("x"), "other"),
        (BlobError("x"), "damaged"),
        (SettingError("x"), "other"),
        (ValueError("x"), "other"),
    ],
)
def test_the_cause_of_an_error(error: Exception, cause: str) -> None:
    report = Report()
    report.note_error(error)
    report.note_error(error)
    assert report.causes == {cause: 2}


def test_what_became_of_what_was_written_in_the_background(scripted: Scripted) -> None:
    behind = WriteBehind(scripted, max_bytes=3)
    behind.write([entry("a", b"1"), entry("b", b"too long")])
    assert behind.flush(10)
    scripted.error = StoreError("gone", "full")
    behind.write([entry("c", b"1")])
    assert behind.flush(10)
    scripted.error = RuntimeError("what nobody expects")
    behind.write([entry("d", b"1")])
    assert behind.flush(10)
    now = metrics.snapshot()
    assert now["writes"] == {"written": 1, "dropped": 1, "failed": 2}
    assert now["write_errors"] == {"full": 1, "other": 1}


def test_a_step_of_decoding_is_not_counted_through(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[Report] = []
    numbers = metrics._numbers
    monkeypatch.setattr(metrics, "_numbers", lambda r: (counted.append(r), numbers(r))[1])
    meter, report = metrics.Meter(), Report([RowReport([Span(0, 5, Kind.COMPUTED)])])
    meter.read(report, True)
    for _ in range(10):
        meter.read(report, False)
    assert len(counted) == 1
    report.bytes_written += 7
    meter.read(report, False)
    assert (told()["computed"], told()["bytes_written"]) == (5, 7)


def run_in_threads(number: int, work: Callable[[], None]) -> None:
    threads = [threading.Thread(target=work) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_threads_add_up() -> None:
    def work() -> None:
        for _ in range(500):
            metrics.Meter().read(Report([RowReport([Span(0, 3, Kind.REUSED)])]), True)

    run_in_threads(8, work)
    assert metrics.snapshot()["prompts"] == 4000
    assert told()["reused"] == 12_000

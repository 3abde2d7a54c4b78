"""The model runs ahead of the store, and nothing is believed that did not come whole."""

from __future__ import annotations

import copy
import operator
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from servers import Server, redis_binary

from chunkcache import RedisChunkCache, StoreError, metrics, open_store
from chunkcache.kv.layers import GrowingLayer
from chunkcache.reuse import background, load, staging
from chunkcache.stores.base import ChunkStore, ReadsFrom
from chunkcache.stores.memory import MemoryStore
from tests.models import tiny, tokens

KINDS = ["llama", "gemma3_text", "qwen3", "gpt_neox", "deepseek_v3", "gpt2"]
PROMPT = 150


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models have small chunks: let those come a layer at a time, too."""
    monkeypatch.setattr(load, "LEAST_BYTES", 1)
    monkeypatch.setattr(background, "GROUP_BYTES", 1)
    monkeypatch.setattr(staging, "STAGED_BYTES", 1)


@pytest.fixture
def arrivals(monkeypatch: pytest.MonkeyPatch) -> list[background.BackgroundLoad]:
    """Every arrival that begins."""
    begun: list[background.BackgroundLoad] = []

    class Noted(background.BackgroundLoad):
        def __init__(self, *args: Any) -> None:
            begun.append(self)
            super().__init__(*args)

    monkeypatch.setattr(load, "BackgroundLoad", Noted)
    return begun


@pytest.fixture
def store(redis_server: Server) -> Iterator[ChunkStore]:
    with redis_server.client() as client:
        client.flushdb()
    with open_store(redis_server.unix_url) as store:
        yield store


def generate(model: Any, ids: torch.Tensor, cache: Any = None) -> torch.Tensor:
    out = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
    assert isinstance(out, torch.Tensor)
    return out


def ask(model: Any, ids: torch.Tensor, store: Any, **settings: Any) -> Any:
    """A new cache that has answered a prompt; its tokens must be those of a run without."""
    cache = RedisChunkCache(model, store, chunk_size=16, **settings)
    assert torch.equal(generate(model, ids, cache), generate(model, ids))
    cache.flush()
    return cache


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_a_run_without(
    kind: str, store: ChunkStore, arrivals: list[background.BackgroundLoad]
) -> None:
    model, ids = tiny(kind), tokens(PROMPT)
    ask(model, ids, store)
    assert not arrivals, "nothing was known"
    cache = ask(model, ids, store)
    report = cache.report
    assert len(arrivals) == 1
    assert (report.reused, report.computed, report.store_errors) == (PROMPT - 1, 1, 0)
    assert report.exact
    assert report.bytes_read == sum(chunk.form.file.size for chunk in arrivals[0].chunks)
    twin = copy.deepcopy(cache)
    assert torch.equal(generate(model, ids, twin), generate(model, ids))
    more = torch.cat([ids[:, :100], tokens(30, seed=2)], 1)
    assert ask(model, more, store).report.reused == 96


def test_rows_of_text_with_padding_come_this_way_too(
    store: ChunkStore, arrivals: list[background.BackgroundLoad]
) -> None:
    model, ids = tiny("llama"), tokens(80, rows=2)
    mask = torch.ones_like(ids)
    ids[0, :30] = mask[0, :30] = 0
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for _ in range(2):
        cache = RedisChunkCache(model, store, chunk_size=16)
        out = model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=6, do_sample=False
        )
        assert torch.equal(out, plain)
        cache.flush()
    assert len(arrivals) == 1
    assert cache.report.reused > 80


class Gated(ReadsFrom):
    """A store on which a test decides when a part goes on its way; it may also fail there."""

    def __init__(self, store: ChunkStore, before: Callable[[int], None]) -> None:
        super().__init__(store)
        self.before = before

    def fetch(self, parts: Any) -> Any:
        in_pieces = len({part.key for part in parts}) < len(parts)
        for number, answer in enumerate(super().fetch(parts)):
            if in_pieces:
                self.before(number)
            yield answer

    def write(self, entries: Any) -> int:
        return self.store.write(entries)

    def delete(self, keys: Any) -> int:
        return self.store.delete(keys)

    def flush(self, timeout: float | None = None) -> bool:
        return self.store.flush(timeout)


def test_a_layer_waits_for_its_own_part_only(
    store: ChunkStore, arrivals: list[background.BackgroundLoad], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny("llama"), tokens(PROMPT)
    ask(model, ids, store)
    chunks = -(-PROMPT // 16)
    layers = model.config.num_hidden_layers
    passed: list[threading.Event] = [threading.Event() for _ in range(layers)]
    update = GrowingLayer.update

    def note(layer: GrowingLayer, *args: Any, **kwargs: Any) -> Any:
        out = update(layer, *args, **kwargs)
        if arrivals and layer in cache.layers:
            passed[cache.layers.index(layer)].set()
        return out

    def before(number: int) -> None:
        """The parts of a layer are held back until the one before it has been used."""
        if number >= chunks:
            assert passed[number // chunks - 1].wait(20), "it waits for what it does not need"

    monkeypatch.setattr(GrowingLayer, "update", note)
    cache = RedisChunkCache(model, Gated(store, before), chunk_size=16)
    out = generate(model, ids, cache)
    assert arrivals
    assert all(event.is_set() for event in passed)
    assert cache.report.reused == PROMPT - 1
    assert cache.report.overlapped_ms >= 0
    assert torch.equal(out, generate(model, ids))


@pytest.mark.parametrize("number", [0, 3, 15, 19])
def test_a_server_killed_at_any_part_changes_no_token(
    number: int, arrivals: list[background.BackgroundLoad]
) -> None:
    model, ids = tiny("llama"), tokens(PROMPT)
    with Server(redis_binary()) as server, open_store(server.unix_url) as store:
        ask(model, ids, store)

        def kill(at: int) -> None:
            if at == number:
                server.stop()

        report = ask(model, ids, Gated(store, kill)).report
    assert arrivals
    assert len(arrivals) == 1, "it is done again without running ahead"
    if number < 10:  # later, the last replies have been sent
        assert report.computed == PROMPT
        assert "connection" in report.causes
        assert "damaged" not in report.causes


def damage(client: Any, byte: int = -1, value: int | None = None) -> tuple[bytes, bytes]:
    """Change a byte of the chunk of tokens 64 to 80. Returns its name and the blob now."""
    name = next(
        key for key in client.keys("safetensors@*@kv_bytes") if b'"64-80"' in client.get(key)
    )
    blob = bytearray(client.get(name))
    blob[byte] = blob[byte] ^ 1 if value is None else value
    client.set(name, bytes(blob))
    return name, bytes(blob)


def damaged(store: ChunkStore, redis_server: Server) -> tuple[Any, torch.Tensor]:
    """A model and a prompt of which the store has a damaged blob."""
    model, ids = tiny("llama"), tokens(PROMPT)
    ask(model, ids, store)
    with redis_server.client() as client:
        damage(client)
    return model, ids


@pytest.mark.parametrize("byte", [5, 300, -1])
def test_a_damaged_blob_is_a_miss_and_replaced(
    byte: int, store: ChunkStore, redis_server: Server, arrivals: list[background.BackgroundLoad]
) -> None:
    model, ids = tiny("llama"), tokens(PROMPT)
    ask(model, ids, store)
    before = metrics.snapshot()
    with redis_server.client() as client:
        name, blob = damage(client, byte)
        report = ask(model, ids, store).report
        assert arrivals
        assert (report.reused, report.computed) == (64, PROMPT - 64)
        assert "damaged" in report.errors[0] or "not of this chunk" in report.errors[0]
        after = metrics.snapshot()
        assert after["prompts"] - before["prompts"] == 1
        errors = (now["store_errors"].get("damaged", 0) for now in (before, after))
        assert -operator.sub(*errors) == 1
        assert client.get(name) not in (None, blob)
    assert ask(model, ids, store).report.store_errors == 0


def test_a_blob_that_goes_meanwhile_is_a_miss(
    store: ChunkStore, arrivals: list[background.BackgroundLoad]
) -> None:
    model, ids = tiny("llama"), tokens(PROMPT)
    ask(model, ids, store)
    gone: list[str] = []

    def lose(number: int) -> None:
        if not gone:
            gone.append(arrivals[0].chunks[6].form.key)
            store.delete(gone)

    report = ask(model, ids, Gated(store, lose)).report
    assert (report.reused, report.store_errors) == (96, 0)
    assert len(arrivals) == 1


def test_a_forward_that_fails_ends_the_reading(
    store: ChunkStore, arrivals: list[background.BackgroundLoad], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny("llama"), tokens(PROMPT)
    ask(model, ids, store)
    cache = RedisChunkCache(model, store, chunk_size=16)
    with monkeypatch.context() as patch:
        patch.setattr(
            RedisChunkCache, "update", lambda *args, **_: (_ for _ in ()).throw(MemoryError)
        )
        with pytest.raises(MemoryError):
            generate(model, ids, cache)
    assert arrivals[0]._end.is_open
    cache.reset()
    assert torch.equal(generate(model, ids, cache), generate(model, ids))
    assert cache.report.reused == PROMPT - 1


@pytest.mark.parametrize("settings", [{"reuse": "anywhere"}, {"on_error": "raise"}])
def test_some_caches_wait(
    settings: dict[str, Any], store: ChunkStore, arrivals: list[background.BackgroundLoad]
) -> None:
    model, ids = tiny("llama"), tokens(PROMPT)
    for _ in range(2):
        cache = ask(model, ids, store, **settings)
    assert cache.report.reused == PROMPT - 1
    assert not arrivals


def test_stores_that_cannot_give_parts_are_waited_for(
    arrivals: list[background.BackgroundLoad],
) -> None:
    model, ids, store = tiny("llama"), tokens(PROMPT), MemoryStore()
    for _ in range(2):
        cache = ask(model, ids, store)
    assert cache.report.reused == PROMPT - 1
    assert not arrivals


def test_a_conversation_that_goes_on_is_waited_for(
    store: ChunkStore, arrivals: list[background.BackgroundLoad]
) -> None:
    """What it holds could not be computed again from the new ids alone."""
    model, ids = tiny("llama"), tokens(PROMPT)
    cache = ask(model, ids, store)
    answer = generate(model, ids)
    longer = torch.cat([answer, tokens(40, seed=3)], 1)
    ask(model, longer, store)
    arrivals.clear()
    assert torch.equal(generate(model, longer, cache), generate(model, longer))
    assert not arrivals


@pytest.mark.parametrize("when", ["before the cache", "after the cache"])
@pytest.mark.parametrize("kind", ["pre-hook", "hook"])
def test_hooks_on_the_model_are_applied_once(
    when: str, kind: str, store: ChunkStore, redis_server: Server, arrivals: list[Any]
) -> None:
    model, ids = tiny("llama"), tokens(PROMPT)
    first = model(ids).logits[0, -1]
    bias = torch.zeros(len(first))
    bias[50] = (first.max() - first[50]) * 0.6  # twice, it would decide
    calls = []

    def change_ids(module: Any, args: Any, kwargs: Any) -> Any:
        return args, {**kwargs, "input_ids": (kwargs["input_ids"] + 1) % len(first)}

    def add_bias(module: Any, args: Any, out: Any) -> Any:
        calls.append(1)
        out.logits = out.logits + bias.to(out.logits.device)
        return out

    def hook() -> None:
        if kind == "pre-hook":
            model.register_forward_pre_hook(change_ids, with_kwargs=True)
        else:
            model.register_forward_hook(add_bias)

    if when == "after the cache":
        RedisChunkCache(model, store, chunk_size=16)
    hook()
    for _ in range(2):
        ask(model, ids, store)
    if (kind, when) == ("pre-hook", "after the cache"):
        # It changes ids that our hook has seen: whose K/V come of it, nobody could say.
        cache = RedisChunkCache(model, store, chunk_size=16)
        assert torch.equal(generate(model, ids, cache), generate(model, ids))
        assert "a forward hook on the model" in cache.report.skipped
        with redis_server.client() as client:
            assert not list(client.scan_iter("safetensors@*"))
        return
    with redis_server.client() as client:
        damage(client)
    calls.clear()
    plain = generate(model, ids)
    alone = len(calls)
    cache = RedisChunkCache(model, store, chunk_size=16)
    assert torch.equal(generate(model, ids, cache), plain)
    assert cache.report.reused == 64
    assert len(calls) == 2 * alone
    assert not arrivals, "a hook would see what is thrown away"


def test_hooks_on_a_part_see_nothing_that_is_thrown_away(
    store: ChunkStore, redis_server: Server, arrivals: list[background.BackgroundLoad]
) -> None:
    model, ids = damaged(store, redis_server)
    seen = []
    model.model.layers[1].register_forward_hook(lambda *args: seen.append(args[2]))
    ask(model, ids, store)
    assert not arrivals
    assert len(seen) == 2 * 6


def test_a_blob_that_makes_the_forward_fail_is_gone_the_next_time(
    store: ChunkStore, redis_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny("llama"), tokens(PROMPT)
    norm = type(model.model.norm)
    forward = norm.forward

    def guarded(self: Any, x: torch.Tensor) -> torch.Tensor:
        if x.isnan().any():
            raise FloatingPointError
        out: torch.Tensor = forward(self, x)
        return out

    monkeypatch.setattr(norm, "forward", guarded)
    ask(model, ids, store)
    with redis_server.client() as client:
        name, blob = damage(client, value=0x7F)
        client.set(name, blob[:-4] + b"\xff\xff\xff\x7f")  # not a number
    cache = RedisChunkCache(model, store, chunk_size=16)
    with pytest.raises(FloatingPointError):
        generate(model, ids, cache)
    assert "damaged" in cache.report.errors[0]
    assert ask(model, ids, store).report.store_errors == 0


def test_after_an_unsound_arrival_all_is_waited_for(
    store: ChunkStore, redis_server: Server, arrivals: list[background.BackgroundLoad]
) -> None:
    model, ids = damaged(store, redis_server)
    for _ in range(3):  # nobody may remove it
        report = ask(model, ids, store, write=False).report
        assert (report.reused, len(report.errors)) == (64, 1)
    assert len(arrivals) == 1


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a device has a clock of its own")
def test_the_forward_that_was_thrown_away_is_in_the_report(
    store: ChunkStore, redis_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = damaged(store, redis_server)
    now = iter(range(10_000))
    monkeypatch.setattr("chunkcache.reuse.stopwatch.perf_counter", lambda: next(now))
    # Two forwards of a second each, but for what was waited, which another clock has measured.
    assert 1500 < ask(model, ids, store).report.prefill_ms <= 2000


def test_with_much_to_compute_all_is_waited_for(
    store: ChunkStore, arrivals: list[background.BackgroundLoad]
) -> None:
    model, ids = tiny("llama"), tokens(PROMPT)
    ask(model, ids, store)
    report = ask(model, torch.cat([ids[:, :64], tokens(64, seed=5)], 1), store).report
    assert report.reused == 64
    assert not arrivals


def test_without_a_thread_all_is_waited_for(
    store: ChunkStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny("llama"), tokens(PROMPT)
    ask(model, ids, store)

    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(background, "start_thread", refuse)
    assert ask(model, ids, store).report.reused == PROMPT - 1


def test_an_interrupted_prompt_is_read_no_further(
    store: ChunkStore, arrivals: list[background.BackgroundLoad], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny("llama"), tokens(PROMPT)
    ask(model, ids, store)
    go, parts = threading.Event(), []

    def hold(number: int) -> None:
        parts.append(number)
        if number == 2:
            assert go.wait(20)

    cache = RedisChunkCache(model, Gated(store, hold), chunk_size=16)
    with monkeypatch.context() as patch:
        patch.setattr(
            background.BackgroundLoad,
            "_wait",
            lambda *args: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        with pytest.raises(KeyboardInterrupt):
            generate(model, ids, cache)
    cache.reset()
    go.set()
    assert arrivals[0]._end.wait(20)
    assert len(parts) < 5
    assert cache._prefill is None
    copy.deepcopy(cache)
    assert torch.equal(generate(model, ids, cache), generate(model, ids))


def test_what_failed_lets_go_of_its_memory(
    store: ChunkStore, arrivals: list[background.BackgroundLoad]
) -> None:
    model, ids = tiny("llama"), tokens(PROMPT)
    ask(model, ids, store)

    def fail(number: int) -> None:
        raise StoreError("gone")

    ask(model, ids, Gated(store, fail))
    gone = weakref.ref(arrivals.pop())
    assert gone() is None


def test_hidden_reading_is_not_free(store: ChunkStore) -> None:
    model, ids = tiny("llama"), tokens(PROMPT)
    ask(model, ids, store)

    def slow(number: int) -> None:
        time.sleep(0.002)

    cache = ask(model, ids, Gated(store, slow))
    report = cache.report
    assert report.overlapped_ms > 0
    ((_, noted),) = cache._context.gauge._read
    assert noted == pytest.approx(report.read_ms + report.overlapped_ms, rel=0.2)

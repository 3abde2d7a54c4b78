"""Arrival: the model runs ahead of the store, and nothing is believed that did not come whole."""

from __future__ import annotations

import copy
import operator
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from servers import Server, redis_binary

from chunkcache import RedisChunkCache, metrics, open_store
from chunkcache.kv.layers import GrowingLayer
from chunkcache.reuse import arrival, restore
from chunkcache.stores.base import ChunkStore, ReadsFrom
from chunkcache.stores.memory import MemoryStore
from tests.models import tiny, tokens

KINDS = ["llama", "gemma3_text", "qwen3", "gpt_neox", "deepseek_v3", "gpt2"]
PROMPT = 150


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models have small chunks: let those come a layer at a time, too."""
    monkeypatch.setattr(restore, "LEAST_BYTES", 1)
    monkeypatch.setattr(arrival, "GROUP_BYTES", 1)


@pytest.fixture
def arrivals(monkeypatch: pytest.MonkeyPatch) -> list[arrival.Arrival]:
    """Every arrival that begins."""
    begun: list[arrival.Arrival] = []

    class Noted(arrival.Arrival):
        def __init__(self, *args: Any) -> None:
            begun.append(self)
            super().__init__(*args)

    monkeypatch.setattr(restore, "Arrival", Noted)
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
    kind: str, store: ChunkStore, arrivals: list[arrival.Arrival]
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
    store: ChunkStore, arrivals: list[arrival.Arrival]
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

    def read_parts(self, parts: Any) -> Any:
        for number, answer in enumerate(super().read_parts(parts)):
            self.before(number)
            yield answer

    def write(self, entries: Any) -> int:
        return self.store.write(entries)

    def delete(self, keys: Any) -> int:
        return self.store.delete(keys)

    def flush(self, timeout: float | None = None) -> bool:
        return self.store.flush(timeout)


def test_a_layer_waits_for_its_own_part_only(
    store: ChunkStore, arrivals: list[arrival.Arrival], monkeypatch: pytest.MonkeyPatch
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
    assert cache.report.hidden_ms >= 0
    assert torch.equal(out, generate(model, ids))


@pytest.mark.parametrize("number", [0, 3, 15, 19])
def test_a_server_killed_at_any_part_changes_no_token(
    number: int, arrivals: list[arrival.Arrival]
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


@pytest.mark.parametrize("byte", [5, 300, -1])
def test_a_damaged_blob_is_a_miss_and_replaced(
    byte: int, store: ChunkStore, redis_server: Server, arrivals: list[arrival.Arrival]
) -> None:
    model, ids = tiny("llama"), tokens(PROMPT)
    ask(model, ids, store)
    before = metrics.snapshot()
    with redis_server.client() as client:
        name = next(
            key for key in client.keys("safetensors@*@kv_bytes") if b'"64-80"' in client.get(key)
        )
        blob = bytearray(client.get(name))
        blob[byte] ^= 1
        client.set(name, bytes(blob))
        report = ask(model, ids, store).report
        assert arrivals
        assert (report.reused, report.computed) == (64, PROMPT - 64)
        assert "damaged" in report.errors[0] or "not of this chunk" in report.errors[0]
        after = metrics.snapshot()
        assert after["prompts"] - before["prompts"] == 1
        errors = (now["store_errors"].get("damaged", 0) for now in (before, after))
        assert -operator.sub(*errors) == 1
        assert client.get(name) not in (None, bytes(blob))
    assert ask(model, ids, store).report.store_errors == 0


def test_a_blob_that_goes_meanwhile_is_a_miss(
    store: ChunkStore, arrivals: list[arrival.Arrival]
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
    store: ChunkStore, arrivals: list[arrival.Arrival], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny("llama"), tokens(PROMPT)
    ask(model, ids, store)
    cache = RedisChunkCache(model, store, chunk_size=16)
    with monkeypatch.context() as patch:
        patch.setattr(
            type(model.lm_head), "forward", lambda *args: (_ for _ in ()).throw(MemoryError)
        )
        with pytest.raises(MemoryError):
            generate(model, ids, cache)
    assert not arrivals[0]._thread.is_alive()
    cache.reset()
    assert torch.equal(generate(model, ids, cache), generate(model, ids))
    assert cache.report.reused == PROMPT - 1


@pytest.mark.parametrize("settings", [{"reuse": "anywhere"}, {"on_error": "raise"}])
def test_some_caches_wait(
    settings: dict[str, Any], store: ChunkStore, arrivals: list[arrival.Arrival]
) -> None:
    model, ids = tiny("llama"), tokens(PROMPT)
    for _ in range(2):
        cache = ask(model, ids, store, **settings)
    assert cache.report.reused == PROMPT - 1
    assert not arrivals


def test_stores_that_cannot_give_parts_are_waited_for(arrivals: list[arrival.Arrival]) -> None:
    model, ids, store = tiny("llama"), tokens(PROMPT), MemoryStore()
    for _ in range(2):
        cache = ask(model, ids, store)
    assert cache.report.reused == PROMPT - 1
    assert not arrivals


def test_a_conversation_that_goes_on_is_waited_for(
    store: ChunkStore, arrivals: list[arrival.Arrival]
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

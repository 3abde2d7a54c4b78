"""K/V that come to a device while the model computes there: nothing is used before it is there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from chunkcache import RedisChunkCache, open_store
from chunkcache.kv.layers import GrowingLayer, allocate_all, are_edited, note_all_written
from chunkcache.kv.layout import KVLayout, LayerShape
from chunkcache.model.check import CACHE
from chunkcache.reuse import load, staging
from tests import fakegpu
from tests.models import tiny, tokens

SHAPES = (LayerShape(2, 4, 2, 4), LayerShape(1, 8, 1, 4), LayerShape(2, 4, 2, 4))
TARGETS = [staging.Target(0, 8 * n, 8) for n in range(3)] + [staging.Target(0, 24, 5)]


def layers_with_room() -> list[GrowingLayer]:
    layers = [GrowingLayer() for _ in SHAPES]
    layout = KVLayout(torch.float32, SHAPES)
    allocate_all(layers, layout, 1, 29, torch.device(fakegpu.NAME))
    note_all_written(layers)
    return layers


def read(way: staging.Staging, groups: int) -> list[list[Tensor]]:
    """Do what the reading thread does, with random numbers. Returns these by chunk and layer."""
    source = torch.Generator().manual_seed(0)
    given: list[list[Tensor]] = [[] for _ in TARGETS]
    for number, group in enumerate(way.groups[:groups]):
        way.begin(number)
        for runs, blob in zip(way.runs, given, strict=True):
            for layer in group:
                (memory,) = runs[layer]
                blob.append(torch.randn(memory.nbytes // 4, generator=source))
                memory[:] = blob[-1].numpy().view("uint8").data
        way.send(number)
    return given


@pytest.fixture(params=[1, 1 << 20], ids=["a layer at a time", "all at once"])
def way(request: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[GrowingLayer]]:
    monkeypatch.setattr(staging, "STAGED_BYTES", request.param)
    layers = layers_with_room()
    return staging.Staging(layers, TARGETS), layers


def test_each_byte_comes_to_its_place_in_one_copy_per_group(way: Any) -> None:
    staged, layers = way
    with fakegpu.counting() as trace:
        given = read(staged, len(staged.groups))
        for group in range(len(staged.groups)):
            staged.wait_for(group)
    assert trace.counts["h2d"] == len(staged.groups)
    assert trace.counts["wait"] == max(0, len(staged.groups) - staging.BUFFERS)  # of the reader
    assert not are_edited(layers)  # that is ours, though another thread has written it
    for (row, column, count), blob in zip(TARGETS, given, strict=True):
        for layer, numbers in zip(layers, blob, strict=True):
            keys, values = (x.cpu().reshape(-1) for x in layer.peek(row, column, count))
            assert torch.equal(torch.cat([keys, values]), numbers)


def test_what_is_used_too_early_is_no_number(way: Any) -> None:
    staged, layers = way
    read(staged, 1)
    first = layers[0].peek(0, 0, 29)[0]
    assert (first * 1).isnan().all()
    staged.wait_for(0)
    assert not (first * 1).isnan().any()


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "MOST_BYTES", 100)
    with pytest.raises(RuntimeError, match="pinned"):
        staging.Staging(layers_with_room(), TARGETS)


@pytest.mark.parametrize(
    "trouble", ["none", "inference mode", "no pinned memory", "device is full"]
)
def test_a_warm_prompt_of_a_server_is_one_copy_per_group(
    trouble: str, redis_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none of the thread that computes; where that cannot be, chunks come one by one."""
    monkeypatch.setattr(load, "LEAST_BYTES", 1)
    model, prompt = tiny("llama"), tokens(150, seed=1)
    with redis_server.client() as client:
        client.flushdb()
    mode = torch.inference_mode if trouble == "inference mode" else torch.no_grad
    with open_store(redis_server.unix_url) as store, mode():
        plain = model(prompt, use_cache=True, logits_to_keep=1).logits
        for known in (False, True):
            if known and trouble == "no pinned memory":
                monkeypatch.setattr(fakegpu.device, "can_pin", False)
            if known and trouble == "device is full":
                monkeypatch.setattr(load, "Staging", full)
            cache = RedisChunkCache(model, store, chunk_size=16)
            with fakegpu.counting() as trace:
                logits = model(prompt, **{CACHE: cache}, logits_to_keep=1).logits
            cache.flush()
            assert torch.allclose(logits.cpu(), plain.cpu(), atol=1e-5)
    assert cache.report.reused == 149
    assert cache.report.store_errors == 0
    if trouble in ("none", "inference mode"):
        assert trace.counts["h2d"] == 0, trace.table()
        assert trace.counts["other h2d"] == 1, trace.table()
        assert trace.of("chunkcache", "wait") <= 3, trace.table()
    else:
        assert trace.counts["other h2d"] == 0, trace.table()


def test_a_compiled_forward_waits_for_what_comes(
    redis_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "LEAST_BYTES", 1)
    monkeypatch.setattr(staging, "STAGED_BYTES", 1)
    model, prompt = tiny("llama"), tokens(150, seed=1)
    how: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    plain = model.generate(prompt, **how)
    model.forward = torch.compile(model.forward, backend="eager")
    with redis_server.client() as client:
        client.flushdb()
    with open_store(redis_server.unix_url) as store:
        for known in (0, 149):
            cache = RedisChunkCache(model, store, chunk_size=16)
            assert torch.equal(model.generate(prompt, **{CACHE: cache}, **how), plain)
            cache.flush()
            assert cache.report.reused == known
            assert not cache.report.skipped


def full(*_: Any) -> Any:
    raise torch.OutOfMemoryError

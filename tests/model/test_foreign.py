"""Hooks and patches of others: those that change K/V must not meet stored ones."""

from __future__ import annotations

import types

import pytest
import torch

from chunkcache import RedisChunkCache
from chunkcache.model.foreign import foreign_hooks, patches
from chunkcache.stores.memory import MemoryStore
from tests.models import tiny
from tests.models import tokens as random_ids


def generate(model, ids, cache=None, new=6):
    return model.generate(ids, past_key_values=cache, max_new_tokens=new, do_sample=False)


def steer_by_return(module, args, output):
    return output + 3.0


def steer_in_place(module, args, output):
    output.add_(3.0)


def steer_inputs(module, args):
    return (args[0] * 1.5,)


def steer_steps_only(module, args, output):
    if output.shape[1] == 1:
        output.add_(3.0)


def hook(model, fn, place="output"):
    part = model.model.layers[1].mlp
    if fn is steer_inputs:
        return part.register_forward_pre_hook(fn)
    return part.register_forward_hook(fn)


STEERING = [steer_by_return, steer_in_place, steer_inputs]


@pytest.mark.parametrize("fn", STEERING)
def test_steering_never_meets_plain_kv(fn):
    """Known plain chunks, then steering, then plain again: each as without a cache."""
    model, store = tiny("llama"), MemoryStore()
    ids = random_ids(300)
    plain = generate(model, ids)
    generate(model, ids, RedisChunkCache(model, store))
    handle = hook(model, fn)
    steered = generate(model, ids)
    assert not torch.equal(steered, plain)
    for _ in range(2):
        cache = RedisChunkCache(model, store)
        assert torch.equal(generate(model, ids, cache), steered)
        assert "forward hook on model.layers.1.mlp" in cache.report.skipped
        assert cache.report.computed == 300
    handle.remove()
    cache = RedisChunkCache(model, store)
    assert torch.equal(generate(model, ids, cache), plain)
    assert cache.report.reused == 299


@pytest.mark.parametrize("fn", STEERING)
def test_nothing_steered_is_stored(fn):
    model, store = tiny("llama"), MemoryStore()
    ids = random_ids(300)
    handle = hook(model, fn)
    generate(model, ids, RedisChunkCache(model, store))
    handle.remove()
    cache = RedisChunkCache(model, store)
    assert torch.equal(generate(model, ids, cache), generate(model, ids))
    assert cache.report.reused == 0


def test_steering_of_the_answer_alone_is_noticed_when_it_begins():
    model, store = tiny("llama"), MemoryStore()
    ids = random_ids(120)
    handle = hook(model, steer_steps_only)
    steered = generate(model, ids, new=20)
    assert torch.equal(generate(model, ids, RedisChunkCache(model, store), new=20), steered)
    handle.remove()
    longer = torch.cat([steered, random_ids(9)], 1)
    cache = RedisChunkCache(model, store)
    assert torch.equal(generate(model, longer, cache), generate(model, longer))
    assert cache.report.reused == 0


def test_a_hook_that_only_looks_costs_nothing():
    model, store = tiny("llama"), MemoryStore()
    ids, widths = random_ids(300), []
    generate(model, ids, RedisChunkCache(model, store))
    part = model.model.layers[1].mlp
    handles = [
        part.register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1])),
        part.register_forward_hook(lambda module, args, output: output),
    ]
    before = [dict(part._forward_pre_hooks), dict(part._forward_hooks)]
    cache = RedisChunkCache(model, store)
    assert torch.equal(generate(model, ids, cache, new=3), generate(model, ids, new=3))
    assert cache.report.reused == 299
    assert widths[:3] == [1, 1, 1]
    assert [dict(part._forward_pre_hooks), dict(part._forward_hooks)] == before
    for handle in handles:
        handle.remove()


def test_hooks_are_as_they_were_after_an_error():
    model, store = tiny("llama"), MemoryStore()
    part = model.model.layers[1].mlp
    handle = part.register_forward_hook(lambda *_: 1 / 0)
    before = dict(part._forward_hooks)
    with pytest.raises(ZeroDivisionError):
        generate(model, random_ids(30), RedisChunkCache(model, store))
    assert dict(part._forward_hooks) == before
    handle.remove()


def test_a_replaced_forward_makes_a_model_of_its_own():
    model, store = tiny("llama"), MemoryStore()
    ids = random_ids(300)
    plain = generate(model, ids)
    generate(model, ids, RedisChunkCache(model, store))
    part = model.model.layers[1].mlp
    original = part.forward
    part.forward = types.MethodType(lambda self, x: original(x) * 0.5, part)
    patched = generate(model, ids)
    for reused in (0, 299):
        cache = RedisChunkCache(model, store)
        assert torch.equal(generate(model, ids, cache), patched)
        assert cache.report.reused == reused
    del part.forward
    cache = RedisChunkCache(model, store)
    assert torch.equal(generate(model, ids, cache), plain)
    assert cache.report.reused == 299


def test_what_counts_as_foreign():
    model = tiny("llama")
    assert foreign_hooks(model) == []
    assert patches(model) == ()
    hook(model, steer_by_return)
    assert [path for path, _, _ in foreign_hooks(model)] == ["model.layers.1.mlp"]

"""The check token: a changed model or poisoned store is seen, and nothing that is only rounding."""

from __future__ import annotations

import pytest
import torch

from chunkcache import RedisChunkCache
from chunkcache.model.identity import ModelIdentity
from chunkcache.model.state import ModelState
from chunkcache.stores.memory import MemoryStore
from tests.model.test_makeup import (
    activation,
    attention,
    build,
    class_method,
    control_vector,
    epsilon,
    module_function,
    patch,  # noqa: F401 - a fixture
    replaced_class,
    rope_scale,
    scaling,
)
from tests.models import PAD, tiny, tokens

IDS = tokens(300, seed=5)
LONGER = torch.cat([IDS, tokens(40, seed=6)], 1)
CHANGES = [
    scaling, activation, epsilon, rope_scale, class_method, module_function, attention,
    replaced_class, control_vector,
]  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def generate(model, ids, cache=None, **how):
    how = {"max_new_tokens": 6, "do_sample": False} | how
    return model.generate(ids, past_key_values=cache, **how)


@pytest.fixture
def blind(monkeypatch):
    """The identity sees no change: the check token alone has to."""
    of = ModelIdentity.of
    first = {}

    def same(model, *rest, **more):
        return first.setdefault(id(model), of(model, *rest, **more))

    monkeypatch.setattr(ModelIdentity, "of", same)
    return first


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_on_a_clean_store(change, dtype, patch, blind):  # noqa: F811
    model, store = build(dtype), MemoryStore()
    generate(model, IDS, RedisChunkCache(model, store))
    change(model, patch)
    for ids in (IDS, LONGER):
        cache = RedisChunkCache(model, store)
        assert torch.equal(generate(model, ids, cache), generate(model, ids))
        assert "not those that the model computes" in cache.report.skipped
        assert (cache.report.reused, cache.report.bytes_written) == (0, 0)


def test_trust_comes_back_with_the_model(blind):
    model, store = build(), MemoryStore()
    generate(model, IDS, RedisChunkCache(model, store))
    mlp = model.model.layers[0].self_attn
    usual, mlp.scaling = mlp.scaling, 0.01
    generate(model, IDS, RedisChunkCache(model, store))
    other = RedisChunkCache(model, store)
    generate(model, tokens(200, seed=9), other)
    assert other.report.bytes_written == 0  # nor of other texts
    mlp.scaling = usual
    cache = RedisChunkCache(model, store)
    assert torch.equal(generate(model, LONGER, cache), generate(model, LONGER))
    assert cache.report.reused == 300
    assert cache.report.skipped == ""
    assert cache.report.bytes_written > 0


def test_a_clean_model_on_a_poisoned_store(blind):
    """An edited model had stored the text, under an identity that did not show the edit."""
    model, store = build(), MemoryStore()
    ModelState.of(model).identity()
    for layer in model.model.layers:
        layer.self_attn.scaling *= 0.25
    generate(model, IDS, RedisChunkCache(model, store))
    for layer in model.model.layers:
        layer.self_attn.scaling *= 4
    for ids in (IDS, LONGER):
        cache = RedisChunkCache(model, store)
        assert torch.equal(generate(model, ids, cache), generate(model, ids))
        assert cache.report.reused == 0
        assert "another namespace" in cache.report.skipped


@pytest.mark.parametrize("how", [{"num_beams": 2}, {"num_return_sequences": 2, "num_beams": 2}, {}])
def test_batches_turns_and_parts(how, blind):
    """With padding, in a conversation, and in parts: wrong stored K/V do not get through."""
    model, store = build(), MemoryStore()
    batch = torch.cat([IDS, torch.cat([torch.full((1, 77), PAD), tokens(223, seed=8)], 1)])
    mask = (torch.arange(300) >= torch.tensor([[0], [77]])).long()
    more = {"attention_mask": mask, **how}
    generate(model, batch, RedisChunkCache(model, store), **more)
    generate(model, LONGER, RedisChunkCache(model, store))
    model.model.layers[1].self_attn.scaling = 0.01
    cache = RedisChunkCache(model, store)
    assert torch.equal(generate(model, batch, cache, **more), generate(model, batch, **more))
    assert cache.report.reused == 0
    cache = RedisChunkCache(model, store)
    answer = generate(model, tokens(40, seed=7), cache)
    turn = torch.cat([answer, IDS], 1)
    assert torch.equal(generate(model, turn, cache), generate(model, turn))
    how = {"prefill_chunk_size": 100}
    cache = RedisChunkCache(model, store)
    assert torch.equal(generate(model, LONGER, cache, **how), generate(model, LONGER, **how))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "kind", ["llama", "gemma2", "gemma3_text", "qwen3_moe", "deepseek_v3", "gpt2", "bloom", "phi"]
)
def test_no_false_alarm(kind, dtype):
    """Prompts that share beginnings of all lengths, repeated, continued, in batches."""
    model, store = tiny(kind, dtype=dtype), MemoryStore()
    generate(model, IDS, RedisChunkCache(model, store, chunk_size=16))
    for shared in (17, 40, 100, 200, 299, 300):
        ids = torch.cat([IDS[:, :shared], tokens(3, seed=shared)], 1)
        for rows in (1, 2):
            cache = RedisChunkCache(model, store, chunk_size=16)
            generate(model, ids.repeat(rows, 1), cache, max_new_tokens=2)
            assert cache.report.skipped == ""
            assert cache.report.reused >= rows * (shared // 16) * 16


def test_it_costs_no_token_where_the_prompt_is_known_to_its_end():
    model, store, seen = tiny(), MemoryStore(), []
    generate(model, IDS, RedisChunkCache(model, store))
    model.model.embed_tokens.register_forward_hook(lambda m, a, out: seen.append(out.shape[1]))
    for ids, first in ((IDS, 1), (LONGER, 340 - 300 + 1)):
        seen.clear()
        generate(model, ids, RedisChunkCache(model, store, hooks="observers", write=False))
        assert seen[0] == first

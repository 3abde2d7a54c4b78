"""K/V edited inside the cache: used as in a `DynamicCache`, never stored, nor what comes behind."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from chunkcache import RedisChunkCache
from chunkcache.stores.memory import MemoryStore
from tests.models import tiny, tokens

PROMPT = tokens(201, seed=5)


def scale_in_place(layer):
    layer.values.mul_(0.5)


def steer_the_last(layer):
    layer.values[:, :, -1:] += 2.0


def steer_old_ones(layer):
    layer.keys[:, :, 40:70] += 2.0


def zero_channels(layer):
    keys = layer.keys.clone()
    keys[..., ::2] = 0
    layer.keys = keys


def fill_detached(layer):
    layer.values.detach()[:, :, 3].fill_(0.7)


def steer_the_last_uncounted(layer):
    layer.values.data[:, :, -1] += 2.0  # which leaves the version counters as they are


def steer_old_ones_uncounted(layer):
    layer.keys.data[:, :, 40:70] += 2.0


def drop_half(layer):
    half = layer.keys.shape[2] // 2
    layer.keys, layer.values = layer.keys[:, :, half:].clone(), layer.values[:, :, half:].clone()


def drop_as_views(layer):
    layer.keys, layer.values = layer.keys[:, :, :-7], layer.values[:, :, :-7]


SAME_LENGTH = [scale_in_place, steer_the_last, steer_old_ones, zero_channels, fill_detached]
UNCOUNTED = [steer_the_last_uncounted, steer_old_ones_uncounted]
COUNTED = [*SAME_LENGTH, drop_half, drop_as_views]
EDITS = [*COUNTED, *UNCOUNTED]


def go(model, ids, cache=None, new=40):
    return model.generate(ids, past_key_values=cache, max_new_tokens=new, do_sample=False)


@torch.no_grad()
def prefill_plainly(model, cache):
    prefill(model, cache)


def prefill(model, cache):
    model(PROMPT[:, :-1], past_key_values=cache, logits_to_keep=1)


def edit(cache, change):
    for layer in cache.layers[1:3]:
        change(layer)


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [
        (torch.no_grad, torch.float32),
        (torch.inference_mode, torch.bfloat16),
        (torch.enable_grad, torch.float32),
    ],
)
@pytest.mark.parametrize("change", EDITS)
def test_edits_of_a_caller(change, mode, dtype):
    """Prefill, edit what is held, generate; then anyone's prompt over the same text."""
    model, store = tiny("llama", dtype=dtype), MemoryStore()
    with mode():
        theirs, ours = (
            DynamicCache(config=model.config),
            RedisChunkCache(model, store, chunk_size=32),
        )
        prefill(model, theirs), prefill(model, ours)
        with torch.no_grad():
            edit(theirs, change), edit(ours, change)
        steered = go(model, PROMPT, theirs)
        assert torch.equal(go(model, PROMPT, ours), steered)
    assert "changed by others" in ours.report.skipped
    assert ours.report.bytes_written == 0
    longer = torch.cat([steered, tokens(10, seed=3)], 1)
    cache = RedisChunkCache(model, store, chunk_size=32)
    assert torch.equal(go(model, longer, cache), go(model, longer))
    assert cache.report.reused <= 200


def scale_states(layer):
    for states in (layer.recurrent_states, layer.conv_states):
        for state in states.values():
            if state is not None:
                state.mul_(3.0)


def replace_states(layer):
    for index, state in layer.conv_states.items():
        layer.conv_states[index] = state * 3.0


def flip_index_keys(layer):
    layer.indexer_keys.mul_(-3.0)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("qwen3_5_text", scale_states), ("lfm2", replace_states), ("falcon_h1", scale_states),
        ("qwen3_5_text", steer_the_last), ("deepseek_v32", flip_index_keys),
    ],
)  # fmt: skip
def test_edits_of_what_hybrid_models_hold(kind, change):
    """States, index keys, and K/V beside states, which were not gone back to a snapshot."""
    model, store = tiny(kind), MemoryStore()
    theirs, ours = DynamicCache(config=model.config), RedisChunkCache(model, store, chunk_size=32)
    for cache in (theirs, ours):
        prefill_plainly(model, cache)
        change(cache.layers[1 if change is steer_the_last else 0])
    steered = go(model, PROMPT, theirs)
    assert not torch.equal(steered, go(model, PROMPT))
    assert torch.equal(go(model, PROMPT, ours), steered)
    assert "changed by others" in ours.report.skipped
    longer = torch.cat([steered, tokens(10, seed=3)], 1)
    assert torch.equal(go(model, longer, ours, 4), go(model, longer, theirs, 4))
    ours.flush()
    cache = RedisChunkCache(model, store, chunk_size=32)
    assert torch.equal(go(model, longer, cache, 4), go(model, longer, None, 4))
    assert 0 < cache.report.reused <= 200


@pytest.mark.parametrize("kind", ["qwen3_5_text", "lfm2"])
def test_changes_of_all_layers_are_no_edits(kind):
    model, store = tiny(kind), MemoryStore()
    cache = RedisChunkCache(model, store, chunk_size=32)
    go(model, PROMPT, cache, 4)
    twin = copy.deepcopy(cache)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_select_indices(torch.tensor([0]))
    told = go(model, PROMPT, None, 4)
    longer = torch.cat([told, tokens(10, seed=3)], 1)
    for each in (cache, twin):
        assert torch.equal(go(model, longer, each, 4), go(model, longer, None, 4))
        assert each.report.skipped == each.report.not_stored == ""


@pytest.mark.parametrize("change", [*COUNTED, steer_old_ones_uncounted])
def test_edits_in_the_middle_of_an_answer(change):
    model, store = tiny("llama"), MemoryStore()

    def answer(cache):
        steps = []

        def criteria(ids, scores, **_):
            steps.append(1)
            if len(steps) == 20:
                edit(cache, change)
            return torch.zeros(len(ids), dtype=torch.bool)

        return model.generate(
            PROMPT, past_key_values=cache, max_new_tokens=90, do_sample=False,
            stopping_criteria=[criteria],
        )  # fmt: skip

    steered = answer(DynamicCache(config=model.config))
    assert torch.equal(answer(RedisChunkCache(model, store, chunk_size=32)), steered)
    longer = torch.cat([steered, tokens(10, seed=3)], 1)
    cache = RedisChunkCache(model, store, chunk_size=32)
    assert torch.equal(go(model, longer, cache), go(model, longer))
    assert cache.report.reused <= 220


@pytest.mark.parametrize("change", COUNTED)
def test_hooks_that_edit_the_cache(change):
    """As compression by hooks does, with the promise that they only look broken."""
    model, store = tiny("llama"), MemoryStore()
    go(model, PROMPT, RedisChunkCache(model, store, chunk_size=32))

    def hook(module, args, kwargs, output):
        if kwargs["hidden_states"].shape[1] > 1:
            change(kwargs["past_key_values"].layers[module.layer_idx])

    def put():
        return [
            layer.self_attn.register_forward_hook(hook, with_kwargs=True)
            for layer in model.model.layers
        ]

    other = tokens(150, seed=8)
    handles = put()
    pressed = go(model, other, DynamicCache(config=model.config))
    for promise in ("fallback", "observers"):
        cache = RedisChunkCache(model, store, chunk_size=32, hooks=promise)
        assert torch.equal(go(model, other, cache), pressed)
        assert cache.report.bytes_written == 0
    for handle in handles:
        handle.remove()
    cache = RedisChunkCache(model, store, chunk_size=32)
    assert torch.equal(go(model, other, cache), go(model, other))
    assert cache.report.reused == 0


@pytest.mark.parametrize("change", SAME_LENGTH)
def test_edits_survive_turns_and_copies(change):
    model = tiny("llama")
    theirs, ours = DynamicCache(config=model.config), RedisChunkCache(model, MemoryStore())
    prefill_plainly(model, theirs), prefill_plainly(model, ours)
    edit(theirs, change), edit(ours, change)
    twin = copy.deepcopy(ours)
    text, steered = PROMPT, None
    for turn in range(2):
        answer = go(model, text, theirs)
        steered = answer if steered is None else steered
        assert torch.equal(go(model, text, ours), answer)
        assert ours.report.reused
        assert ours.report.bytes_written == 0
        text = torch.cat([answer, tokens(12, seed=turn)], 1)
    assert torch.equal(go(model, PROMPT, twin), steered)
    assert twin.report.bytes_written == 0
    other = tokens(90, seed=4)
    assert torch.equal(go(model, other, ours), go(model, other))  # nothing of it is held any more
    assert ours.report.skipped == ""


def test_what_the_cache_does_itself_is_no_edit():
    """Beams, crops, copies, drafts, several turns, parts of a prompt: all that moves K/V."""
    model, store = tiny("llama"), MemoryStore()
    batch = torch.cat([PROMPT, tokens(201, seed=6)])
    for how in (
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 3},
        {"prompt_lookup_num_tokens": 4},
        {"prefill_chunk_size": 64},
    ):
        for mode in (torch.no_grad, torch.inference_mode):
            ids = batch[:1] if "prompt_lookup_num_tokens" in how else batch
            cache = RedisChunkCache(model, store, chunk_size=16)
            with mode():
                model.generate(ids, past_key_values=cache, max_new_tokens=20, **how)
                assert cache.report.skipped == ""
                twin = copy.deepcopy(cache)
                twin.crop(-5)
                generated = model.generate(ids[:1], past_key_values=twin, max_new_tokens=20)
            assert generated.shape[1]
            assert twin.report.skipped == ""

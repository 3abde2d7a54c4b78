"""The promise: what comes out with the cache is what comes out without it."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import weakref

import pytest
import torch
from transformers import DynamicCache

from chunkcache import (
    RedisChunkCache,
    SettingError,
    StoreError,
    UnsupportedCallError,
    open_store,
    uninstall,
)
from chunkcache.stores.base import ChunkStore, Entry
from chunkcache.stores.memory import MemoryStore
from chunkcache.tokens.chunking import cut
from tests.models import tiny
from tests.models import tokens as random_ids
from tests.scripted import Scripted, blobs, fail_at

KINDS = [
    "llama",  # grouped queries, half-split RoPE
    "qwen3",  # normed queries and keys
    "gemma3_text",  # sliding and full layers, two RoPE bases
    "gpt2",  # learned positions
    "gpt_neox",  # partial RoPE
    "cohere",  # interleaved RoPE
    "phi",
    "mixtral",  # experts
    "deepseek_v3",  # latent attention: keys and values differ in width
    "bloom",  # ALiBi, no position_ids
    "opt",
    "olmo2",
]
LENGTHS = [1, 2, 127, 128, 129, 384, 391]


@pytest.fixture
def store() -> ChunkStore:
    return MemoryStore()


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


def generate(model, ids, cache=None, new=6, **kwargs):
    return model.generate(ids, past_key_values=cache, max_new_tokens=new, do_sample=False, **kwargs)


def last_logits(model, ids, cache=None):
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_those_of_a_plain_run(kind, store):
    model = tiny(kind)
    for length in LENGTHS:
        ids = random_ids(length, seed=length)
        plain = generate(model, ids)
        for run in ("cold", "warm"):
            cache = RedisChunkCache(model, store)
            assert torch.equal(generate(model, ids, cache), plain), (run, length)
            assert cache.report.skipped == ""
            expected = length - 1 if run == "warm" and length > 1 else 0
            assert cache.report.reused == expected
            assert cache.report.computed == length - expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-9)])
def test_logits_are_those_of_a_plain_run(kind, dtype, tolerance, store):
    model = tiny(kind, dtype=dtype)
    if kind == "deepseek_v3":
        tolerance = 1e-5  # its router computes in float32 whatever the weights are
    if dtype is torch.float64:
        model.set_experts_implementation("eager")  # the others have no float64
    first = random_ids(300, seed=1)
    generate(model, first, RedisChunkCache(model, store), new=1)
    for shared in (0, 1, 127, 128, 200):
        ids = torch.cat([first[:, :shared], random_ids(300 - shared, seed=2 + shared)], dim=1)
        cache = RedisChunkCache(model, store)
        difference = (last_logits(model, ids, cache) - last_logits(model, ids)).abs().max()
        assert cache.report.reused == (shared if shared >= 16 else 0)
        assert difference <= tolerance * last_logits(model, ids).abs().max()


def test_reuse_is_real(llama, store):
    """The model is really called with the rest of the prompt only."""
    ids = random_ids(300)
    generate(llama, ids, RedisChunkCache(llama, store))
    widths = []
    handle = llama.get_input_embeddings().register_forward_pre_hook(
        lambda module, args: widths.append(args[0].shape[1])
    )
    generate(llama, ids, RedisChunkCache(llama, store, hooks="observers"), new=3)
    handle.remove()
    assert widths == [1, 1, 1]


def test_corrupted_contents_would_be_noticed(llama, store):
    """The tests above can fail: other K/V in the store give other tokens."""
    ids = random_ids(300)
    plain = last_logits(llama, ids)
    cache = RedisChunkCache(llama, store)
    last_logits(llama, ids, cache)
    cache.reset()
    last_logits(llama, ids[:, :256], cache)
    for layer in cache.layers:
        layer.keys.neg_()
    out = llama(ids[:, 256:], past_key_values=cache, logits_to_keep=1).logits[:, -1]
    assert (out - plain).abs().max() > 1e-2


@pytest.mark.parametrize("overlap", [0, 5])
@pytest.mark.parametrize("size", [1, 7, 16, 64])
def test_any_chunk_size(llama, store, size, overlap):
    if overlap >= size:
        with pytest.raises(SettingError, match="chunk_overlap"):
            RedisChunkCache(llama, store, chunk_size=size, chunk_overlap=overlap)
        return
    settings = {"chunk_size": size, "chunk_overlap": overlap}
    ids = random_ids(90)
    longer = torch.cat([ids, random_ids(37, seed=5)], dim=1)
    generate(llama, ids, RedisChunkCache(llama, store, **settings))
    cache = RedisChunkCache(llama, store, **settings)
    assert torch.equal(generate(llama, longer, cache), generate(llama, longer))
    stride = size - overlap
    whole = (90 - size) // stride + 1  # the last chunk is a shorter one
    few = 90 - whole * stride < 16 or 90 - size - (whole - 1) * stride < 2
    assert cache.report.reused == ((whole - 1) * stride + size if few else 90)


def test_without_tails_only_whole_chunks_are_kept(llama, store):
    ids = random_ids(300)
    generate(llama, ids, RedisChunkCache(llama, store, store_tail=False), new=1)
    cache = RedisChunkCache(llama, store, store_tail=False)
    generate(llama, ids, cache)
    assert cache.report.reused == 256


def test_reuse_off_only_writes(llama, store):
    ids = random_ids(300)
    for _ in range(2):
        cache = RedisChunkCache(llama, store, reuse="off")
        generate(llama, ids, cache)
        assert cache.report.reused == 0
    cache = RedisChunkCache(llama, store)
    generate(llama, ids, cache)
    assert cache.report.reused == 299


def test_sampling_draws_the_same_tokens(llama, store):
    ids = random_ids(300)
    outs = []
    for cache in (None, RedisChunkCache(llama, store), RedisChunkCache(llama, store)):
        torch.manual_seed(7)
        outs.append(llama.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=True))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


# ---------------------------------------------------------------------- one object, many prompts


def test_the_same_object_with_other_prompts(llama, store):
    a, b = random_ids(300, seed=1), random_ids(210, seed=2)
    cache = RedisChunkCache(llama, store)
    turns = [a, b, a, torch.cat([a, random_ids(60, seed=3)], 1), a[:, :150], b[:, :1]]
    for ids in turns:
        assert torch.equal(generate(llama, ids, cache), generate(llama, ids))
        assert cache.report.prompt_tokens == ids.shape[1]


def test_why_the_last_token_of_a_prompt_that_is_held_is_computed(llama, store):
    cache, ids = RedisChunkCache(llama, store), random_ids(200)
    for _ in range(2):
        generate(llama, ids, cache)
    assert [span.reason for span in cache.report.rows[0].spans] == ["", "its output is wanted"]


def test_a_conversation_continues(llama, store):
    """Turn by turn with the whole text, as chat templates do."""
    cache = RedisChunkCache(llama, store)
    text = random_ids(200)
    for turn in range(4):
        out = generate(llama, text, cache, new=20)
        assert torch.equal(out, generate(llama, text, new=20))
        if turn:
            assert cache.report.reused >= text.shape[1] - 31
        text = torch.cat([out, random_ids(30, seed=turn)], dim=1)


def test_a_conversation_goes_on_in_a_new_object(llama, store):
    """Tokens of an answer are stored as they fill chunks."""
    ids = random_ids(200)
    out = generate(llama, ids, RedisChunkCache(llama, store), new=100)
    longer = torch.cat([out, random_ids(10, seed=4)], dim=1)
    cache = RedisChunkCache(llama, store)
    assert torch.equal(generate(llama, longer, cache), generate(llama, longer))
    assert cache.report.reused == 256


def test_only_the_new_ids_with_a_mask_over_all(llama, store):
    first = random_ids(150)
    cache = RedisChunkCache(llama, store)
    out = generate(llama, first, cache, new=10)
    text = torch.cat([out, random_ids(20, seed=3)], dim=1)
    held = cache.get_seq_length()
    new = text[:, held:]
    mask = torch.ones(1, text.shape[1], dtype=torch.long)
    answer = generate(llama, new, cache, attention_mask=mask)
    assert torch.equal(answer[:, new.shape[1] :], generate(llama, text)[:, text.shape[1] :])
    assert cache.report.reused == held


def test_a_mask_that_fits_nothing_is_refused(llama, store):
    cache = RedisChunkCache(llama, store)
    generate(llama, random_ids(50), cache)
    cache._is_user_defined = True
    with pytest.raises(UnsupportedCallError, match="attention_mask covers 30"):
        llama(
            random_ids(10),
            past_key_values=cache,
            attention_mask=torch.ones(1, 30, dtype=torch.long),
            logits_to_keep=1,
        )
    assert torch.equal(generate(llama, random_ids(40), cache), generate(llama, random_ids(40)))


def test_forward_in_pieces(llama, store):
    """A manual loop: prefill in parts, then token by token."""
    ids = random_ids(300)
    with torch.no_grad():
        plain = llama(ids).logits
        for _ in range(2):
            cache = RedisChunkCache(llama, store)
            parts = [
                llama(p, past_key_values=cache).logits for p in ids.split([140, 100, 59, 1], 1)
            ]
            assert torch.allclose(torch.cat(parts, 1), plain, atol=1e-4)
        assert cache.report.reused > 0


def test_prefill_chunk_size(llama, store):
    ids = random_ids(300)
    plain = generate(llama, ids)
    for run in range(2):
        cache = RedisChunkCache(llama, store)
        assert torch.equal(generate(llama, ids, cache, prefill_chunk_size=100), plain)
        assert cache.report.prompt_tokens == 300
        assert (cache.report.reused > 250) == bool(run)


def test_a_failed_forward_leaves_no_trace(llama, store):
    ids = random_ids(200)
    plain = generate(llama, ids)
    cache = RedisChunkCache(llama, store)
    generate(llama, ids[:, :150], cache)
    handle = llama.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(llama, ids, cache)
    handle.remove()
    assert torch.equal(generate(llama, ids, cache), plain)


@pytest.mark.parametrize("warm", [False, True])
def test_deepcopy_shares_the_store(llama, store, warm):
    ids = random_ids(200)
    if warm:
        generate(llama, ids[:, :150], RedisChunkCache(llama, store))
    cache = RedisChunkCache(llama, store)
    generate(llama, ids[:, :150], cache)
    assert (cache.report.reused > 0) == warm
    twin = copy.deepcopy(cache)
    assert twin.store is cache.store
    assert torch.equal(generate(llama, ids, twin), generate(llama, ids))
    other = torch.cat([ids[:, :150], random_ids(20, seed=9)], 1)
    assert torch.equal(generate(llama, other, cache), generate(llama, other))


def test_it_is_a_dynamic_cache(llama, store):
    cache, plain = RedisChunkCache(llama, store), DynamicCache(config=llama.config)
    assert isinstance(cache, DynamicCache)
    ids = random_ids(140)
    with torch.no_grad():
        llama(ids, past_key_values=cache)
        llama(ids, past_key_values=plain)
    assert len(cache) == len(plain)
    assert cache.get_seq_length() == plain.get_seq_length() == 140
    assert cache.is_compileable is False
    for mine, its in zip(cache, plain, strict=True):
        assert torch.allclose(mine[0], its[0], atol=1e-5)
        assert torch.allclose(mine[1], its[1], atol=1e-5)
    cache.crop(-40)
    assert cache.get_seq_length() == 100
    cache.batch_repeat_interleave(3)
    assert cache.layers[0].keys.shape[0] == 3
    cache.batch_select_indices(torch.tensor([0, 2]))
    assert cache.layers[0].keys.shape[0] == 2
    cache.reset()
    assert cache.get_seq_length() == 0


# ---------------------------------------------------------------------- calls that want it all


@pytest.mark.parametrize("option", ["output_hidden_states", "output_attentions"])
def test_outputs_of_every_token_in_generate(store, option):
    model = tiny("llama", attn_implementation="eager")
    ids = random_ids(200)
    name = option.removeprefix("output_")
    options = {option: True, "return_dict_in_generate": True}
    plain = generate(model, ids, **options)
    for _ in range(2):
        cache = RedisChunkCache(model, store)
        out = generate(model, ids, cache, **options)
        assert torch.equal(out.sequences, plain.sequences)
        shapes = [[t.shape for t in step] for step in out[name]]
        assert shapes == [[t.shape for t in step] for step in plain[name]]
        assert option in cache.report.skipped
        assert cache.report.computed == 200
    cache = RedisChunkCache(model, store)
    generate(model, ids, cache)
    assert cache.report.reused == 199, "what was computed in full must have been stored"


def test_labels_and_full_logits(llama, store):
    """Of tokens whose K/V alone are known; their outputs are known then (see test_outputs.py)."""
    ids = random_ids(200)
    generate(llama, ids, RedisChunkCache(llama, store))
    with torch.no_grad():
        plain = llama(ids, labels=ids)
        for kwargs, reason, computed in [
            ({}, "logits of every token", 200),
            ({"labels": ids}, "", 1),
        ]:
            cache = RedisChunkCache(llama, store)
            out = llama(ids, past_key_values=cache, **kwargs)
            assert out.logits.shape == plain.logits.shape
            assert torch.allclose(out.logits, plain.logits, atol=1e-4)
            assert cache.report.skipped.startswith(reason)
            assert cache.report.computed == computed
        assert torch.allclose(out.loss, plain.loss)


def test_use_cache_false_is_refused(llama, store):
    with pytest.raises(UnsupportedCallError, match="use_cache=False"):
        generate(llama, random_ids(20), RedisChunkCache(llama, store), use_cache=False)


# ---------------------------------------------------------------------- rows


def test_beams_and_several_answers(llama, store):
    ids = random_ids(200)
    for options in ({"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}):
        plain = generate(llama, ids, new=60, **options)
        for _ in range(2):
            cache = RedisChunkCache(llama, store)
            assert torch.equal(generate(llama, ids, cache, new=60, **options), plain)
        assert cache.report.reused == 3 * 199
        assert len(cache.report.rows) == 3


def test_a_batch_with_padding(llama, store):
    rows = [random_ids(n, seed=n)[0] for n in (300, 140, 41)]
    ids = torch.zeros(3, 300, dtype=torch.long)
    mask = torch.zeros(3, 300, dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids[row, 300 - len(tokens) :] = tokens
        mask[row, 300 - len(tokens) :] = 1
    plain = generate(llama, ids, attention_mask=mask)
    for run in range(2):
        cache = RedisChunkCache(llama, store)
        assert torch.equal(generate(llama, ids, cache, attention_mask=mask), plain)
        assert cache.report.skipped == ""
        assert [row.prompt_tokens for row in cache.report.rows] == [300, 140, 41]
        assert [row.reused for row in cache.report.rows] == ([299, 139, 40] if run else [0, 0, 0])
    # Each row is found on its own, too, and rows that are known less far hold back the others.
    cache = RedisChunkCache(llama, store)
    assert torch.equal(generate(llama, rows[1][None], cache), generate(llama, rows[1][None]))
    assert cache.report.reused == 139
    ids[2, 259:] = random_ids(41, seed=99)
    cache = RedisChunkCache(llama, store)
    plain = generate(llama, ids, attention_mask=mask)
    assert torch.equal(generate(llama, ids, cache, attention_mask=mask), plain)
    assert [row.reused for row in cache.report.rows] == [259, 99, 0]


def test_right_padding_is_reused_and_stored_as_far_as_it_is_text(llama, store):
    ids = random_ids(200)
    mask = torch.ones(1, 200, dtype=torch.long)
    mask[0, 190:] = 0
    plain = generate(llama, ids, attention_mask=mask)
    for reused in (0, 190):
        cache = RedisChunkCache(llama, store)
        assert torch.equal(generate(llama, ids, cache, attention_mask=mask), plain)
        assert "padding_side" in cache.report.skipped
        assert cache.report.reused == reused
    # Of the padding and the answer behind it nothing was kept.
    cache = RedisChunkCache(llama, store)
    assert torch.equal(generate(llama, ids, cache), generate(llama, ids))
    assert cache.report.reused == 190


def test_a_new_prompt_with_holes_after_a_good_one(llama, store):
    """What is held begins like the new prompt, but its mask is not that of a text."""
    ids = random_ids(200)
    mask = torch.ones(1, 200, dtype=torch.long)
    mask[0, 20:30] = 0
    cache = RedisChunkCache(llama, store)
    generate(llama, ids, cache)
    plain = generate(llama, ids, attention_mask=mask)
    assert torch.equal(generate(llama, ids, cache, attention_mask=mask), plain)
    assert "padding" in cache.report.skipped


def test_embeddings_have_no_tokens(llama, store):
    ids = random_ids(200)
    embeds = llama.get_input_embeddings()(ids).detach()
    plain = llama.generate(inputs_embeds=embeds, max_new_tokens=6, do_sample=False)
    cache = RedisChunkCache(llama, store)
    generate(llama, ids, cache)
    out = llama.generate(
        inputs_embeds=embeds, past_key_values=cache, max_new_tokens=6, do_sample=False
    )
    assert torch.equal(out, plain)
    assert "input_ids" in cache.report.skipped


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_grad_mode_and_from_one_to_the_next(llama, store, mode):
    ids = random_ids(200)
    plain = last_logits(llama, ids)
    cache = RedisChunkCache(llama, store)
    for _ in range(2):
        with mode():
            out = llama(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            step = llama(ids[:, :1], past_key_values=cache)
        assert torch.allclose(out.logits[:, -1], plain, atol=1e-4)
        again = llama(ids[:, :1], past_key_values=cache)
        assert step.logits.shape == again.logits.shape
        cache = RedisChunkCache(llama, store)
    assert torch.equal(generate(llama, ids, cache), generate(llama, ids))


def test_prompt_lookup_and_assistant(llama, store):
    ids = random_ids(40).repeat(1, 5)
    plain = generate(llama, ids, new=150)
    for options in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": tiny("llama", seed=1)}):
        for _ in range(2):
            cache = RedisChunkCache(llama, store, chunk_size=16)
            assert torch.equal(generate(llama, ids, cache, new=150, **options), plain)
    assert cache.report.reused > 180


# ---------------------------------------------------------------------- who shares with whom


@pytest.mark.parametrize("kind", ["lfm2", "gemma3_text"])
def test_drafts_are_taken_back_where_the_cache_stands_aside(kind, store, monkeypatch):
    """Layers of Transformers' own forget what they were not told to keep."""
    model = tiny(kind)
    monkeypatch.setattr("chunkcache.model.self_test.known_obstacle", lambda model: "for a test")
    ids = random_ids(60, seed=70).repeat(1, 2)
    how = {"new": 12, "prompt_lookup_num_tokens": 3}
    for _ in range(2):
        cache = RedisChunkCache(model, store)
        assert torch.equal(generate(model, ids, cache, **how), generate(model, ids, **how))
        assert cache.report.skipped == "for a test"
        assert torch.equal(generate(model, ids, cache), generate(model, ids))


def test_nothing_is_shared_across_namespaces(llama, store):
    ids = random_ids(300)
    generate(llama, ids, RedisChunkCache(llama, store, namespace="a"))
    for namespace, reused in (("b", 0), ("", 0), ("a", 299)):
        cache = RedisChunkCache(llama, store, namespace=namespace)
        generate(llama, ids, cache)
        assert cache.report.reused == reused


def test_nothing_is_shared_by_models_that_differ(store):
    ids = random_ids(300)
    reference = tiny("llama")
    generate(reference, ids, RedisChunkCache(reference, store))
    others = {
        "other weights": tiny("llama", seed=1),
        "other type": tiny("llama", dtype=torch.float64),
        "other RoPE": tiny("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        "other attention": tiny("llama", attn_implementation="eager"),
    }
    edited = tiny("llama")
    with torch.no_grad():
        edited.model.layers[0].mlp.up_proj.weight[3, 5] += 1e-3
    others["one weight edited"] = edited
    for name, model in others.items():
        cache = RedisChunkCache(model, store)
        assert torch.equal(generate(model, ids, cache), generate(model, ids)), name
        assert cache.report.reused == 0, name
    twin = RedisChunkCache(tiny("llama"), store)
    generate(twin._context.model, ids, twin)
    assert twin.report.reused == 299


def test_an_edit_in_the_middle_of_a_conversation(store):
    model = tiny("llama")
    ids = random_ids(300)
    cache = RedisChunkCache(model, store)
    generate(model, ids, cache)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight.mul_(1.5)
    assert torch.equal(generate(model, ids, cache), generate(model, ids))
    assert cache.report.reused == 0


def test_a_cache_made_for_another_model(llama, store):
    other = tiny("llama", seed=3, num_hidden_layers=3)
    RedisChunkCache(other, store)
    cache = RedisChunkCache(llama, store)
    ids = random_ids(200)
    assert torch.equal(generate(other, ids, cache), generate(other, ids))
    assert "another model" in cache.report.skipped
    assert cache.report.bytes_written == 0


@pytest.mark.parametrize("used", [False, True])
def test_a_model_that_no_cache_was_made_for_is_refused(llama, store, used):
    other, ids = tiny("llama"), random_ids(200)  # the same, loaded again
    cache = RedisChunkCache(llama, store)
    if used:
        generate(llama, ids, cache)
    with pytest.raises(UnsupportedCallError, match="another model object"):
        generate(other, ids, cache)
    if used:  # it is good for its own model all the same
        assert torch.equal(generate(llama, ids, cache), generate(llama, ids))


def test_models_that_cannot_be_tested_compute_plainly(store):
    model, ids = tiny("jamba"), random_ids(150)
    cache = RedisChunkCache(model, store)
    assert torch.equal(generate(model, ids, cache), generate(model, ids))
    assert cache.report.bytes_written == 0


def test_training_mode_stands_aside(store):
    model = tiny("llama").train()
    ids = random_ids(200)
    cache = RedisChunkCache(model, store)
    generate(model, ids, cache)
    assert "training mode" in cache.report.skipped
    model.eval()
    cache = RedisChunkCache(model, store)
    assert torch.equal(generate(model, ids, cache), generate(model, ids))
    assert cache.report.reused == 0


# ---------------------------------------------------------------------- stores in trouble


@pytest.mark.parametrize("verb", ["sizes", "fetch", "read_metadata", "write"])
def test_a_failing_store_is_a_miss(llama, verb):
    store = Scripted()
    ids, plain = random_ids(300), generate(llama, random_ids(300))
    if verb != "write":
        generate(llama, ids, RedisChunkCache(llama, store))
    if verb == "fetch":
        store.answer = fail_at(1, StoreError("fetch failed"))
    else:
        store.script[verb] = StoreError(f"{verb} failed")
    cache = RedisChunkCache(llama, store)
    assert torch.equal(generate(llama, ids, cache), plain)
    if verb != "read_metadata":
        assert cache.report.store_errors == 1
        assert cache.report.errors == [f"{verb} failed"]
        with pytest.raises(StoreError):
            generate(llama, ids, RedisChunkCache(llama, store, on_error="raise"))
    assert cache.report.reused == {"sizes": 0, "fetch": 128, "read_metadata": 299, "write": 0}[verb]


def flip(place):
    place[-1][-1000 % place[-1].nbytes] ^= 4


def zeros(place):
    for view in place:
        view[:] = bytes(view.nbytes)


@pytest.mark.parametrize("lie", [flip, zeros, lambda place: False], ids=["flip", "zeros", "gone"])
def test_a_damaged_blob_is_a_miss_and_is_written_anew(llama, lie):
    store = Scripted()
    ids, plain = random_ids(300), generate(llama, random_ids(300))
    generate(llama, ids, RedisChunkCache(llama, store))
    truth, store.answer = store.answer, lambda n, part, _: lie(part.place) if n == 1 else None
    cache = RedisChunkCache(llama, store)
    assert torch.equal(generate(llama, ids, cache), plain)
    assert cache.report.reused == 128
    assert cache.report.bytes_written > 0
    store.answer = truth
    cache = RedisChunkCache(llama, store)
    assert torch.equal(generate(llama, ids, cache), plain)
    assert cache.report.reused == 299


def test_swapped_blobs_are_misses(llama):
    store = MemoryStore()
    ids = random_ids(300)
    cache = RedisChunkCache(llama, store)
    generate(llama, ids, cache)
    space = cache._conversation.keys
    keys = [space.key(c.hash) for c in cut(ids[0].numpy(), cache._context.grid, space.salt)]
    first, second = map(memoryview, blobs(store, *keys))
    store.write([Entry(keys[0], {}, second), Entry(keys[1], {}, first)])
    cache = RedisChunkCache(llama, store)
    assert torch.equal(generate(llama, ids, cache), generate(llama, ids))
    assert cache.report.reused == 0


def test_a_dead_server_is_reported_and_computed_around(llama):
    cache = RedisChunkCache(llama, "redis://127.0.0.1:1/0")
    ids = random_ids(200)
    assert torch.equal(generate(llama, ids, cache), generate(llama, ids))
    assert cache.report.store_errors >= 1
    assert "127.0.0.1:1" in str(cache.report)


# ---------------------------------------------------------------------- where it lives


def test_a_model_and_its_cache_can_be_freed(store):
    model = tiny("llama")
    generate(model, random_ids(150), RedisChunkCache(model, store))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_uninstall_leaves_the_model_as_it_was(store):
    model = tiny("llama")
    before = len(model._forward_pre_hooks), len(model._forward_hooks)
    RedisChunkCache(model, store)
    RedisChunkCache(model, store)
    assert (len(model._forward_pre_hooks), len(model._forward_hooks)) == (
        before[0] + 1,
        before[1] + 1,
    )
    uninstall(model)
    assert (len(model._forward_pre_hooks), len(model._forward_hooks)) == before


FRESH_PROCESS = """
import sys, torch
from tests.models import tiny
from tests.models import tokens as random_ids
from chunkcache import RedisChunkCache
model, ids = tiny("llama"), random_ids(300)
cache = RedisChunkCache(model, sys.argv[1])
out = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False)
print(cache.report.reused, out[0, 300:].tolist())
"""


def test_a_fresh_process_finds_them_in_redis(llama, redis_server):
    url = redis_server.unix_url
    ids = random_ids(300)
    with RedisChunkCache(llama, url) as cache:
        out = generate(llama, ids, cache)
        assert cache.flush(5)
    fresh = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS, url], capture_output=True, text=True, check=True
    )
    assert fresh.stdout.strip() == f"299 {out[0, 300:].tolist()}"


def test_the_pairs_in_redis(llama, redis_server):
    """Keys and both entries as documented, readable without chunkcache."""
    from safetensors import safe_open

    cache = RedisChunkCache(llama, redis_server.unix_url, namespace="team", tags="kind=test")
    ids = random_ids(256)
    generate(llama, ids, cache, new=1)
    assert cache.flush(5)
    client = redis_server.client()
    names = sorted(key.decode() for key in client.keys("safetensors@*"))
    assert len(names) == 4
    for blob_name, metadata_name in zip(names[::2], names[1::2], strict=True):
        key, _, half = blob_name.rpartition("@")
        assert half == "kv_bytes"
        assert metadata_name == f"{key}@metadata"
        format, _, world_size, worker, chunk_hash = key.split("@")
        assert (format, world_size, worker, len(chunk_hash)) == ("safetensors", "1", "0", 64)
        fields = {k.decode(): v.decode() for k, v in client.hgetall(metadata_name).items()}
        assert fields["namespace"] == "team"
        assert fields["tags"] == "kind=test"
        assert fields["tokens"] == "128"
        assert fields["positions"] in ("0-128", "128-256")
        assert int(fields["bytes"]) == client.strlen(blob_name)
    start = int(fields["positions"].split("-")[0])
    path = redis_server.folder / "chunk.safetensors"
    path.write_bytes(client.get(blob_name))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        assert metadata["tokens"] == str(ids[0, start : start + 128].tolist()).replace(" ", "")
        held = cache.layers[1].keys[0, :, start : start + 128]
        assert torch.equal(file.get_tensor("layers.1.keys"), held)


def test_a_url_opens_one_store_for_all_caches_of_a_model(llama):
    first, second = (RedisChunkCache(llama, "memory://") for _ in range(2))
    assert first.store is second.store
    with open_store("memory://") as other:
        assert RedisChunkCache(llama, other).store is other


def test_the_environment_is_asked_for_each_cache(llama, monkeypatch):
    monkeypatch.setenv("CHUNKCACHE_URL", "memory://")
    first, second = (RedisChunkCache(llama) for _ in range(2))
    assert first.store is second.store
    monkeypatch.setenv("CHUNKCACHE_URL", "memory://?bytes=1MB")
    assert RedisChunkCache(llama).store is not first.store
    with pytest.raises(SettingError, match="one URL per tier"):
        RedisChunkCache(llama, [])  # which is not the same as none
    monkeypatch.setenv("CHUNKCACHE_URL", "nope://")
    with pytest.raises(SettingError, match="nope"):
        RedisChunkCache(llama)

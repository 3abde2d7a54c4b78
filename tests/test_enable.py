"""enabled(): every generate() inside uses the cache; the model is as before afterwards."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, GenerationConfig, pipeline

from chunkcache import (
    RedisChunkCache,
    SettingError,
    UnsupportedModelError,
    cache,
    enabled,
)
from chunkcache.model.check import CACHE
from chunkcache.reuse.hook import install, is_installed
from chunkcache.stores.memory import MemoryStore
from tests.models import tiny, tokens
from tests.words import word_tokenizer, words

HOW = {"max_new_tokens": 6, "do_sample": False}
IDS = tokens(300, seed=1)


@pytest.fixture
def model():
    return tiny("llama")


@pytest.fixture
def store():
    return MemoryStore()


def is_as_before(model):
    hooks = (model._forward_hooks, model._forward_pre_hooks)
    return "generate" not in vars(model) and not any(hooks)


def test_every_generate_inside_uses_the_cache(model, store):
    plain = model.generate(IDS, **HOW)
    with enabled(model, store) as context:
        assert torch.equal(model.generate(IDS, **HOW), plain)
        assert context.report.computed == 300
        assert context.flush()
        for inputs in ({"input_ids": IDS}, {"inputs": IDS}, {"inputs": IDS, CACHE: None}):
            assert torch.equal(model.generate(**inputs, **HOW), plain)
            assert context.report.computed < 50
    assert is_as_before(model)
    assert torch.equal(model.generate(IDS, **HOW), plain)


def test_settings_are_those_of_the_cache(model, store):
    with enabled(model, store, reuse="anywhere", repair="full", namespace="a") as context:
        model.generate(IDS, **HOW)
        context.flush()
        moved = torch.cat([tokens(30, seed=2), IDS], 1)
        out = model.generate(moved, **HOW)
        assert context.report.recomputed > 200
    assert torch.equal(out, model.generate(moved, **HOW))
    with enabled(model, store, namespace="b") as context:
        model.generate(IDS, **HOW)
        assert context.report.computed == 300


@pytest.mark.parametrize(
    "own",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"generation_config": GenerationConfig(use_cache=False, **HOW)},
    ],
)
def test_calls_that_want_no_cache_are_left_alone(model, store, own):
    plain = model.generate(IDS, **HOW)
    with enabled(model, store) as context:
        assert torch.equal(model.generate(IDS, **{**HOW, **own}), plain)
        assert context.report.prompt_tokens == 0


def test_a_cache_of_the_callers_is_used(model, store):
    theirs = DynamicCache(config=model.config)
    with enabled(model, store) as context:
        model.generate(IDS, past_key_values=theirs, **HOW)
        assert context.report.prompt_tokens == 0
    assert theirs.get_seq_length() == 305


def test_afterwards_the_model_is_as_before_also_after_an_exception(model, store):
    with pytest.raises(ZeroDivisionError), enabled(model, store):
        raise ZeroDivisionError
    assert is_as_before(model)
    with pytest.raises(ValueError, match="max_new_tokens"), enabled(model, store):
        model.generate(IDS, max_new_tokens=0)
    assert is_as_before(model)
    with pytest.raises(SettingError, match="chunk_size"), enabled(model, store, chunk_size=-1):
        pass
    assert is_as_before(model)
    model.config.is_encoder_decoder = True
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"), enabled(model, store):
        pass


def test_a_generate_of_someone_elses_comes_back(model, store):
    calls = []
    model.generate = lambda *args, **kwargs: calls.append(kwargs[CACHE])
    theirs = model.generate
    with enabled(model, store):
        model.generate(IDS)
    assert model.generate is theirs
    assert isinstance(calls[0], RedisChunkCache)


def test_a_cache_that_lives_keeps_its_hook(model, store):
    with enabled(model, store):
        cache = RedisChunkCache(model, store)
        out = model.generate(IDS, return_dict_in_generate=True, **HOW)
    assert is_installed(model)
    for mine in (cache, out.past_key_values):
        found = model.generate(IDS, past_key_values=mine, **HOW)
        assert torch.equal(found, model.generate(IDS, **HOW))
        assert mine.report.prompt_tokens == 300


def test_a_cache_that_another_thread_is_making_keeps_it_too(model, store, monkeypatch):
    context = enabled(model, store)

    def install_and_lose_the_cpu(inner):
        install(inner)
        context.__exit__(None, None, None)

    context.__enter__()
    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(cache, "install", install_and_lose_the_cpu)
        made = pool.submit(RedisChunkCache, model, store).result()
    found = model.generate(IDS, past_key_values=made, **HOW)
    assert torch.equal(found, model.generate(IDS, **HOW))
    assert made.report.prompt_tokens == 300


def test_nested_the_innermost_counts(model, store):
    other = MemoryStore()
    with enabled(model, store) as outer:
        model.generate(IDS, **HOW)
        with enabled(model, other) as inner:
            model.generate(IDS, **HOW)
            assert inner.report.computed == 300
        outer.flush()
        model.generate(IDS, **HOW)
        assert outer.report.computed < 50
    assert is_as_before(model)


def test_threads_each_have_their_own(model, store):
    prompts = [tokens(200 + 10 * n, seed=50 + n) for n in range(4)]
    plain = [model.generate(ids, **HOW) for ids in prompts]
    together = Barrier(4)

    def work(n):
        together.wait()
        with enabled(model, store, namespace=str(n)) as context:
            together.wait()
            outs = [model.generate(prompts[n], **HOW)]
            context.flush()
            outs.append(model.generate(prompts[n], **HOW))
            skipped = context.report.prompt_tokens - context.report.computed
            together.wait()
        return outs, context.report.prompt_tokens, skipped

    with ThreadPoolExecutor(4) as pool:
        for n, (outs, length, skipped) in enumerate(pool.map(work, range(4))):
            assert length == prompts[n].shape[1]
            assert skipped > 100
            assert all(torch.equal(out, plain[n]) for out in outs)
    assert is_as_before(model)


def test_a_thread_without_one_takes_the_latest(model, store):
    with enabled(model, store) as context, ThreadPoolExecutor(1) as pool:
        pool.submit(model.generate, IDS, **HOW).result()
        assert context.report.prompt_tokens == 300


def test_pipelines_use_it(model, store):

    pipe = pipeline("text-generation", model=model, tokenizer=word_tokenizer())
    text = words(IDS[0].tolist())
    plain = pipe(text, **HOW)
    with enabled(model, store) as context:
        assert pipe(text, **HOW) == plain
        context.flush()
        assert pipe([text, text], **HOW) == [plain, plain]
        assert context.report.computed < context.report.prompt_tokens / 2


def test_a_peft_model_uses_it_and_adapters_are_told_apart(store):

    model = get_peft_model(
        tiny("llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    on = model.generate(input_ids=IDS, **HOW)
    with model.disable_adapter():
        off = model.generate(input_ids=IDS, **HOW)
    assert not torch.equal(on, off)
    with enabled(model, store) as context:
        for _ in range(2):
            assert torch.equal(model.generate(input_ids=IDS, **HOW), on)
            context.flush()
            with model.disable_adapter():
                assert torch.equal(model.generate(input_ids=IDS, **HOW), off)
                context.flush()
        assert context.report.computed < 50


# ------------------------------------------------------------------ forwards


def scored(model, ids, **more):
    with torch.no_grad():
        return model(ids, **more)


@pytest.mark.parametrize("how", [{}, {"use_cache": False}, {"labels": IDS}, {"return_dict": False}])
def test_forwards_inside_use_the_cache(model, store, how):
    want = scored(model, IDS, **how)
    with enabled(model, store, forwards=True, chunk_size=16) as context:
        for computed in (300, 300 % 16):
            with torch.inference_mode():
                got = model(IDS, **how)
            assert context.report.computed == computed
            assert context.report.skipped == ""
            assert context.flush()
            assert len(got) == len(want)
            if isinstance(got, tuple):
                assert torch.allclose(got[0], want[0], atol=1e-4)
                continue
            assert torch.allclose(got.logits, want.logits, atol=1e-4)
            assert ("past_key_values" in got) == ("use_cache" not in how)
            assert "labels" not in how or abs(float(got.loss - want.loss)) < 1e-5
        del got  # its cache needs the hook
    assert is_as_before(model)
    assert not model.lm_head._forward_pre_hooks
    assert torch.equal(scored(model, IDS, **how)[0], want[0])


def test_rows_padded_on_the_right_without_a_mask(model, store):
    """As lm-eval has them: what stands behind a row's last token are more tokens."""
    ids = IDS[:, :100].repeat(4, 1)
    for row in range(4):
        ids[row, 80 + row : 95] = tokens(15 - row, seed=row)
        ids[row, 95 - row :] = 0
    want = scored(model, ids).logits
    with enabled(model, store, forwards=True, chunk_size=16) as context:
        for computed in (400, 16):
            assert torch.allclose(scored(model, ids).logits, want, atol=1e-4)
            assert context.report.computed == computed
            context.flush()
        swapped = scored(model, ids[[3, 0]]).logits
    assert torch.allclose(swapped, want[[3, 0]], atol=1e-4)


@pytest.mark.parametrize("counted", [True, False])
def test_rows_padded_on_the_left(model, store, counted):
    """Without positions, the model counts padding too: then K/V are not those of the text alone."""
    ids, mask = IDS[:, :100].repeat(2, 1), torch.ones(2, 100, dtype=torch.long)
    mask[1, :20] = 0
    more = {"attention_mask": mask}
    if counted:
        more["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    want = scored(model, ids, **more).logits[mask.bool()]
    with enabled(model, store, forwards=True, chunk_size=16) as context:
        for computed in (180, 8) if counted else (200, 200):
            got = scored(model, ids, **more).logits[mask.bool()]
            assert torch.allclose(got, want, atol=1e-4)
            assert context.report.computed == computed
            told = "padding on the left and no position_ids" in context.report.skipped
            assert (context.report.skipped == "", told) == (counted, not counted)
            context.flush()
        plain = tiny("llama").generate(IDS, **HOW)
        assert torch.equal(model.generate(IDS, **HOW), plain)
        assert context.report.prompt_tokens == 300


def test_forwards_that_are_not_for_it(model, store):
    with enabled(model, store, forwards=True, chunk_size=16) as context:
        assert model(IDS).logits.requires_grad
        assert "gradients" in context.report.skipped
        cache = DynamicCache(config=model.config)
        assert scored(model, IDS, past_key_values=cache).past_key_values is cache
        model.generate(IDS, use_cache=False, **HOW)
        assert "gradients" in context.report.skipped  # nobody has asked since
        with enabled(model, store, chunk_size=16) as inner:
            scored(model, IDS)
        assert inner.report.prompt_tokens == 0
    assert store.sizes([]) == []
    assert list(store.scan("safetensors")) == []


def test_outputs_from(model, store):
    want = scored(model, IDS).logits
    fresh = partial(scored, tiny("llama"), IDS)
    with enabled(model, store, forwards=True, last_outputs=20, chunk_size=16) as context:
        for computed in (300, 12):
            got = scored(model, IDS).logits
            assert got.shape == want.shape
            assert got[:, :280].isnan().all()
            assert torch.allclose(got[:, 280:], want[:, 280:], atol=1e-4)
            assert context.report.computed == computed
            context.flush()
        assert not scored(model, IDS, labels=IDS).logits.isnan().any()
        short = scored(model, IDS[:, :9]).logits
        assert torch.allclose(short, want[:, :9], atol=1e-4)
        for first in (280, 281):  # the logits of 280 tell the label of 281
            labels = IDS.clone().index_fill(1, torch.arange(first), -100)
            got, plain = scored(model, IDS, labels=labels), fresh(labels=labels)
            assert abs(float(got.loss - plain.loss)) < 1e-5
            assert bool(got.logits[:, :280].isnan().all()) == (first == 281)
    for wrong in ({"last_outputs": -1, "forwards": True}, {"last_outputs": 3}):
        with pytest.raises(SettingError, match="last_outputs"), enabled(model, store, **wrong):
            pass

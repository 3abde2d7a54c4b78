"""Reuse at any position: what is exact in it is exact, and what is not never passes for it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from chunkcache import RedisChunkCache, UnsupportedModelError
from chunkcache.anywhere.moved import MovedText
from chunkcache.anywhere.probes import Probes
from chunkcache.kv.rope import KeyRotation
from chunkcache.repair import Repair
from chunkcache.stores.base import ReadOnly
from chunkcache.stores.memory import MemoryStore
from tests.models import tiny
from tests.models import tokens as random_ids
from tests.prompts import (
    DOCUMENTS,
    anywhere,
    build,
    close,
    first_prompt,
    joined,
    logits,
    meet,
    padded,
    prefill,
    shuffled_prompt,
)
from tests.scripted import Scripted

KINDS = ["llama", "qwen3", "gemma3_text", "cohere", "phi", "gpt_neox", "deepseek_v3", "mixtral"]
SLIDING_AND_FULL = ["sliding_attention", "full_attention"]
OTHERS = ["gemma2", "glm", "olmo2", "stablelm", "smollm3"]


def a_batch():
    """Rows that differ in length, in order and in what they repeat."""
    a, b, c, d = DOCUMENTS
    return padded(shuffled_prompt(), joined(51, b, 13, c, 9), joined(8, d, a, a, 30))


# ------------------------------------------------------------------------ exact where it can be


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_computing_everything_again_is_a_full_run(kind, attention):
    own = {"layer_types": SLIDING_AND_FULL} if kind == "gemma3_text" else {}
    model = build(kind, num_hidden_layers=2, attn_implementation=attention, **own)
    store = MemoryStore()
    meet(model, store)
    prompt = a_batch()
    cache = anywhere(model, ReadOnly(store), repair="full")
    assert close(logits(model, prompt, cache), logits(model, prompt))
    report = cache.report
    assert report.recomputed > 2000
    assert report.reused == report.moved == 0
    assert report.exact


def test_with_gradients_on_too():
    """A model that is called outside of `no_grad` keeps what autograd needs."""
    model, store = build(), MemoryStore()
    meet(model, store)
    cache = anywhere(model, ReadOnly(store), repair="full")
    with torch.enable_grad():
        out = model(input_ids=shuffled_prompt(), past_key_values=cache, logits_to_keep=1).logits
        step = model(input_ids=out[:, -1:].argmax(-1), past_key_values=cache).logits
        step.sum().backward()
    assert cache.report.recomputed > 1000
    assert close(out[:, -1], logits(model, shuffled_prompt()))


@pytest.mark.parametrize("kind", OTHERS)
def test_so_it_is_on_other_models(kind):
    model, store = build(kind), MemoryStore()
    meet(model, store)
    found, report = prefill(model, store, shuffled_prompt(), repair="full")
    assert close(found, logits(model, shuffled_prompt()))
    assert report.recomputed > 1000


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_in_double_precision_to_nine_digits(kind):
    model, store = build(kind, dtype=torch.float64), MemoryStore()
    meet(model, store)
    found, _ = prefill(model, store, a_batch(), repair="full")
    # Norms and rotations are computed in single precision by some models.
    assert close(found, logits(model, a_batch()), 1e-9)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt_neox", "deepseek_v3"])
def test_with_one_layer_a_move_is_exact(kind, attention):
    """There, K/V depend on token and position alone: a right rotation is all that it takes."""
    store = MemoryStore()
    own = {"layer_types": ["sliding_attention"]} if kind == "gemma3_text" else {}
    model = build(kind, num_hidden_layers=1, attn_implementation=attention, **own)
    meet(model, store)
    for prompt in (shuffled_prompt(), a_batch()):
        found, report = prefill(model, ReadOnly(store), prompt, repair="none")
        assert close(found, logits(model, prompt))
        assert report.moved > 500


def test_text_moved_with_all_that_it_sees_is_exact():
    """Through three layers of windows of 8 a token sees 21 before it; these move along with it."""
    model, store = build("mistral", sliding_window=8, num_hidden_layers=3), MemoryStore()
    meet(model, store)
    cache = anywhere(model, ReadOnly(store), repair="head:21")
    found = logits(model, shuffled_prompt(), cache)
    plain = RedisChunkCache(model, MemoryStore())
    assert close(found, logits(model, shuffled_prompt(), plain))
    assert cache.report.moved > 900
    for mine, its in zip(cache.layers, plain.layers, strict=True):
        assert close(mine.keys, its.keys, 1e-3)
        assert close(mine.values, its.values, 1e-3)
    cache = anywhere(model, store, repair="none")  # the heads of the runs remember other text
    logits(model, shuffled_prompt(), cache)
    assert not close(cache.layers[2].keys, plain.layers[2].keys, 1e-2)


def test_a_wrong_rotation_would_be_noticed(monkeypatch):
    model, store = build(num_hidden_layers=1), MemoryStore()
    meet(model, store)
    move = KeyRotation.move_into
    monkeypatch.setattr(
        KeyRotation, "move_into", lambda self, to, kv, old, new: move(self, to, kv, old, new + 1)
    )
    found, _ = prefill(model, store, shuffled_prompt(), repair="none")
    assert not close(found, logits(model, shuffled_prompt()), 1e-3)


# ------------------------------------------------------------------------ how much is found


@given(
    order=st.permutations(range(4)),
    gaps=st.lists(st.integers(1, 140), min_size=5, max_size=5),
    again=st.lists(st.integers(0, 3), min_size=1, max_size=4),
)
@settings(max_examples=12, deadline=None)
def test_almost_all_of_repeated_text_is_found(order, gaps, again):
    """At least 97 % of the tokens in repeated runs of 256 and more, whatever order and offset."""
    model, store = MODEL, MemoryStore()
    meet(
        model,
        store,
        joined(*(p for n, gap in zip(order, gaps, strict=False) for p in (gap, DOCUMENTS[n]))),
    )
    parts = [part for n, gap in zip(again, gaps[1:], strict=False) for part in (gap, DOCUMENTS[n])]
    _, report = prefill(model, store, joined(*parts, gaps[0]))
    repeated = sum(DOCUMENTS[n].shape[1] for n in again)
    assert report.reused + report.moved + report.recomputed >= 0.97 * repeated


MODEL = build(num_hidden_layers=1)


def test_the_exact_beginning_comes_first():
    model, store = build(), MemoryStore()
    meet(model, store)
    _, report = prefill(model, store, joined(first_prompt()[:, :400], 30, DOCUMENTS[3], 9))
    assert report.reused == 400
    assert report.moved > 200
    assert not report.exact


def test_of_two_variants_the_one_with_the_longer_common_context_is_moved():
    """Both hold the text; what is wanted follows what one of them followed."""
    model, store = build(), MemoryStore()
    a, b, c, d = (document[:, :256] for document in DOCUMENTS)
    meet(model, store, joined(a, b), joined(37, c, a[:, :30], d, b))
    cache = anywhere(model, store, repair="none")
    logits(model, joined(5, a, b, 9), cache)
    origins = [
        s["origin"] for s in cache.report.chunks if s["kind"] == "moved" and s["start"] >= 261
    ]
    assert origins[0] == "met in a prompt, position 256"
    cache = anywhere(model, store, repair="none")
    logits(model, joined(5, d, b, 9), cache)
    origins = [
        s["origin"] for s in cache.report.chunks if s["kind"] == "moved" and s["start"] > 261
    ]
    assert origins
    assert "met in a prompt, position 256" not in origins


def test_hits_do_not_decay():
    """What was first met behind moved text is found again, too."""
    model, store = build(), MemoryStore()
    meet(model, store)
    new = random_ids(300, seed=77)
    prefill(model, store, joined(9, DOCUMENTS[1], new, 5))
    _, report = prefill(model, store, joined(30, new, 8))
    assert report.moved + report.recomputed >= 0.9 * 300


def test_damaged_and_lost_chunks_are_holes():
    model, store = build(), MemoryStore()
    meet(model, store)

    def lose(number, part, there):
        part.place[-1][-9 % part.place[-1].nbytes] ^= number % 3 == 1
        return there and number % 3 > 0

    found, report = prefill(model, Scripted(store, lose), shuffled_prompt(), repair="full")
    assert close(found, logits(model, shuffled_prompt()))
    assert 0 < report.recomputed < 700
    assert "damaged" in report.errors[0]
    assert {s["reason"] for s in report.chunks} >= {"its chunk could not be read"}


# ------------------------------------------------------------------------ never for exact


def adversary(model, store):
    """Prompts that mix moved, exact and new text; after each, is prefix mode still exact?"""
    prompts = [shuffled_prompt()]
    prompts += [joined(DOCUMENTS[1], prompts[0][:, 5:700], DOCUMENTS[2])]
    prompts += [joined(prompts[1], 150), joined(prompts[0][:, :900], DOCUMENTS[3])]
    truth = [logits(model, known) for known in prompts]
    meet(model, store)
    exact = []
    for ids in prompts:
        cache = anywhere(model, store, repair="none")
        out = model.generate(ids, past_key_values=cache, max_new_tokens=40, do_sample=False)
        model.generate(joined(out, 130), past_key_values=cache, max_new_tokens=2)
        for known, its in zip(prompts, truth, strict=True):
            plain = RedisChunkCache(model, ReadOnly(store), reuse="prefix")
            exact.append(close(logits(model, known, plain), its))
            assert plain.report.exact
    return exact


def test_nothing_computed_on_moved_text_is_stored_as_exact():
    assert all(adversary(build(num_hidden_layers=2), MemoryStore()))


def test_it_would_be_noticed_if_it_were(monkeypatch):
    monkeypatch.setattr(MovedText, "inexact_from", lambda self, computed: None)
    assert not all(adversary(build(num_hidden_layers=2), MemoryStore()))


def test_namespaces_are_worlds_of_their_own():
    model, store = build(), MemoryStore()
    logits(model, first_prompt(), anywhere(model, store, namespace="a"))
    ids = shuffled_prompt()
    found, report = prefill(model, store, ids, namespace="b")
    assert torch.equal(found, logits(model, ids))
    assert report.computed == ids.shape[1]
    _, report = prefill(model, store, ids, namespace="a")
    assert report.moved > 1000


def test_prompts_with_an_image_stand_aside():
    model, store = build(), MemoryStore()
    meet(model, store)
    given = {"input_ids": shuffled_prompt(), "pixel_values": torch.ones(1, 3, 4, 4)}
    found, report = prefill(model, store, given)
    assert torch.equal(found, logits(model, given))
    assert "pixel_values" in report.skipped
    assert report.computed == shuffled_prompt().shape[1]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("gpt2", "layer 0: no known rotation explains how its keys turn"),
        ("bloom", "takes no position_ids"),
        ("opt", "no known rotation"),
        ("lfm2", "a recurrent state is of all tokens before it"),
        ("deepseek_v32", "the keys of indexed attention choose by position"),
    ],
)
def test_models_whose_kv_cannot_be_moved_are_refused(kind, reason):
    model = tiny(kind)
    with pytest.raises(UnsupportedModelError, match=reason) as raised:
        anywhere(model, MemoryStore())
    assert "reuse='prefix'" in str(raised.value)


def test_attention_that_takes_no_mask_is_refused_at_once():
    """As flash attention; in the default mode such a model is served."""
    AttentionInterface.register("unmaskable", sdpa_attention_forward)
    AttentionMaskInterface.register("unmaskable", sdpa_mask)
    model, store = build(attn_implementation="unmaskable"), MemoryStore()
    with pytest.raises(UnsupportedModelError, match="takes no mask: load the model with"):
        anywhere(model, store)
    ids = joined(300)
    for reused in (0, 299):
        cache = RedisChunkCache(model, store)
        assert close(logits(model, ids, cache), logits(model, ids))
        assert cache.report.reused == reused


# ------------------------------------------------------------------------ repair


@pytest.mark.parametrize("repair", ["none", "head:4", "seam:8", "deviation:0.15", "query:0.15",
                                    "head:4+query:0.1+deviation:0.1", "random:0.15"])  # fmt: skip
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_every_repair(kind, repair):
    model, store = build(kind), MemoryStore()
    meet(model, store)
    cache = anywhere(model, store, repair=repair)
    out = model.generate(shuffled_prompt(), past_key_values=cache, max_new_tokens=5)
    report = cache.report
    assert out.shape[1] == shuffled_prompt().shape[1] + 5
    assert report.errors == []
    assert report.moved > 700
    found = report.moved + report.recomputed
    if ":0.15" in repair:
        assert report.recomputed == round(0.15 * found)
    assert report.charged >= report.recomputed
    assert (report.charged == report.recomputed) == (
        "deviation" not in repair and "query" not in repair
    )
    assert model.config._attn_implementation == "sdpa"


def test_a_strategy_picks_among_moved_tokens_only():
    class Everything(Repair):
        def pick(self, situation):
            return np.ones(situation.tokens, dtype=bool)

    model, store = build(), MemoryStore()
    meet(model, store)
    ids = joined(first_prompt()[:, :400], 30, DOCUMENTS[3], 9)
    found, report = prefill(model, store, ids, repair=Everything())
    assert close(found, logits(model, ids))
    assert report.reused == 400
    assert report.charged == report.recomputed > 300


def test_requests_in_threads_on_one_model_do_not_meet():
    """Whichever repairs they use: plain, exact and approximate results are those of one thread."""
    model, store = build(num_hidden_layers=2), MemoryStore()
    meet(model, store)
    ids = shuffled_prompt()
    others = [random_ids(200 + n, seed=300 + n) for n in range(8)]
    plain = [logits(model, other) for other in others]
    repairs = ["query:0.1", "deviation:0.1", "query:0.1+deviation:0.1"]
    once = {r: prefill(model, ReadOnly(store), ids, repair=r)[0] for r in repairs}

    def request(number):
        if number % 2:
            repair = repairs[number % 3]
            found, report = prefill(model, ReadOnly(store), ids, repair=repair)
            return torch.equal(found, once[repair]) and not report.errors
        which = number // 2 % len(others)
        cache = RedisChunkCache(model, store) if number % 4 else None
        return close(logits(model, others[which], cache), plain[which])

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(request, range(24)))
    for other, its in zip(others, plain, strict=True):
        assert close(logits(model, other, RedisChunkCache(model, ReadOnly(store))), its)


def test_a_failing_repair_falls_back(monkeypatch):
    monkeypatch.setattr(Probes, "query_attention", lambda self: 1 / 0)
    model, store = build(), MemoryStore()
    meet(model, store)
    _, report = prefill(model, store, shuffled_prompt(), repair="query:0.1")
    assert "head:4 was used" in report.errors[0]
    assert report.recomputed == 4 * 4

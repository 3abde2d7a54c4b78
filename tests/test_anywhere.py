"""Reuse at any position: what is exact in it is exact, and what is not never passes for it."""

from __future__ import annotations

import pytest
import torch

from chunkcache import RedisChunkCache, UnsupportedModelError
from chunkcache.stores.memory import MemoryStore
from tests.models import tiny
from tests.models import tokens as random_ids

KINDS = ["llama", "qwen3", "gemma2", "gemma3_text", "gpt_neox", "cohere", "glm", "phi", "mixtral"]
KINDS += ["deepseek_v3", "olmo2", "stablelm", "smollm3"]


def build(kind="llama", **overrides):
    return tiny(kind, max_position_embeddings=2048, **overrides)


def logits(model, ids, cache=None):
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]


def anywhere(model, store, **settings):
    return RedisChunkCache(model, store, reuse="anywhere", **settings)


def close(a, b, tolerance=1e-4):
    return (a - b).abs().max() <= tolerance * b.abs().max()


DOCUMENTS = [random_ids(256 + 31 * n, seed=10 + n) for n in range(4)]


def first_prompt():
    return torch.cat([random_ids(10), *DOCUMENTS, random_ids(20, seed=1)], 1)


def shuffled_prompt():
    parts = [random_ids(23, seed=2), DOCUMENTS[2], random_ids(7, seed=3), DOCUMENTS[0]]
    return torch.cat([*parts, DOCUMENTS[3], DOCUMENTS[1], random_ids(20, seed=4)], 1)


@pytest.mark.parametrize("kind", KINDS)
def test_computing_everything_again_is_a_full_run(kind):
    model, store = build(kind), MemoryStore()
    logits(model, first_prompt(), anywhere(model, store))
    ids = shuffled_prompt()
    cache = anywhere(model, store, repair="full")
    assert close(logits(model, ids, cache), logits(model, ids))
    assert cache.report.recomputed > 1000
    assert cache.report.reused == cache.report.moved == 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "deepseek_v3"])
def test_with_one_layer_a_move_is_exact(kind, attention):
    """There, K/V depend on token and position alone: a right rotation is all that it takes."""
    store = MemoryStore()
    own = {"layer_types": ["sliding_attention"]} if kind == "gemma3_text" else {}
    model = build(kind, num_hidden_layers=1, attn_implementation=attention, **own)
    logits(model, first_prompt(), anywhere(model, store))
    ids = shuffled_prompt()
    cache = anywhere(model, store, repair="none")
    assert close(logits(model, ids, cache), logits(model, ids))
    assert cache.report.moved > 1000


def test_a_wrong_rotation_would_be_noticed(monkeypatch):
    model, store = build(num_hidden_layers=1), MemoryStore()
    logits(model, first_prompt(), anywhere(model, store))
    from chunkcache.rope import KeyMover

    move = KeyMover.move_all
    monkeypatch.setattr(
        KeyMover, "move_all", lambda self, kv, old, new: move(self, kv, old, new + 1)
    )
    ids = shuffled_prompt()
    assert not close(logits(model, ids, anywhere(model, store)), logits(model, ids), 1e-3)


def test_almost_all_of_repeated_text_is_found():
    """At least 97 % of the tokens in repeated runs of 256 and more, whatever order and offset."""
    model = build()
    found = repeated = 0
    generator = torch.Generator().manual_seed(0)
    for trial in range(8):
        store = MemoryStore()
        documents = [random_ids(260 + 40 * n, seed=100 * trial + n) for n in range(4)]
        for _ in range(2):
            order = torch.randperm(4, generator=generator).tolist()
            gaps = torch.randint(1, 60, (5,), generator=generator).tolist()
            parts = []
            for gap, number in zip(gaps, order, strict=False):
                seed = int(torch.randint(1 << 30, (1,), generator=generator))
                parts += [random_ids(gap, seed=seed), documents[number]]
            cache = anywhere(model, store, repair="none")
            logits(model, torch.cat([*parts, random_ids(9, seed=trial)], 1), cache)
        found += cache.report.moved + cache.report.reused
        repeated += sum(document.shape[1] for document in documents)
    assert found >= 0.97 * repeated


def test_repetitions_inside_one_prompt():
    model, store = build(), MemoryStore()
    logits(model, first_prompt(), anywhere(model, store))
    ids = torch.cat([random_ids(5, seed=7), *[DOCUMENTS[0]] * 3, random_ids(9, seed=8)], 1)
    cache = anywhere(model, store, repair="full")
    assert close(logits(model, ids, cache), logits(model, ids))
    assert cache.report.recomputed >= 0.97 * 3 * DOCUMENTS[0].shape[1]


def test_the_exact_beginning_comes_first():
    model, store = build(), MemoryStore()
    logits(model, first_prompt(), anywhere(model, store))
    ids = torch.cat([first_prompt()[:, :400], random_ids(30, seed=5), DOCUMENTS[3]], 1)
    cache = anywhere(model, store)
    logits(model, torch.cat([ids, random_ids(9)], 1), cache)
    assert cache.report.reused == 384
    assert cache.report.moved > 200
    assert not cache.report.exact


def test_nothing_computed_on_moved_text_is_stored_as_exact():
    """An adversary's sequence of prompts; after each, prefix mode must still be exact."""
    model, store = build(), MemoryStore()
    prompts = [first_prompt(), shuffled_prompt()]
    prompts += [torch.cat([DOCUMENTS[n], p[:, 5:700], DOCUMENTS[3 - n]], 1)
                for n, p in enumerate(prompts)]  # fmt: skip
    prompts += [torch.cat([p, random_ids(150, seed=9)], 1) for p in prompts[1:]]
    for ids in prompts:
        cache = anywhere(model, store, repair="none")
        model.generate(ids, past_key_values=cache, max_new_tokens=140, do_sample=False)
        for known in prompts:
            plain = RedisChunkCache(model, store, reuse="prefix")
            assert close(logits(model, known, plain), logits(model, known))
            assert plain.report.exact
        cache = RedisChunkCache(model, store, reuse="prefix")


def test_hits_do_not_decay():
    """What was first met behind moved text is found again, too."""
    model, store = build(), MemoryStore()
    logits(model, first_prompt(), anywhere(model, store))
    new = random_ids(300, seed=77)
    logits(model, torch.cat([random_ids(9), DOCUMENTS[1], new, random_ids(5)], 1),
           anywhere(model, store))  # fmt: skip
    cache = anywhere(model, store)
    logits(model, torch.cat([random_ids(30, seed=6), new, random_ids(8, seed=5)], 1), cache)
    assert cache.report.moved + cache.report.recomputed >= 0.9 * 300


def test_namespaces_are_worlds_of_their_own():
    model, store = build(), MemoryStore()
    logits(model, first_prompt(), anywhere(model, store, namespace="a"))
    cache = anywhere(model, store, namespace="b")
    ids = shuffled_prompt()
    assert torch.equal(logits(model, ids, cache), logits(model, ids))
    assert cache.report.computed == ids.shape[1]


@pytest.mark.parametrize("repair", ["none", "head:4", "seam:8", "deviation:0.15", "query:0.15",
                                    "head:4+query-deviation:0.1", "random:0.15"])  # fmt: skip
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_every_repair(kind, repair):
    model, store = build(kind), MemoryStore()
    logits(model, first_prompt(), anywhere(model, store))
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


def test_beams_move_too():
    model, store = build(), MemoryStore()
    logits(model, first_prompt(), anywhere(model, store))
    cache = anywhere(model, store, repair="full")
    options = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False}
    ids = shuffled_prompt()
    out = model.generate(ids, past_key_values=cache, **options)
    assert torch.equal(out, model.generate(ids, **options))
    assert cache.report.recomputed > 3000


def test_a_conversation_behind_moved_text_goes_on_and_says_so():
    model, store = build(), MemoryStore()
    logits(model, first_prompt(), anywhere(model, store))
    cache = anywhere(model, store)
    out = model.generate(shuffled_prompt(), past_key_values=cache, max_new_tokens=5)
    longer = torch.cat([out, random_ids(12)], 1)
    model.generate(longer, past_key_values=cache, max_new_tokens=5)
    assert cache.report.reused > 1000
    assert not cache.report.exact


@pytest.mark.parametrize("kind", ["gpt2", "bloom", "opt", "mamba"])
def test_models_whose_kv_cannot_be_moved_are_refused(kind):
    model = tiny(kind)
    with pytest.raises(UnsupportedModelError, match="anywhere"):
        anywhere(model, MemoryStore())


def test_a_failing_repair_falls_back(monkeypatch):
    from chunkcache.probes import Probes

    monkeypatch.setattr(Probes, "query_attention", lambda self: 1 / 0)
    model, store = build(), MemoryStore()
    logits(model, first_prompt(), anywhere(model, store))
    cache = anywhere(model, store, repair="query:0.1")
    logits(model, shuffled_prompt(), cache)
    assert "head:4 was used" in cache.report.errors[0]
    assert cache.report.recomputed > 0


def test_damaged_and_lost_chunks_are_holes():
    model, store = build(), MemoryStore()
    logits(model, first_prompt(), anywhere(model, store))

    class Lossy(MemoryStore):
        def read(self, keys):
            for number, blob in enumerate(store.read(keys)):
                damaged = bytearray(blob) if blob else bytearray()
                if number % 3 == 1 and damaged:
                    damaged[-9] ^= 1
                yield None if number % 3 == 0 else memoryview(damaged)

        def sizes(self, keys):
            return store.sizes(keys)

        def read_metadata(self, keys):
            return store.read_metadata(keys)

    cache = anywhere(model, Lossy(), repair="full")
    ids = shuffled_prompt()
    assert close(logits(model, ids, cache), logits(model, ids))
    assert 0 < cache.report.recomputed < 700
    assert "damaged" in cache.report.errors[0]

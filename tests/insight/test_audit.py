"""An audit must see every error, and none where there is none."""

from __future__ import annotations

import json
import logging
from typing import Any

import numpy as np
import pytest
import torch
from servers import Server

from chunkcache import RedisChunkCache, SettingError, StoreError, UnsupportedCallError
from chunkcache.insight.audit import compare
from chunkcache.insight.runs import Run
from chunkcache.kv.rope import KeyRotation
from chunkcache.kv.sample import Sample
from chunkcache.report import Report
from chunkcache.samples import load_smollm2
from chunkcache.stores.memory import MemoryStore
from chunkcache.stores.redis import RedisStore
from tests.models import tiny
from tests.models import tokens as random_ids
from tests.scripted import Scripted
from tests.test_report import WellFormed

KINDS = ["llama", "gemma3_text", "qwen3"]
DOCUMENTS = [random_ids(200 + 31 * n, seed=10 + n) for n in range(3)]


def build(kind: str = "llama", **overrides: Any) -> Any:
    return tiny(kind, max_position_embeddings=2048, **overrides)


def joined(*parts: torch.Tensor) -> torch.Tensor:
    return torch.cat(parts, dim=1)


def first_prompt() -> torch.Tensor:
    return joined(random_ids(10), *DOCUMENTS, random_ids(20, seed=1))


def moved_prompt() -> torch.Tensor:
    return joined(
        random_ids(23, seed=2), DOCUMENTS[2], DOCUMENTS[0], DOCUMENTS[1], random_ids(9, seed=3)
    )


def prefill(model: Any, store: Any, ids: torch.Tensor, **chosen: Any) -> Report:
    cache = RedisChunkCache(model, store, **chosen)
    model.generate(ids, past_key_values=cache, max_new_tokens=1, do_sample=False)
    return cache.report


def is_exact(audit: Any) -> bool:
    return (
        audit.max_kl < 1e-6
        and audit.top1_agreement == 1
        and np.nanmax(audit.key_deviation) < 1e-5
        and np.nanmax(audit.value_deviation) < 1e-5
        and np.nanmax(audit.token_deviation) < 1e-4
    )


@pytest.mark.parametrize("mode", ["prefix", "anywhere", "off"])
@pytest.mark.parametrize("kind", KINDS)
def test_exact_reuse_is_a_full_run(kind: str, mode: str) -> None:
    model, store, ids = build(kind), MemoryStore(), random_ids(300)
    cold = RedisChunkCache(model, store, reuse=mode).audit(ids)
    assert is_exact(cold)
    assert cold.report.computed == 300
    prefill(model, store, ids)
    warm = RedisChunkCache(model, store, reuse=mode).audit(ids[0].tolist())
    assert is_exact(warm)
    assert warm.report.reused == (0 if mode == "off" else 299)
    assert warm.kl.shape == warm.top1.shape == (1, 33)
    assert warm.continuation.shape == (1, 32)
    assert warm.token_deviation.shape == (1, 300)
    assert warm.key_deviation.shape == warm.value_deviation.shape == (4,)
    assert (warm.token_deviation[0, :7] == 0).all()  # read back as they were


@pytest.mark.parametrize("kind", KINDS)
def test_moved_text_is_off_and_full_repair_is_not(kind: str) -> None:
    model, store = build(kind), MemoryStore()
    prefill(model, store, first_prompt(), reuse="anywhere")
    ids = moved_prompt()
    audit = RedisChunkCache(model, store, reuse="anywhere").audit(ids)
    assert audit.report.moved > 500
    assert audit.mean_kl > 1e-3
    assert audit.top1_agreement < 1
    whole = RedisChunkCache(model, store, reuse="anywhere", repair="full").audit(ids)
    assert whole.report.recomputed > 500
    assert is_exact(whole)


def test_distributions_are_compared_where_they_belong() -> None:
    """Against what a few lines without our audit find."""
    model, store = build(), MemoryStore()
    prefill(model, store, first_prompt(), reuse="anywhere")
    ids, behind = moved_prompt(), random_ids(5, seed=4)
    audit = RedisChunkCache(model, store, reuse="anywhere").audit(ids, continuation=behind)
    text = joined(ids, behind)
    cache = RedisChunkCache(model, store, reuse="anywhere")
    with torch.no_grad():
        full = model(text).logits[0, -6:].log_softmax(-1)
        steps = [model(ids, past_key_values=cache, logits_to_keep=1).logits[0, -1]]
        steps += [
            model(behind[:, [n]], past_key_values=cache, logits_to_keep=1).logits[0, -1]
            for n in range(5)
        ]
    cached = torch.stack(steps).log_softmax(-1)
    expected = (full.exp() * (full - cached)).sum(-1)
    assert np.allclose(audit.kl[0], expected, rtol=1e-3, atol=1e-5)
    assert (audit.top1[0] == (full.argmax(-1) == cached.argmax(-1)).numpy()).all()
    assert audit.mean_kl == pytest.approx(float(expected.mean()), rel=1e-3)
    assert audit.max_kl == pytest.approx(float(expected.max()), rel=1e-3)
    assert (audit.continuation == behind.numpy()).all()


def test_deviations_of_known_size() -> None:
    def run(keys: torch.Tensor, values: torch.Tensor) -> Run:
        return Run([torch.zeros(2, 3)], torch.empty(2, 0).long(), [None, (keys, values)], 1.0)

    keys, values = torch.ones(2, 1, 4, 8), torch.ones(2, 1, 4, 8)
    off_keys, off_values = keys.clone(), values.clone()
    off_keys[1, :, 3] *= 1.5
    off_values[1, :, 2] *= 0
    off_keys[0, :, 0] = torch.nan  # padding may hold anything
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    audit = compare(run(keys, values), run(off_keys, off_values), mask, Report())
    assert audit.key_deviation == pytest.approx([np.nan, (0.25 / 6) ** 0.5], nan_ok=True)
    assert audit.value_deviation == pytest.approx([np.nan, (1 / 6) ** 0.5], nan_ok=True)
    off = [[np.nan, np.nan, 0, 0], [0, 0, 0.5**0.5, (0.25 / 2) ** 0.5]]
    assert audit.token_deviation == pytest.approx(np.array(off), nan_ok=True)
    # A plain sliding layer holds the last tokens only.
    audit = compare(
        run(keys[:, :, 2:], values[:, :, 2:]), run(off_keys, off_values), mask, Report()
    )
    assert audit.token_deviation[1] == pytest.approx([np.nan, np.nan, *off[1][2:]], nan_ok=True)


def test_divergence_of_known_size() -> None:
    def run(*probabilities: float) -> Run:
        return Run([torch.tensor([probabilities]).log()], torch.empty(1, 0).long(), [], 1.0)

    audit = compare(run(0.5, 0.5, 0), run(0.25, 0.75, 0), torch.ones(1, 0), Report())
    assert audit.kl.item() == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3))
    assert compare(run(1, 0), run(0, 1), torch.ones(1, 0), Report()).max_kl == np.inf
    assert np.isnan(compare(run(1, np.nan), run(1, 0), torch.ones(1, 0), Report()).max_kl)


def test_a_wrong_rotation_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one layer K/V depend on token and position alone, so only the rotation can be off."""
    model, store = build(num_hidden_layers=1), MemoryStore()
    prefill(model, store, first_prompt(), reuse="anywhere")
    cache = RedisChunkCache(model, store, reuse="anywhere", repair="none")
    assert is_exact(cache.audit(moved_prompt()))
    move = KeyRotation.move_into
    monkeypatch.setattr(
        KeyRotation, "move_into", lambda self, to, kv, old, new: move(self, to, kv, old, new + 1)
    )
    audit = cache.audit(moved_prompt())
    assert audit.key_deviation[0] > 0.05
    assert audit.value_deviation[0] < 1e-6
    assert audit.max_kl > 1e-6
    (row,) = audit.report.rows
    for span in row.spans:
        off = audit.token_deviation[0, span.start : span.stop]
        assert (off > 0.01).all() if span.kind == "moved" else (off < 1e-6).all()


def test_wrong_kv_in_the_store_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values were changed under a cache's hands, which then stored them in good faith."""
    monkeypatch.setattr(Sample, "differences", lambda self, layers: [])
    model, store, ids = build(), MemoryStore(), random_ids(300)
    cache = RedisChunkCache(model, store)
    with torch.no_grad():
        model(ids[:, :200], past_key_values=cache, logits_to_keep=1)
        for layer in cache.layers:
            layer.values.data[:, :, 150:] *= 1.1  # which PyTorch does not count
        model(ids[:, 200:], past_key_values=cache, logits_to_keep=1)
    audit = RedisChunkCache(model, store).audit(ids)
    assert audit.report.reused >= 256
    assert not is_exact(audit)
    assert audit.token_deviation[0, :150].max() < 1e-5
    assert audit.token_deviation[0, 150:200].min() > 0.01
    assert audit.key_deviation[0] < 1e-5 < 0.01 < audit.value_deviation[0]


def test_padded_batches() -> None:
    model, store = build(), MemoryStore()
    ids = random_ids(300, rows=3)
    mask = torch.ones_like(ids)
    mask[0, :170], mask[2, :5] = 0, 0
    for _ in range(2):
        audit = RedisChunkCache(model, store).audit(ids, attention_mask=mask)
        assert is_exact(audit)
        assert audit.kl.shape == (3, 33)
        assert (np.isnan(audit.token_deviation) == (mask == 0).numpy()).all()
        assert audit.report.prompt_tokens == mask.sum()
        cache = RedisChunkCache(model, store)
        model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=1)
    assert audit.report.reused > 300
    alone = RedisChunkCache(model, store).audit(ids[:1, 170:])
    assert (alone.continuation == audit.continuation[:1]).all()


def test_sliding_layers_are_compared_where_a_plain_cache_has_them() -> None:
    model, store, ids = build("mistral", sliding_window=8), MemoryStore(), random_ids(150)
    prefill(model, store, ids)
    audit = RedisChunkCache(model, store).audit(ids)
    assert audit.report.reused == 149
    assert is_exact(audit)
    assert (~np.isnan(audit.token_deviation)).sum() == 7


@pytest.mark.parametrize("kind", ["jamba", "hooked"])
def test_where_the_cache_stands_aside(kind: str) -> None:
    model = build() if kind == "hooked" else tiny(kind)
    if kind == "hooked":
        model.model.layers[1].register_forward_hook(lambda module, args, out: out * 1.01)
    audit = RedisChunkCache(model, MemoryStore()).audit(random_ids(150), new_tokens=3)
    assert audit.max_kl == 0
    assert audit.top1.all()
    assert audit.report.skipped
    assert audit.report.skipped in str(audit)


def test_nothing_is_written(redis_server: Server) -> None:
    def content() -> dict[bytes, Any]:
        client = redis_server.client()
        return {key: client.dump(key) for key in sorted(client.keys())}

    model = build()
    with RedisStore(redis_server.unix_url) as store:
        known = joined(random_ids(10), random_ids(90, seed=1))
        prefill(model, store, known, reuse="anywhere", chunk_size=16)
        before = content()
        assert before
        for mode in ("prefix", "anywhere", "off"):
            for ids in (known, known[:, 7:], random_ids(100, seed=9)):
                cache = RedisChunkCache(model, store, reuse=mode, chunk_size=16)
                audit = cache.audit(ids, new_tokens=17)
                assert audit.report.bytes_written == audit.report.bytes_dropped == 0
        assert content() == before


def test_what_the_cache_holds_stays() -> None:
    model, ids = build(), random_ids(300)
    plain = model.generate(ids, max_new_tokens=8, do_sample=False)
    cache = RedisChunkCache(model, MemoryStore())
    out = model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
    report, layers, held = cache.report, cache.layers, cache.get_seq_length()
    said = report.to_dict()
    keys = [layer.keys.clone() for layer in layers]
    cache.audit(ids)
    cache.audit(random_ids(200, seed=3), new_tokens=2)
    assert cache.report is report
    assert report.to_dict() == said
    assert cache.layers is layers
    assert all(torch.equal(layer.keys, k) for layer, k in zip(layers, keys, strict=True))
    more = model.generate(out, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert cache.report.reused == held
    assert torch.equal(more, plain)


@pytest.mark.parametrize("mode", ["prefix", "anywhere"])
def test_a_dead_store(mode: str) -> None:
    model, store = build(), RedisStore("redis://127.0.0.1:1/0")
    audit = RedisChunkCache(model, store, reuse=mode).audit(random_ids(150), new_tokens=2)
    assert is_exact(audit)
    assert audit.report.store_errors
    strict = RedisChunkCache(model, store, reuse=mode, on_error="raise")
    with pytest.raises(StoreError):
        strict.audit(random_ids(150), new_tokens=2)


def test_a_store_that_raises_on_writes_is_not_asked_to() -> None:
    full = Scripted(write=StoreError("full"))
    audit = RedisChunkCache(build(), full, on_error="raise").audit(random_ids(150), new_tokens=2)
    assert not audit.report.errors


def test_bad_arguments() -> None:
    cache = RedisChunkCache(build(), MemoryStore())
    with pytest.raises(SettingError, match="input_ids"):
        cache.audit("a text")
    with pytest.raises(SettingError, match="continuation"):
        cache.audit(random_ids(9), continuation="more")
    cache._context.model.train()
    with pytest.raises(UnsupportedCallError, match=r"model\.eval"):
        cache.audit(random_ids(9))


def test_sixteen_bits() -> None:
    model, store, ids = build(dtype=torch.bfloat16), MemoryStore(), random_ids(300)
    prefill(model, store, ids)
    audit = RedisChunkCache(model, store).audit(ids)
    assert audit.report.reused == 299
    assert audit.max_kl < 0.05
    assert audit.key_deviation.max() < 0.01


def test_a_real_model() -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    model, tokenizer = load_smollm2()
    text = "The quick brown fox jumps over the lazy dog. " * 15
    ids = tokenizer(text, return_tensors="pt").input_ids
    store = MemoryStore()
    prefill(model, store, ids)
    audit = RedisChunkCache(model, store).audit(ids, new_tokens=4)
    assert audit.report.reused == ids.shape[1] - 1
    assert is_exact(audit)


def test_in_words_html_and_json() -> None:
    model, store = build(), MemoryStore()
    audit = RedisChunkCache(model, store).audit(random_ids(150), new_tokens=3)
    audit.report.errors.append("<script>")
    words = str(audit)
    assert "at 4 of 4 positions" in words
    assert str(audit.report) in words
    parser = WellFormed()
    parser.feed(audit._repr_html_())
    parser.close()
    assert parser.open == []
    assert parser.tags <= {"div", "span", "table", "tr", "th", "td"}
    assert "computed 150" in parser.text
    mask = torch.ones(1, 150)
    mask[0, :3] = 0
    audit = RedisChunkCache(model, store).audit(random_ids(150), attention_mask=mask.long())
    found = json.loads(json.dumps(audit.to_dict(), allow_nan=False))
    assert found["token_deviation"][0][:3] == [None] * 3
    for name in ("mean_kl", "max_kl", "top1_agreement", "full_ms", "cached_ms"):
        assert found[name] == getattr(audit, name)
    for name in ("kl", "top1", "key_deviation", "value_deviation", "continuation"):
        assert found[name] == getattr(audit, name).tolist()
    assert found["report"] == audit.report.to_dict()

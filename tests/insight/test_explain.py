"""What explain says must be what a run then does; each reason is provoked for real."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from servers import Server

from chunkcache import RedisChunkCache, SettingError, StoreError
from chunkcache.anywhere.matching import SHORTEST_RUN
from chunkcache.gain import NO_GAIN
from chunkcache.insight import elsewhere
from chunkcache.insight import fates as reasons
from chunkcache.stores.base import KV_BYTES, ChunkStore, Entry, ReadOnly
from chunkcache.stores.memory import MemoryStore
from chunkcache.stores.redis import RedisStore
from chunkcache.stores.tiered import TieredStore
from chunkcache.tokens.plan import TOO_SHORT, Span
from tests.models import tiny
from tests.models import tokens as random_ids
from tests.scripted import Scripted


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny("llama", max_position_embeddings=2048)


@pytest.fixture
def store() -> Scripted:
    return Scripted()


def prefill(model: Any, store: ChunkStore, ids: torch.Tensor, mask: Any = None, **chosen: Any):
    """Put a prompt through a new cache, and return its report."""
    cache = RedisChunkCache(model, store, **chosen)
    inputs = {"attention_mask": torch.ones_like(ids) if mask is None else mask}
    model.generate(ids, **inputs, past_key_values=cache, max_new_tokens=1, do_sample=False)
    return cache.report


def told(
    cache: RedisChunkCache, ids: Any, *, elsewhere: bool = False, **inputs: Any
) -> list[tuple[int, int, str, str]]:
    """The findings without their keys and sizes, as they should be printed."""
    found = cache.explain(ids, elsewhere=elsewhere, **inputs).chunks
    return [(finding.start, finding.stop, str(finding.kind), finding.reason) for finding in found]


def dead_store() -> RedisStore:
    return RedisStore("redis://127.0.0.1:1/0")


def joined(*parts: torch.Tensor) -> torch.Tensor:
    return torch.cat(parts, dim=1)


def test_a_new_prompt_and_a_known_one(llama, store) -> None:
    ids = random_ids(300)
    cache = RedisChunkCache(llama, store)
    missing, tail = reasons.NOT_IN_STORE, reasons.TAIL_NOT_IN_STORE
    assert told(cache, ids) == [
        (0, 128, "computed", missing),
        (128, 256, "computed", missing),
        (256, 299, "computed", tail),
        (299, 300, "computed", reasons.LAST_TOKEN),
    ]
    prefill(llama, store, ids)
    explanation = cache.explain(ids)
    assert told(cache, ids) == [
        (0, 128, "reused", ""),
        (128, 256, "reused", ""),
        (256, 299, "reused", ""),
        (299, 300, "computed", reasons.LAST_TOKEN),
    ]
    first = explanation.chunks[0]
    (key,) = [key for key in store.asked("write") if key.endswith(first.key)]
    assert [first.bytes] == store.sizes([key])
    assert explanation.exact
    assert told(cache, ids[0].tolist()) == told(cache, ids)


@pytest.mark.parametrize("mode", ["prefix", "anywhere"])
def test_a_gap_before_what_is_known(llama, store, mode) -> None:
    ids = random_ids(300)
    prefill(llama, store, ids, reuse="anywhere")
    cache = RedisChunkCache(llama, store, reuse=mode)
    gone = cache.explain(ids).chunks[0].key
    store.delete([key for key in store.asked("write") if key.endswith(gone)])
    fate = ("reused", "") if mode == "anywhere" else ("computed", reasons.GAP_BEFORE)
    assert told(cache, ids) == [
        (0, 128, "computed", reasons.NOT_IN_STORE),
        (128, 256, *fate),
        (256, 299, *fate),
        (299, 300, "computed", reasons.LAST_TOKEN),
    ]
    assert cache.explain(ids).chunks[1].bytes > 0
    assert (cache.explain(ids).bytes_to_read > 0) == (mode == "anywhere")


def test_another_row_is_not_known_this_far(llama, store) -> None:
    known, new = random_ids(300), random_ids(300, seed=1)
    prefill(llama, store, known)
    cache = RedisChunkCache(llama, store)
    batch = torch.cat([known, joined(known[:, :128], new[:, :172])])
    explanation = cache.explain(batch)
    row = [(f.start, f.stop, f.reason) for f in explanation.chunks if f.row == 0]
    assert row == [
        (0, 128, ""),
        (128, 256, reasons.OTHER_ROW),
        (256, 299, reasons.OTHER_ROW),
        (299, 300, reasons.LAST_TOKEN),
    ]
    assert explanation.bytes_to_read == prefill(llama, store, batch).bytes_read


@pytest.mark.parametrize("mode", ["prefix", "anywhere"])
@pytest.mark.parametrize(
    ("reason", "before", "after", "chosen"),
    [
        (reasons.OTHER_POSITION, random_ids(10), random_ids(20, seed=1), {}),
        (reasons.OTHER_CONTEXT, random_ids(128), random_ids(128, seed=1), {}),
        (reasons.OTHER_CUT, random_ids(128), random_ids(128), {"chunk_size": 96}),
    ],
)
def test_text_that_is_known_under_another_key(llama, store, mode, reason, before, after, chosen):
    document = random_ids(256, seed=2)
    prefill(llama, store, joined(before, document, random_ids(5)), reuse="anywhere")
    cache = RedisChunkCache(llama, store, reuse=mode, **chosen)
    begin = after.shape[1]
    why = reason if mode == "anywhere" else reason + reasons.WOULD_MOVE
    explanation = cache.explain(joined(after, document, random_ids(9, seed=3)))
    found = [f for f in explanation.chunks if f.reason == why]
    assert sum(f.tokens for f in found) >= 250
    shift = begin - before.shape[1]
    assert all(f.start - f.old_start == shift and f.bytes for f in found)
    assert {str(f.kind) for f in found} == {"moved" if mode == "anywhere" else "computed"}
    assert explanation.exact == (mode == "prefix")
    # A chunk of another size serves as far as it begins like the prompt.
    assert (explanation.bytes_to_read > 0) == (mode == "anywhere" or reason == reasons.OTHER_CUT)


def test_runs_too_short_to_be_moved_are_told(llama, store) -> None:
    document = random_ids(256, seed=2)
    prefill(llama, store, joined(random_ids(10), document, random_ids(5)), reuse="anywhere")
    few = document[:, 40 : 40 + SHORTEST_RUN - 1]
    for behind in (random_ids(20, seed=3), document[:, 100:]):  # alone, and beside a longer one
        ids = joined(random_ids(30, seed=1), few, behind, random_ids(5, seed=4))
        expected = (30, 30 + few.shape[1], "computed", TOO_SHORT)
        assert expected in told(RedisChunkCache(llama, store, reuse="anywhere"), ids)
        assert TOO_SHORT not in {why for *_, why in told(RedisChunkCache(llama, store), ids)}
    report = prefill(llama, ReadOnly(store), ids, reuse="anywhere", repair="none")
    assert report.moved == 156
    short = [span for span in report.rows[0].spans if span.reason == TOO_SHORT]
    assert [(span.start, span.stop) for span in short] == [(30, 30 + few.shape[1])]
    assert sum(span.tokens for span in report.rows[0].spans) == ids.shape[1]


def test_new_text_that_stands_in_a_prompt_three_times_is_told(llama, store) -> None:
    document = random_ids(100, seed=2)
    ids = joined(random_ids(9), document, random_ids(9, seed=3), document, document)
    found = told(RedisChunkCache(llama, store, reuse="anywhere"), ids)
    again = [(start, stop) for start, stop, _, why in found if why == reasons.REPEATED]
    assert again == [(118, 317)]
    assert reasons.REPEATED not in {why for *_, why in told(RedisChunkCache(llama, store), ids)}
    prefill(llama, store, ids, reuse="anywhere")
    after = RedisChunkCache(llama, store, reuse="anywhere").explain(
        joined(document, random_ids(5), document, random_ids(6))
    )
    assert after.moved > 190


def test_text_computed_behind_moved_text(llama, store) -> None:
    document, new = random_ids(256, seed=2), random_ids(128, seed=3)
    prefill(llama, store, joined(random_ids(10), document, random_ids(5)), reuse="anywhere")
    ids = joined(document, new, random_ids(5, seed=4))
    prefill(llama, store, ids, reuse="anywhere")
    cache = RedisChunkCache(llama, store)
    assert reasons.INEXACT_CONTEXT + reasons.WOULD_MOVE in {why for *_, why in told(cache, ids)}


def test_blobs_that_went_from_the_store(llama, redis_server: Server) -> None:
    document = random_ids(256, seed=2)
    with RedisStore(redis_server.unix_url) as store:
        prefill(llama, store, joined(random_ids(10), document, random_ids(5)), reuse="anywhere")
        client = redis_server.client()
        client.delete(*client.keys(f"*{KV_BYTES}"))
        cache = RedisChunkCache(llama, store, reuse="anywhere")
        explanation = cache.explain(joined(random_ids(20, seed=1), document))
    assert reasons.BLOB_GONE in {found.reason for found in explanation.chunks}
    assert explanation.computed == explanation.prompt_tokens
    assert explanation.bytes_to_read == 0


def test_a_row_whose_blobs_are_gone_has_the_others_computed(llama, redis_server: Server) -> None:
    lost, there = random_ids(256, seed=2), random_ids(256, seed=3)
    client = redis_server.client()
    with RedisStore(redis_server.unix_url) as store:
        prefill(llama, store, joined(random_ids(10), lost, random_ids(5)), reuse="anywhere")
        client.delete(*client.keys(f"*{KV_BYTES}"))
        prefill(llama, store, joined(random_ids(10), there, random_ids(5)), reuse="anywhere")
        before = random_ids(20, rows=2, seed=4)
        batch = joined(before, torch.cat([lost, there]), random_ids(5, rows=2, seed=5))
        cache = RedisChunkCache(llama, store, reuse="anywhere")
        assert cache.explain(batch[1:]).moved == 256
        explanation = cache.explain(batch)
    assert explanation.moved == 0
    assert reasons.OTHER_ROW in {found.reason for found in explanation.chunks if found.row}


def test_the_last_token_is_nobodys(llama, store) -> None:
    """It is computed, so a chunk for it is not read and a run is not found with its help."""
    document = random_ids(256, seed=2)
    prefill(llama, store, joined(random_ids(10), document, random_ids(5)), reuse="anywhere")
    short = joined(random_ids(40, seed=1), document[:, :SHORTEST_RUN])
    assert RedisChunkCache(llama, store, reuse="anywhere").explain(short).moved == 0
    assert RedisChunkCache(llama, store, reuse="anywhere").explain(
        joined(short, document[:, SHORTEST_RUN : SHORTEST_RUN + 1])
    ).moved == SHORTEST_RUN  # fmt: skip
    ids = random_ids(20)
    prefill(llama, store, joined(ids, ids), chunk_size=1)
    explanation = RedisChunkCache(llama, store, chunk_size=1).explain(ids)
    assert explanation.reused == 19
    assert explanation.bytes_to_read == prefill(llama, store, ids, chunk_size=1).bytes_read


@pytest.mark.parametrize("mode", ["prefix", "anywhere"])
def test_a_dead_store(llama, mode) -> None:
    ids = random_ids(300)
    cache = RedisChunkCache(llama, dead_store(), reuse=mode)
    explanation = cache.explain(ids)
    assert explanation.computed == 300
    assert "127.0.0.1:1" in explanation.errors[0]
    assert told(cache, ids) == [(0, 300, "computed", cache.explain(ids).errors[0])]
    strict = RedisChunkCache(llama, dead_store(), reuse=mode, on_error="raise")
    with pytest.raises(StoreError):
        strict.explain(ids)


def test_a_dead_tier_is_named(llama, store) -> None:
    ids = random_ids(300)
    prefill(llama, store, ids)
    tiers = TieredStore([dead_store(), store])
    explanation = RedisChunkCache(llama, tiers).explain(ids)
    assert explanation.reused == 299
    assert len(explanation.errors) == len(set(explanation.errors)) > 0
    assert "127.0.0.1:1" in str(explanation)
    with pytest.raises(StoreError, match=r"127\.0\.0\.1:1"):
        RedisChunkCache(llama, tiers, on_error="raise").explain(ids)


def test_a_store_that_dies_half_way(llama) -> None:
    """What was known exactly is told all the same."""

    def die(keys):
        if any(key.startswith("anchor@") for key in keys):
            raise StoreError("gone")

    store, ids = Scripted(read_metadata=die), random_ids(300)
    prefill(llama, store, ids[:, :200])
    cache = RedisChunkCache(llama, store)
    explanation = cache.explain(ids)
    assert explanation.reused == 128
    assert explanation.errors == ("gone",)
    with pytest.raises(StoreError):
        RedisChunkCache(llama, store, on_error="raise").explain(ids)


def test_models_and_prompts_that_are_not_handled(llama, store) -> None:
    ids = random_ids(150)
    explanation = RedisChunkCache(tiny("jamba"), store).explain(ids)
    assert "begins with no state" in explanation.skipped
    assert explanation.chunks[0].reason == explanation.skipped
    cache = RedisChunkCache(llama, store)
    mask = torch.ones_like(ids)
    mask[0, 140:] = 0
    assert "padding" in cache.explain(ids, attention_mask=mask).skipped
    model = tiny("llama").train()
    cache = RedisChunkCache(model, store)
    assert "model.eval()" in cache.explain(ids).skipped
    model.eval()
    assert cache.explain(ids).skipped == ""
    hook = model.model.layers[1].register_forward_hook(lambda module, args, out: out * 1.01)
    prefill(model, store, ids)
    assert "would see a trimmed prompt" in cache.explain(ids).skipped
    hook.remove()


def test_a_row_that_is_padding_alone(llama, store) -> None:
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0] = 0
    found = told(RedisChunkCache(llama, store), random_ids(40, rows=2), attention_mask=mask)
    assert sum(stop - start for start, stop, *_ in found) == 40


def test_reuse_off(llama, store) -> None:
    ids = random_ids(150)
    prefill(llama, store, ids)
    assert told(RedisChunkCache(llama, store, reuse="off"), ids) == [
        (0, 150, "computed", "reuse is off")
    ]


def test_bad_input_is_an_error(llama, store) -> None:
    with pytest.raises(SettingError, match="input_ids"):
        RedisChunkCache(llama, store).explain("a text")


def test_other_models_and_namespaces_are_not_found(llama, store) -> None:
    ids = random_ids(300)
    prefill(llama, store, ids, reuse="anywhere")
    other = tiny("llama", seed=1, max_position_embeddings=2048)
    for cache in (RedisChunkCache(other, store), RedisChunkCache(llama, store, namespace="b")):
        assert {why for *_, why in told(cache, ids)} == {
            reasons.NOT_IN_STORE, reasons.TAIL_NOT_IN_STORE, reasons.LAST_TOKEN,
        }  # fmt: skip


def why_not(cache: RedisChunkCache, ids: Any) -> set[str]:
    """What is said of the first 256 tokens."""
    return {why for start, _, _, why in told(cache, ids, elsewhere=True) if start < 256}


def test_what_other_models_are_called_takes_one_line(llama, store) -> None:
    ids = random_ids(300)
    fields = {"token_ids": str(ids[0, :128].tolist()), "dtype": "\x1b[31m\nforged", "a": "b"}
    name = "%1B%5D0%3Bx%07%0Aforged"
    store.write([Entry(f"safetensors@{name}@1@0@{'a' * 64}", fields, memoryview(b"x"))])
    said = " ".join(why for *_, why in told(RedisChunkCache(llama, store), ids, elsewhere=True))
    assert "another model (␛]0;x␇␊forged, ␛[31m␊forged)" in said


@pytest.mark.parametrize("mode", ["prefix", "anywhere"])
def test_what_other_caches_have_is_told(mode) -> None:
    store, ids = MemoryStore(), random_ids(300)
    llama = tiny("llama", max_position_embeddings=2048)  # new: its verdict goes into this store
    prefill(llama, store, ids, reuse=mode)

    def asked(model: Any = llama, **settings: Any) -> set[str]:
        return why_not(RedisChunkCache(model, store, **settings), ids)

    other = tiny("llama", seed=1, max_position_embeddings=2048)
    (said,) = asked(other)
    assert said == "in the store for another model (LlamaForCausalLM, float32; other weights)"
    turned = tiny("llama", max_position_embeddings=2048, rope_theta=500.0)
    (said,) = asked(turned)
    assert "other configuration, RoPE" in said
    (said,) = asked(tiny("llama", max_position_embeddings=2048).to(torch.bfloat16))
    assert "float32; other" in said
    assert "weights" in said
    assert asked(namespace="b") == {"in the store, in the namespace ''"}
    assert asked(codec="safetensors-bf16") == {"in the store, with the codec safetensors"}
    assert asked(secret="x" * 20) == {elsewhere.OTHER_SECRET}
    if mode == "prefix":  # the index tells the others
        assert asked(chunk_size=96) == {"", "in the store, in a chunk of 128 tokens"}
        shifted = torch.cat([random_ids(10, seed=3), ids[:, :256]], dim=1)
        assert why_not(RedisChunkCache(llama, store), shifted) == {
            reasons.NOT_IN_STORE, "in the store, at another position" + elsewhere.NOT_INDEXED,
        }  # fmt: skip


def test_what_was_evicted_is_told(llama, redis_server: Server) -> None:
    redis_server.client().flushall()
    ids = random_ids(300)
    with RedisStore(redis_server.unix_url) as store:
        prefill(llama, store, ids)
        for key in redis_server.client().keys(f"*{KV_BYTES}"):
            redis_server.client().delete(key)
        assert why_not(RedisChunkCache(llama, store), ids) == {elsewhere.EVICTED}


def test_metadata_that_hold_nonsense_are_passed_over(llama, store) -> None:
    ids = random_ids(300)
    prefill(llama, store, ids)
    for text in ("", "[", "[" * 100_000, "[1e400]", "[[1]]", '["a"]', "[1]", "{}"):
        for key in set(store.asked("write")):
            if key.startswith("safetensors@"):
                store.write([Entry(key, {"token_ids": text}, memoryview(b"x"))])
        assert reasons.WRONG_SIZE in why_not(RedisChunkCache(llama, store), ids)


def test_the_tokenizer_of_the_cache_is_used_and_nonsense_refused(llama, store) -> None:
    with pytest.raises(SettingError, match="tokenizer="):
        RedisChunkCache(llama, store).explain(random_ids(40), tokenizer="gpt2")  # type: ignore[arg-type]


def test_what_would_not_pay_is_told(llama, store) -> None:
    ids = random_ids(300)
    prefill(llama, store, ids)
    cache = RedisChunkCache(llama, store, min_gain=1.0)
    for _ in range(8):
        cache._context.gauge.note_read(1_000_000, 1e6)
        cache._context.gauge.note_computed(300, 1.0)
    explanation = cache.explain(ids)
    assert explanation.reused == 0
    assert explanation.bytes_to_read == 0
    assert NO_GAIN in {found.reason for found in explanation.chunks}
    llama.generate(ids, past_key_values=cache, max_new_tokens=1, do_sample=False)
    assert cache.report.reused == 0


def test_nothing_is_run_and_nothing_is_written(llama, redis_server: Server) -> None:
    def content() -> dict[bytes, bytes]:
        client = redis_server.client()
        return {key: client.dump(key) for key in sorted(client.keys())}

    with RedisStore(redis_server.unix_url) as store:
        prefill(llama, store, random_ids(300), reuse="anywhere")
        cache = RedisChunkCache(llama, store, reuse="anywhere")
        before = content()
        assert before
        calls = []
        hook = llama.model.register_forward_pre_hook(lambda *_: calls.append(1))
        for ids in (random_ids(300), random_ids(290)[:, 20:], random_ids(40, seed=9)):
            cache.explain(ids)
        hook.remove()
        assert not calls
        assert content() == before
    empty = Scripted()  # a verdict is not written either, should it be due
    cache = RedisChunkCache(tiny("llama", seed=5).train(), empty)
    cache._context.model.eval()
    assert cache.explain(random_ids(300)).skipped == ""
    assert not empty.written


def test_what_the_cache_holds_stays(llama, store) -> None:
    ids = random_ids(300)
    cache = RedisChunkCache(llama, store)
    out = llama.generate(ids, past_key_values=cache, max_new_tokens=4)
    report, layers, held = cache.report, cache.layers, cache.get_seq_length()
    cache.explain(random_ids(200, seed=3))
    assert cache.report is report
    assert cache.layers is layers
    assert cache.get_seq_length() == held
    llama.generate(out, past_key_values=cache, max_new_tokens=4)
    assert cache.report.reused == held


parts = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 290)), min_size=1, max_size=4)


@given(
    first=parts,
    second=parts,
    overlap=st.sampled_from([0, 16]),
    row=st.integers(0, 260),
    shift=st.sampled_from([0, 7]),
)
@example(first=[(0, 290)], second=[(0, 290)], overlap=16, row=0, shift=0)
@example(first=[(0, 290)], second=[(1, 40), (0, 200)], overlap=0, row=239, shift=0)
@example(first=[(0, 32)], second=[(0, 1), (0, 33)], overlap=0, row=32, shift=0)
@settings(max_examples=25, deadline=None)
def test_a_run_does_what_was_told(first, second, overlap, row, shift) -> None:
    """Token counts and bytes are those of the report, for padded batches too."""
    model, store = MODEL, MemoryStore()
    texts = [random_ids(300, seed=seed) for seed in range(5)]
    ids, other = (joined(*(texts[n][:, :size] for n, size in p)) for p in (first, second))
    chosen = {"chunk_size": 64, "chunk_overlap": overlap}
    prefill(model, store, ids, reuse="anywhere", **chosen)
    length = other.shape[1]
    batch = torch.zeros(2, length, dtype=torch.long)
    batch[0] = other
    inside = min(row + 1, length)
    batch[1, length - inside :] = ids.repeat(1, 300)[0, shift : shift + inside]
    mask = torch.ones_like(batch)
    mask[1, : length - inside] = 0
    plain = torch.ones_like(other)
    for prompt, padding, mode, repair in [
        (other, plain, "prefix", "none"),
        (other, plain, "anywhere", "head:4"),
        (batch, mask, "prefix", "none"),
        (batch, mask, "anywhere", "none"),  # a repair adds columns that only a run can tell
    ]:
        chosen |= {"reuse": mode, "repair": repair}
        cache = RedisChunkCache(model, store, **chosen)
        explanation = cache.explain(prompt, attention_mask=padding)
        assert sum(f.tokens for f in explanation.chunks) == explanation.prompt_tokens
        report = prefill(model, ReadOnly(store), prompt, padding, **chosen)
        assert explanation.prompt_tokens == report.prompt_tokens
        assert explanation.reused == report.reused
        assert explanation.moved == report.moved + report.recomputed
        assert explanation.computed == report.computed
        assert explanation.bytes_to_read == report.bytes_read
        assert explanation.exact == report.exact
        for at, row in enumerate(report.rows):
            told_of = [found for found in explanation.chunks if found.row == at]
            assert [f.start for f in told_of] == [0, *(f.stop for f in told_of[:-1])]
            assert reused(told_of) == reused(row.spans)
            if len(prompt) == 1:
                assert reasons.OTHER_ROW not in {found.reason for found in told_of}


def reused(spans: Iterable[Span]) -> list[tuple[int, int, str]]:
    return [(span.start, span.stop, span.key) for span in spans if span.kind == "reused"]


MODEL = tiny("llama", max_position_embeddings=4096)

"""A model on a device: the tokens of a plain run, few copies, and nothing that is waited for.

Runs where the simulated device is (`-p tests.on_device`): models and token ids lie on it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from chunkcache import RedisChunkCache
from chunkcache.model.check import CACHE
from chunkcache.model.identity import ModelIdentity
from chunkcache.model.loading import load_model
from chunkcache.stores.base import OUTPUTS, STATE, ChunkStore
from chunkcache.stores.memory import MemoryStore
from chunkcache.stores.writer import WriteBehind
from tests import fakegpu
from tests.models import tiny, tokens
from tests.prompts import close, first_prompt, meet, padded, prefill, shuffled_prompt

KINDS = [
    "llama", "qwen3", "gemma3_text", "gemma2", "phi", "gpt_neox", "gpt2", "cohere", "deepseek_v3",
    "mixtral", "mimo_v2_flash", "bloom",
]  # fmt: skip
PROMPT = tokens(150, seed=1)
CHUNKS = 9  # of 16 tokens each that a prompt like it has


def small(kind: str = "llama", **how: Any) -> Any:
    """A model of two layers, one of them with a window where the architecture has both."""
    if kind == "gemma3_text":
        how["layer_types"] = ["sliding_attention", "full_attention"]
    return tiny(kind, **{"num_hidden_layers": 2, "max_position_embeddings": 2048, **how})


def behind(prompt: Tensor, new: int, seed: int = 9) -> Tensor:
    """The prompt, and random tokens behind it."""
    return torch.cat([prompt, tokens(new, rows=len(prompt), seed=seed).to(prompt.device)], 1)


def run(model: Any, prompt: Any, cache: Any, new: int = 6, **how: Any) -> Tensor:
    given = prompt if isinstance(prompt, dict) else {"input_ids": prompt}
    given = {"attention_mask": torch.ones_like(given["input_ids"]), **given}
    ids: Tensor = model.generate(
        **given, **{CACHE: cache}, **{"max_new_tokens": new, "do_sample": False, **how}
    )
    return ids


@pytest.fixture
def store() -> Iterator[ChunkStore]:
    """Written by a thread, as a server is."""
    with WriteBehind(MemoryStore()) as opened:
        yield opened


@pytest.fixture(scope="module")
def llama() -> Any:
    return small()


# ------------------------------------------------------------------------ the tokens of a plain run


@pytest.mark.parametrize("kind", ["qwen3_5_text", "falcon_h1", "lfm2", "deepseek_v32"])
def test_states_and_index_keys(kind: str, store: ChunkStore) -> None:
    model = tiny(kind)
    batch = padded(PROMPT, behind(PROMPT[:, :140], 40))
    del batch["position_ids"]
    for prompt, most in ((PROMPT, 128), (batch, 256)):
        for known in (False, True):
            cache = RedisChunkCache(model, store, chunk_size=32, on_error="raise")
            assert torch.equal(run(model, prompt, cache), run(model, prompt, None))
            cache.flush()
            assert not cache.report.skipped
            assert cache.report.reused >= known * most


@pytest.mark.parametrize("kind", KINDS)
def test_several_turns(kind: str, store: ChunkStore) -> None:
    model = small(kind)
    cache = RedisChunkCache(model, store, chunk_size=16, on_error="raise")
    first = run(model, PROMPT, cache, 20)
    assert torch.equal(first, run(model, PROMPT, None, 20))
    cache.flush()
    # The answer was stored as it came, so that the next turn finds it: in the layers, and anew.
    second = behind(first, 9)
    expected = run(model, second, None)
    for held in (cache, RedisChunkCache(model, store, chunk_size=16, on_error="raise")):
        assert torch.equal(run(model, second, held), expected)
        assert held.report.reused >= first.shape[1] - 16, held.report
        assert not held.report.skipped


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_batches_and_beams(kind: str, how: dict[str, Any], store: ChunkStore) -> None:
    model = small(kind)
    batch = padded(*(PROMPT[:, :n].cpu() for n in (150, 127, 140)))
    batch = {name: part.to(fakegpu.NAME) for name, part in batch.items() if "position" not in name}
    expected = run(model, batch, None, 8, **how)
    for reused in (0, 112):
        cache = RedisChunkCache(model, store, chunk_size=16, on_error="raise")
        assert torch.equal(run(model, batch, cache, 8, **how), expected)
        assert min(row.reused for row in cache.report.rows) >= reused
        cache.flush()


def test_assisted_decoding(llama: Any, store: ChunkStore) -> None:
    how = {"assistant_model": small(num_hidden_layers=1, seed=1)}
    for _ in range(2):
        cache = RedisChunkCache(llama, store, chunk_size=16, on_error="raise")
        assert torch.equal(run(llama, PROMPT, cache, 20, **how), run(llama, PROMPT, None, 20))
        cache.flush()
    assert cache.report.reused >= 140


@pytest.mark.parametrize(
    "codec", ["safetensors+zstd", "safetensors-bf16", "safetensors-int8", "sealed"]
)
def test_codecs_as_on_the_cpu(codec: str, llama: Any, store: ChunkStore) -> None:
    """What the device has stored, a model on the CPU reads with the same result, and back."""
    chosen = {"seal": "5e" * 32} if codec == "sealed" else {"codec": codec}
    found: list[Tensor] = []
    with torch.no_grad():
        for model, part in ((llama, 144), (small().cpu(), 150), (llama, 150)):
            cache = RedisChunkCache(
                model, store, **chosen, chunk_size=16, write=part < 150, on_error="raise"
            )
            ids = PROMPT[:, :part].to(model.device)
            found.append(model(ids, **{CACHE: cache}, logits_to_keep=1).logits.cpu())
            assert cache.report.reused == (0 if part < 150 else 144)
            cache.flush()
    assert torch.equal(found[1], found[2])


def test_a_mask_that_was_left_on_the_cpu(llama: Any, store: ChunkStore) -> None:
    mask = torch.ones(PROMPT.shape, dtype=torch.long)
    plain = llama(PROMPT, attention_mask=mask, use_cache=True, logits_to_keep=1).logits
    for _ in range(2):
        cache = RedisChunkCache(llama, store, on_error="raise")
        out = llama(PROMPT, attention_mask=mask, **{CACHE: cache}, logits_to_keep=1)
        assert close(out.logits, plain)
        mask_of_all = torch.ones(1, 151, dtype=torch.long)
        llama(PROMPT[:, :1], attention_mask=mask_of_all, **{CACHE: cache})  # and one more token
        cache.flush()
    assert cache.report.reused == 149


def test_a_device_that_pins_no_memory(
    llama: Any, store: ChunkStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fakegpu.device, "can_pin", False)
    for _ in range(2):
        cache = RedisChunkCache(llama, store, on_error="raise")
        assert torch.equal(run(llama, PROMPT, cache), run(llama, PROMPT, None))
        cache.flush()
    assert cache.report.reused == 149


def test_a_device_without_float64(store: ChunkStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fakegpu.device, "has_float64", False)
    model = small(seed=3)
    meet(model, store)
    _, report = prefill(model, store, shuffled_prompt(), repair="query:0.1+deviation:0.1")
    assert (report.errors, report.moved > 500) == ([], True)


def test_a_device_whose_memory_is_full(
    llama: Any, store: ChunkStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be gathered there is copied piece by piece, what cannot come is computed."""

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError

    plain = run(llama, PROMPT, None)
    with monkeypatch.context() as patch:
        patch.setattr("chunkcache.kv.layout.TensorFile.gather", full)
        cache = RedisChunkCache(llama, store, on_error="raise")
        assert torch.equal(run(llama, PROMPT, cache), plain)
        cache.flush()
    with monkeypatch.context() as patch:
        patch.setattr("chunkcache.kv.codec.upload", full)
        cache = RedisChunkCache(llama, store, on_error="raise")
        assert torch.equal(run(llama, PROMPT, cache), plain)
        assert cache.report.reused == 0
    cache = RedisChunkCache(llama, store, on_error="raise")
    assert torch.equal(run(llama, PROMPT, cache), plain)
    assert cache.report.reused == 149


def test_numbers_that_others_write_are_seen(llama: Any, store: ChunkStore) -> None:
    cache = RedisChunkCache(llama, store, chunk_size=16)
    first = run(llama, PROMPT, cache)
    for layer in cache.layers:
        layer.values.data.mul_(2)  # which PyTorch counts nowhere
    run(llama, behind(first, 9), cache)
    assert "changed by others" in cache.report.skipped


# ------------------------------------------------------------------------ text that moves


@pytest.mark.parametrize("repair", ["deviation:0.1", "query:0.1", "query:0.1+deviation:0.1"])
def test_moved_text_as_on_the_cpu(repair: str, llama: Any) -> None:
    found = []
    for model in (llama, small().cpu()):
        store, device = MemoryStore(), next(model.parameters()).device
        with torch.no_grad():
            for prompt, chosen in ((None, "full"), (shuffled_prompt(), repair)):
                ids = (first_prompt() if prompt is None else prompt).to(device)
                cache = RedisChunkCache(
                    model, store, reuse="anywhere", repair=chosen, on_error="raise"
                )
                out = model(ids, **{CACHE: cache}, logits_to_keep=1).logits.cpu()
        assert cache.report.errors == []
        found.append((out, cache.report.moved, cache.report.charged))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]
    assert found[0][1] > 500


# ------------------------------------------------------------------------ copies and waits


def counted(model: Any, prompt: Tensor, cache: Any, new: int) -> fakegpu.Trace:
    with fakegpu.counting() as trace:
        run(model, prompt, cache, new)
    return trace


@pytest.mark.parametrize("kind", ["llama", "deepseek_v3", "gemma3_text"])
def test_a_warm_prompt_is_one_copy_per_chunk(kind: str, store: ChunkStore) -> None:
    model = small(kind)
    run(model, PROMPT, RedisChunkCache(model, store, chunk_size=16), 1)
    store.flush()
    cache = RedisChunkCache(model, store, chunk_size=16)
    prompt = behind(PROMPT, 3)
    warm = counted(model, prompt, cache, 1)
    assert cache.report.reused >= 144
    assert warm.of("chunkcache", "h2d", "d2h") <= CHUNKS + 4, warm.table()
    assert warm.of("chunkcache", "wait") <= 4, warm.table()


def test_a_second_turn_waits_as_little(llama: Any, store: ChunkStore) -> None:
    cache = RedisChunkCache(llama, store, chunk_size=16)
    second = behind(run(llama, PROMPT, cache, 4), 3)
    mine = counted(llama, second, cache, 1)
    assert cache.report.reused >= 150
    assert mine.of("chunkcache", "wait") <= 3, mine.table()
    assert mine.of("chunkcache", "h2d", "d2h") <= 2, mine.table()


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_decoding_copies_and_waits_for_nothing(
    how: dict[str, Any], llama: Any, store: ChunkStore
) -> None:
    """Six tokens more, of which none completes a chunk, cost what they cost anyway."""
    batch = padded(*(PROMPT[:, :n].cpu() for n in (145, 129, 113)))
    batch = {n: part.to(fakegpu.NAME) for n, part in batch.items() if n != "position_ids"}
    counts = []
    for new in (3, 9):
        with fakegpu.counting() as trace:
            run(llama, batch, RedisChunkCache(llama, store, write=False), new, **how)
        counts.append(trace)
    for kind in ("wait", "h2d", "d2h"):
        few, more = (trace.of("chunkcache", kind) for trace in counts)
        assert few == more, counts[1].table()


def test_a_chunk_of_the_answer_is_one_copy_and_one_wait(llama: Any, store: ChunkStore) -> None:
    cache = RedisChunkCache(llama, store, chunk_size=16, store_tail=False)
    mine = counted(llama, PROMPT[:, :144], cache, 18)
    store.flush()
    assert mine.of("chunkcache", "wait") <= 2 + 1, mine.table()
    assert mine.of("chunkcache", "h2d", "d2h") <= 4, mine.table()


def test_nothing_is_copied_before_the_first_token_is_there(llama: Any, store: ChunkStore) -> None:
    """Then the writer copies each chunk once, while the answer is decoded."""
    cache = RedisChunkCache(llama, store, chunk_size=16)
    seen = []

    def look(ids: Tensor, scores: Tensor) -> Tensor:
        time.sleep(0.1)  # the writer has had time
        seen.append(trace.counts["other d2h"])
        return scores

    with fakegpu.counting() as trace:
        run(llama, PROMPT[:, :144], cache, 2, logits_processor=[look])
        cache.flush()
    assert seen[0] == 0
    assert trace.counts["other d2h"] == CHUNKS, trace.table()
    assert trace.nbytes["other d2h"] < CHUNKS * 17_000


@pytest.mark.parametrize(
    ("kind", "value", "copies"), [("llama", OUTPUTS, 2), ("qwen3_5_text", STATE, 1)]
)
def test_values_beside_kv_are_copied_as_they_are(
    kind: str, value: str, copies: int, store: ChunkStore
) -> None:
    """One copy each and no wait: of hidden states of all tokens, of a snapshot of states."""
    model = tiny(kind)
    wanted: dict[str, Any] = {} if value == OUTPUTS else {"logits_to_keep": 1}
    prompt = tokens(140, seed=3)

    def run_once(ids: Tensor) -> tuple[fakegpu.Trace, Any, Tensor]:
        cache = RedisChunkCache(model, store, chunk_size=64, on_error="raise")
        with fakegpu.counting() as trace, torch.no_grad():
            logits = model(ids, **{CACHE: cache}, **wanted).logits
        store.flush()
        return trace, cache.report, logits

    run_once(tokens(90, seed=4))  # the self-tests
    cold, *_ = run_once(prompt)
    assert sum(listed.extras.get(value, 0) > 0 for page in store.scan() for listed in page) >= 1
    assert cold.of("chunkcache", "wait") <= 2, cold.table()
    warm, report, logits = run_once(behind(prompt, 3))
    assert report.reused >= 128
    assert warm.of("chunkcache", "h2d") <= 2 + copies, warm.table()  # K/V of two chunks
    assert warm.of("chunkcache", "wait") <= 3, warm.table()
    with torch.no_grad():
        plain = model(behind(prompt, 3), use_cache=True, **wanted).logits
    assert close(logits, plain)


def test_one_token_alone_is_stored_too(llama: Any, store: ChunkStore) -> None:
    """Nobody decodes on, and no cache is asked to flush."""
    cache = RedisChunkCache(llama, store)
    run(llama, PROMPT, cache, 1)
    assert store.flush(5)
    again = RedisChunkCache(llama, store)
    run(llama, PROMPT, again, 1)
    assert again.report.reused == 149


# ------------------------------------------------------------------------ what reading gains


def test_computing_is_timed_by_the_device(
    llama: Any, store: ChunkStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And that is read once the device has come so far: the host is done long before."""
    is_done = False
    monkeypatch.setattr(fakegpu.Event, "query", lambda event: is_done)
    monkeypatch.setattr(fakegpu.Event, "elapsed_time", lambda event, end: 300.0)
    cache = RedisChunkCache(llama, store)
    gauge = cache._context.gauge
    with fakegpu.counting() as trace:
        llama(PROMPT, **{CACHE: cache}, logits_to_keep=1)
    assert (cache.report.prefill_ms, list(gauge._computed)) == (0, [])
    is_done = True
    llama(PROMPT[:, :1], **{CACHE: cache}, logits_to_keep=1)
    assert (cache.report.prefill_ms, list(gauge._computed)) == (300, [(150, 300.0)])
    assert trace.counts["wait"] <= 4
    # So reading what takes 100 ms is worth it.
    for _ in range(2):
        gauge.note_computed(150, 300.0)
        gauge.note_read(100_000, 100.0)
    assert gauge.expects_gain(150, 100_000, 2)


# ------------------------------------------------------------------------ which model it is


def test_experts_that_transformers_switches_for_decoding(store: ChunkStore) -> None:
    model = small("mixtral")
    before = ModelIdentity.of(model)
    assert "grouped_mm" in dict(before.parts)["numerics"]
    switched = []
    numerics = model.set_experts_implementation

    def switch(to: Any) -> Any:
        switched.append(to)
        return numerics(to)

    model.set_experts_implementation = switch
    cache = RedisChunkCache(model, store, chunk_size=16, on_error="raise")
    del model.set_experts_implementation
    first = run(model, PROMPT, cache, 24)
    assert not cache.report.skipped
    cache.flush()
    again = RedisChunkCache(model, store, chunk_size=16, on_error="raise")
    run(model, behind(first, 9), again)
    assert again.report.reused >= 160  # the answer, too


def test_frequencies_that_the_device_has_computed_a_little_differently() -> None:
    here, model = ModelIdentity.of(tiny().cpu()), tiny()
    table = model.model.rotary_emb.inv_freq
    table.mul_(1 + 2**-23)
    weights = dict(here.parts)["weights"]
    assert dict(ModelIdentity.of(model).parts)["weights"] == weights
    table.mul_(1 + 1e-5)
    assert dict(ModelIdentity.of(model).parts)["weights"] != weights


def test_a_model_is_loaded_to_the_accelerator(tmp_path: Any) -> None:
    tiny().cpu().save_pretrained(tmp_path)
    with pytest.raises(Exception, match="tokenizer"):  # there is none, and that is all
        load_model(str(tmp_path))

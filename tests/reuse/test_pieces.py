"""Pieces: one forward in several, and the same bits whatever the store has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from chunkcache import RedisChunkCache, SettingError, open_store
from chunkcache.model.identity import ModelIdentity
from chunkcache.reuse.pieces import Pieces, environment, piece
from chunkcache.settings import Settings
from chunkcache.stores.base import ChunkStore, Entry
from chunkcache.stores.memory import MemoryStore
from tests.models import tiny, tokens
from tests.prompts import close, joined, logits, padded
from tests.scripted import blobs

KINDS = ("qwen3", "gemma3_text", "gpt2", "bloom", "gptj", "mixtral", "deepseek_v3", "gpt_oss")
BF16 = tiny("qwen3", dtype=torch.bfloat16, max_position_embeddings=2048)
SAME = {"reproducible": True, "piece_tokens": 64}


def ids_of(lengths: list[int], seed: int) -> dict[str, Tensor]:
    """A prompt, or a batch of prompts with padding on the left, as `generate()` takes them."""
    rows = [tokens(length, seed=seed + row) for row, length in enumerate(lengths)]
    batch = padded(*rows)
    del batch["position_ids"]
    return batch


def answer(model: Any, prompt: dict[str, Tensor], store: ChunkStore, **how: Any) -> tuple[Any, ...]:
    """Logits and tokens of an answer, and what was reused, with the settings in `SAME`."""
    return run(model, prompt, RedisChunkCache(model, store, **SAME), **how)


def run(model: Any, prompt: dict[str, Tensor], cache: Any, **how: Any) -> tuple[Any, ...]:
    torch.manual_seed(5)
    out = model.generate(
        **prompt, past_key_values=cache, max_new_tokens=5, return_dict_in_generate=True,
        output_logits=True, **({"do_sample": False} | how),
    )  # fmt: skip
    cache.flush()
    return torch.stack(out.logits), out.sequences, cache.report


def equal(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def evict(store: MemoryStore, seed: int, share: float = 0.5) -> None:
    """Remove some of the chunks, drawn at random."""
    keys = sorted(entry.key for page in store.scan("safetensors") for entry in page)
    drawn = torch.rand(len(keys), generator=torch.Generator().manual_seed(seed)).tolist()
    store.delete([key for key, one in zip(keys, drawn, strict=True) if one < share])


# ------------------------------------------------------------------ where a forward is cut


@given(
    size=st.integers(1, 50), begin=st.integers(0, 200), more=st.integers(1, 200),
    wanted=st.integers(1, 60), same=st.booleans(),
)  # fmt: skip
def test_cuts_are_multiples_between_what_is_known_and_what_is_wanted(
    size: int, begin: int, more: int, wanted: int, same: bool
) -> None:
    pieces, total = Pieces(size, same), begin + more
    limit = total - min(wanted, more)
    cuts = pieces.cuts(begin, limit)
    assert cuts == tuple(c for c in range(begin + 1, limit + 1) if c % size == 0)
    whole = pieces.whole(limit, total)
    assert whole % size == 0
    assert whole <= total
    assert all(cut <= whole for cut in cuts)
    assert pieces.usable(begin) == (begin // size * size if same else begin)


def test_no_pieces_no_cuts() -> None:
    assert Pieces().cuts(0, 1000) == ()


def test_a_piece_has_its_part_of_all_that_is_per_token() -> None:
    kwargs = {
        "input_ids": tokens(10), "position_ids": torch.arange(3, 13)[None],
        "attention_mask": torch.ones(1, 13), "logits_to_keep": torch.tensor([8, -1]),
        "use_cache": True,
    }  # fmt: skip
    first, last = piece(kwargs, 2, 6), piece(kwargs, 6)
    assert torch.equal(first["input_ids"], kwargs["input_ids"][:, 2:6])
    assert first["position_ids"].tolist() == [[5, 6, 7, 8]]
    assert first["attention_mask"].shape[1] == 9
    assert first["logits_to_keep"] == 1
    assert last["input_ids"].shape[1] == 4
    assert last["attention_mask"].shape[1] == 13
    assert last["logits_to_keep"].tolist() == [-2, -1]
    assert last["use_cache"]


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "bloom", "deepseek_v3"])
def test_pieces_without_reproducible_change_rounding_alone(kind: str) -> None:
    model, ids, store = tiny(kind), tokens(300), MemoryStore(1 << 26)
    seen: list[int] = []
    embeddings = model.get_input_embeddings()
    watch = embeddings.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[1]))
    plain = logits(model, ids)
    try:
        for reused in (0, 299):
            seen.clear()
            cache = RedisChunkCache(model, store, piece_tokens=70, hooks="observers")
            assert close(logits(model, ids, cache), plain)
            cache.flush()
            assert cache.report.reused == reused
            assert seen == ([70, 70, 70, 70, 20] if not reused else [1])
    finally:
        watch.remove()


# ------------------------------------------------------------------ the same bits


@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_the_store(kind: str) -> None:
    """Empty, full, half evicted; alone and in a batch with padding on the left."""
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny(kind, dtype=dtype, max_position_embeddings=2048)
        batches = ([330],) if kind == "bloom" else ([330], [150, 290])
        for number, lengths in enumerate(batches):
            prompt, store = ids_of(lengths, 50 * number), MemoryStore(1 << 28)
            cold = answer(model, prompt, store)
            warm = answer(model, prompt, store)
            evict(store, number)
            half = answer(model, prompt, store)
            assert equal(cold, warm)
            assert equal(cold, half)
            assert not cold[0].isnan().any()
            assert cold[2].reused == 0
            assert warm[2].reused >= (256 if number == 0 else 150)


@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=3), seed=st.integers(0, 1 << 16),
    size=st.sampled_from([16, 64, 100]), share=st.floats(0, 1), beams=st.sampled_from([1, 1, 2]),
    sample=st.booleans(),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_nor_does_any_way_to_generate(
    lengths: list[int], seed: int, size: int, share: float, beams: int, sample: bool
) -> None:
    prompt, store = ids_of(lengths, seed), MemoryStore(1 << 28)
    how = {"num_beams": beams, "do_sample": sample}
    first, *others = (
        run(BF16, prompt, RedisChunkCache(BF16, store, reproducible=True, piece_tokens=size), **how)
        for _ in range(3)
        if evict(store, seed, share if _ == 2 else 0.0) is None
    )
    assert all(equal(first, other) for other in others)


def test_without_it_they_do() -> None:
    """Or the tests above would prove nothing."""
    differing = 0
    for seed in range(10):
        prompt, store = ids_of([200 + 11 * seed], seed), MemoryStore(1 << 26)
        cold, warm = (run(BF16, prompt, RedisChunkCache(BF16, store)) for _ in range(2))
        differing += not equal(cold, warm)
    assert differing


_PROCESS = """
import sys, torch
from chunkcache import open_store
from tests.reuse.test_pieces import BF16, answer, ids_of
with open_store(sys.argv[1]) as store:
    torch.save(answer(BF16, ids_of([300], 3), store)[0], sys.argv[2])
"""


def test_nor_does_the_process(tmp_path: Path) -> None:
    url, file = (tmp_path / "store").as_uri(), tmp_path / "logits.pt"
    done = subprocess.run(
        [sys.executable, "-c", _PROCESS, url, str(file)], capture_output=True, text=True
    )
    assert not done.returncode, done.stderr
    with open_store(url) as store:
        mine = answer(BF16, ids_of([300], 3), store)
    assert torch.equal(mine[0], torch.load(file))
    assert mine[2].reused == 256


def test_another_beginning_serves_only_as_far_as_whole_pieces_agree() -> None:
    store = MemoryStore(1 << 26)
    text = tokens(200)
    answer(BF16, {"input_ids": joined(text, 90)}, store)
    fresh = {"input_ids": joined(text, 60)}
    cold = answer(BF16, fresh, MemoryStore(1 << 26))
    mixed = answer(BF16, fresh, store)
    assert equal(cold, mixed)
    assert mixed[2].reused == 192  # of 200 that are the same


def test_a_later_turn_is_as_in_a_new_object() -> None:
    """What was computed token by token in an answer is computed again."""
    store, first = MemoryStore(1 << 26), {"input_ids": tokens(150)}
    cache = RedisChunkCache(BF16, store, **SAME)
    told = run(BF16, first, cache)[1]
    second = {"input_ids": joined(told, 90)}
    later = run(BF16, second, cache)
    assert later[2].reused == 128
    assert equal(later, answer(BF16, second, MemoryStore(1 << 26)))
    assert equal(later, answer(BF16, second, store))


def test_tokens_behind_what_is_held_are_never_stored_in_other_shapes() -> None:
    store = MemoryStore(1 << 26)
    cache = RedisChunkCache(BF16, store, **SAME)
    ids = tokens(400)
    with torch.no_grad():
        BF16(ids[:, :70], past_key_values=cache, use_cache=True, logits_to_keep=1)
        BF16(ids[:, 70:], past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.flush()
    whole = {"input_ids": ids}
    assert equal(answer(BF16, whole, store), answer(BF16, whole, MemoryStore(1 << 26)))
    assert len({e.key for page in store.scan("safetensors") for e in page}) == 6


@pytest.mark.parametrize(("size", "reused"), [(128, 128), (100, 64)])
def test_prefill_chunk_size_is_obeyed(size: int, reused: int) -> None:
    prompt, store = {"input_ids": tokens(300)}, MemoryStore(1 << 26)
    cold = answer(BF16, prompt, store, prefill_chunk_size=size)
    warm = answer(BF16, prompt, store, prefill_chunk_size=size)
    evict(store, 1)
    half = answer(BF16, prompt, store, prefill_chunk_size=size)
    assert equal(cold, warm)
    assert equal(cold, half)
    assert warm[2].reused == reused


def test_a_damaged_blob_changes_nothing() -> None:
    prompt, store = {"input_ids": tokens(300)}, MemoryStore(1 << 26)
    cold = answer(BF16, prompt, store)
    keys = [entry.key for page in store.scan("safetensors") for entry in page]
    starts = [(fields or {})["positions"] for fields in store.read_metadata(keys)]
    key = keys[starts.index("128-192")]
    blob = bytearray(blobs(store, key)[0] or b"")
    blob[-1] ^= 1
    store.delete([key])
    store.write([Entry(key, {}, memoryview(blob))])
    harmed = answer(BF16, prompt, store)
    assert equal(cold, harmed)
    assert harmed[2].reused == 128


def test_a_store_that_is_not_believed_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check token finds K/V of another model: all is computed, in the same pieces."""
    prompt, store = {"input_ids": tokens(300)}, MemoryStore(1 << 26)
    model = tiny("llama", dtype=torch.bfloat16)
    identity = ModelIdentity.of(model)
    monkeypatch.setattr(ModelIdentity, "of", lambda *_, **__: identity)
    answer(model, prompt, store)
    kind = type(model.model.layers[0].self_attn)
    forward = kind.forward

    def changed(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(self, hidden_states * 1.5, *args, **kwargs)

    monkeypatch.setattr(kind, "forward", changed)
    wrong = answer(model, prompt, store)
    assert wrong[2].reused == 0
    assert "not those that the model computes" in wrong[2].skipped
    fresh = answer(tiny("llama", dtype=torch.bfloat16), prompt, MemoryStore(1 << 26))
    assert equal(wrong, fresh)


# ------------------------------------------------------------------ settings and keys


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"reproducible": 1}, "reproducible=1"),
        ({"piece_tokens": -1}, "piece_tokens=-1"),
        ({"piece_tokens": 1}, "piece_tokens=1 is too few"),
        ({"reproducible": True, "reuse": "anywhere"}, "reuse='prefix'"),
        ({"piece_tokens": 64, "reuse": "anywhere"}, "reuse='prefix'"),
        ({"reproducible": True, "codec": "safetensors-int8"}, "codec"),
        ({"reproducible": True, "chunk_overlap": 8}, "chunk_overlap"),
    ],
)
def test_settings_that_contradict_it(given: dict[str, Any], named: str) -> None:
    with pytest.raises(SettingError, match=named):
        Settings(**given)


def test_chunks_of_other_pieces_threads_or_no_pieces_are_not_found() -> None:
    prompt, store = {"input_ids": tokens(300)}, MemoryStore(1 << 26)
    run(BF16, prompt, RedisChunkCache(BF16, store, chunk_size=64))
    assert answer(BF16, prompt, store)[2].reused == 0
    assert answer(BF16, prompt, store)[2].reused == 256
    other = RedisChunkCache(BF16, store, reproducible=True, piece_tokens=32)
    assert run(BF16, prompt, other)[2].reused == 0
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert f"threads={threads + 1}" in environment(BF16)
        assert answer(BF16, prompt, store)[2].reused == 0
    finally:
        torch.set_num_threads(threads)


def test_the_report_says_what_the_bits_depend_on() -> None:
    report = answer(BF16, {"input_ids": tokens(100)}, MemoryStore(1 << 26))[2]
    assert report.reproducible == f"pieces of 64 tokens, {environment(BF16)}"
    assert report.to_dict()["reproducible"] == report.reproducible
    assert RedisChunkCache(BF16, MemoryStore(1 << 20)).report.reproducible == ""


def test_rows_are_found_by_the_same_batch_alone() -> None:
    """In another one they are computed in other products."""
    store = MemoryStore(1 << 28)
    for lengths in ([130], [130, 200]):
        assert answer(BF16, ids_of(lengths, 7), store)[2].reused == 0
    assert answer(BF16, ids_of([130, 201], 7), store)[2].reused == 0
    assert answer(BF16, ids_of([130, 200], 7), store)[2].reused > 0

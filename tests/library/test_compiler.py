"""Documents become the chunks that a run of their own leaves, whatever they share a batch with."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from chunkcache import (
    RedisChunkCache,
    StoreError,
    UnsupportedCallError,
    UnsupportedModelError,
    open_store,
)
from chunkcache.anywhere.anchors import WINDOW
from chunkcache.library.compiler import Compiler, Document, batches, pieces
from chunkcache.stores.base import Entry
from chunkcache.stores.memory import MemoryStore
from chunkcache.tokens.chunking import Grid
from tests.models import tiny
from tests.models import tokens as random_ids
from tests.scripted import Scripted

PREFIX = np.array([1, 40, 41, 42, 43])


class Recorder(Scripted):
    """Tells what was written; a blob may be written once only."""

    @property
    def entries(self) -> dict[str, Entry]:
        blobs = [entry.key for entry in self.written if entry.nbytes]
        assert len(set(blobs)) == len(blobs), "written twice"
        return {entry.key: entry for entry in self.written}

    def chunks(self) -> dict[str, Entry]:
        return {key: entry for key, entry in self.entries.items() if entry.nbytes}


def compiler(kind="llama", batch_tokens=4096, store=None, **settings) -> Compiler:
    model = tiny(kind, max_position_embeddings=2048)
    store = Recorder() if store is None else store
    return Compiler(model, store, {"reuse": "anywhere", **settings}, batch_tokens)


def texts(*lengths: int) -> list[np.ndarray]:
    return [random_ids(length, seed=length)[0].numpy() for length in lengths]


def add(compiler: Compiler, ids, prefix=PREFIX) -> list[int]:
    """The sizes of the batches that it took."""
    sizes: list[int] = []
    documents = [compiler.document(prefix, text) for text in ids]
    compiler.complete(compiler.look(documents), sizes.append)
    return sizes


def by_text(store):
    """Keys of the index entries by which texts are found at any position."""
    index = [key for key in store.entries if key.startswith("anchor@")]
    told = zip(index, store.read_metadata(index), strict=True)
    return [
        key
        for key, fields in told
        if all(place.split()[2:] in ([], ["prepared"]) for place in fields.values())
    ]


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3", "deepseek_v3"])
def test_padded_rows_and_pieces_leave_the_same_chunks_as_a_run_of_its_own(kind):
    ids = texts(40, 300, 290, 131, 700)
    padded, alone, cut, plain = (compiler(kind) for _ in range(4))
    assert add(padded, ids) == [5]
    for text in ids:
        add(alone, [text])
    cut.batch_tokens = 256
    assert add(cut, ids) == [1] * 5
    for text in ids:  # the reference: an ordinary prompt
        row = torch.from_numpy(np.concatenate([PREFIX, text]))[None]
        cache = RedisChunkCache(plain.model, plain.store.store)
        with torch.no_grad():
            plain.model(row, past_key_values=cache, logits_to_keep=1)
    expected = plain.store.store.chunks()
    assert len(expected) == 1 + 3 + 3 + 2 + 6
    for other in (padded, alone, cut):
        found = other.store.store.chunks()
        assert found.keys() == expected.keys()
        for key, entry in expected.items():
            mine, its = load(bytes(found[key].blob)), load(bytes(entry.blob))
            assert mine.keys() == its.keys()
            for name, tensor in its.items():
                torch.testing.assert_close(mine[name], tensor, rtol=1e-4, atol=1e-4)


def test_documents_do_not_see_each_other():
    """What two documents have in common is computed for each of them."""
    shared = random_ids(200, seed=1)[0].numpy()
    first = np.concatenate([random_ids(60, seed=2)[0].numpy(), shared])
    second = np.concatenate([random_ids(90, seed=3)[0].numpy(), shared])
    together, alone = compiler(), compiler()
    add(together, [first])
    add(together, [second])
    add(alone, [second])
    for key, entry in alone.store.store.chunks().items():
        assert bytes(entry.blob) == bytes(together.store.store.entries[key].blob)
        assert together.store.store.entries[key].metadata["context"] == "exact"


def test_the_prefix_is_computed_once():
    prefix = random_ids(384, seed=5)[0].numpy()
    tool = compiler()
    add(tool, [prefix], prefix[:0])
    assert tool.computed == 384
    add(tool, texts(200, 150, 150), prefix)
    assert tool.computed == 384 + 3 * 200  # rows of a batch are trimmed together


@pytest.mark.parametrize("length", [100, 300])
def test_index_entries_are_of_the_document_alone(length):
    """A system prompt before ten thousand documents must not lead to ten thousand chunks."""
    prefix = random_ids(length, seed=5)[0].numpy()
    tool = compiler()
    add(tool, texts(300, 301, 302), prefix)
    store = tool.store.store
    positions = {
        key.rpartition("@")[2]: [int(p) for p in entry.metadata["positions"].split("-")]
        for key, entry in store.chunks().items()
    }
    index = by_text(store)
    assert len(index) > 100
    for fields in store.read_metadata(index):
        for chunk_hash, place in fields.items():
            start, stop = positions[chunk_hash]
            assert length <= start + int(place.split()[0]) < stop + WINDOW


def test_only_what_is_missing_is_computed_and_written():
    tool = compiler()
    add(tool, texts(500))
    store = tool.store.store
    lost = [key for key, e in store.chunks().items() if e.metadata["positions"] == "256-384"]
    add(tool, texts(400))
    blob = bytes(store.entries[lost[0]].blob)
    store.delete(lost)
    store.written.clear()
    before = tool.computed
    assert add(tool, texts(400, 500)) == [1]
    assert [key for key in store.entries if not key.startswith("anchor@")] == lost
    assert not by_text(store)
    assert len(store.entries[lost[0]].blob) == len(blob)
    assert tool.computed - before == len(PREFIX) + 500 - 256


def test_an_index_entry_that_is_missing_is_written_without_the_model():
    tool = compiler()
    add(tool, texts(300))
    store = tool.store.store
    gone = by_text(store)[::2]
    store.delete(gone)
    store.written.clear()
    before = tool.computed
    assert add(tool, texts(300)) == []
    assert tool.computed == before
    assert sorted(store.entries) == sorted(gone)


def test_what_many_documents_share_leads_to_the_newest_only():
    """Whoever meets an entry with too many variants trims it; that is not a loss to be repaired."""
    shared = random_ids(100, seed=1)[0].numpy()
    ids = [np.concatenate([shared, random_ids(100, seed=n)[0].numpy()]) for n in range(2, 22)]
    tool = compiler()
    add(tool, ids)
    store = tool.store.store
    prompt = torch.from_numpy(np.concatenate([random_ids(30, seed=99)[0].numpy(), ids[0]]))[None]
    cache = RedisChunkCache(tool.model, store, reuse="anywhere")
    with torch.no_grad():
        tool.model(prompt, past_key_values=cache, logits_to_keep=1)
    index = by_text(store)
    assert max(map(len, store.read_metadata(index))) <= 9
    assert tool.look([tool.document(PREFIX, text) for text in ids]) == []


def test_a_document_that_prompts_have_crowded_out_is_indexed():
    tool, (text,) = compiler(), texts(100)
    store = tool.store.store
    for seed in range(10):
        prompt = np.concatenate([random_ids(20, seed=seed)[0].numpy(), text])
        other = tool.document(prompt[:20], text)
        tool.complete(tool.look([other]), lambda _: None)
    assert add(tool, [text]) == [1]
    names = {chunk.hash for chunk in tool.document(PREFIX, text).chunks}
    index = by_text(store)
    assert all(len(fields) > 8 for fields in store.read_metadata(index))
    assert all(names & fields.keys() for fields in store.read_metadata(index))


def test_what_a_prompt_has_left_is_computed_again(valkey_server):
    """What is prepared is of a run over documents, not even by rounding of what prompts hold."""
    row = torch.from_numpy(np.concatenate([PREFIX, *texts(300), *texts(40)]))[None]
    with open_store(valkey_server.unix_url) as store:
        tool = compiler(store=store)

        def ask():
            with torch.no_grad():
                tool.model(row, past_key_values=RedisChunkCache(tool.model, store))
            store.flush()

        ask()
        assert add(tool, texts(300)) == [1]
        assert tool.computed == len(PREFIX) + 300
        tail = tool.document(PREFIX, *texts(300)).chunks[-1]
        ask()
        assert add(tool, texts(300)) == []  # the prompt's longer chunk has not replaced the tail
        store.delete([key for key in catalog_keys(store) if key.endswith(tail.hash)])
        ask()
        assert add(tool, texts(300)) == [1]
        assert tool.computed == len(PREFIX) + 300 + tail.stop - tail.start


def catalog_keys(store):
    return [entry.key for page in store.scan() for entry in page]


def test_a_blob_that_lost_its_metadata_is_written_anew(valkey_server):
    with open_store(valkey_server.unix_url) as store, valkey_server.client() as client:
        tool = compiler(store=store)
        add(tool, texts(300))
        names = sorted(client.scan_iter(match="safetensors@*@metadata"))
        client.delete(names[0])
        assert add(tool, texts(300)) == [1]
        assert sorted(client.scan_iter(match="safetensors@*@metadata")) == names
        assert json.loads(client.hget(names[0], "token_ids"))


def test_a_store_that_forgets_is_noticed():
    forgetful = Scripted(write=lambda entries: sum(entry.nbytes for entry in entries))
    with pytest.raises(StoreError, match="has not kept"):
        add(compiler(store=forgetful), texts(300))


def test_a_store_that_takes_nothing_is_noticed_before_the_work():
    tool = compiler(store=Scripted(check_writable=StoreError("full")))
    with pytest.raises(StoreError, match="full"):
        add(tool, texts(300))
    assert tool.computed == 0


def test_many_entries_go_in_parts(monkeypatch):
    monkeypatch.setattr("chunkcache.library.compiler.KEYS_AT_ONCE", 10)
    monkeypatch.setattr("chunkcache.library.compiler.ENTRIES_AT_ONCE", 10)
    tool = compiler()
    add(tool, texts(300))
    assert sum(key.startswith("anchor@") for key in tool.store.store.entries) > 50


def test_a_model_that_hooks_change_is_refused():
    tool = compiler()
    layer = tool.model.model.layers[1]
    layer.register_forward_hook(lambda _module, _args, output: output * 1.5)
    with pytest.raises(UnsupportedCallError, match="hook"):
        add(tool, texts(300))


def test_models_that_cannot_be_compiled_for():
    model = tiny("gpt2")
    with pytest.raises(UnsupportedModelError, match="anywhere"):
        Compiler(model, MemoryStore(), {"reuse": "anywhere"}, 4096)
    with pytest.raises(UnsupportedCallError, match=r"model\.eval"):
        Compiler(tiny().train(), MemoryStore(), {"reuse": "anywhere"}, 4096)


def test_a_wrapper_is_looked_through():
    tool = compiler()
    wrapper = SimpleNamespace(_orig_mod=tool.model)  # as torch.compile makes it
    other = Compiler(wrapper, tool.store.store, {"reuse": "anywhere"}, 4096)
    add(tool, texts(300))
    assert add(other, texts(300)) == []


def test_no_gradients_are_kept():
    tool, seen = compiler(), []
    tool.model.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    add(tool, texts(100))
    assert seen == [False]


@given(st.lists(st.integers(1, 300), max_size=20), st.integers(1, 600))
def test_batches_hold_everything_and_are_bounded(lengths, most):
    documents = [Document(np.zeros(n, dtype=np.int64), 0, [], []) for n in lengths]
    found = list(batches(documents, most))
    assert sorted(len(doc.row) for batch in found for doc in batch) == sorted(lengths)
    assert {id(doc) for batch in found for doc in batch} == {id(doc) for doc in documents}
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(len(doc.row) for doc in batch) <= most
        assert len(batch[0].row) == max(len(doc.row) for doc in batch)


@given(st.integers(1, 700), st.integers(1, 64), st.integers(0, 63), st.integers(1, 300))
def test_pieces_are_bounded_and_end_with_chunks(tokens, size, overlap, most):
    grid = Grid(size, min(overlap, size - 1))
    found = pieces(tokens, grid, most)
    assert [begin for begin, _ in found] == [0, *(end for _, end in found[:-1])]
    assert found[-1][1] == tokens
    assert all(0 < end - begin <= max(most, size) for begin, end in found)
    assert {end for _, end in found[:-1]} <= {stop for _, stop in grid.spans(tokens)}

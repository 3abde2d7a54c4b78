"""Harvest: what is kept of a prompt, under which key, and what is not."""

from __future__ import annotations

import json

import pytest
import torch

from chunkcache import RedisChunkCache
from chunkcache.tokens.chunking import Grid, cut
from tests.models import tokens as random_ids
from tests.prompts import DOCUMENTS, anywhere, build, joined, logits, meet, padded
from tests.scripted import Scripted

MODEL = build(num_hidden_layers=2)


class Kept(Scripted):
    """Notes what it is given."""

    def take(self):
        """The entries given since the last time: chunks and index."""
        entries, self.written = [e for e in self.written if "self-test" not in e.key], []
        entries = [e for e in entries if not e.key.startswith("moving")]
        for number, entry in enumerate(entries):  # what points to them comes behind
            later = {e.key.rpartition("@")[2] for e in entries[number:] if e.nbytes}
            assert entry.nbytes or later.isdisjoint(entry.metadata)
        return [e for e in entries if e.nbytes], [e for e in entries if not e.nbytes]


@pytest.fixture
def store():
    return Kept()


def positions(chunks, context="exact"):
    return [e.metadata["positions"] for e in chunks if e.metadata["context"] == context]


def test_what_is_told_of_a_chunk(store):
    cache = RedisChunkCache(MODEL, store, namespace="n", tags="a=1", pin=True)
    ids = random_ids(200)
    logits(MODEL, ids, cache)
    chunks, index = store.take()
    first, second = chunks
    # One for each chunk, by which it is found behind the one before; none of texts elsewhere.
    assert [list(e.metadata) for e in index] == [[e.key.rpartition("@")[2]] for e in chunks]
    assert all(e.merge and e.pinned for e in index)
    keys = cache._conversation.keys
    hashes = [c.hash for c in cut(ids[0].numpy(), Grid(), keys.salt, tail=True)]
    assert [first.key, second.key] == [keys.key(name) for name in hashes]
    fields = dict(second.metadata)
    assert json.loads(fields.pop("token_ids")) == ids[0, 128:].tolist()
    assert fields.pop("created")
    assert fields == {
        "model": "LlamaForCausalLM", "revision": "", "identity": keys.identity.digest,
        "dtype": "float32", "codec": "safetensors", "tokens": "72", "positions": "128-200",
        "layers": "2", "bytes": str(second.nbytes), "namespace": "n", "tags": "a=1",
        "context": "exact", "parent": hashes[0], "pinned": "yes",
    }  # fmt: skip
    assert first.metadata["parent"] == ""
    assert first.pinned
    assert second.pinned
    assert not first.merge


def test_an_index_entry_is_written_once_per_key_and_names_all_its_chunks(store):
    doc = DOCUMENTS[0][:, :256]
    logits(MODEL, joined(doc, 7, doc, 9), anywhere(MODEL, store, pin=True))
    chunks, index = store.take()
    keys = [entry.key for entry in index]
    assert len(keys) == len(set(keys)) < 48 * len(chunks)
    assert all(entry.merge and entry.pinned and not entry.nbytes for entry in index)
    names = {chunk.key.rpartition("@")[2] for chunk in chunks}
    assert {name for entry in index for name in entry.metadata} == names
    assert max(len(entry.metadata) for entry in index) >= 2  # the text stands there twice


def test_a_conversation_hands_over_what_is_new_only(store):
    cache = RedisChunkCache(MODEL, store)
    options = {"max_new_tokens": 5, "do_sample": False}
    out = MODEL.generate(random_ids(300), past_key_values=cache, **options)
    assert positions(store.take()[0]) == ["0-128", "128-256", "256-300"]
    MODEL.generate(joined(out, 200), past_key_values=cache, **options)
    assert positions(store.take()[0]) == ["256-384", "384-505"]


def test_answers_are_kept_as_their_chunks_are_complete(store):
    cache = RedisChunkCache(MODEL, store, chunk_size=16, store_tail=False)
    MODEL.generate(random_ids(20), past_key_values=cache, max_new_tokens=30, do_sample=False)
    assert positions(store.take()[0]) == ["0-16", "16-32", "32-48"]


def test_of_a_batch_each_row_is_kept_and_equal_ones_once(store):
    a, b = random_ids(140, seed=1), random_ids(300, seed=2)
    logits(MODEL, padded(a, b, a), RedisChunkCache(MODEL, store))
    chunks, _ = store.take()
    assert sorted(positions(chunks)) == ["0-128", "0-128", "128-140", "128-256", "256-300"]
    alone = Kept()
    logits(MODEL, padded(a), RedisChunkCache(MODEL, alone))
    alone_blobs = {e.key: e.nbytes for e in alone.take()[0]}
    assert alone_blobs.items() <= {e.key: e.nbytes for e in chunks}.items()


def test_what_was_computed_behind_moved_text_is_marked_and_has_keys_of_its_own(store):
    meet(MODEL, store)
    store.take()
    ids = joined(200, DOCUMENTS[2], 40, DOCUMENTS[0], 31, 150)
    cache = anywhere(MODEL, store, repair="none")
    logits(MODEL, ids, cache)
    chunks, index = store.take()
    moved = [(s["start"], s["stop"]) for s in cache.report.chunks if s["kind"] == "moved"]
    first, last = moved[0][0], moved[-1][1]
    assert (first, last) == (200, ids.shape[1] - 181)
    assert positions(chunks) == ["0-128"]
    stops = [200 + 318, 200 + 318 + 40]
    assert positions(chunks, "approximate") == [
        "128-200", f"{stops[0]}-{stops[1]}", f"{last}-{last + 128}", f"{last + 128}-{last + 181}",
    ]  # fmt: skip
    exact = {c.hash for c in cut(ids[0].numpy(), Grid(), cache._conversation.keys.salt, tail=True)}
    names = {e.key.rpartition("@")[2]: e for e in chunks}
    assert {n for n, e in names.items() if e.metadata["context"] == "approximate"}.isdisjoint(exact)
    assert names.keys() == {name for entry in index for name in entry.metadata}
    # And the same again brings nothing new.
    cache = anywhere(MODEL, store, repair="none")
    logits(MODEL, ids, cache)
    assert positions(store.take()[0]) == []


def test_short_gaps_between_moved_texts_are_not_kept(store):
    meet(MODEL, store)
    store.take()
    logits(MODEL, joined(9, DOCUMENTS[2], 20, DOCUMENTS[0], 31), anywhere(MODEL, store))
    assert store.take()[0] == []


def test_prefix_mode_does_not_keep_what_a_mover_has_computed(store):
    """A conversation that moved text goes on; its later turns are marked, too."""
    meet(MODEL, store)
    cache = anywhere(MODEL, store, repair="none")
    out = MODEL.generate(joined(9, DOCUMENTS[2], 5), past_key_values=cache, max_new_tokens=4)
    store.take()
    MODEL.generate(joined(out, 300), past_key_values=cache, max_new_tokens=150)
    chunks, _ = store.take()
    assert positions(chunks) == []
    assert [e.metadata["tokens"] for e in chunks] == ["128", "128", "45"]


def test_blobs_hold_what_the_layers_hold(store):
    cache = RedisChunkCache(MODEL, store)
    logits(MODEL, random_ids(128), cache)
    from safetensors.torch import load

    tensors = load(bytes(store.take()[0][0].blob))
    for index, layer in enumerate(cache.layers):
        assert torch.equal(tensors[f"layers.{index}.keys"], layer.keys[0])
        assert torch.equal(tensors[f"layers.{index}.values"], layer.values[0])

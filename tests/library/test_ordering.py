"""order: no other order of the documents is reused further."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from chunkcache import RedisChunkCache, SettingError, StoreError, order
from chunkcache.stores.base import ReadOnly
from chunkcache.stores.memory import MemoryStore
from tests.models import tiny
from tests.models import tokens as random_ids
from tests.words import word_tokenizer, words

MODEL = tiny(num_hidden_layers=1, max_position_embeddings=4096)
PREFIX = [1, *range(5, 40)]
NOWHERE = "redis://127.0.0.1:1/0"


def document(number):
    return random_ids(90 + 37 * number, seed=number)[0].clamp(min=4).tolist()


def reused(store, *parts, **settings):
    """Tokens that a prompt of these parts reuses; what it has is stored."""
    cache = RedisChunkCache(MODEL, store, min_gain=0, **settings)
    ids = torch.tensor([[token for part in parts for token in part]])
    with torch.no_grad():
        MODEL(ids, past_key_values=cache, logits_to_keep=1)
    return cache.report.reused


def question(number):
    return random_ids(25, seed=500 + number)[0].tolist()


HISTORIES = {
    "nothing": [],
    "one prompt": [(2, 0, 3, 1)],
    "several": [(3, 1), (2, 0, 1), (2, 3, 0), (0,), (1, 2, 3, 0)],
    "with others between": [(1, 7, 2), (3, 0, 8)],
}


@pytest.mark.parametrize("settings", [{}, {"chunk_size": 32}, {"chunk_overlap": 30}], ids=str)
@pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES)
def test_no_order_is_reused_further(history, settings):
    store = MemoryStore()
    for number, each in enumerate(history):
        reused(store, PREFIX, *map(document, each), question(number), **settings)
    given = [document(number) for number in range(4)]
    best = order(given, MODEL, ReadOnly(store), prefix=PREFIX, **settings)
    assert sorted(best) == sorted(given)
    every = {
        each: reused(ReadOnly(store), PREFIX, *map(document, each), question(99), **settings)
        for each in permutations(range(4))
    }
    found = every[tuple(map(given.index, best))]
    assert found == max(every.values())
    assert (found > 200) == bool(history)


@pytest.mark.parametrize("most", [1 << 13, 100])
def test_of_many_documents_known_beginnings_are_followed(most, monkeypatch):
    monkeypatch.setattr("chunkcache.library.ordering.MOST_CHUNKS", most)
    store, known = MemoryStore(), (5, 9, 0, 7, 2, 8)
    reused(store, PREFIX, *map(document, known), question(1))
    reused(store, PREFIX, *map(document, (9, 0, 1)), question(2))
    given = [document(number) for number in range(10)]
    best = order(given, MODEL, store, prefix=PREFIX)
    assert best == [given[number] for number in (*known, 1, 3, 4, 6)]


def test_a_document_that_ends_just_behind_a_chunk_is_followed(monkeypatch):
    """Its last tokens are too few to be looked up before others stand behind them."""
    monkeypatch.setattr("chunkcache.library.ordering.MOST_CHUNKS", 1)  # one more at a time
    store = MemoryStore()
    first = random_ids(256 - len(PREFIX) + 5, seed=77)[0].tolist()
    reused(store, PREFIX, first, document(3), question(1))
    given = [document(number) for number in range(5)]
    best = order([*given, first], MODEL, store, prefix=PREFIX)
    assert best[:2] == [first, given[3]]


def test_it_takes_two_round_trips():
    store = MemoryStore()
    given = [document(number) for number in range(4)]
    reused(store, PREFIX, given[2], given[0], question(1))
    asked = []

    class Counting(ReadOnly):
        def sizes(self, keys):
            asked.append("sizes")
            return super().sizes(keys)

        def read_metadata(self, keys):
            asked.append("metadata")
            return super().read_metadata(keys)

    best = order(given, MODEL, Counting(store), prefix=PREFIX)
    assert best[:2] == [given[2], given[0]]
    assert asked[:2] == ["sizes", "metadata"]
    assert len(asked) <= 3  # whether what goes on from a known chunk is still there
    assert all(a is b for a in best for b in given if a == b)


def test_texts_are_read_as_the_prompt_that_they_make():
    tokenizer, store = word_tokenizer(), MemoryStore()
    given = [words(document(number)) for number in range(3)]
    separator, prefix = " w7 w8 ", "w10 w11 "
    prompt = tokenizer(prefix + separator.join([given[2], given[0]]) + " w20", return_tensors="pt")
    with torch.no_grad():
        MODEL(prompt.input_ids, past_key_values=RedisChunkCache(MODEL, store), logits_to_keep=1)
    best = order(given, MODEL, store, prefix=prefix, separator=separator, tokenizer=tokenizer)
    assert best == [given[2], given[0], given[1]]
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in given]
    best = order(ids, MODEL, store, prefix=[1, 10, 11], separator=[7, 8])
    assert best == [ids[2], ids[0], ids[1]]


def test_a_store_in_trouble_leaves_the_order_as_it_is():
    given = [document(number) for number in range(3)]
    assert order(given, MODEL, NOWHERE) == given
    with pytest.raises(StoreError):
        order(given, MODEL, NOWHERE, on_error="raise")


def test_little_to_order():
    assert order([], MODEL, MemoryStore()) == []
    assert order([[5]], MODEL, MemoryStore()) == [[5]]
    assert order([[5], [], [5]], MODEL, MemoryStore(), reuse="off") == [[5], [], [5]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("text", "not one str"),
        (["text"], "document 0 is a text: pass tokenizer"),
        (7, "not one int"),
    ],
)
def test_wrong_input(given, message):
    with pytest.raises(SettingError, match=message):
        order(given, MODEL, MemoryStore())

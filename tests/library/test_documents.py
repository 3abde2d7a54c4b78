"""add_documents: what was added is found, in any process, and what was not is told."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch

from chunkcache import (
    RedisChunkCache,
    SettingError,
    StoreError,
    UnsupportedCallError,
    UnsupportedModelError,
    add_documents,
    open_store,
)
from chunkcache.stores.memory import MemoryStore
from tests.models import tiny
from tests.models import tokens as random_ids
from tests.words import word_tokenizer, words

ROOT = Path(__file__).parents[2]
NOWHERE = "redis://127.0.0.1:1/0"


def build(kind="llama", **overrides):
    return tiny(kind, max_position_embeddings=2048, **overrides)


def documents(count=6):
    return [random_ids(200 + 57 * n, seed=n)[0].tolist() for n in range(count)]


def add(model, store, given, **options):
    return add_documents(model, store, given, **{"progress": False, **options})


def ask(model, store, *parts, **settings):
    """Logits after a prompt of these parts, and the report."""
    cache = RedisChunkCache(model, store, **settings)
    ids = torch.tensor([[token for part in parts for token in part]])
    with torch.no_grad():
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.logits[0, -1], cache.report


def gap(count, seed):
    return random_ids(count, seed=1000 + seed)[0].tolist()


# ------------------------------------------------------------------------- found again


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "qwen3"])
def test_documents_are_found_in_another_order(kind):
    model, store, given = build(kind), MemoryStore(), documents()
    summary = add(model, store, given)
    assert (summary.documents, summary.added, summary.skipped) == (6, 6, 0)
    assert summary.tokens == sum(map(len, given))
    assert summary.computed == summary.tokens + 6  # a BOS token each
    parts = gap(23, 1), given[4], gap(9, 2), given[1], gap(20, 3)
    logits, report = ask(model, store, *parts, reuse="anywhere", repair="none")
    assert report.moved >= 0.97 * (len(given[4]) + len(given[1]))
    assert report.errors == []
    # A document at its own place, behind its own prefix, moves by nothing: all of it is exact.
    logits, report = ask(model, store, [1], given[2], gap(9, 2), reuse="anywhere", repair="none")
    plain, _ = ask(model, MemoryStore(), [1], given[2], gap(9, 2))
    assert report.reused + report.moved >= 0.97 * len(given[2])
    torch.testing.assert_close(logits, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prefix", [None, [], gap(40, 7), gap(300, 8)], ids=[0, 1, 2, 3])
def test_prefix_and_document_are_reused_exactly(prefix):
    model, store, given = build(), MemoryStore(), documents(3)
    assert add(model, store, given, prefix=prefix).added == 3
    begin = [1] if prefix is None else prefix
    for document in given:
        logits, report = ask(model, store, begin, document, gap(20, 1))
        assert report.exact
        both = len(begin) + len(document)
        assert report.reused == (both if both % 128 >= 16 else both - both % 128)
        plain = model(torch.tensor([[*begin, *document, *gap(20, 1)]])).logits[0, -1]
        torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("filler", [gap(500, 3), gap(20, 4)], ids=["cut", "repeated"])
def test_documents_behind_a_filler_are_exact_behind_it_and_moved_elsewhere(filler):
    model, store, (document, other, _) = build(), MemoryStore(), documents(3)
    prefix = gap(40, 1)
    assert add(model, store, [document, other], prefix=prefix, filler=filler).added == 2
    front = [*prefix, *(filler * 20)[-(256 - len(prefix)) :]]
    behind_it = [*front, *document, *gap(20, 2)]
    plain = model(torch.tensor([behind_it])).logits[0, -1]
    logits, report = ask(model, store, behind_it)
    assert report.exact
    assert report.reused == len(front) + len(document)
    torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-4)
    # Behind the prefix alone its context is another: what was computed is never taken for exact.
    at_once = [*prefix, *document, *gap(20, 2)]
    plain = model(torch.tensor([at_once])).logits[0, -1]
    for variants in ("any", "prepared"):
        _, report = ask(model, store, at_once, reuse="anywhere", repair="none", variants=variants)
        assert not report.exact
        assert (report.reused, report.moved) == (len(prefix), len(document))
    logits, report = ask(model, store, at_once)
    assert report.exact
    assert report.reused == len(prefix)
    torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-4)


def test_what_is_computed_behind_a_filler_depends_on_nothing_else():
    model, given, filler = build(), documents(3), gap(90, 1)
    one, several = MemoryStore(), MemoryStore()
    add(model, one, given[1:2], filler=filler)
    add(model, several, given, filler=filler)
    chunks = {entry.key for page in one.scan() for entry in page if "positions" in entry.metadata}
    assert chunks < {entry.key for page in several.scan() for entry in page}
    again = add(model, several, given[::-1], filler=filler)
    assert (again.skipped, again.computed) == (3, 0)
    assert add(model, several, given, filler=gap(90, 2)).added == 3
    # Chunks of the document hold nothing else.
    found = [(int(f["positions"].split("-")[0]), f) for f in one.read_metadata(sorted(chunks))]
    texts = [json.loads(f["token_ids"]) for begin, f in sorted(found, key=lambda e: e[0])]
    assert [*texts[-2], *texts[-1]] == given[1][:256]


def test_a_document_that_is_the_filler_or_does_not_fit_behind_it_is_computed_without():
    model, store = build(), MemoryStore()
    long = random_ids(2000, seed=9)[0].tolist()
    assert add(model, store, [long, long[:300]], filler=gap(200, 1)).added == 2
    assert ask(model, store, [1], long, gap(9, 1))[1].reused == 2001
    assert ask(model, store, [1], long[:300], gap(9, 1))[1].reused == 301  # of the long one
    # Nor is one that is the filler: it would be read as a repetition of itself.
    store = MemoryStore()
    assert add(model, store, documents(2), filler=documents(2)[1]).added == 2
    assert ask(model, store, [1], documents(2)[1], gap(9, 1))[1].reused == 256
    assert ask(model, store, [1], documents(2)[0], gap(9, 1))[1].reused == 0
    assert add(model, MemoryStore(), [long], prefix=gap(1900, 1), filler=gap(9, 1)).failures
    assert add(model, MemoryStore(), [long[:100]], prefix=gap(1900, 1), filler=gap(9, 1)).added == 1


def test_texts_and_ids_are_the_same():
    model, store, tokenizer = build(), MemoryStore(), word_tokenizer()
    given = [[max(token, 4) for token in document] for document in documents(4)]
    mixed = [words(given[0]), given[1], torch.tensor(given[2]), words(given[3])]
    prefix = "w10 w11 w12"
    assert add(model, store, mixed, tokenizer=tokenizer, prefix=prefix).added == 4
    assert add(model, store, given, prefix=[1, 10, 11, 12]).skipped == 4
    ids = tokenizer(f"{prefix} {mixed[3]} w20 w21")["input_ids"]
    assert ask(model, store, ids)[1].reused == 4 + len(given[3])


def test_chunk_settings_are_honoured():
    model, store, given = build(), MemoryStore(), documents(2)
    options = {"chunk_size": 64, "chunk_overlap": 16, "namespace": "team", "store_tail": False}
    assert add(model, store, given, **options).added == 2
    _, report = ask(model, store, [1], given[1], gap(9, 1), **options)
    assert report.reused == 256
    assert ask(model, store, [1], given[1], **{**options, "namespace": ""})[1].reused == 0


def test_tags_are_in_the_metadata_of_every_chunk(redis_server):
    add(build(), redis_server.unix_url, documents(2), tags="kind=manual")
    with redis_server.client() as client:
        names = list(client.scan_iter(match="safetensors@*@metadata"))
        assert len(names) == 2 + 3
        assert {client.hget(name, "tags") for name in names} == {b"kind=manual"}


# ------------------------------------------------------------------------- resuming

KILLED = """
import os, sys
sys.path.insert(0, sys.argv[1])
from tests.library.test_documents import add, build, documents

def some():
    for number, document in enumerate(documents()):
        if number == 4:
            os._exit(9)
        yield document

add(build(), sys.argv[2], some(), batch_tokens=16, prefix=[1, 5, 6])
"""


def test_a_killed_run_goes_on_in_another_process(redis_server):
    url = redis_server.unix_url
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(ROOT), url], capture_output=True, check=False
    )
    assert killed.returncode == 9, killed.stderr
    model, given = build(), documents()
    summary = add(model, url, given, prefix=[1, 5, 6])
    assert (summary.added, summary.skipped) == (2, 4)
    assert summary.computed == len(given[4]) + len(given[5]) + 2 * 3
    parts = gap(23, 1), given[3], gap(9, 2), given[0], gap(20, 3)
    _, report = ask(model, url, *parts, reuse="anywhere", repair="none")
    assert report.moved >= 0.97 * (len(given[3]) + len(given[0]))


def test_what_is_there_costs_nothing():
    model, store, given = build(), MemoryStore(), documents()
    add(model, store, given[1:3])
    summary = add(model, store, [*given, given[0], given[5]])
    assert (summary.documents, summary.added, summary.skipped) == (8, 4, 4)
    assert summary.tokens == sum(map(len, given)) + len(given[0]) + len(given[5])
    assert summary.computed == sum(len(given[n]) + 1 for n in (0, 3, 4, 5))
    again = add(model, store, given)
    assert (again.added, again.skipped, again.computed, again.bytes_written) == (0, 6, 0, 0)
    assert str(again) == (
        "0 of 6 documents added, 6 skipped as known, 2,055 tokens, 0 computed, 0.0 MB to the store"
    )


def test_documents_are_taken_one_by_one():
    model, store = build(), MemoryStore()
    taken = []

    def endless():
        for number in range(1000):
            taken.append(number)
            if number == 40:
                raise KeyboardInterrupt
            yield random_ids(100, seed=number)[0]

    with pytest.raises(KeyboardInterrupt):
        add(model, store, endless(), batch_tokens=128)
    # 11 rows of 101 tokens make a portion; three of them are in the store.
    known = add(model, store, [random_ids(100, seed=number)[0] for number in range(40)])
    assert (known.skipped, known.added) == (33, 7)


# ------------------------------------------------------------------------- in trouble


def test_what_cannot_be_added_is_named():
    model, store, given = build(), MemoryStore(), documents(3)
    long = random_ids(2048, seed=9)[0].tolist()
    summary = add(model, store, [given[0], [], given[1], long, given[2], long[:-1]])
    assert (summary.documents, summary.added) == (6, 4)
    assert [failure.document for failure in summary.failures] == [1, 3]
    assert summary.failures[0].reason == "it is empty"
    assert "2,049 tokens" in summary.failures[1].reason
    assert "2 failed, the first is document 1: it is empty" in str(summary)
    assert summary.stopped == ""
    short = add(model, store, [given[0], given[0][:100]], store_tail=False)
    assert "too short" in short.failures[0].reason
    with pytest.raises(FrozenInstanceError):
        summary.added = 7


def test_an_unreachable_store_is_told_before_any_work():
    model = build()
    summary = add(model, NOWHERE, documents(), prefix=gap(40, 1))
    assert summary.computed == summary.added == summary.documents == 0
    assert "check that the server runs" in summary.stopped
    assert "stopped: " in str(summary)
    with pytest.raises(StoreError, match="check that the server runs"):
        add(model, NOWHERE, documents(), on_error="raise")


def test_a_server_that_dies_stops_the_run(valkey_server):
    given, taken = documents(), []

    def mortal():
        for number, document in enumerate(given):
            taken.append(number)
            if number == 3:
                valkey_server.stop()
            yield document

    with open_store(valkey_server.tcp_url) as store:
        summary = add(build(), store, mortal(), batch_tokens=16)
    assert (summary.documents, summary.added) == (4, 3)
    assert [failure.document for failure in summary.failures] == [3]
    assert summary.failures[0].reason == summary.stopped != ""
    assert taken == [0, 1, 2, 3]
    assert str(summary).count(summary.stopped) == 1
    assert "1 failed, stopped: " in str(summary)


def test_a_full_server_stops_the_run(redis_server):
    given = documents()
    add(build(), redis_server.unix_url, given[:1])
    with redis_server.client() as client:
        client.config_set("maxmemory", client.info("memory")["used_memory"] + 400_000)
    with open_store(redis_server.unix_url) as store:
        summary = add(build(), store, given)
        assert "maxmemory" in summary.stopped
        assert (summary.documents, summary.skipped, summary.added) == (6, 1, 0)
        assert [failure.document for failure in summary.failures] == [1, 2, 3, 4, 5]
    with open_store(redis_server.unix_url) as store, pytest.raises(StoreError, match="maxmemory"):
        add(build(), store, given, on_error="raise")


def test_a_small_write_queue_drops_nothing(redis_server):
    with open_store(redis_server.unix_url, write_queue_bytes=200_000) as store:
        summary = add(build(), store, documents())
        assert (summary.added, summary.stopped) == (6, "")
    with open_store(redis_server.unix_url, write_queue_bytes=100_000) as store:
        summary = add(build(), store, documents(), namespace="other")
        assert summary.added == 0
        assert "write_queue_bytes" in summary.stopped


def test_a_store_that_is_too_small_is_told():
    summary = add(build(), MemoryStore(300_000), documents())
    assert summary.added == 0
    assert "the size of the store" in summary.stopped


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ("one text", {}, "documents must be.*not one str.*list"),
        ({"a": 1}, {}, "documents must be.*not one dict"),
        (None, {}, "documents must be.*not one NoneType"),
        ([5, 6, 7], {}, "document 0 is neither a text nor"),
        (random_ids(9)[0], {}, "document 0 is neither a text nor"),
        (["w5 w6"], {}, "document 0 is a text: pass tokenizer="),
        ([[5], "w5 w6"], {}, "document 1 is a text: pass tokenizer="),
        ([[5, 700]], {}, "document 0 has token ids"),
        ([[5]], {"prefix": "w5"}, "prefix is a text: pass tokenizer="),
        ([[5]], {"prefix": [5] * 3000}, "prefix has 3,000 tokens"),
        ([[5]], {"filler": "w5"}, "filler is a text: pass tokenizer="),
        ([[5]], {"filler": [700]}, "filler has token ids"),
        ([[5]], {"batch_tokens": 0}, "batch_tokens=0"),
        ([[5]], {"batch_tokens": True}, "batch_tokens=True"),
        ([[5]], {"reuse": "prefix"}, "reuse='prefix' is not for add_documents"),
        ([[5]], {"chunk_sise": 64}, "chunk_sise"),
    ],
)
def test_wrong_input(given, options, message):
    with pytest.raises(SettingError, match=message):
        add(build(), MemoryStore(), given, **options)


def test_models_and_calls_that_are_refused():
    with pytest.raises(UnsupportedModelError, match="anywhere"):
        add(tiny("gpt2"), NOWHERE, documents())
    with pytest.raises(UnsupportedCallError, match=r"model\.eval"):
        add(build().train(), MemoryStore(), documents())
    with pytest.raises(UnsupportedModelError):
        add("llama", MemoryStore(), documents())


def test_progress_is_shown_when_it_is_wanted(capsys):
    model, store, given = build(), MemoryStore(), documents(3)
    add(model, store, [given[0], [], given[1], given[1]], progress=True)
    assert "4/4" in capsys.readouterr().err
    add(model, store, iter(given), progress=True)
    assert "3doc" in capsys.readouterr().err
    add(model, store, given)
    assert capsys.readouterr().err == ""


def test_the_model_is_left_as_it_was():
    model = build()
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    add(model, MemoryStore(), documents(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(p.requires_grad for p in model.parameters())
    assert torch.is_grad_enabled()

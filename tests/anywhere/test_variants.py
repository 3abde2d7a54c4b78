"""Prepared documents alone: an answer is the same, whatever was asked before."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from chunkcache import RedisChunkCache, add_documents
from chunkcache.anywhere.matching import MET, PREPARED
from chunkcache.anywhere.moved import NOT_PREPARED
from chunkcache.stores.memory import MemoryStore
from tests.prompts import DOCUMENTS, anywhere, build, close, joined, logits, meet, prefill

GIVEN = [document[0] for document in DOCUMENTS]
A, B, C, D = DOCUMENTS
BOS = torch.ones_like(A[:, :1])
PROMPT = joined(BOS, A[:, :200], 23, C, 7, D, A[:, :150], 21)  # begins with a prepared document


@cache
def model():
    return build(num_hidden_layers=3)


def prepare(store):
    assert not add_documents(model(), store, GIVEN, progress=False).failures


def the_same_prompt_exactly(store):
    logits(model(), PROMPT, RedisChunkCache(model(), store))


def the_same_prompt_moved(store):
    meet(model(), store, joined(30, D, A, 5, C))
    logits(model(), PROMPT, anywhere(model(), store, repair="none"))


def prompts_that_go_on_from_documents(store):
    for document in DOCUMENTS:
        logits(model(), joined(BOS, document, 60), RedisChunkCache(model(), store))


def many_prompts_with_them(store):
    meet(model(), store, *(joined(9 + n, C, 3 + n, D) for n in range(9)))


HISTORIES = {
    "nothing": (),
    "the same prompt exactly": (the_same_prompt_exactly,),
    "the same prompt moved": (the_same_prompt_moved,),
    "documents at their own place": (prompts_that_go_on_from_documents,),
    "many prompts": (many_prompts_with_them, the_same_prompt_exactly),
}


def after(history, before, variants, **settings):
    """Tokens of the answer, logits of the first, and the report, after these earlier prompts."""
    store = MemoryStore()
    for asked in history if before else ():
        asked(store)
    prepare(store)
    for asked in history:
        asked(store)
    cache = anywhere(model(), store, variants=variants, **settings)
    out = model().generate(
        PROMPT, past_key_values=cache, max_new_tokens=6, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    return out.sequences, out.logits[0], cache.report


def test_an_answer_is_the_same_after_any_history():
    tokens, first, report = after((), False, "prepared", repair="head:4+query:0.05")
    assert report.moved > 500
    assert not report.exact
    for name, history in HISTORIES.items():
        for before in (False, True):  # before the documents were added, too
            other, its, told = after(history, before, "prepared", repair="head:4+query:0.05")
            assert torch.equal(other, tokens), name
            assert torch.equal(its, first), name  # to the last bit
            assert told.variants == report.variants
            assert [s["kind"] for s in told.chunks] == [s["kind"] for s in report.chunks]
    assert {origin.split(",")[0] for origin in report.variants.values()} == {PREPARED}


def test_with_any_variant_it_is_not():
    _, first, _ = after((), False, "any")
    found = [after(history, False, "any") for history in HISTORIES.values()]
    assert any(not close(its, first, 1e-3) for _, its, _ in found)
    served = {origin.split(",")[0] for *_, told in found for origin in told.variants.values()}
    assert served == {PREPARED, MET}


def test_what_the_cache_object_holds_of_another_prompt_does_not_serve():
    store = MemoryStore()
    prepare(store)
    first, _ = prefill(model(), store, PROMPT, variants="prepared")
    cache = anywhere(model(), store, variants="prepared")
    model().generate(joined(PROMPT[:, :700], 40), past_key_values=cache, max_new_tokens=2)
    out = model().generate(
        PROMPT, past_key_values=cache, max_new_tokens=1, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert torch.equal(out.logits[0], first)


def test_the_beginning_of_a_prompt_is_exact_where_it_was_prepared():
    store = MemoryStore()
    prepare(store)
    prompt = joined(BOS, B, 30)
    found, report = prefill(model(), store, prompt, variants="prepared")
    assert report.exact
    assert report.reused == 1 + B.shape[1]
    assert close(found, logits(model(), prompt))
    # An earlier prompt's beginning is not read, though it would be exact.
    other = joined(300, 30)
    meet(model(), store, other)
    _, report = prefill(model(), store, other, variants="prepared")
    assert report.computed == other.shape[1]
    assert {span["reason"] for span in report.chunks} == {NOT_PREPARED}
    assert prefill(model(), store, other)[1].reused > 300


@pytest.mark.parametrize("reuse", ["prefix", "anywhere"])
def test_what_was_evicted_is_a_hole_that_prompts_do_not_fill(reuse):
    store = MemoryStore()
    prepare(store)
    prompt = joined(40, B, 20)
    first, report = prefill(model(), store, prompt, variants="prepared")
    assert report.moved > 200
    every = [entry.key for page in store.scan() for entry in page]
    store.delete([key for key in every if key.rpartition("@")[2] in report.variants])
    own_place = joined(BOS, B, 60)  # leaves the very same chunks
    logits(model(), own_place, RedisChunkCache(model(), store, reuse=reuse))
    assert prefill(model(), store, prompt)[1].moved > 200
    found, report = prefill(model(), store, prompt, variants="prepared")
    assert (report.moved, report.computed) == (0, prompt.shape[1])
    assert NOT_PREPARED in {span["reason"] for span in report.chunks}
    assert close(found, logits(model(), prompt))
    prepare(store)
    assert close(prefill(model(), store, prompt, variants="prepared")[0], first)


def test_explain_says_which_variant_would_serve():
    store = MemoryStore()
    prepare(store)
    meet(model(), store, joined(50, A))
    cache = anywhere(model(), store, variants="prepared")
    found = cache.explain(joined(40, B, 20, A[:, 100:], 50, A[:, :50]))
    moved = [each for each in found.chunks if each.hit]
    assert {each.origin.split(",")[0] for each in moved} == {PREPARED}
    assert NOT_PREPARED in {each.reason for each in found.chunks}

"""Recall: each row of a batch finds its own, so do later parts of a prompt, in few calls."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chunkcache import RedisChunkCache
from chunkcache.errors import StoreError
from chunkcache.stores.base import ReadOnly
from chunkcache.stores.memory import MemoryStore
from chunkcache.tokens.plan import OTHER_ROW
from tests.prompts import (
    DOCUMENTS,
    anywhere,
    build,
    close,
    first_prompt,
    joined,
    logits,
    meet,
    padded,
    prefill,
    shuffled_prompt,
)

A, B, C, D = DOCUMENTS


class Watched(MemoryStore):
    """Counts calls, and the blobs asked for."""

    def __init__(self):
        super().__init__()
        self.calls, self.blobs, self.down = Counter(), [], set()

    def _note(self, verb):
        self.calls[verb] += 1
        if verb in self.down:
            raise StoreError(f"{verb} is down")

    def sizes(self, keys):
        self._note("sizes")
        return super().sizes(keys)

    def read_metadata(self, keys):
        self._note("read_metadata")
        return super().read_metadata(keys)

    def fetch(self, parts):
        self._note("fetch")
        self.blobs += [part.key for part in parts]
        return super().fetch(parts)

    def forget(self):
        self.calls.clear()
        self.blobs.clear()


@pytest.fixture(scope="module")
def model():
    return build(num_hidden_layers=2)


@pytest.fixture(scope="module")
def flat():
    """One layer: there every move is exact."""
    return build(num_hidden_layers=1)


@pytest.fixture
def store():
    return Watched()


def kinds(report, row):
    return {s["kind"] for s in report.chunks if s["row"] == row}


def sound(report, prompt):
    """Spans that cover every row without a gap, and whose counts add up."""
    rows = prompt["attention_mask"].sum(1).tolist()
    for number, (row, tokens) in enumerate(zip(report.rows, rows, strict=True)):
        stops = [0, *(span.stop for span in row.spans)]
        assert [span.start for span in row.spans] == stops[:-1], number
        assert stops[-1] == row.prompt_tokens == tokens
        assert row.reused + row.moved + row.recomputed + row.computed == tokens
    # What the model computes, it computes for all rows; padding aside.
    width = prompt["input_ids"].shape[1]
    computed = [
        {width - tokens + position for position in again(row)}
        for row, tokens in zip(report.rows, rows, strict=True)
    ]
    union = set().union(*computed)
    for number, tokens in enumerate(rows):
        assert computed[number] == {c for c in union if c >= width - tokens}
    return len(union)


# ------------------------------------------------------------------------ batches


def test_each_row_finds_its_own(flat, store):
    meet(flat, store)
    prompt = padded(joined(40, A, 12, C, 9), joined(63, B, 30, D, 21), joined(5, C, A, 33))
    found, report = prefill(flat, ReadOnly(store), prompt, repair="none")
    assert close(found, logits(flat, prompt))
    assert all(row.moved > 250 for row in report.rows)
    sound(report, prompt)


def test_the_model_computes_the_union_of_the_columns(model, store):
    meet(model, store)
    prompt = padded(joined(40, A, 12, C, 9), joined(63, B, 30, D, 21), joined(5, C, A, 33))
    seen = []
    handle = model.model.embed_tokens.register_forward_hook(
        lambda m, a, out: seen.append(out.shape)
    )
    cache = anywhere(model, ReadOnly(store), hooks="observers")
    logits(model, prompt, cache)
    handle.remove()
    assert seen[-1][:2] == (3, sound(cache.report, prompt))
    assert seen[-1][1] < 500
    assert cache.report.charged == cache.report.recomputed


def test_equal_rows_are_looked_up_and_repaired_once(model, store):
    meet(model, store)
    one = {"input_ids": shuffled_prompt()}
    many = {"input_ids": shuffled_prompt().repeat(3, 1)}
    store.forget()
    alone, first = prefill(model, ReadOnly(store), one, repair="head:4+query:0.1+deviation:0.1")
    calls, blobs = dict(store.calls), sorted(store.blobs)
    store.forget()
    together, report = prefill(
        model, ReadOnly(store), many, repair="head:4+query:0.1+deviation:0.1"
    )
    assert close(together, alone.repeat(3, 1))
    assert (dict(store.calls), sorted(store.blobs)) == (calls, blobs)
    assert report.recomputed == 3 * first.recomputed
    probes = first.charged - first.recomputed
    assert probes > 0
    assert report.charged == pytest.approx(report.recomputed + probes)


def test_a_blob_is_read_once_whoever_needs_it(model, store):
    meet(model, store)
    prompt = padded(joined(40, A, 12, A, 9), joined(63, B, 30, A, 21))
    store.forget()
    _, report = prefill(model, ReadOnly(store), prompt)
    assert len(store.blobs) == len(set(store.blobs)) > 4
    assert store.calls["fetch"] <= 2
    # Here the document is known exactly in one row, and moved within the same and another one.
    prompt = padded(joined(first_prompt()[:, :266], 30, A, 9), joined(40, A, 7, A, 30))
    store.forget()
    _, report = prefill(model, ReadOnly(store), prompt)
    assert report.rows[0].reused > 200
    assert report.moved > 200
    assert len(store.blobs) == len(set(store.blobs))


def test_a_row_that_knows_nothing_makes_all_rows_compute_and_nothing_is_moved(model, store):
    """What would be computed anyway is not worth reading, and is better fresh."""
    meet(model, store)
    prompt = padded(joined(40, A, 12, C, 9), joined(700))
    store.forget()
    found, report = prefill(model, ReadOnly(store), prompt)
    assert close(found, logits(model, prompt))
    assert report.exact
    assert report.moved == report.bytes_read == 0
    assert store.calls["fetch"] == 0


def test_pieces_of_no_use_are_left_out_and_said_so(model, store):
    meet(model, store)
    prompt = padded(joined(400, C, 20), joined(30, A, 83, C, 20))  # C stands in the same columns
    _, report = prefill(model, ReadOnly(store), prompt)
    assert [row.moved > 200 for row in report.rows] == [True, True]
    left_out = [s for s in report.chunks if s["reason"] == OTHER_ROW]
    assert {s["row"] for s in left_out} == {1}
    assert sum(s["stop"] - s["start"] for s in left_out) > 250
    sound(report, prompt)


def test_rows_are_exact_as_far_as_each_is_known(model, store):
    """The row that is known least does not decide for all, as it does without moving."""
    meet(model, store)
    prompt = padded(joined(first_prompt()[:, :900], 40), joined(83, A, B, 54, C[:, :260]))
    found, report = prefill(model, ReadOnly(store), prompt)
    exact, moved = report.rows
    assert exact.moved == exact.recomputed == 0
    assert exact.reused > 500
    assert moved.moved > 500
    assert any(s["reason"] == OTHER_ROW for s in report.chunks if s["row"] == 0)
    sound(report, prompt)
    alone = logits(model, joined(first_prompt()[:, :900], 40))
    assert close(found[:1], alone)


def test_what_is_exact_in_a_batch_is_stored_as_exact_and_nothing_else(model, store):
    meet(model, store)
    first = joined(first_prompt()[:, :900], 140)
    second = joined(83, A, B, 54, C[:, :260], 31)
    prefill(model, store, padded(first, second), repair="none")
    for row in (first, second):
        cache = RedisChunkCache(model, ReadOnly(store))
        assert close(logits(model, row, cache), logits(model, row))
        assert cache.report.exact
        assert cache.report.reused == (1039 if row is first else 0)


@pytest.mark.parametrize("repair", ["head:4", "deviation:0.2", "query:0.2+head:2"])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_each_row_of_a_batch_is_repaired_as_it_is_alone(kind, repair):
    """What it would pick alone is computed again, and what others pick."""
    model, store = build(kind), MemoryStore()
    meet(model, store)
    rows = [joined(40, A, 12, C, 9), joined(17, A, 12, C, 9), joined(66, C, 25, A, 30)]
    alone = [prefill(model, ReadOnly(store), row, repair=repair)[1].rows[0] for row in rows]
    _, report = prefill(model, ReadOnly(store), padded(*rows), repair=repair)
    assert report.errors == []
    for one, together in zip(alone, report.rows, strict=True):
        picked, computed = again(one), again(together)
        assert picked
        assert len(picked & computed) > 0.95 * len(picked)  # but for ties that rounding decides
        assert computed & moved(together) == set()


def again(row):
    return positions(row, "recomputed", "computed")


def moved(row):
    return positions(row, "moved")


def positions(row, *kinds):
    return {p for span in row.spans if span.kind in kinds for p in range(span.start, span.stop)}


@given(
    rows=st.lists(
        st.tuples(
            st.integers(0, 200),
            st.lists(st.tuples(st.integers(0, 3), st.integers(1, 60)), max_size=3),
            st.sampled_from([0, 0, 200, 330]),
        ),
        min_size=1,
        max_size=4,
    ),
)
@example(rows=[(0, [(0, 1)], 200)])  # text moved to where a continuation's other tokens lie
@settings(max_examples=25, deadline=None)
def test_any_batch(rows):
    """With one layer a move is exact, so whatever is found, the outputs are those of a full run."""
    texts = []
    for lead, parts, begin in rows:
        text = [first_prompt()[:, :begin], 1 + lead]
        for number, gap in parts:
            text += [DOCUMENTS[number], gap]
        texts.append(joined(*text))
    prompt = padded(*texts)
    found, report = prefill(ONE_LAYER, ReadOnly(KNOWN), prompt)
    assert close(found, logits(ONE_LAYER, prompt))
    assert report.errors == []
    sound(report, prompt)


ONE_LAYER, KNOWN = (
    build("gemma3_text", num_hidden_layers=1, layer_types=["full_attention"]),
    Watched(),
)
meet(ONE_LAYER, KNOWN)


def test_beams_move_too(model, store):
    meet(model, store)
    prompt = padded(joined(40, A, 12, C, 9), joined(63, B, 30, D, 21))
    options = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False}
    cache = anywhere(model, store, repair="full")
    out = model.generate(**prompt, past_key_values=cache, **options)
    assert torch.equal(out, model.generate(**prompt, **options))
    assert cache.report.recomputed > 2000


# ------------------------------------------------------------------------ later parts


@pytest.mark.parametrize("size", [100, 300, 512])
def test_a_prompt_in_pieces_moves_in_all_of_them(flat, store, size):
    """`prefill_chunk_size`: the forward is called several times."""
    meet(flat, store)
    prompt = padded(shuffled_prompt(), joined(51, B, 13, C, 9))
    options = {"max_new_tokens": 6, "do_sample": False}
    del prompt["position_ids"]
    cache = anywhere(flat, ReadOnly(store), repair="none")
    out = flat.generate(**prompt, past_key_values=cache, prefill_chunk_size=size, **options)
    assert torch.equal(out, flat.generate(**prompt, **options))
    assert cache.report.prompt_tokens == int(prompt["attention_mask"].sum())
    stops = [s["stop"] for s in cache.report.chunks if s["kind"] == "moved" and s["row"] == 0]
    assert max(stops) > 1000
    assert cache.report.rows[0].moved > (900 if size > 100 else 600)


def test_only_new_ids_move_behind_what_is_held(flat, store):
    meet(flat, store)
    options = {"max_new_tokens": 6, "do_sample": False}
    cache = anywhere(flat, ReadOnly(store), repair="none")
    out = flat.generate(joined(70), past_key_values=cache, **options)
    new = joined(out[:, -1:], 11, B, A, 9)
    whole = joined(out[:, :-1], new)
    mask = torch.ones_like(whole)
    found = flat.generate(new, past_key_values=cache, attention_mask=mask, **options)
    assert cache.report.moved > 500
    assert not cache.report.exact
    assert torch.equal(
        found[:, new.shape[1] :], flat.generate(whole, **options)[:, whole.shape[1] :]
    )


def test_the_next_turn_of_a_conversation_moves_too(flat, store):
    meet(flat, store)
    options = {"max_new_tokens": 6, "do_sample": False}
    cache = anywhere(flat, ReadOnly(store), repair="none")
    out = flat.generate(joined(20, A, 9), past_key_values=cache, **options)
    longer = joined(out, 11, B, 9)
    found = flat.generate(longer, past_key_values=cache, **options)
    assert torch.equal(found, flat.generate(longer, **options))
    assert cache.report.reused == out.shape[1] - 1
    assert cache.report.moved > 200
    assert cache._conversation.transcript.inexact_from == [20]  # the first moved token of all


def test_the_taint_of_moved_text_stays_until_it_is_dropped(model, store):
    meet(model, store)
    start = joined(150)
    cache = anywhere(model, store, repair="none")
    out = model.generate(joined(start, A, 9), past_key_values=cache, max_new_tokens=3)
    assert cache.report.moved > 200
    model.generate(joined(out, 200), past_key_values=cache, max_new_tokens=3)
    assert cache.report.moved == 0
    assert not cache.report.exact  # it was computed behind moved text
    other = joined(start, 170)
    found = model.generate(other, past_key_values=cache, max_new_tokens=3)
    assert cache.report.reused == 150
    assert cache.report.exact
    assert torch.equal(found, model.generate(other, max_new_tokens=3))
    plain = RedisChunkCache(model, ReadOnly(store))
    assert close(logits(model, other, plain), logits(model, other))
    assert plain.report.reused == 319  # so it was stored under exact keys


def test_the_taint_is_told_also_when_the_cache_stands_aside(model, store):
    meet(model, store)
    cache = anywhere(model, store, repair="none")
    logits(model, joined(150, A, 9), cache)
    more = {"input_ids": joined(40), "position_ids": torch.arange(415, 455)[None]}
    logits(model, {**more, "pixel_values": torch.ones(1)}, cache)
    assert "pixel_values" in cache.report.skipped
    assert not cache.report.exact  # what is held is what these tokens saw
    cache.reset()
    logits(model, {"input_ids": joined(40), "pixel_values": torch.ones(1)}, cache)
    assert cache.report.exact


def test_the_taint_follows_the_rows(model, store):
    meet(model, store)
    prompt = padded(joined(first_prompt()[:, :600], 31), joined(83, A, B))
    cache = anywhere(model, ReadOnly(store), repair="none")
    logits(model, prompt, cache)
    tainted = cache._conversation.transcript.inexact_from
    assert tainted[0] is None
    assert tainted[1] is not None
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache._conversation.transcript.inexact_from == tainted[::-1]
    cache.batch_repeat_interleave(2)
    assert cache._conversation.transcript.inexact_from == [tainted[1]] * 2 + [None] * 2
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert cache._conversation.transcript.inexact_from == [None, tainted[1]]


def test_a_model_that_was_changed_since_is_computed_and_that_is_said(store):
    own = build(num_hidden_layers=2)
    meet(own, store)
    cache = anywhere(own, store)
    own.config.max_position_embeddings = 12
    found = logits(own, shuffled_prompt(), cache)
    assert close(found, logits(own, shuffled_prompt()))
    assert cache.report.exact
    assert "too few positions" in cache.report.errors[0]


# ------------------------------------------------------------------------ calls to the store


def test_a_lookup_costs_two_round_trips_more_than_in_prefix_mode(model, store):
    meet(model, store)
    prompt = padded(shuffled_prompt(), joined(51, B, 13, C, 9), joined(first_prompt()[:, :500], 20))
    store.forget()
    RedisChunkCache(model, ReadOnly(store))
    logits(model, prompt, RedisChunkCache(model, ReadOnly(store)))
    prefix = Counter(store.calls)
    store.forget()
    logits(model, prompt, anywhere(model, ReadOnly(store)))
    assert store.calls - prefix == {
        "read_metadata": 2,
        "sizes": 1,
        "fetch": store.calls["fetch"] - prefix["fetch"],
    }
    assert store.calls["fetch"] <= 2


@pytest.mark.parametrize("verbs", [{"read_metadata"}, {"fetch"}, {"sizes"}])
def test_a_store_that_fails_on_the_way_is_computed_around(model, store, verbs):
    meet(model, store)
    prompt = padded(joined(first_prompt()[:, :500], A, 20), shuffled_prompt())
    anywhere(model, store)
    store.down = verbs
    cache = anywhere(model, ReadOnly(store), repair="full")
    assert close(logits(model, prompt, cache), logits(model, prompt))
    assert cache.report.errors == [f"{next(iter(verbs))} is down"]
    store.down = set()
    cache = anywhere(model, ReadOnly(store), on_error="raise")
    store.down = verbs
    with pytest.raises(StoreError):
        logits(model, prompt, cache)


def test_entries_that_lead_nowhere_are_put_right_by_the_prompt_that_met_them(model, store):
    meet(model, store)
    lost = [key for key in [*store._free] if key.startswith("safetensors@")]
    store.delete(lost)
    prefill(model, store, shuffled_prompt())
    again = {key for key in [*store._free] if key.startswith("safetensors@")}
    names = {key.rpartition("@")[2] for key in again}
    anchors = [key for key in [*store._free] if key.startswith("anchor@")]
    asked = [fields for fields in store.read_metadata(anchors) if fields and fields.keys() & names]
    assert len(asked) > 250
    assert all(fields.keys() <= names for fields in asked)
    _, report = prefill(model, store, joined(30, B, 12, D, 8))
    assert report.moved > 400

"""Models with recurrent and convolution states, and with index keys: exact, and taken up again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from chunkcache import RedisChunkCache, enabled
from chunkcache.errors import StoreError
from chunkcache.gain import Gauge
from chunkcache.kv.layers import GrowingLayer
from chunkcache.kv.layout import KVLayout, LayerShape, StateShape
from chunkcache.kv.states import take_states
from chunkcache.model import state_test
from chunkcache.model.state_test import run_state_test
from chunkcache.reuse.check_token import CheckToken
from chunkcache.reuse.states import States, spacing
from chunkcache.stores.base import STATE, Entry
from chunkcache.stores.memory import MemoryStore
from chunkcache.stores.redis import RedisStore
from tests.models import tiny, tokens
from tests.prompts import close, joined, logits, padded
from tests.scripted import Scripted, blobs
from tests.servers import Server

FAMILIES = (
    "qwen3_5_text", "qwen3_next", "olmo_hybrid", "kimi_linear", "bailing_hybrid", "falcon_h1",
    "granitemoehybrid", "nemotron_h", "bamba", "zamba2", "zaya",
)  # fmt: skip
WINDOWS = ("lfm2", "lfm2_moe", "lfm3")
INDEXED = ("deepseek_v32", "glm_moe_dsa", "hy_v4", "axk2")
ONE_OF_EACH = ("qwen3_5_text", "falcon_h1", "nemotron_h", "lfm2")
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sample": {"do_sample": True},
    "beams": {"num_beams": 3},
    "returns": {"do_sample": True, "num_return_sequences": 2},
    "chunks": {"prefill_chunk_size": 90},
}
TEXT, ENDING, OTHER = tokens(150, seed=1), tokens(45, seed=2), tokens(60, seed=3)
PROMPT = joined(TEXT, ENDING)  # 195 tokens; snapshots at 64, 128 and perhaps 192
HYBRID = tiny("qwen3_5_text")


def generate(model: Any, ids: Any, cache: Any = None, **how: Any) -> Tensor:
    torch.manual_seed(7)
    given = ids if isinstance(ids, dict) else {"input_ids": ids}
    given = {"attention_mask": torch.ones_like(given["input_ids"]), **given}
    out = model.generate(
        **given, past_key_values=cache, **({"max_new_tokens": 6, "do_sample": False} | how)
    )
    assert isinstance(out, Tensor)
    if cache is not None:
        cache.flush()
    return out


def new(model: Any, store: Any, **settings: Any) -> RedisChunkCache:
    return RedisChunkCache(model, store, **({"chunk_size": 32} | settings))


def kept(store: MemoryStore, ending: str = "") -> dict[str, str]:
    """Keys of blobs by where their chunk is, of K/V or, with an ending, of what is beside them."""
    keys = [entry.key for page in store.scan("safetensors") for entry in page]
    keys = [key for key in keys if store.sizes([key + ending])[0]]
    told = store.read_metadata(keys)
    return {(fields or {})["positions"]: key for key, fields in zip(keys, told, strict=True)}


# ------------------------------------------------------------------ every family, every way


@pytest.mark.parametrize("kind", [*FAMILIES, *WINDOWS, *INDEXED])
def test_tokens_are_those_of_a_plain_run(kind: str) -> None:
    """Cold, warm, with another ending; also in a second copy of the model."""
    first, second, store = tiny(kind), tiny(kind), MemoryStore()
    other = joined(TEXT, OTHER)
    for model, ids, least in ((first, PROMPT, 0), (second, PROMPT, 128), (second, other, 128)):
        cache = new(model, store)
        assert torch.equal(generate(model, ids, cache), generate(model, ids))
        assert cache.report.skipped == ""
        assert (cache.report.reused >= least) if least else cache.report.reused == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["qwen3_5_text", "lfm2"])
def test_in_every_way_to_generate(kind: str, way: str) -> None:
    model, store, how = tiny(kind), MemoryStore(), WAYS[way]
    wanted = generate(model, PROMPT, **how)
    for reused in (False, True):
        cache = new(model, store)
        assert torch.equal(generate(model, PROMPT, cache, **how), wanted)
        assert bool(cache.report.reused) == reused


@pytest.mark.parametrize(("kind", "beams"), [("falcon_h1", 1), ("nemotron_h", 2), ("lfm2", 2)])
def test_rows_of_unequal_length_and_knowledge(kind: str, beams: int) -> None:
    model, store = tiny(kind), MemoryStore()
    generate(model, PROMPT, new(model, store))  # the store knows one of the rows
    batch = padded(tokens(110, seed=9), PROMPT, joined(TEXT, OTHER)[:, :170], tokens(2, seed=8))
    del batch["position_ids"]
    wanted = generate(model, batch, num_beams=beams)
    for least in (256, 448):
        cache = new(model, store)
        assert torch.equal(generate(model, batch, cache, num_beams=beams), wanted)
        assert cache.report.reused >= least * beams / 2
        assert cache.report.prompt_tokens == beams * (110 + 195 + 170 + 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["qwen3_5_text", "lfm2"])
def test_in_16_bits(kind: str, dtype: torch.dtype) -> None:
    """A cut at a multiple of what scans compute at once changes nothing but rounding."""
    model, store = tiny(kind, dtype=dtype), MemoryStore()
    plain = logits(model, PROMPT)
    for _ in range(2):
        cache = new(model, store)
        assert close(logits(model, PROMPT, cache), plain, 0.05)
        cache.flush()
    assert cache.report.reused >= 128


# ------------------------------------------------------------------ what may be missing or damaged


@pytest.mark.parametrize("kind", ["qwen3_5_text", "lfm2"])
@pytest.mark.parametrize("harm", ["gone", "damaged", "short", "other", "K/V gone", "K/V damaged"])
def test_a_state_or_its_chunk_is_gone_or_damaged(kind: str, harm: str) -> None:
    model, store = tiny(kind), MemoryStore()
    wanted = generate(model, PROMPT)
    generate(model, PROMPT, new(model, store))
    last = max(kept(store, STATE), key=lambda where: int(where.split("-")[1]))
    ends = sorted(int(where.split("-")[1]) for where in kept(store, STATE))
    key = kept(store)[last] + ("" if harm.startswith("K/V") else STATE)
    blob = bytearray(blobs(store, key)[0] or b"")
    if harm.endswith("gone"):
        store.delete([key])
    else:
        blob[-1] ^= harm.endswith("damaged")
        if harm == "short":
            del blob[-4:]
        if harm == "other":
            earlier = kept(store)[f"{ends[-2] - 32}-{ends[-2]}"]
            blob = bytearray(blobs(store, earlier + STATE)[0] or b"")
        store.write([Entry(key, {}, memoryview(blob), merge=True)])
    cache = new(model, store)
    assert torch.equal(generate(model, PROMPT, cache), wanted)
    assert cache.report.reused == ends[-2]
    again = new(model, store)  # and has been written anew
    assert torch.equal(generate(model, PROMPT, again), wanted)
    assert again.report.reused >= ends[-1]


def test_states_of_another_model_are_not_found() -> None:
    store, other = MemoryStore(), tiny("qwen3_5_text", seed=1)
    generate(HYBRID, PROMPT, new(HYBRID, store))
    cache = new(other, store)
    assert torch.equal(generate(other, PROMPT, cache), generate(other, PROMPT))
    assert cache.report.reused == 0


# ------------------------------------------------------------------ where snapshots are


def test_the_second_prompt_with_a_beginning_makes_it_resumable() -> None:
    """K/V are known to the branch, the state is not; the third prompt goes on from there."""
    store = MemoryStore()
    seen = []
    for seed in range(3):
        ids = joined(tokens(230, seed=1), tokens(400, seed=10 + seed))
        cache = new(HYBRID, store, state_every=5000)
        assert torch.equal(generate(HYBRID, ids, cache), generate(HYBRID, ids))
        seen.append(cache.report)
    assert [report.reused for report in seen] == [0, 0, 192]
    reason = seen[1].rows[0].spans[0].reason
    assert "K/V known to 224, no state" in reason
    assert "224 tokens computed again" in reason


def test_explain_says_what_a_missing_state_costs() -> None:
    store = MemoryStore()
    generate(
        HYBRID,
        joined(tokens(230, seed=1), tokens(400, seed=10)),
        new(HYBRID, store, state_every=5000),
    )
    told = new(HYBRID, store).explain(joined(tokens(230, seed=1), tokens(40, seed=11)))
    assert "no state" in str(told.chunks[0].reason)


def test_marks_are_where_a_prompt_can_be_taken_up() -> None:
    store = MemoryStore()
    cache = new(HYBRID, store, state_every=5000)
    cache.mark(140)
    generate(HYBRID, joined(tokens(150, seed=1), tokens(400, seed=10)), cache)
    again = new(HYBRID, store, state_every=5000)
    generate(HYBRID, joined(tokens(150, seed=1), tokens(400, seed=11)), again)
    assert again.report.reused == 128


@pytest.mark.parametrize(("every", "count"), [(64, 9), (256, 2), (5000, 1)])
def test_snapshots_are_as_far_apart_as_asked_for(every: int, count: int) -> None:
    store = MemoryStore()
    generate(HYBRID, tokens(610), new(HYBRID, store, state_every=every))
    assert len(kept(store, STATE)) == count


def test_windows_are_at_each_chunk_in_one_forward() -> None:
    model, store, seen = tiny("lfm2"), MemoryStore(), []
    watch = model.get_input_embeddings().register_forward_hook(
        lambda _, given, __: seen.append(given[0].shape[1])
    )
    generate(model, tokens(610), new(model, store, hooks="observers"), max_new_tokens=1)
    watch.remove()
    assert seen[-1] == 610
    assert len(kept(store, STATE)) == 9


def test_spacing_goes_by_bytes() -> None:
    kv = LayerShape(4, 256, 4, 256)
    states = (StateShape("a", (64, 128, 128), torch.float32),)
    layout = KVLayout(torch.bfloat16, (kv,), states)
    assert layout.state_bytes == 4 << 20
    assert spacing(layout, 0) == int((4 << 20) / (0.4 * 4096))
    assert spacing(layout, 640) == 640


# ------------------------------------------------------------------ several turns


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_turns_of_one_object(kind: str) -> None:
    """Going on, going back to a snapshot, and beginning anew."""
    model, store = tiny(kind), MemoryStore()
    cache = new(model, store)
    told = generate(model, PROMPT, cache)
    for ids in (
        joined(told, OTHER),  # continues
        joined(told[:, :-4], ENDING),  # the end of the answer was edited
        joined(PROMPT[:, :140], OTHER),  # the prompt was
        tokens(90, seed=30),  # another one
        PROMPT,
    ):
        assert torch.equal(generate(model, ids, cache), generate(model, ids))
        assert cache.report.skipped == ""
    assert cache.report.reused >= 128


def test_snapshots_of_text_that_was_dropped_are_forgotten() -> None:
    """The second prompt takes none where the first one had one."""
    cache = new(HYBRID, MemoryStore(), state_every=5000)
    cache.mark(64)
    second = joined(PROMPT[:, :100], tokens(300, seed=20))
    for ids, reused in ((PROMPT, 0), (second, 64), (joined(second[:, :200], OTHER), 64)):
        assert torch.equal(generate(HYBRID, ids, cache), generate(HYBRID, ids))
        assert cache.report.reused == reused


def test_a_chat_whose_thinking_is_stripped() -> None:
    """Each turn reuses what comes before the last answer, to a multiple of 64."""
    store, history = MemoryStore(), tokens(200, seed=4)
    reused = []
    for turn in range(6):
        prompt = joined(history, tokens(40, seed=50 + turn), tokens(5, seed=99))
        cache = new(HYBRID, store)
        told = generate(HYBRID, prompt, cache, max_new_tokens=20)
        assert torch.equal(told, generate(HYBRID, prompt, max_new_tokens=20))
        reused.append((cache.report.reused, history.shape[1]))
        answer = told[:, prompt.shape[1] + 8 :]  # the first tokens were its thinking
        history = joined(prompt[:, :-5], answer)
    assert reused == [(0, 200), (192, 252), (256, 304), (320, 356), (384, 408), (384, 460)]


@pytest.mark.parametrize("kind", ["lfm2", "lfm3"])
def test_prompt_lookup(kind: str) -> None:
    model, store = tiny(kind), MemoryStore()
    ids = joined(TEXT[:, :80], TEXT[:, :80], TEXT[:, :20])
    how = {"prompt_lookup_num_tokens": 4}
    wanted = generate(model, ids, **how)
    for _ in range(2):
        cache = new(model, store)
        assert torch.equal(generate(model, ids, cache, **how), wanted)
    assert cache.report.reused >= 128


def test_one_by_one_is_another_thing_for_some() -> None:
    """What they compute in an answer is not stored, and not gone on from as a prompt's."""
    model, store = tiny("nemotron_h"), MemoryStore()
    cache = new(model, store)
    assert cache._conversation.self_test.steps_differ
    told = generate(model, PROMPT, cache, max_new_tokens=80)
    assert max(int(where.split("-")[1]) for where in kept(store)) == 192
    ids = joined(told, ENDING)
    assert torch.equal(generate(model, ids, cache), generate(model, ids))
    assert cache.report.reused == 128


def test_nothing_is_read_behind_tokens_computed_one_by_one() -> None:
    """A plain cache goes on from these, too."""
    model, store = tiny("nemotron_h"), MemoryStore()
    cache = new(model, store)
    told = generate(model, PROMPT, cache, max_new_tokens=30)
    generate(model, joined(told, OTHER, OTHER), new(model, store))
    held = cache.get_seq_length()
    rest = joined(told, OTHER, OTHER)[:, held:]
    mask = torch.ones(1, held + rest.shape[1], dtype=torch.long)
    with torch.no_grad():
        model(rest, attention_mask=mask, past_key_values=cache, logits_to_keep=1)
    assert cache.report.reused == held


def test_two_tokens_at_least_are_computed() -> None:
    """One by itself would be another thing."""
    model, store = tiny("nemotron_h"), MemoryStore()
    logits(model, PROMPT, first := new(model, store, state_every=64))
    first.flush()
    for tokens_given, reused in ((129, 64), (130, 128)):
        cache = new(model, store, write=False)
        plain = logits(model, PROMPT[:, :tokens_given])
        assert close(logits(model, PROMPT[:, :tokens_given], cache), plain)
        assert cache.report.reused == reused


# ------------------------------------------------------------------ the rest


def test_calls_by_hand_need_no_positions() -> None:
    """Bamba counts from 0 in each forward; what is trimmed is given positions."""
    model, store = tiny("bamba"), MemoryStore()
    plain = logits(model, PROMPT)
    for reused in (0, 128):
        cache = new(model, store)
        assert close(logits(model, PROMPT, cache), plain)
        cache.flush()
        assert cache.report.reused >= reused


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("jamba", "begins with no state"),
        ("zamba", "begins with no state"),
        ("recurrent_gemma", "in its modules"),
    ],
)
def test_what_cannot_be_taken_up_falls_back(kind: str, why: str) -> None:
    model, store = tiny(kind), MemoryStore()
    wanted = generate(model, PROMPT)
    for _ in range(2):
        cache = new(model, store)
        assert torch.equal(generate(model, PROMPT, cache), wanted)
        assert why in cache.report.skipped
    assert not kept(store)


@pytest.mark.parametrize("codec", ["safetensors+zstd", "safetensors-int8"])
@pytest.mark.parametrize("kind", ["qwen3_5_text", "deepseek_v32"])
def test_codecs(kind: str, codec: str) -> None:
    """States keep their bits in each."""
    model, store = tiny(kind, dtype=torch.bfloat16), MemoryStore()
    cold, warm = new(model, store, codec=codec), new(model, store, codec=codec)
    plain = generate(model, PROMPT)
    assert torch.equal(generate(model, PROMPT, cold), plain)
    generate(model, PROMPT, warm)
    assert warm.report.reused >= 128
    assert warm.report.exact == (codec != "safetensors-int8")


def test_bits_are_the_same_with_reproducible() -> None:
    model, store = tiny("qwen3_5_text", dtype=torch.bfloat16), MemoryStore()
    batch = padded(tokens(150, seed=1), tokens(290, seed=2))
    del batch["position_ids"]
    for prompt in ({"input_ids": PROMPT}, batch):
        found = []
        for _ in range(3):
            cache = RedisChunkCache(model, store, reproducible=True, piece_tokens=64)
            out = model.generate(
                **prompt, past_key_values=cache, max_new_tokens=4, do_sample=False,
                output_logits=True, return_dict_in_generate=True,
            )  # fmt: skip
            cache.flush()
            found.append((torch.stack(out.logits), cache.report.reused))
            if len(found) == 2:
                keys = list(kept(store).values())
                store.delete(keys[::2])
        assert all(torch.equal(found[0][0], each) for each, _ in found)
        assert found[1][1] > 0


def test_boundaries_are_where_scans_are_cut() -> None:
    from chunkcache.tokens.chunking import Grid, cut

    chunks = cut(tokens(300)[0].numpy(), Grid(32), b"salt")
    assert [chunk.stop for chunk in States.boundaries(chunks)] == [64, 128, 192, 256]
    chunks = cut(tokens(300)[0].numpy(), Grid(50), b"salt")
    assert [chunk.stop for chunk in States.boundaries(chunks)] == [50, 100, 150, 200, 250, 300]


# ------------------------------------------------------------------ what a plain prefill gives


def kv_error(cache: RedisChunkCache, model: Any, ids: Tensor) -> float:
    """How far the K/V that a cache object holds are from those of a plain prefill."""
    plain = DynamicCache(config=model.config)
    logits(model, ids, plain)  # type: ignore[arg-type]
    return max(
        float((ours.keys - its.keys).abs().max() / its.keys.abs().max())
        for ours, its in zip(cache.layers, plain.layers, strict=True)
        if isinstance(ours, GrowingLayer)
    )


def test_single_steps_by_hand_need_no_positions_either() -> None:
    """Or K/V at position 0 would be stored for every token."""
    model, store = tiny("bamba"), MemoryStore()
    cache = new(model, store)
    with torch.no_grad():
        for at in range(100):
            model(PROMPT[:, at : at + 1], past_key_values=cache, use_cache=True)
    assert kv_error(cache, model, PROMPT[:, :100]) < 1e-4
    for _ in range(3):
        assert torch.equal(generate(model, PROMPT, new(model, store)), generate(model, PROMPT))


def test_no_piece_of_one_token_where_that_is_another_thing() -> None:
    model, store = tiny("nemotron_h"), MemoryStore()
    cache = new(model, store, piece_tokens=64)
    generate(model, PROMPT[:, :127], cache, max_new_tokens=1)
    generate(model, PROMPT, cache, max_new_tokens=1)
    assert kv_error(cache, model, PROMPT) < 1e-5


@pytest.mark.parametrize("kind", ONE_OF_EACH)
@pytest.mark.parametrize("holes", ["inside", "on the right"])
def test_masks_with_holes_fall_back(kind: str, holes: str) -> None:
    """A state takes in what is masked, but in a forward from the first token on."""
    model, store = tiny(kind), MemoryStore()
    ids = torch.cat([PROMPT, tokens(195, seed=5)])
    mask = torch.ones_like(ids)
    mask[0, slice(140, 160) if holes == "inside" else slice(150, None)] = 0
    for rows in (1, 2):
        prompt = {"input_ids": ids[:rows], "attention_mask": mask[:rows]}
        for _ in range(2):
            cache = new(model, store)
            assert torch.equal(generate(model, prompt, cache), generate(model, prompt))
            assert "attention_mask" in cache.report.skipped


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["jamba", "zamba"])
def test_a_scan_without_a_state_is_seen_however_little_it_does(
    kind: str, dtype: torch.dtype
) -> None:
    model = tiny(kind, dtype=dtype, initializer_range=0.05)
    assert "begins with no state" in run_state_test(model).bypass_reason


def test_snapshots_that_are_not_written_do_not_pile_up() -> None:
    cache, history = new(HYBRID, MemoryStore(), write=False), tokens(70)
    for turn in range(5):
        history = joined(generate(HYBRID, history, cache), tokens(60, seed=turn))
    assert cache._conversation.states is not None
    assert len(cache._conversation.states.held) <= 3


def test_snapshots_between_other_chunks_serve_longer_prompts() -> None:
    """100 tokens a chunk: a long prompt has ends at multiples of 64, a short one has not."""
    store, ids = MemoryStore(), tokens(1700)
    logits(HYBRID, ids[:, :1500], first := new(HYBRID, store, chunk_size=100))
    first.flush()
    later = new(HYBRID, store, chunk_size=100)
    assert close(logits(HYBRID, ids, later), logits(HYBRID, ids))
    assert later.report.reused == 1400


def test_a_batch_says_why_it_is_computed() -> None:
    with torch.no_grad():
        HYBRID(tokens(70, rows=2), past_key_values=(cache := new(HYBRID, MemoryStore())))
    assert "logits of every token" in cache.report.skipped


def test_a_batch_says_what_went_wrong_with_its_rows() -> None:
    store = Scripted(fetch=StoreError("the server is gone"))
    ids = padded(PROMPT, joined(TEXT, OTHER))
    cache = new(HYBRID, store)
    assert torch.equal(generate(HYBRID, ids, cache), generate(HYBRID, ids))
    assert cache.report.errors == ["the server is gone"]  # of the second row, which begins alike
    assert cache.report.store_errors
    assert cache.report.prefill_ms > 0


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_one_padded_row_over_several_turns(kind: str) -> None:
    """Its columns are not positions, and no state may be kept as if they were."""
    model, store = tiny(kind), MemoryStore()
    row = {
        "input_ids": torch.cat([torch.zeros(1, 20, dtype=torch.long), PROMPT], 1),
        "attention_mask": torch.cat([torch.zeros(1, 20), torch.ones(1, 195)], 1).long(),
    }
    cache = new(model, store)
    for _ in range(2):
        told = generate(model, row, cache)
        assert torch.equal(told, generate(model, row))
        ids = torch.cat([told, tokens(140, seed=40)], 1)
        row = {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) >= 20)[None].long()}
    text = told[:, 20:]
    for _ in range(2):
        fresh = new(model, store)
        assert torch.equal(generate(model, text, fresh), generate(model, text))
        assert close(logits(model, text, new(model, store)), logits(model, text))


def test_explain_says_what_each_row_reuses() -> None:
    store = MemoryStore()
    generate(HYBRID, PROMPT, new(HYBRID, store))
    batch = padded(PROMPT, tokens(90, seed=2), joined(TEXT, OTHER), tokens(1, seed=3))
    told = new(HYBRID, store).explain(batch["input_ids"], attention_mask=batch["attention_mask"])
    logits(HYBRID, batch, cache := new(HYBRID, store))
    assert sum(c.tokens for c in told.chunks if c.kind == "reused") == cache.report.reused == 256
    assert sum(c.tokens for c in told.chunks) == cache.report.prompt_tokens


def test_whole_pieces_of_a_batch_are_stored_once() -> None:
    store, batch = MemoryStore(), padded(tokens(200, seed=1), tokens(150, seed=2))
    logits(HYBRID, batch, RedisChunkCache(HYBRID, store, reproducible=True, piece_tokens=64))
    keys = [entry.key for page in store.scan("safetensors") for entry in page]
    assert len(keys) == 3 + 2


def test_states_to_go_back_to_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of a prompt is computed again, behind what was held, though snapshots came since."""
    model = tiny("qwen3_5_text")  # which will not believe the store any more
    store, ids = MemoryStore(), tokens(480)
    generate(model, ids[:, :250], new(model, store, state_every=64))
    cache = new(model, store, state_every=64)
    logits(model, ids[:, :100], cache)
    monkeypatch.setattr(CheckToken, "difference", lambda _: 9.0)
    assert close(logits(model, ids[:, 100:], cache), logits(model, ids))
    assert "not those that the model computes" in cache.report.skipped


# ------------------------------------------------------------------ answers, and other settings


@pytest.mark.parametrize(
    ("kind", "reused"), [("qwen3_5_text", 256), ("lfm2", 256), ("nemotron_h", 128)]
)
def test_the_next_turn_goes_on_from_the_answer(kind: str, reused: int) -> None:
    """In another object too, but where single tokens are computed in another way."""
    model, store = tiny(kind), MemoryStore()
    told = generate(model, PROMPT, new(model, store, state_every=64), max_new_tokens=80)
    ids = joined(told, OTHER)
    cache = new(model, store)
    assert torch.equal(generate(model, ids, cache), generate(model, ids))
    assert cache.report.reused == reused


def test_snapshots_of_an_answer_are_as_far_apart_as_those_of_a_prompt() -> None:
    store = MemoryStore()
    generate(HYBRID, PROMPT, new(HYBRID, store, state_every=150), max_new_tokens=180)
    ends = sorted(int(where.split("-")[1]) for where in kept(store, STATE))
    assert ends == [128, 320]


def test_min_gain_counts_the_bytes_of_a_state(monkeypatch: pytest.MonkeyPatch) -> None:
    store, asked = MemoryStore(), []
    generate(HYBRID, PROMPT, new(HYBRID, store))
    monkeypatch.setattr(Gauge, "pays", lambda _, tokens, nbytes, __: bool(asked.append(nbytes)))
    cache = new(HYBRID, store)
    assert torch.equal(generate(HYBRID, PROMPT, cache), generate(HYBRID, PROMPT))
    kv = [key for where, key in kept(store).items() if int(where.split("-")[1]) <= 128]
    layout = cache._conversation.self_test.layout
    assert layout is not None
    assert asked == [sum(store.sizes(kv)) + layout.state_bytes]
    assert cache.report.reused == 0


def test_snapshots_are_sealed() -> None:
    store, seen = MemoryStore(), []
    for digit in "aab":
        cache = new(HYBRID, store, seal=digit * 64)
        assert torch.equal(generate(HYBRID, PROMPT, cache), generate(HYBRID, PROMPT))
        seen.append(cache.report.reused)
        assert cache._conversation.states is not None
        bits = [state.numpy().tobytes()[:64] for state in cache._conversation.states.held[128]]
    assert seen == [0, 128, 0]
    stored = [blobs(store, key + STATE)[0] or b"" for key in kept(store, STATE).values()]
    assert stored
    assert not any(piece in bytes(blob) for blob in stored for piece in bits if any(piece))


def test_snapshots_expire_with_their_chunks(redis_server: Server) -> None:
    with RedisStore(redis_server.tcp_url, ttl=1000) as store:
        for _ in range(2):
            generate(HYBRID, PROMPT, cache := new(HYBRID, store))
        assert cache.report.reused >= 128
    client = redis_server.client()
    names = [name for name in client.keys("*") if name.endswith(STATE.encode())]
    assert len(names) == 3
    assert all(900_000 < client.pttl(name) <= 1_000_000 for name in names)


def test_threads_share_a_model() -> None:
    store = MemoryStore()
    prompts = [joined(TEXT, tokens(40, seed=50 + at)) for at in range(4)]
    wanted = [generate(HYBRID, ids) for ids in prompts]

    def ask(ids: Tensor) -> list[Tensor]:
        told = []
        for _ in range(2):
            cache = new(HYBRID, store)
            told.append(HYBRID.generate(ids, past_key_values=cache, max_new_tokens=6))
            cache.flush()
        return told

    with ThreadPoolExecutor(4) as pool:
        for told, expected in zip(pool.map(ask, prompts), wanted, strict=True):
            assert all(torch.equal(each, expected) for each in told)


@pytest.mark.parametrize("kind", ["qwen3_5_text", "lfm2"])
def test_chunks_that_overlap(kind: str) -> None:
    model, store = tiny(kind), MemoryStore()
    for reused in (0, 128):
        cache = new(model, store, chunk_overlap=8)
        assert torch.equal(generate(model, PROMPT, cache), generate(model, PROMPT))
        assert cache.report.reused == reused


def test_within_enabled() -> None:
    store, wanted = MemoryStore(), generate(HYBRID, PROMPT)
    for reused in (0, 128):
        with enabled(HYBRID, store, chunk_size=32) as used:
            assert torch.equal(generate(HYBRID, PROMPT), wanted)
            store.flush()
            assert used.report.reused == reused


def test_a_hook_that_edits_hidden_states_falls_back() -> None:
    model, store = tiny("qwen3_5_text"), MemoryStore()
    for _ in range(2):
        hook = model.model.layers[1].register_forward_hook(lambda _, __, out: out.flip(-1))
        cache = new(model, store)
        steered = generate(model, PROMPT)
        assert torch.equal(generate(model, PROMPT, cache), steered)
        assert "forward hook" in cache.report.skipped
        hook.remove()
        assert not torch.equal(generate(model, PROMPT, new(model, store)), steered)


def test_states_on_several_devices_fall_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("qwen3_5_text", seed=8)
    monkeypatch.setattr(
        state_test, "take_states",
        lambda layers: [*take_states(layers), torch.empty(1, device="meta")],
    )  # fmt: skip
    cache = new(model, MemoryStore())
    generate(model, PROMPT, cache)
    assert "several devices" in cache.report.skipped

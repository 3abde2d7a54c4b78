"""Logits and losses of every token out of the store: those of a plain run, or none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from chunkcache import RedisChunkCache, open_store
from chunkcache.inventory import catalog
from chunkcache.keys import CODECS, PLAIN, ZSTD
from chunkcache.model.head import HeadInput
from chunkcache.reuse.hook import uninstall
from chunkcache.stores.base import OUTPUTS, ChunkStore, Entry, Part, chunk_of
from chunkcache.stores.memory import MemoryStore
from tests.models import tiny, tokens
from tests.test_processes import ENVIRONMENT

DENSE = (
    "llama", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "cohere2", "gpt2", "gpt_neox",
    "bloom", "opt", "granite", "falcon", "mpt",
)  # fmt: skip
EXPERTS = ("qwen2_moe", "deepseek_v3", "gpt_oss", "llama4_text")  # torch has none in float64
IDS = tokens(100, seed=1)
LABELS = IDS.clone().index_fill(1, torch.arange(3, 40, device=IDS.device), -100)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny("llama")


@pytest.fixture
def store() -> ChunkStore:
    return MemoryStore()


def new(model: Any, store: ChunkStore, **settings: Any) -> RedisChunkCache:
    return RedisChunkCache(model, store, **{"chunk_size": 16, **settings})


def score(model: Any, ids: Tensor = IDS, cache: Any = None, **more: Any) -> Any:
    with torch.no_grad():
        return model(ids, past_key_values=cache, **more)


def far(got: Any, want: Any) -> float:
    """How far logits and loss are from those of a plain run, of the largest."""
    assert got.logits.shape == want.logits.shape
    error = float((got.logits - want.logits).abs().max() / want.logits.abs().max())
    if want.get("loss") is not None:
        error = max(error, abs(float(got.loss / want.loss) - 1))
    return error


def check(
    model: Any, store: ChunkStore, ids: Tensor = IDS, bound: float = 1e-4, **more: Any
) -> Any:
    """Score with a new cache, compare with a plain run. The cache's report."""
    settings = more.pop("settings", {})
    cache = new(model, store, **settings)
    assert far(score(model, ids, cache, **more), score(model, ids, **more)) <= bound
    assert cache.flush(5)
    return cache.report


@pytest.mark.parametrize(
    ("model_type", "dtype", "bound"),
    [(name, torch.float32, 1e-4) for name in DENSE + EXPERTS]
    + [(name, torch.float64, 1e-9) for name in DENSE],
)
def test_logits_and_loss_are_those_of_a_plain_run(
    model_type: str, dtype: torch.dtype, bound: float
) -> None:
    model, store = tiny(model_type, dtype=dtype), MemoryStore()
    for computed in (100, 1):
        report = check(model, store, bound=bound, labels=LABELS)
        assert (report.computed, report.skipped) == (computed, "")
    other = torch.cat([IDS[:, :70], tokens(30, seed=2)], 1)
    report = check(model, store, other, bound)
    assert report.reused == 64


@pytest.mark.parametrize(
    "keep",
    [0, 1, 7, 60, 100, 150, torch.tensor([3, 50, -1]), torch.tensor([98, 99]),
     torch.arange(100) % 3 == 0],
    ids=["all", "last", "few", "many", "each", "more", "indices", "end", "mask"],
)  # fmt: skip
def test_logits_to_keep_means_what_it_means_to_the_model(
    model: Any, store: ChunkStore, keep: Any
) -> None:
    check(model, store)
    report = check(model, store, logits_to_keep=keep)
    assert report.computed == 1
    assert report.skipped == ""


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows(model: Any, store: ChunkStore, side: str) -> None:
    ids, mask = IDS.repeat(3, 1), torch.ones(3, 100, dtype=torch.long)
    ids[2, 50:] = tokens(50, seed=3)[0]
    for row, pads in enumerate((0, 9, 23)):
        hidden = slice(0, pads) if side == "left" else slice(100 - pads, None)
        mask[row, hidden] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    more = {"attention_mask": mask, "position_ids": positions}
    labels = ids.masked_fill(mask == 0, -100)
    want = score(model, ids, labels=labels, **more)
    for _warm in (False, True):
        for labelled in (True, False):
            cache = new(model, store)
            got = score(model, ids, cache, labels=labels if labelled else None, **more)
            seen = mask.bool()
            assert torch.allclose(got.logits[seen], want.logits[seen], atol=1e-4)
            assert not labelled or abs(float(got.loss - want.loss)) < 1e-5
            cache.flush(5)
    assert cache.report.reused > 150
    if side == "left":  # what stands before the first token is no number that looks right
        assert got.logits[2, :20].isnan().all()
        score(model, ids, cache := new(model, store), labels=labels, **more)
        assert "labels count outputs of padding" in cache.report.skipped
        labels[torch.arange(3), mask.argmax(1)] = -100
        want = score(model, ids, labels=labels, **more)
        got = score(model, ids, cache := new(model, store), labels=labels, **more)
        assert abs(float(got.loss - want.loss)) < 1e-5
        assert cache.report.skipped == ""


def test_rows_get_their_own_outputs(model: Any, store: ChunkStore) -> None:
    ids = tokens(100, rows=3, seed=5)
    for computed in (300, 3):
        assert check(model, store, ids).computed == computed
    assert check(model, store, ids[[2, 0]]).computed == 2
    mixed = torch.cat([ids[:1], IDS])
    assert check(model, store, mixed).computed == 200


def test_part_by_part_with_one_cache(model: Any, store: ChunkStore) -> None:
    check(model, store)
    want = score(model)
    cache = new(model, store)
    parts = [score(model, part, cache).logits for part in IDS.split(48, 1)]
    assert torch.allclose(torch.cat(parts, 1), want.logits, atol=1e-4)
    assert cache.report.computed <= 3


def outputs_in(store: ChunkStore) -> list[str]:
    chunks = [entry for page in store.scan("safetensors") for entry in page]
    return [entry.key + OUTPUTS for entry in chunks if entry.outputs]


def test_only_who_wants_them_pays(model: Any, store: ChunkStore) -> None:
    cache = new(model, store)
    model.generate(IDS, past_key_values=cache, max_new_tokens=20, do_sample=False)
    cache.flush(5)
    assert outputs_in(store) == []
    report = check(model, store)  # K/V alone are known
    assert (report.computed, report.reused) == (100, 0)
    assert "no outputs" in report.skipped
    listed = [entry for page in store.scan("safetensors") for entry in page]
    assert sum(entry.outputs > 0 for entry in listed) == 7
    for entry in listed:
        assert ("outputs" in (entry.metadata or {})) == bool(entry.outputs)
    assert catalog.stats(store).total.bytes == sum(e.nbytes + e.outputs for e in listed)
    assert check(model, store).computed == 1


@pytest.mark.parametrize("loss", ["evicted", "damaged", "swapped", "short", "of K/V"])
def test_outputs_that_cannot_be_used_are_computed(model: Any, store: ChunkStore, loss: str) -> None:
    check(model, store)
    chunks = {
        (entry.metadata or {})["positions"]: entry
        for page in store.scan("safetensors")
        for entry in page
    }
    entry, other = chunks["32-48"], chunks["48-64"]
    key = entry.key + OUTPUTS
    blob = memoryview(bytearray(entry.outputs))
    source = {"swapped": other.key + OUTPUTS, "of K/V": entry.key}.get(loss, key)
    if loss == "of K/V":
        blob = memoryview(bytearray(entry.nbytes))
    assert list(store.fetch([Part(source, 0, [blob])])) == [True]
    if loss == "evicted":
        assert store.delete([key]) == 1
        assert store.sizes([entry.key]) == [entry.nbytes]
    else:
        blob[-1 if loss == "damaged" else 0] ^= loss == "damaged"
        store.write([Entry(key, {}, blob[:-8] if loss == "short" else blob)])
    report = check(model, store)
    assert (report.reused, report.computed) == (32, 68)
    assert (report.errors != []) == (loss != "evicted")
    assert check(model, store).computed == 1  # they were stored again


def test_of_another_model_is_nothing_known(model: Any, store: ChunkStore) -> None:
    check(model, store)
    assert check(tiny("llama", seed=1), store).computed == 100


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("secret", ["", "0f" * 32])
def test_codecs(model: Any, store: ChunkStore, codec: str, secret: str) -> None:
    settings = {"codec": codec} | ({"seal": secret} if secret else {})
    exact = codec in (PLAIN, PLAIN + ZSTD)
    for warm in (False, True):
        report = check(model, store, settings=settings)
        assert report.computed == (1 if warm and exact else 100)
        assert (report.skipped == "") == exact
    if secret and exact:
        keys = outputs_in(store)
        blob = bytearray(store.sizes(keys[:1])[0])
        list(store.fetch([Part(keys[0], 0, [memoryview(blob)])]))
        assert b"hidden" not in blob


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_more_than_logits_is_computed_in_full(store: ChunkStore, name: str) -> None:
    model = tiny("llama", attn_implementation="eager")
    for _ in range(2):
        report = check(model, store, **{name: True})
        assert report.computed == 100
        assert name in report.skipped


def test_gradients_are_computed_in_full(model: Any, store: ChunkStore) -> None:
    check(model, store)
    cache = new(model, store)
    out = model(IDS, labels=IDS, past_key_values=cache)
    assert out.loss.requires_grad
    assert "gradients" in cache.report.skipped
    assert cache.report.computed == 100


def test_another_process_finds_them(store: ChunkStore, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store"
    code = (
        "import torch; from tests.models import tiny, tokens; from chunkcache import *\n"
        f"cache = RedisChunkCache(tiny('llama'), {url!r}, chunk_size=16)\n"
        "model = cache._context.model\n"
        "with torch.no_grad(): model(tokens(100, seed=1), past_key_values=cache)\n"
        "assert cache.flush(5)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT)
    with open_store(url) as found:
        report = check(tiny("llama"), found, labels=LABELS)
    assert report.computed == 1


# ------------------------------------------------------------------ heads that are called otherwise


WAY = "CHUNKCACHE_TEST_WAY"  # in the environment, which no identity of a model sees


class Moody(nn.Linear):
    """A head that its model gives what it should, at first."""

    def __call__(self, hidden: Tensor) -> Tensor:
        if os.environ.get(WAY) == "flat":
            return super().__call__(hidden.flatten(0, 1)).unflatten(0, hidden.shape[:2])
        if os.environ.get(WAY) == "twice":
            super().__call__(hidden)
        if os.environ.get(WAY) == "by name":
            return super().__call__(input=hidden)
        return super().__call__(hidden)


WAYS = ["flat", "twice", "by name"]


def with_moody_head() -> Any:
    model: Any = tiny("llama")
    model.lm_head.__class__ = Moody
    return model


@pytest.mark.parametrize("way", [*WAYS, "none"])
def test_a_head_that_is_called_otherwise(
    store: ChunkStore, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_moody_head()
    monkeypatch.setenv(WAY, way)
    if way == "none":
        model.get_output_embeddings = lambda: None
    for _ in range(2):
        report = check(model, store, labels=LABELS)
        assert report.computed == 100
        assert "labels were given" in report.skipped
        assert "output embeddings" in report.skipped
    assert outputs_in(store) == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("more", [{}, {"logits_to_keep": 60}], ids=["all", "60"])
def test_a_head_that_is_called_otherwise_later(
    store: ChunkStore, way: str, more: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = with_moody_head()
    for computed in (100, 1):
        assert check(model, store).computed == computed
    monkeypatch.setenv(WAY, way)
    assert check(model, store, **more).computed == (60 if more else 100)
    report = check(model, store)
    assert report.computed == 100
    assert "output embeddings" in report.skipped


def test_a_test_tells_hidden_states_of_other_tokens(
    store: ChunkStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = HeadInput.__init__

    def off_by_one(self: Any, *args: Any, **more: Any) -> None:
        plain(self, *args, **more)
        if self._before is not None:
            self._before = self._before.roll(1, 1)

    monkeypatch.setattr(HeadInput, "__init__", off_by_one)
    for _ in range(2):
        report = check(tiny("llama"), store)
        assert report.computed == 100
        assert "stored hidden states" in report.skipped


def test_the_model_is_left_as_it_was(store: ChunkStore) -> None:
    model: Any = tiny("llama")
    check(model, store)
    assert model.lm_head._forward_pre_hooks
    uninstall(model)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_keys_of_outputs() -> None:
    assert chunk_of("a@b" + OUTPUTS) == "a@b" == chunk_of("a@b")

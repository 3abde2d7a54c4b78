"""Doctor: what it finds of real models."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from chunkcache import RedisChunkCache, catalog
from chunkcache.doctor.checks import Health, ModelHealth
from chunkcache.doctor.trial import examine_model, replanning
from chunkcache.stores.memory import MemoryStore
from tests.models import tiny, tokens


def quiet(_: str) -> None:
    """Nobody listens."""


@pytest.mark.parametrize("codec", ["safetensors", "safetensors-bf16", "safetensors-int8+zstd"])
def test_a_model(monkeypatch, codec):
    monkeypatch.setenv("CHUNKCACHE_CODEC", codec)
    model = tiny()
    with MemoryStore() as store:
        found = examine_model("a model", model, store, quiet)
        with RedisChunkCache(model, store, codec=codec.removesuffix("+zstd")) as cache:
            model.generate(tokens(128), past_key_values=cache, max_new_tokens=1)
        (entry,) = catalog.entries(store)
    assert (found.bypass_reason, found.moving, found.dtype) == ("", "", "float32")
    assert found.token_bytes == pytest.approx(entry.nbytes / 128, rel=0.01)
    assert f": 1 GB holds {1e9 / found.token_bytes:,.0f} tokens" in str(found)
    assert found.break_even is not None
    assert "K/V can be moved, too" in str(found)


def test_a_model_that_cannot_be_moved():
    with MemoryStore() as store:
        found = examine_model("a model", tiny("gpt2"), store, quiet)
    assert found.bypass_reason == ""
    assert "cannot be moved: " in str(found)


def test_a_model_with_states():
    with MemoryStore() as store:
        found = examine_model("a model", tiny("qwen3_5_text"), store, quiet)
    assert found.bypass_reason == ""
    assert found.state_bytes == 12_288
    assert "a snapshot of its states has 12,288 bytes" in str(found)


@pytest.mark.parametrize("kind", ["jamba", "mamba"])
def test_models_that_are_computed_as_usual(kind):
    with MemoryStore() as store:
        found = examine_model("a model", tiny(kind), store, quiet)
    assert "! falls back to normal prefill: " in str(found)
    assert not Health((), found).good


def test_attention_that_plans_anew_for_each_length(monkeypatch):
    """On a GPU, unless it was switched off."""
    model, told = tiny(), []
    on_a_gpu = SimpleNamespace(device=torch.device("cuda"))
    assert replanning(model) == "", "there is no GPU"
    monkeypatch.setattr(model, "parameters", lambda: iter([on_a_gpu]))
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        for enabled in (True, False):
            torch.backends.cuda.enable_cudnn_sdp(enabled)
            told.append(replanning(model))
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
    assert "enable_cudnn_sdp(False)" in told[0]
    assert told[1] == ""
    assert told[0] in str(ModelHealth("a model", token_bytes=1, note=told[0]))

"""Footprint: what the configuration tells is what the model then caches."""

from __future__ import annotations

import pytest
import torch

from chunkcache import RedisChunkCache, UnsupportedModelError, catalog
from chunkcache.doctor.footprint import chunk_bytes, layout_of
from chunkcache.model.proof import measure_layout
from chunkcache.stores.memory import MemoryStore
from tests.models import tiny, tiny_config, tokens


@pytest.mark.parametrize(
    "kind", ["llama", "gemma3n_text", "gpt2", "mixtral", "deepseek_v3", "falcon", "gpt_oss"]
)
def test_it_is_what_the_model_caches(kind):
    assert layout_of(tiny_config(kind)) == measure_layout(tiny(kind)).layout


def test_types():
    config = tiny_config("llama", dtype="bfloat16")
    assert layout_of(config).dtype is torch.bfloat16
    assert layout_of(config, torch.float16).dtype is torch.float16
    assert config.pad_token_id == 0  # the configuration stays as it was


@pytest.mark.parametrize("kind", ["mamba", "lfm2"])
def test_models_whose_kv_cannot_be_reused(kind):
    with pytest.raises(UnsupportedModelError, match=r"computed as usual|without chunkcache"):
        layout_of(tiny_config(kind))


def test_shapes_that_only_a_run_would_tell(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("no numbers")

    monkeypatch.setattr("transformers.LlamaModel.forward", fail)
    with pytest.raises(UnsupportedModelError, match=r"(?s)no numbers.*without --plan"):
        layout_of(tiny_config("llama"))


@pytest.mark.parametrize("codec", ["safetensors", "safetensors-bf16", "safetensors-int8"])
def test_the_bytes_of_a_chunk(codec):
    model, store = tiny(), MemoryStore()
    RedisChunkCache(model, store, codec=codec)
    with RedisChunkCache(model, store, codec=codec) as cache:
        model.generate(tokens(128), past_key_values=cache, max_new_tokens=1)
    (entry,) = catalog.entries(store)
    told = chunk_bytes(layout_of(model.config), 128, codec)
    assert told == pytest.approx(entry.nbytes, rel=0.01)
    assert chunk_bytes(layout_of(model.config), 128, codec + "+zstd") == told

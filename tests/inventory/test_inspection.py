"""What one blob holds, and blobs that hold nonsense."""

from __future__ import annotations

import json

import pytest
import torch

from chunkcache import RedisChunkCache
from chunkcache.inventory import catalog
from chunkcache.inventory.inspection import Inspection, inspect
from chunkcache.stores.base import Entry
from chunkcache.stores.memory import MemoryStore
from tests.models import tiny, tokens


def filled(**settings) -> tuple[MemoryStore, str]:
    """A store with one chunk, and its key."""
    model, store = tiny(), MemoryStore()
    with RedisChunkCache(model, store, chunk_size=128, **settings) as cache:
        model.generate(tokens(129), past_key_values=cache, max_new_tokens=1)
        cache.flush()
    (entry,) = catalog.entries(store)
    return store, entry.key


@pytest.mark.parametrize("codec", ["safetensors", "safetensors-bf16"])
def test_the_norms_are_those_of_the_model(codec):
    store, key = filled(codec=codec)
    model = tiny()
    with torch.no_grad():
        plain = model(tokens(129)).past_key_values
    found = inspect(store, key)
    assert not found.unread
    assert len(found.header) == 1 + 2 * model.config.num_hidden_layers
    for layer, norms in enumerate(found.norms):
        keys = plain.layers[layer].keys[0, :, :128]
        values = plain.layers[layer].values[0, :, :128]
        assert norms.layer == layer
        assert norms.keys == pytest.approx(float(keys.norm(dim=-1).mean()), rel=1e-2)
        assert norms.values == pytest.approx(float(values.norm(dim=-1).mean()), rel=1e-2)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"codec": "safetensors-int8"}, "not keys and values as they are"),
        ({"codec": "safetensors+zstd"}, "is read by caches only"),
        ({"seal": "ab" * 32}, "is read by caches only"),
    ],
)
def test_blobs_that_are_not_shown(settings, why):
    store, key = filled(**settings)
    found = inspect(store, key)
    assert why in found.unread
    assert found.norms == ()


@pytest.mark.parametrize("blob", [b"x", b"\xff" * 64, (80).to_bytes(8, "little") + b"[" * 80, b""])
def test_nonsense(blob):
    store, key = filled()
    store.write([Entry(key, {"a": "b"}, memoryview(blob))])
    assert inspect(store, key).unread


def test_what_is_no_chunk():
    assert "not the key of a chunk" in inspect(MemoryStore(), "nonsense").unread


def written(tensors: dict[str, dict[str, object]], data: bytes = b"") -> Inspection:
    """What is found in a blob with this header."""
    store, key = filled()
    header = json.dumps(tensors).encode()
    blob = len(header).to_bytes(8, "little") + header + data
    store.write([Entry(key, {"a": "b"}, memoryview(blob))])
    return inspect(store, key)


@pytest.mark.parametrize(("dtype", "shape", "nbytes"), [("F4", [2], 1), ("F8_E8M0", [2], 2)])
def test_types_that_torch_has_none_like(dtype, shape, nbytes):
    tensor = {"dtype": dtype, "shape": shape, "data_offsets": [0, nbytes]}
    found = written({"layers.0.keys": tensor}, b"x" * nbytes)
    assert found.norms == ()


@pytest.mark.parametrize("shape", [[10**15, 0], [2, 10**14, 0], []])
def test_shapes_that_no_keys_have(shape):
    nbytes = 0 if shape else 4
    tensors = {
        f"layers.0.{part}": {"dtype": "F32", "shape": shape, "data_offsets": [at, at + nbytes]}
        for part, at in (("keys", 0), ("values", nbytes))
    }
    assert written(tensors, b"\0" * 2 * nbytes).norms == ()


def test_layers_with_numbers_that_cannot_be():
    tensor = {"dtype": "F32", "shape": [1, 1, 1], "data_offsets": [0, 4]}
    assert written({f"layers.{'1' * 5000}.keys": tensor}, b"\0" * 4).norms == ()

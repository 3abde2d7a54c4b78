"""Doctor: what it finds of real models."""

from __future__ import annotations

import pytest

from chunkcache.doctor.checks import Health
from chunkcache.doctor.trial import examine_model
from chunkcache.stores.memory import MemoryStore
from tests.models import tiny


def quiet(_: str) -> None:
    """Nobody listens."""


def test_a_model(monkeypatch):
    monkeypatch.setenv("CHUNKCACHE_CODEC", "safetensors-bf16")
    with MemoryStore() as store:
        found = examine_model("a model", tiny(), store, quiet)
    assert (found.obstacle, found.moving, found.dtype) == ("", "", "float32")
    assert 512 < found.token_bytes < 600  # of 2 bytes, and a header
    assert found.break_even is not None
    assert "K/V can be moved, too" in str(found)


def test_a_model_that_cannot_be_moved():
    with MemoryStore() as store:
        found = examine_model("a model", tiny("gpt2"), store, quiet)
    assert found.obstacle == ""
    assert "cannot be moved: " in str(found)


@pytest.mark.parametrize("kind", ["lfm2", "mamba"])
def test_models_that_are_computed_as_usual(kind):
    with MemoryStore() as store:
        found = examine_model("a model", tiny(kind), store, quiet)
    assert "! is computed as usual: " in str(found)
    assert not Health((), found).good

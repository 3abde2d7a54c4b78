"""CacheContext: trouble is reported, and raised only when that was asked for."""

from __future__ import annotations

import pytest

from chunkcache.errors import BlobError, RepairError, StoreError
from chunkcache.model.state import ModelState
from chunkcache.report import Report
from chunkcache.reuse.context import CacheContext
from chunkcache.settings import Settings
from chunkcache.stores.memory import MemoryStore
from tests.models import tiny

MODEL = tiny("llama", num_hidden_layers=1)


def context(**settings):
    return CacheContext(MODEL, ModelState.of(MODEL), MemoryStore(), Settings(**settings))


@pytest.mark.parametrize("error", [StoreError("down"), BlobError("bad"), RepairError("odd")])
def test_trouble_is_counted(error):
    report = Report()
    for _ in range(2):
        context().handle_store_error(error, report)
    assert report.errors == [str(error)]


def test_a_failing_store_is_raised_when_asked_for_and_nothing_else():
    report, strict = Report(), context(on_error="raise")
    strict.handle_store_error(RepairError("odd"), report)
    with pytest.raises(StoreError, match="down"):
        strict.handle_store_error(StoreError("down"), report)
    assert report.errors == ["odd", "down"]

"""What a forward works on: trouble is reported, and raised only when that was asked for."""

from __future__ import annotations

import pytest
from chunkcache.reuse.step import Setup

from chunkcache.errors import BlobError, RepairError, StoreError
from chunkcache.model.state import ModelState
from chunkcache.report import Report
from chunkcache.settings import Settings
from chunkcache.stores.memory import MemoryStore
from chunkcache.tokens.chunking import Grid
from tests.models import tiny

MODEL = tiny("llama", num_hidden_layers=1)


def setup(**settings):
    return Setup(MODEL, ModelState.of(MODEL), MemoryStore(), Settings(**settings), Grid())


@pytest.mark.parametrize("error", [StoreError("down"), BlobError("bad"), RepairError("odd")])
def test_trouble_is_counted(error):
    report = Report()
    for _ in range(2):
        setup().trouble(error, report)
    assert report.errors == [str(error)]


def test_a_failing_store_is_raised_when_asked_for_and_nothing_else():
    report, strict = Report(), setup(on_error="raise")
    strict.trouble(RepairError("odd"), report)
    with pytest.raises(StoreError, match="down"):
        strict.trouble(StoreError("down"), report)
    assert report.errors == ["odd", "down"]

"""Sampled audits: what was served is measured, and nothing of it changes."""

from __future__ import annotations

import logging
from threading import enumerate as threads

import pytest
import torch

from chunkcache import SettingError, metrics
from chunkcache.insight import sampling
from chunkcache.settings import Settings
from chunkcache.stores.base import ReadOnly
from chunkcache.stores.memory import MemoryStore
from chunkcache.sums import SUMS
from tests.prompts import DOCUMENTS, anywhere, build, joined, logits, meet, padded, shuffled_prompt


@pytest.fixture(autouse=True)
def from_nothing():
    SUMS.begin()


def wait():
    for thread in threads():
        if thread.name == "chunkcache audit":
            thread.join()


def generate(model, store, prompt, **settings):
    cache = anywhere(model, ReadOnly(store), repair="none", **settings)
    given = prompt if isinstance(prompt, dict) else {"input_ids": prompt}
    given = {name: value for name, value in given.items() if name != "position_ids"}
    out = model.generate(
        **given, past_key_values=cache, max_new_tokens=5, do_sample=True, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    wait()
    return out


@pytest.mark.parametrize("where", ["background", "call"])
@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_what_was_served_is_measured(kind, where, caplog):
    model, store = build(kind), MemoryStore()
    meet(model, store)
    batch = padded(shuffled_prompt(), joined(51, DOCUMENTS[1], 13, DOCUMENTS[2], 9))
    for prompt in (shuffled_prompt(), batch):
        SUMS.begin()
        torch.manual_seed(3)
        plain = generate(model, store, prompt)
        assert metrics.snapshot()["audits"]["rows"] == 0
        torch.manual_seed(3)
        with caplog.at_level(logging.WARNING, "chunkcache"):
            out = generate(model, store, prompt, audit_rate=1, audit_bound=1e-6, audit_in=where)
        assert torch.equal(out.sequences, plain.sequences)
        assert all(map(torch.equal, out.logits, plain.logits))
        served, full = out.logits[0].double(), logits(model, prompt).double()
        p = full.softmax(-1)
        kl = (p * (full.log_softmax(-1) - served.log_softmax(-1))).sum(-1)
        found = metrics.snapshot()["audits"]
        assert found["rows"] == len(kl) == found["over_bound"]
        assert found["kl"] == pytest.approx(float(kl.sum()), rel=1e-2)
        assert found["same_top1"] == int((full.argmax(-1) == served.argmax(-1)).sum())
        assert found["failed"] == 0
        assert "more than audit_bound=1e-06" in caplog.text


def test_a_share_of_the_prompts_and_one_at_a_time(monkeypatch):
    model, store = build(num_hidden_layers=1), MemoryStore()
    meet(model, store)
    prompt = shuffled_prompt()
    monkeypatch.setattr(sampling, "_CHANCE", sampling.Random(5))
    for _ in range(20):
        logits(model, prompt, anywhere(model, ReadOnly(store), audit_rate=0.3, audit_in="call"))
    assert 2 <= metrics.snapshot()["audits"]["rows"] <= 10
    before = metrics.snapshot()["audits"]
    with sampling._BUSY:
        logits(model, prompt, anywhere(model, ReadOnly(store), audit_rate=1, audit_in="call"))
    logits(model, joined(400), anywhere(model, ReadOnly(store), audit_rate=1))  # nothing moved
    assert metrics.snapshot()["audits"] == before


def test_one_that_fails_fails_nothing_else(monkeypatch, caplog):
    model, store = build(num_hidden_layers=1), MemoryStore()
    meet(model, store)
    monkeypatch.setattr(sampling, "divergence", lambda *_: 1 / 0)
    for where in ("call", "background"):
        generate(model, store, shuffled_prompt(), audit_rate=1, audit_in=where)
    assert metrics.snapshot()["audits"]["failed"] == 2
    assert "could not be audited: division by zero" in caplog.text


@pytest.mark.parametrize(
    "wrong", [{"audit_rate": 2}, {"audit_rate": -1}, {"audit_bound": "x"}, {"audit_in": "never"}]
)
def test_wrong_settings(wrong):
    with pytest.raises(SettingError, match=next(iter(wrong))):
        Settings(**wrong)

"""Thirty architectures in every way of generating, as the committed table says; and that a broken
build would be seen there."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from benchmarks.coverage import NOT_RUN, TABLE, WRONG, cover
from chunkcache import RedisChunkCache
from chunkcache.anywhere import prefill
from chunkcache.keys import ChunkKey
from chunkcache.kv.rope import KeyRotation
from chunkcache.model.identity import ModelIdentity
from chunkcache.model.scatter import scatter_mask
from chunkcache.reuse.check_token import CheckToken
from chunkcache.reuse.hook import ForwardCall
from chunkcache.stores.memory import MemoryStore
from tests.models import tiny, tokens

KINDS = [
    "bloom",  # ALiBi, no positions
    "cohere",  # interleaved rotation
    "cohere2",  # windows, layers without positions
    "deepseek_v3",  # latent attention
    "deepseek_v32",  # latent attention with an index
    "doge",
    "exaone4",
    "falcon",
    "falcon_h1",  # attention and recurrent state in one layer
    "gemma2",
    "gemma3_text",  # windows, two bases
    "gemma3n_text",  # layers that share K/V
    "glm4",  # partial, interleaved
    "gpt2",  # learned positions
    "gpt_neox",  # partial
    "gpt_oss",  # sinks
    "granite",
    "hrm_text",  # sensitive to rounding
    "lfm2",  # convolutions
    "llama",
    "llama4_text",  # chunked attention
    "mamba",
    "minimax",  # cache class of its own
    "mistral",
    "mixtral",
    "olmo2",
    "phi3",
    "qwen3",
    "qwen3_next",  # linear attention
    "smollm3",
]


def table() -> dict[str, list[str]]:
    """The committed rows by model type."""
    rows = re.findall(r"^\| (\w[\w-]*) \| (.*) \|$", TABLE.read_text(), re.M)
    return {name: [cell.strip() for cell in rest.split(" | ")] for name, rest in rows}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_as_the_table_says(kind: str) -> None:
    row = cover(kind)
    assert row.prefix not in (WRONG, NOT_RUN)
    assert row.anywhere != WRONG
    prefix, share, anywhere = table()[kind][:3]
    assert (prefix, anywhere) == (row.prefix, row.anywhere)
    assert share == (f"{100 * row.skipped:.0f} %" if row.skipped else "")


def test_nothing_in_the_table_is_wrong() -> None:
    rows = table()
    assert len(rows) > 100
    assert not [name for name, cells in rows.items() if WRONG in cells[0] or WRONG in cells[2]]


# ------------------------------------------------------------ what a broken build would look like


def pads_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ForwardCall, "pads", lambda self: [0] * len(self.ids))
    patch.setattr(ForwardCall, "follows", lambda self, past, pads: True)
    patch.setattr(ForwardCall, "text_columns", lambda self, past, pads: past + self.new)


def no_reorder(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RedisChunkCache, "reorder_cache", lambda self, beams: None)


def no_crop(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RedisChunkCache, "crop", lambda self, tokens_to_remove: None)


def rotation_off_by_one(patch: pytest.MonkeyPatch) -> None:
    move = KeyRotation.move_into
    patch.setattr(
        KeyRotation, "move_into", lambda self, to, kv, old, new: move(self, to, kv, old, new + 1)
    )


def wrong_window(patch: pytest.MonkeyPatch) -> None:
    def wide(model: Any, *args: Any) -> Any:
        window = model.config.sliding_window
        model.config.sliding_window = 3 * window
        mask = scatter_mask(model, *args)
        model.config.sliding_window = window
        return mask

    patch.setattr(prefill, "scatter_mask", wide)


@pytest.mark.parametrize(
    ("kind", "broken", "where"),
    [
        ("llama", pads_ignored, "padding as text"),
        ("llama", no_reorder, "beams"),
        ("llama", no_crop, "lookup"),
        ("gemma2", wrong_window, "anywhere"),
    ],
)
def test_a_broken_build_is_wrong(kind: str, broken: Any, where: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(CheckToken, "difference", lambda self: 0.0)  # which sees some of these
    broken(monkeypatch)
    row = cover(kind)
    assert where in row.wrong or (where == "anywhere" and row.anywhere == WRONG)


def test_a_missing_salt_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models that differ in their weights alone, and one store."""
    ids, how = tokens(300, seed=8), {"max_new_tokens": 6, "do_sample": False}

    def outputs() -> tuple[Any, Any]:
        store, models = MemoryStore(), (tiny(seed=0), tiny(seed=1))
        caches = [RedisChunkCache(model, store) for model in models]
        found = [
            model.generate(ids, past_key_values=cache, **how)
            for model, cache in zip(models, caches, strict=True)
        ]
        return found[1], models[1].generate(ids, **how)

    assert torch.equal(*outputs())
    monkeypatch.setattr(ModelIdentity, "salt", lambda self, *_: b"")
    monkeypatch.setattr(ModelIdentity, "key", lambda self, *of: ChunkKey(of[1], "m", 1, 0, of[0]))
    assert torch.equal(*outputs())  # thanks to the check token
    monkeypatch.setattr(CheckToken, "difference", lambda self: 0.0)
    assert not torch.equal(*outputs())


def test_a_rotation_off_by_one_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one layer a move is exact: nothing but the rotation can be off."""
    model, how = tiny(num_hidden_layers=1), {"max_new_tokens": 6, "do_sample": False}
    ids = tokens(300, seed=8)
    moved = torch.cat([tokens(40, seed=9), ids[:, 5:]], 1)

    def is_right() -> bool:
        store, settings = MemoryStore(), {"reuse": "anywhere", "repair": "none"}
        for prompt in (ids, moved):
            cache = RedisChunkCache(model, store, **settings)
            out = model.generate(prompt, past_key_values=cache, **how)
        assert cache.report.moved > 200
        return torch.equal(out, model.generate(moved, **how))

    assert is_right()
    rotation_off_by_one(monkeypatch)
    assert not is_right()

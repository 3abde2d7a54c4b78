"""Break-even: from what prompt length on reading K/V is faster than computing them, measured.

Both ways are timed to the first token's logits, in turns, at growing lengths: a prompt that the
store has but for its last token, and the same prompt without a cache.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from chunkcache.cache import RedisChunkCache
from chunkcache.errors import StoreError
from chunkcache.inventory import catalog
from chunkcache.model.check import check_model
from chunkcache.model.self_test import forward, probe_ids, takes
from chunkcache.model.state_test import has_states
from chunkcache.reuse.states import LAST_TOKENS
from chunkcache.stores.base import ChunkStore
from chunkcache.stores.health import retry_until
from chunkcache.tokens.texts import most_positions

LENGTHS = (1, 2, 4, 8, 16)  # in chunks
REPEATS = 3
ENOUGH_MS = 3_000.0  # after a prompt that takes so long to compute, no longer one is tried


@dataclass(frozen=True, slots=True)
class Point:
    """Milliseconds to the first token's logits of one prompt, medians."""

    tokens: int
    compute_ms: float
    read_ms: float


@dataclass(frozen=True, slots=True)
class BreakEven:
    """What was measured, in order of length."""

    points: tuple[Point, ...]

    @property
    def from_tokens(self) -> int | None:
        """The shortest prompt measured from which on reading was faster; `None`: it never was."""
        found = None
        for point in reversed(self.points):
            if point.read_ms >= point.compute_ms:
                break
            found = point.tokens
        return found

    @property
    def prefill_rate(self) -> float:
        """Tokens per second that the model computes, of the longest prompt."""
        return 1e3 * self.points[-1].tokens / self.points[-1].compute_ms


def measure_break_even(
    model: nn.Module, store: ChunkStore, step: Callable[[str], object] = lambda _: None
) -> BreakEven:
    """Time both ways, and delete what was stored for it, if the store lets us.

    Args:
        model: A model in evaluation mode whose K/V can be reused.
        store: An open store.
        step: Told what is being done.

    Raises:
        StoreError: The store failed, or has not kept what was written.
    """
    inner = check_model(model)
    namespace = f"doctor-{uuid.uuid4().hex[:12]}"
    settings: dict[str, Any] = {
        "namespace": namespace,
        "reuse": "prefix",
        "on_error": "raise",
        "write": True,  # its own data, which are deleted afterwards
        "pin": False,
        "min_gain": 0.0,  # what would not pay is read too: that is the question
    }
    chunk = RedisChunkCache(model, store, **settings).settings.chunk_size
    config: Any = inner.config
    longest = most_positions(config)
    # A state is not kept at a prompt's very end.
    ending = LAST_TOKENS if has_states(inner) else 1
    points: list[Point] = []
    try:
        for length in (chunk * count for count in LENGTHS):
            if length + ending > longest or (points and points[-1].compute_ms > ENOUGH_MS):
                break
            step(f"computing and reading {length:,} tokens")
            ids = probe_ids(inner, length + ending)
            cache = RedisChunkCache(model, store, **settings)
            _timed(inner, ids, cache)
            cache.flush()
            computed, read = [], []
            for _ in range(REPEATS):
                computed.append(_timed(inner, ids, DynamicCache(config=config)))
                cache = RedisChunkCache(model, store, **settings)
                read.append(_timed(inner, ids, cache))
                if cache.report.reused < length:
                    raise StoreError(
                        f"of {length:,} tokens written, {cache.report.reused:,} were found: the "
                        f"store is full, slow or read-only ({cache.report})"
                    )
            points.append(Point(length, median(computed), median(read)))
    finally:
        retry_until(lambda: catalog.delete(store, catalog.Filter(namespace=namespace)))
    return BreakEven(tuple(points))


@torch.no_grad()
def _timed(model: nn.Module, ids: Tensor, cache: DynamicCache) -> float:
    """Milliseconds until the logits of the last of `[1, tokens]` ids are there."""
    keep = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}
    started = perf_counter()
    float(forward(model, ids, cache, **keep)[0, -1, 0])  # waits for a GPU
    return 1e3 * (perf_counter() - started)

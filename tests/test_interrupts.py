"""Ctrl-C: wherever it lands in a prompt, later prompts are right, and nothing hangs or stays.

`CHUNKCACHE_INTERRUPTS=500 pytest tests/test_interrupts.py` interrupts 500 prompts of each store and
mode by the clock and 500 at a step drawn from all, instead of a few.
"""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random

import pytest
import torch
from interrupting import Steps, after, no_hang, until
from torch import Tensor

from chunkcache import RedisChunkCache, open_store
from chunkcache.errors import UnsupportedCallError
from chunkcache.reuse import background, load
from chunkcache.stores.base import ChunkStore
from tests.models import tiny, tokens
from tests.servers import Server

# Where it lands in a finalizer, Python can only print it.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

PROMPTS = int(os.environ.get("CHUNKCACHE_INTERRUPTS", "0"))
KINDS = ("memory", "file", "redis", "embedded", "tiered")
MODES = ("prefix", "anywhere")
NEW = 3
MOST_THREADS = 8  # of ours at once: a writer, a probe, those that read what nobody wants any more


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str | list[str]:
    """The URL of a store of each kind."""
    redis_server: Server = request.getfixturevalue("redis_server")
    urls: dict[str, str | list[str]] = {
        "memory": "memory://?bytes=4MB",
        "file": f"file://{tmp_path}?bytes=50MB",
        "redis": redis_server.unix_url,
        "embedded": f"embedded://{tmp_path}/server?bytes=100MB",
        "tiered": ["memory://?bytes=1MB", redis_server.unix_url],
    }
    return urls[request.param]


@pytest.fixture
def store(url: str | list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[ChunkStore]:
    """That store; K/V are read in the background where that can be done."""
    monkeypatch.setattr(load, "LEAST_BYTES", 0)
    monkeypatch.setattr(background, "GROUP_BYTES", 1 << 14)
    with open_store(url, max_delay=10.0, read_timeout=5.0) as store:
        yield store


class Prompts:
    """Prompts of shared texts for one model, and what comes of them without a cache."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.model = tiny("llama")
        texts = [tokens(size, seed=size) for size in (48, 64, 80, 96)]
        self.all = []
        for number in range(6):
            some = self.random.sample(texts, 2)
            self.all.append(torch.cat([*some, tokens(9, seed=number)], dim=1))
        self.plain = [self.generate(ids, None) for ids in self.all]

    def generate(self, ids: Tensor, cache: RedisChunkCache | None) -> Tensor:
        return self.model.generate(
            ids, past_key_values=cache, max_new_tokens=NEW, do_sample=False
        )  # fmt: skip

    def cache(self, store: ChunkStore, mode: str) -> RedisChunkCache:
        return RedisChunkCache(self.model, store, reuse=mode, repair="full", chunk_size=16)

    def check(self, number: int, cache: RedisChunkCache | None) -> None:
        assert torch.equal(self.generate(self.all[number], cache), self.plain[number])


def check_all_is_well(
    prompts: Prompts, number: int, cache: RedisChunkCache, store: ChunkStore, mode: str
) -> None:
    """The same object, another one, the model without any, and the queue: all work."""
    if prompts.random.random() < 0.3:
        check_goes_on(prompts, cache)
    prompts.check(number, cache)
    other = prompts.random.randrange(len(prompts.all))
    prompts.check(other, prompts.cache(store, mode))
    prompts.check(other, None)
    assert store.flush(10)


@torch.no_grad()
def check_goes_on(prompts: Prompts, cache: RedisChunkCache) -> None:
    """A forward behind what an interrupted one has left is refused, or as it must be."""
    ids = tokens(5, seed=1)
    held = cache.get_seq_length()
    positions = torch.arange(held, held + 5)[None]
    try:
        out = prompts.model(ids, past_key_values=cache, position_ids=positions, logits_to_keep=1)
    except UnsupportedCallError as error:
        assert "cache.reset()" in str(error)  # noqa: PT017
        return
    finally:
        before = (
            cache._conversation.transcript.ids()[0]
            if cache._conversation.transcript.columns
            else None
        )
    assert before is not None
    full = prompts.model(before[None]).logits[:, -1]
    assert (out.logits[:, -1] - full).abs().max() < 1e-3


def open_files() -> int:
    gc.collect()  # what an interrupt's traceback has kept is let go
    return len(os.listdir("/proc/self/fd"))


def our_threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("chunkcache")]


@pytest.mark.parametrize("mode", MODES)
def test_prompts_are_interrupted(store: ChunkStore, mode: str) -> None:
    prompts = Prompts(0)
    cache = prompts.cache(store, mode)
    prompts.check(0, cache)
    done = came = 0
    files = 0
    wanted = PROMPTS or 8
    while came < wanted:
        done += 1
        assert done < 20 * wanted, "the prompts are over before they can be interrupted"
        if prompts.random.random() < 0.5:
            cache = prompts.cache(store, mode)
        number = prompts.random.randrange(len(prompts.all))
        moment = prompts.random.uniform(0.0005, 0.03)
        with no_hang(60):
            if after(moment, partial(prompts.check, number, cache)):
                came += 1
                check_all_is_well(prompts, number, cache, store, mode)
        if came == wanted // 2:
            files = open_files()
    assert until(lambda: len(our_threads()) <= MOST_THREADS), our_threads()
    assert open_files() <= files + MOST_THREADS
    print(f"{came} of {done} prompts were interrupted")


@pytest.mark.parametrize("mode", MODES)
def test_prompts_are_interrupted_at_any_step(store: ChunkStore, mode: str) -> None:
    prompts = Prompts(0)
    steps = Steps("chunkcache", "redis")
    prompts.check(0, prompts.cache(store, mode))
    assert store.flush(10)
    moments = steps.count(partial(prompts.generate, prompts.all[0], prompts.cache(store, mode)))
    assert moments > 300
    some = prompts.random.sample(range(1, moments), PROMPTS or 6)
    for moment in some:
        cache = prompts.cache(store, mode)
        number = prompts.random.choice([0, prompts.random.randrange(len(prompts.all))])
        with no_hang(60):
            steps.at(moment, partial(prompts.generate, prompts.all[number], cache))
            try:
                check_all_is_well(prompts, number, cache, store, mode)
            except BaseException as error:
                error.add_note(f"interrupted at step {moment}, {steps.where}")
                raise
    assert until(lambda: len(our_threads()) <= MOST_THREADS), our_threads()

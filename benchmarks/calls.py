"""What one call costs that finds nothing in the store: calls of 100 tokens, with and without.

    python -m benchmarks.calls             # 3 minutes on 2 cores
    python -m benchmarks.calls --rounds 10

Harnesses make ten thousands of short calls. The arms take turns, each call has tokens that no other
has, and what is counted is CPU time of the thread that calls, so that other processes disturb
little; what still disturbs makes some calls slower and none faster, so the least of all rounds
counts. Prints what chunkcache adds to a forward and to `generate()`, and the parts of that. Writes
`results/calls.csv`.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

import chunkcache
from benchmarks.quality import write
from chunkcache import RedisChunkCache
from chunkcache.kv.sample import Sample
from chunkcache.model import makeup, state, weights
from chunkcache.reuse import conversation, hook, prefill
from chunkcache.samples import load_smollm2
from chunkcache.stores.memory import MemoryStore

RESULTS = Path(__file__).parent / "results"
TOKENS = 100
# What is timed by itself, as (owner, name, label); what is indented is a part of what is above it.
PARTS: list[tuple[Any, str, str]] = [
    (hook, "_before", "before the forward"),
    (RedisChunkCache, "__init__", "  a cache object"),
    (state.ModelState, "identity", "  is it the same model?"),
    (state, "watch", "    weights"),
    (weights, "_pulse", "      numbers of each row and column"),
    (makeup.Makeup, "look", "    attributes, code"),
    (state, "foreign_code", "    hooks"),
    (state, "digest_config", "    configuration"),
    (prefill.Prefill, "plan", "  hashes, lookup, plan"),
    (prefill.Prefill, "load", "  memory for the layers"),
    (conversation.Conversation, "empty", "  layers"),
    (RedisChunkCache, "update", "within: K/V into the layers"),
    (hook, "_after", "behind it"),
    (conversation.Conversation, "store", "  handing over to the writer"),
    (Sample, "__init__", "  a sample of the K/V"),
]


@contextmanager
def parts(model: Any, times: dict[str, float]) -> Iterator[None]:
    """Within this context, add up what each part of a model's calls takes, in seconds."""
    hook.uninstall(model)  # of which the model holds the functions
    with ExitStack() as stack:
        for owner, name, label in PARTS:
            stack.enter_context(mock.patch.object(owner, name, timed(owner, name, label, times)))
        hook.install(model)
        yield
        hook.uninstall(model)
    hook.install(model)


def timed(owner: Any, name: str, label: str, times: dict[str, float]) -> Callable[..., Any]:
    """The same function, which notes what it takes."""
    function = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        begin = time.thread_time()
        try:
            return function(*args, **kwargs)
        finally:
            times[label] += time.thread_time() - begin

    return call


def seconds(call: Callable[[], object]) -> float:
    """CPU time of this thread."""
    begin = time.thread_time()
    call()
    return time.thread_time() - begin


@torch.no_grad()
def measure(rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each arm and of each part of a forward, in each round."""
    torch.set_num_threads(1)  # others' work would not be counted
    model, _ = load_smollm2()
    store, source = MemoryStore(1 << 30), torch.Generator().manual_seed(0)
    arms, taken = defaultdict(list), defaultdict(list)
    how = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}

    def ids() -> torch.Tensor:
        return torch.randint(9, 40_000, (1, TOKENS), generator=source)

    def plain() -> None:
        model(ids(), past_key_values=DynamicCache(config=model.config))

    def generate(cache: Any) -> None:
        model.generate(ids(), past_key_values=cache, **how)

    with chunkcache.enabled(model, store, forwards=True):  # no matter to who brings a cache
        for number in range(rounds + 1):
            times: dict[str, float] = defaultdict(float)
            found = {"forward": seconds(plain)}
            found["forward, enabled()"] = seconds(lambda: model(ids()))
            with parts(model, times):
                model(ids())
            found["generate()"] = seconds(lambda: generate(DynamicCache(config=model.config)))
            found["generate(), RedisChunkCache"] = seconds(
                lambda: generate(RedisChunkCache(model, store))
            )
            store.flush()
            if number:  # the first one looks at the model as a whole
                for kept, new in ((arms, found), (taken, times)):
                    for name, value in new.items():
                        kept[name].append(value)
    return arms, taken


def main() -> None:
    """Parse the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    arms, taken = measure(options.rounds)
    rows = [
        {"what": name, "least_ms": round(1e3 * min(t), 2), "median_ms": round(1e3 * median(t), 2)}
        for name, t in (*arms.items(), *((label, taken[label]) for *_, label in PARTS))
    ]
    least = {name: min(times) for name, times in arms.items()}
    view = Table(title=f"{TOKENS} tokens that nobody knows, SmolLM2-135M, float32, one thread")
    for column in ("", "least, ms", "median, ms"):
        view.add_column(column, justify="right" if column else "left")
    for row in rows:
        view.add_row(*(str(value) for value in row.values()))
    console = Console()
    console.print(view)
    for name, ours in (
        ("forward", "forward, enabled()"),
        ("generate()", "generate(), RedisChunkCache"),
    ):
        added = least[ours] - least[name]
        console.print(f"{name}: {1e3 * added:.1f} ms more, {added / least[name]:.1%}")
    options.out.mkdir(parents=True, exist_ok=True)
    write(rows, options.out / "calls.csv")


def median(times: list[float]) -> float:
    """The middle one."""
    return sorted(times)[len(times) // 2]


if __name__ == "__main__":
    main()

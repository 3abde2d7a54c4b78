"""A model on an accelerator: copies and waits, and where there is one, times.

    python -m benchmarks.device --pretend     # counts, on the simulated device of the tests
    python -m benchmarks.device               # times, on this machine's accelerator
    python -m benchmarks.device --shape qwen3-4b --tokens 2048 8192

Models have random weights, and shapes of real ones where times are taken (16 GB for `llama-8b`).
Counts are those of the thread that generates, by whose code has caused them. For times, the store
is a Redis that this starts; arms take turns, and the medians of `--rounds` are told.

Writes `device-counts.csv` or `device.csv` to benchmarks/results.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from chunkcache import RedisChunkCache, open_store
from chunkcache.stores.base import ChunkStore
from chunkcache.stores.memory import MemoryStore
from chunkcache.stores.writer import WriteBehind
from tests import fakegpu
from tests.models import tiny
from tests.servers import Server, redis_binary

RESULTS = Path(__file__).parent / "results"
NEW = 64  # tokens of a prompt that are not in the store
DECODED = 32
SHAPES = {
    "llama-8b": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072,
    ),
    "qwen3-4b": Qwen3Config(
        hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=151936, max_position_embeddings=40960,
    ),
}  # fmt: skip
KINDS = ("llama", "gemma3_text", "deepseek_v3")  # counts: all layers alike, windows, MLA


def generate(model: Any, ids: torch.Tensor, cache: Any, new: int) -> torch.Tensor:
    """Greedy, exactly `new` tokens."""
    out: torch.Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=new,
        min_new_tokens=new, do_sample=False, pad_token_id=0,
    )  # fmt: skip
    return out


# ------------------------------------------------------------------------ counts


def count(model: Any, ids: torch.Tensor, cache: Any, new: int) -> fakegpu.Trace:
    with fakegpu.counting() as trace:
        generate(model, ids, cache, new)
        if cache is not None:
            cache.flush()
    return trace


def counts(kind: str, tokens: int, where: str, store: ChunkStore) -> Iterator[dict[str, Any]]:
    """One row for each arm."""
    model: Any = tiny(kind, max_position_embeddings=2 * tokens).to(fakegpu.NAME)
    ids = torch.randint(3, 190, (1, tokens), device=fakegpu.NAME)
    generate(model, ids.flip(1)[:, :32], RedisChunkCache(model, store), 1)  # the self-test
    store.flush()
    held = RedisChunkCache(model, store, min_gain=0, write=False)
    second = RedisChunkCache(model, store, min_gain=0)
    arms = {
        "no cache": count(model, ids, None, 1),
        "cold": count(model, ids, second, 1),
        "second turn": count(model, torch.cat([ids, ids[:, :9]], 1), second, 1),
        "warm": count(model, ids, RedisChunkCache(model, store, min_gain=0), 1),
        f"warm, {DECODED} tokens more": count(model, ids, held, 1 + DECODED),
    }
    for arm, trace in arms.items():
        row: dict[str, Any] = {"model": kind, "layers": len(held.layers), "tokens": tokens}
        row["store"] = where
        row |= {"chunks": -(-tokens // held.settings.chunk_size), "arm": arm}
        row |= {
            f"{name} of {package}": trace.of(package.lower(), key)
            for name, key in (("to device", "h2d"), ("to host", "d2h"), ("waits", "wait"))
            for package in ("chunkcache", "Transformers")
        }
        row["to device by the reader"] = trace.counts["other h2d"]
        yield row | {"to host by the writer": trace.counts["other d2h"]}


# ------------------------------------------------------------------------ times


def times(shape: str, tokens: int, rounds: int, url: str) -> dict[str, Any]:
    """Milliseconds to the first token, and for each later one."""
    device = torch.accelerator.current_accelerator()
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(SHAPES[shape], dtype=torch.bfloat16).eval()
    store, taken = open_store(url), defaultdict(list)

    def clock(arm: str, ids: torch.Tensor, cache: Any, new: int = 1) -> None:
        torch.accelerator.synchronize()
        began = time.perf_counter()
        generate(model, ids, cache, new)
        torch.accelerator.synchronize()
        taken[arm].append(1e3 * (time.perf_counter() - began) / new)
        store.flush()

    for number in range(rounds + 1):
        source = torch.Generator().manual_seed(number)
        ids = torch.randint(3, 100_000, (1, tokens), generator=source).to(device)
        known = ids[:, : tokens - NEW]
        clock("no cache", ids, None)
        clock("cold", known, RedisChunkCache(model, store, min_gain=0, namespace=f"{number}"))
        clock("cold, no cache", known, None)
        clock("warm", ids, RedisChunkCache(model, store, min_gain=0, namespace=f"{number}"))
        clock("token, no cache", ids[:, :256], None, DECODED)
        clock("token", ids[:, :256], RedisChunkCache(model, store, write=False), DECODED)
        if not number:  # kernels were compiled, memory was pinned
            taken.clear()
    row: dict[str, Any] = {"shape": shape, "device": str(device), "tokens": tokens}
    return row | {arm: round(statistics.median(ms), 1) for arm, ms in taken.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pretend", action="store_true", help="count, on the simulated device")
    parser.add_argument("--shape", choices=SHAPES, default="llama-8b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    if chosen.pretend:
        fakegpu.install()
        with WriteBehind(MemoryStore(1 << 32)) as store:
            few = min(chosen.tokens)
            rows = [row for kind in KINDS for row in counts(kind, few, "this process", store)]
        with Server(redis_binary()) as server, open_store(server.url("unix")) as store:
            rows += counts("llama", 4 * few, "a server", store)  # enough to be read in background
        name = "device-counts.csv"
    elif not torch.accelerator.is_available():
        parser.error("this machine has no accelerator: --pretend counts copies and waits")
    else:
        with Server(redis_binary()) as server:
            url = server.url("unix")
            rows = [times(chosen.shape, n, chosen.rounds, url) for n in chosen.tokens]
        name = "device.csv"
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console(width=140).print(table)
    with open(RESULTS / name, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()

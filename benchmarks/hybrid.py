"""Models with recurrent and convolution states: what a cold run costs, a warm one gains, and bytes.

    python -m benchmarks.hybrid                        # about 15 minutes on one core
    python -m benchmarks.hybrid --lengths 512 1024 --rounds 2

Random weights in the shapes of Qwen3.5 (three layers with recurrent states to one with attention)
and LFM2 (convolutions), of about 80 M parameters. Arms take turns; CPU time of this process up to
the first token, on one thread, the least of all rounds, since other processes can only add to it.
"warm" is a prompt whose tokens but for the last 32 are known, from Redis on a unix socket, in a new
cache object. Bytes of a Qwen3.5-4B are computed from its shapes.

Writes `hybrid.csv` to benchmarks/results.
"""

from __future__ import annotations

import argparse
import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.quality import write
from chunkcache import RedisChunkCache, open_store
from chunkcache.kv.layout import KVLayout, LayerShape, StateShape
from chunkcache.reuse.states import States
from chunkcache.tokens.chunking import Chunk
from tests.models import VOCABULARY, tiny
from tests.servers import Server, redis_binary

RESULTS = Path(__file__).parent / "results"
NEW = 32
_COMMON: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 64,
    "max_position_embeddings": 8192, "initializer_range": 0.02,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {
        **_COMMON, "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 3,
        "linear_num_key_heads": 6, "linear_num_value_heads": 12, "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
    },
    "lfm2": {**_COMMON, "layer_types": (["conv"] * 2 + ["full_attention"]) * 4},
}  # fmt: skip


def prompt(tokens: int, seed: int) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (1, tokens), generator=source)


def timed(model: Any, ids: torch.Tensor, make: Any) -> tuple[float, torch.Tensor, Any]:
    """CPU seconds from making the cache to the first token, that token, and the report."""
    began = time.process_time()
    cache = make()
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=1,
        do_sample=False,
    )  # fmt: skip
    return time.process_time() - began, out, cache and cache.report


def measure(kind: str, lengths: list[int], rounds: int, url: str) -> Iterator[dict[str, Any]]:
    """A row for each length of prompt."""
    model = tiny(kind, **SHAPES[kind])
    parameters = sum(p.numel() for p in model.parameters())
    with open_store(url) as store:
        RedisChunkCache(model, store)  # which tests it
        for length in lengths:
            known, ids = prompt(length, 1), torch.cat([prompt(length, 1), prompt(NEW, 2)], 1)
            timed(model, known, lambda: RedisChunkCache(model, store))
            # The second prompt with that beginning stores the state where they part.
            timed(
                model, torch.cat([known, prompt(NEW, 3)], 1), lambda: RedisChunkCache(model, store)
            )
            store.flush()
            arms = {
                "plain": lambda: None,
                "cold": lambda: RedisChunkCache(model, store, namespace=uuid.uuid4().hex),
                "warm": lambda: RedisChunkCache(model, store, write=False),
            }
            seconds: dict[str, list[float]] = defaultdict(list)
            reports: dict[str, Any] = {}
            for turn in range(rounds):
                answers = []
                for arm in list(arms)[:: 1 - 2 * (turn % 2)]:
                    took, out, reports[arm] = timed(model, ids, arms[arm])
                    seconds[arm].append(took)
                    answers.append(out)
                    store.flush()
                assert all(torch.equal(answers[0], other) for other in answers), "WRONG tokens"
            plain, cold, warm = (min(seconds[arm]) for arm in arms)
            yield {
                "shape": kind, "parameters": f"{parameters / 1e6:.0f} M", "tokens": length + NEW,
                "plain, ms": round(1e3 * plain),
                "cold / plain": round(cold / plain, 2),
                "plain / warm": round(plain / warm, 1),
                "reused": reports["warm"].reused,
                "MB read": round(reports["warm"].bytes_read / 1e6, 1),
            }  # fmt: skip


def bytes_of_qwen3_5_4b(tokens: int = 8192) -> tuple[int, int]:
    """Bytes of K/V and of snapshots of a prompt: 8 layers with attention, 24 with states."""
    kv = LayerShape(4, 256, 4, 256)
    states = [
        shape
        for layer in range(24)
        for shape in (
            StateShape(f"layers.{layer}.recurrent.0", (32, 128, 128), torch.float32),
            StateShape(f"layers.{layer}.conv.0", (8192, 4), torch.bfloat16),
        )
    ]
    layout = KVLayout(torch.bfloat16, (kv,) * 8, tuple(states))
    context: Any = type("", (), {"settings": type("", (), {"state_every": 0})})
    chunks = [Chunk(at, at + 128, "") for at in range(0, tokens, 128)]
    cuts = States(context, layout, cuts_windows=False).cuts(chunks, 0, 0, tokens - 2, tokens, ())
    return tokens * layout.token_bytes, len(cuts) * layout.state_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="*", default=[512, 1024, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    with Server(redis_binary()) as server:
        for kind in SHAPES:
            for row in measure(kind, chosen.lengths, chosen.rounds, server.unix_url):
                rows.append(row)
                print(row, flush=True)
    table = Table(*map(str, rows[0]), title="hybrid models")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    kv, states = bytes_of_qwen3_5_4b()
    print(f"Qwen3.5-4B, 8,192 tokens: K/V {kv / 2**20:.0f} MiB, snapshots {states / 2**20:.0f} MiB")
    print(f"together {(kv + states) / kv:.2f} times the K/V")
    write(rows, RESULTS / "hybrid.csv")


if __name__ == "__main__":
    main()

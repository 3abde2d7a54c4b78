"""Perplexity of one long text by overlapping windows: the same value, sooner in a second pass.

    python -m benchmarks.perplexity             # 6 minutes on one thread
    python -m benchmarks.perplexity --quick     # 1 minute

Windows of 2,048 tokens every 512, each scored on its last 512, as Transformers' guide on perplexity
does (https://huggingface.co/docs/transformers/perplexity). Every window begins with another token,
so nothing is shared within a pass; a second one, as after a change of one's own code or after
a crash, finds all of it. Arms: no cache; `enabled(forwards=True)`, twice; the same with
`last_outputs=513`, since a window's earlier logits are not looked at. Through a Redis on a unix
socket. Stops if a value differs. Writes `results/perplexity.csv`.
"""

from __future__ import annotations

import argparse
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import chunkcache
from benchmarks.quality import write
from chunkcache.samples import document, load_smollm2
from tests.servers import Server, redis_binary

RESULTS = Path(__file__).parent / "results"
WINDOW, STRIDE = 2048, 512


@torch.no_grad()
def perplexity(model: Any, ids: torch.Tensor) -> float:
    """Of the tokens behind the first of the text; `ids` are `[1, tokens]`."""
    total, count, scored = 0.0, 0, 1
    for begin in range(0, ids.shape[1] - WINDOW + STRIDE, STRIDE):
        window = ids[:, begin : begin + WINDOW]
        labels = window.clone()
        labels[:, : scored - begin] = -100
        new = begin + window.shape[1] - scored
        total += float(model(window, labels=labels).loss) * new
        count, scored = count + new, begin + window.shape[1]
    return float(torch.tensor(total / count).exp())


def measure(model: Any, ids: torch.Tensor, address: str) -> list[dict[str, Any]]:
    """A row for each arm and pass."""
    arms: dict[str, AbstractContextManager[Any]] = {"no cache": nullcontext()}
    for name, more in (("forwards=True", {}), ("last_outputs=513", {"last_outputs": STRIDE + 1})):
        arms[name] = chunkcache.enabled(
            model, address, forwards=True, namespace=name.partition("=")[0], **more
        )
    rows: list[dict[str, Any]] = []
    for arm, context in arms.items():
        with context as cache:
            for number in (1,) if cache is None else (1, 2):
                began, busy = time.perf_counter(), time.process_time()
                value = perplexity(model, ids)
                took, busy = time.perf_counter() - began, time.process_time() - busy
                if cache is not None:
                    cache.flush()
                row = {"arm": arm, "pass": number, "perplexity": round(value, 4)}
                row |= {"seconds": round(took, 2), "cpu_seconds": round(busy, 2)}
                plain = rows[0] if rows else row
                if row["perplexity"] != plain["perplexity"]:
                    raise SystemExit(f"{row} is not {plain}")
                row |= {"times_faster": round(plain["seconds"] / row["seconds"], 2)}
                rows.append(row | {"of_cpu": round(plain["cpu_seconds"] / row["cpu_seconds"], 2)})
    return rows


def main() -> None:
    """Parse the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 windows")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_smollm2()
    length = WINDOW + STRIDE * (2 if options.quick else 10)
    ids = tokenizer(document(length + 9, tokenizer, 3), return_tensors="pt").input_ids[:, :length]
    with Server(redis_binary()) as server:
        rows = measure(model, ids, server.unix_url)
    view = Table(*rows[0], title=f"{length:,} tokens, SmolLM2-135M, float32, one thread")
    for row in rows:
        view.add_row(*map(str, row.values()))
    Console().print(view)
    write(rows, RESULTS / "perplexity.csv")


if __name__ == "__main__":
    main()

"""What the codecs save, how fast they are, and what their rounding does to the answers.

    python -m benchmarks.codecs              # 30 prompts in float32 and bfloat16
    python -m benchmarks.codecs --quick      # 3 prompts, float32 only: about two minutes

Real documents with a question about one of them, as in `benchmarks.quality`. A full run answers.
Then, for each codec, the prompt is stored, and a new cache reads it back and is given the same
answer token by token: KL is that of its next-token distributions from the full run's, mean over 32
tokens. The plain codec is the control: what is left there is rounding of the model's own.

Speeds are those of one thread, on chunks of 128 tokens of real K/V, in bytes of K/V as the model
has them. Prints a table and writes `codecs.csv` to benchmarks/results.
"""

from __future__ import annotations

import argparse
import csv
import random
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.corpus import KINDS, documents, draw
from benchmarks.fidelity import Full, run_full
from benchmarks.quality import ask
from chunkcache import RedisChunkCache
from chunkcache.keys import CODECS
from chunkcache.samples import load_smollm2
from chunkcache.stores.base import ReadOnly
from chunkcache.stores.memory import MemoryStore

RESULTS = Path(__file__).parent / "results"
CHUNK = 128
SEALED = "safetensors, sealed"
ARMS: dict[str, dict[str, str]] = {name: {"codec": name} for name in CODECS} | {
    SEALED: {"seal": secrets.token_hex(32)}
}


@torch.no_grad()
def prefill(model: Any, ids: torch.Tensor, store: Any, settings: dict[str, str]) -> Any:
    """A cache that holds a prompt, and the logits behind it, `[vocabulary]`."""
    cache = RedisChunkCache(model, store, chunk_size=CHUNK, **settings)
    return cache, model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[0, -1]


@torch.no_grad()
def divergence(model: Any, cache: Any, first: torch.Tensor, full: Full) -> tuple[float, float]:
    """KL from the full run in nats, and the share of equal best tokens, over its answer."""
    steps = model(input_ids=full.answer[:, :-1], past_key_values=cache).logits[0]
    log_probs = torch.cat((first[None], steps)).float().log_softmax(-1)
    kl = (full.log_probs.exp() * (full.log_probs - log_probs)).sum(-1).clamp_min(0)
    top1 = (log_probs.argmax(-1) == full.log_probs.argmax(-1)).float().mean()
    return float(kl.mean()), float(top1)


def gigabytes(nbytes: int, work: Callable[[], Any]) -> float:
    """GB/s of some work on so many bytes, the median of 5 rounds."""
    rounds = []
    for _ in range(5):
        begin = time.perf_counter()
        work()
        rounds.append(nbytes / (time.perf_counter() - begin) / 1e9)
    return median(rounds)


def speeds(cache: Any, truth: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    """Encoding and decoding of one chunk, and the size of its blob."""
    keys = cache._conversation.keys
    tokens = list(range(CHUNK))
    form = keys.form(tokens, 0, "0" * 64)
    kv = [(k[0, :, :CHUNK], v[0, :, :CHUNK]) for k, v in truth]
    nbytes, blob = CHUNK * keys.layout.token_bytes, form.encode(kv)
    return {
        "encode": gigabytes(nbytes, lambda: form.encode(kv)),
        "decode": gigabytes(nbytes, lambda: form.decode(blob)),
    }


def measure(model: Any, tokenizer: Any, prompts: int, seed: int) -> Iterator[dict[str, Any]]:
    """One row per prompt and codec."""
    rng = random.Random(seed)
    pools = {kind: documents(kind, "test", tokenizer) for kind in KINDS}
    for index in track(range(prompts), description=str(model.dtype)):
        question = ask(tokenizer, draw(pools[list(KINDS)[index % len(KINDS)]], rng))
        full = run_full(model, tokenizer, question)
        for name, settings in ARMS.items():
            store = MemoryStore()
            cold, _ = prefill(model, question.ids, store, settings)
            warm, first = prefill(model, question.ids, ReadOnly(store), settings)
            kl, top1 = divergence(model, warm, first, full)
            yield {
                "dtype": str(model.dtype).removeprefix("torch."), "codec": name, "prompt": index,
                "tokens": warm.report.reused, "bytes": warm.report.bytes_read,
                "plain": warm.report.bytes_read + warm.report.bytes_saved,
                "exact": warm.report.exact, "kl": kl, "top1": top1, **speeds(cold, full.truth),
            }  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per data type and codec."""
    table = []
    for dtype, codec in dict.fromkeys((row["dtype"], row["codec"]) for row in rows):
        mine = [row for row in rows if (row["dtype"], row["codec"]) == (dtype, codec)]
        total = {name: sum(row[name] for row in mine) for name in ("tokens", "bytes", "plain")}
        table.append(
            {
                "dtype": dtype, "codec": codec, "prompts": len(mine), "exact": mine[0]["exact"],
                "bytes_per_token": round(total["bytes"] / total["tokens"]),
                "ratio": total["plain"] / total["bytes"],
                "encode_gb_s": median(row["encode"] for row in mine),
                "decode_gb_s": median(row["decode"] for row in mine),
                "kl": sum(row["kl"] for row in mine) / len(mine),
                "kl_worst": max(row["kl"] for row in mine),
                "top1": sum(row["top1"] for row in mine) / len(mine),
            }
        )  # fmt: skip
    return table


def show(table: list[dict[str, Any]]) -> None:
    """Print the summary."""
    view = Table(title=f"SmolLM2-135M-Instruct, {table[0]['prompts']} prompts")
    for column in ("", "", "B/token", "ratio", "encode", "decode", "KL (worst)", "top-1"):
        view.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in table:
        view.add_row(
            row["dtype"], row["codec"], f"{row['bytes_per_token']:,}", f"{row['ratio']:.2f}",
            f"{row['encode_gb_s']:.1f}", f"{row['decode_gb_s']:.1f}",
            f"{row['kl']:.1e} ({row['kl_worst']:.1e})", f"{100 * row['top1']:.1f} %",
        )  # fmt: skip
    Console(width=110).print(view)


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=30)
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="3 prompts, float32 only")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.quick:
        options.prompts, options.dtypes = 3, ["float32"]
    rows: list[dict[str, Any]] = []
    for dtype in options.dtypes:
        model, tokenizer = load_smollm2(getattr(torch, dtype))
        rows += measure(model, tokenizer, options.prompts, options.seed)
    table = summary(rows)
    show(table)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "codecs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(table[0]))
        writer.writeheader()
        for row in table:
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
    print(f"written to {options.out}: codecs.csv")


if __name__ == "__main__":
    main()

"""Time to the first token over a stream of retrieval prompts, and of one prompt of 2,000 tokens.

    python -m benchmarks.rag            # about 15 minutes on 2 cores
    python -m benchmarks.rag --quick    # about 2 minutes

Every prompt of the stream draws 4 to 8 of 50 documents (leads of an encyclopedia) in random order
and asks about one of them. Three arms see the same prompts in turn, each with a namespace of its
own that is empty at first: no cache, `reuse="prefix"`, `reuse="anywhere"`. Chunks are written
behind, and the wait for that is not part of any time.

Then prompts of 2,000 tokens of which 95 % were met elsewhere: no cache; anywhere; prefix mode where
the same 95 % stand at the prompt's beginning exactly as before, so that as many tokens are left to
compute; and prefix mode where all but one token are known.

Prints tables and writes `rag.csv`, `rag_2000.csv` and `rag.png` to benchmarks/results.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
import uuid
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.corpus import documents, draw
from benchmarks.quality import ask, write
from chunkcache import RedisChunkCache
from chunkcache.report import Report
from chunkcache.samples import load_smollm2
from tests.servers import Server, redis_binary, valkey_binary

RESULTS = Path(__file__).parent / "results"
DOCUMENTS = 50
ARMS = ("no cache", "prefix", "anywhere")


def first_token(
    model: Any, ids: torch.Tensor, url: str = "", **settings: Any
) -> tuple[float, Report | None]:
    """Milliseconds to the first token, from making the cache on, and what was reused."""
    begin = time.perf_counter()
    cache = RedisChunkCache(model, url, **settings) if url else None
    model.generate(ids, past_key_values=cache, max_new_tokens=1, do_sample=False)
    elapsed = 1e3 * (time.perf_counter() - begin)
    if cache is None:
        return elapsed, None
    cache.flush()
    return elapsed, cache.report


def stream(model: Any, tokenizer: Any, url: str, prompts: int, seed: int) -> list[dict[str, Any]]:
    """One row per prompt and arm."""
    rng = random.Random(seed)
    pool = documents("encyclopedia", "test", tokenizer)[:DOCUMENTS]
    run = uuid.uuid4().hex
    rows = []
    for index in track(range(prompts), description="stream"):
        ids = ask(tokenizer, draw(pool, rng)).ids
        for arm in ARMS:
            settings = {} if arm == "no cache" else {"reuse": arm, "namespace": f"{run} {arm}"}
            elapsed, report = first_token(model, ids, "" if arm == "no cache" else url, **settings)
            found = report.prompt_tokens - report.computed if report else 0
            rows.append(
                {
                    "prompt": index, "arm": arm, "tokens": ids.shape[1],
                    "first_token_ms": round(elapsed, 1), "found": found,
                    "share": round(found / ids.shape[1], 4),
                }
            )  # fmt: skip
    return rows


def two_thousand(model: Any, tokenizer: Any, url: str, repeats: int) -> list[dict[str, Any]]:
    """Times of prompts of 2,021 tokens, one row per repeat and arm.

    What was met before are 8 texts of 240 tokens: 15 whole chunks, so that prefix mode
    finds all of it too.
    """
    everything = [d.text for d in documents("encyclopedia", "test", tokenizer)[DOCUMENTS:]]
    ids = tokenizer("\n\n".join(everything), return_tensors="pt").input_ids
    parts = list(ids.split(240, dim=1))[:-1]
    prompts = [([parts.pop() for _ in range(8)], parts.pop()[:, :101]) for _ in range(repeats + 1)]
    rows = []
    for repeat, (texts, new) in enumerate(track(prompts, description="2,000 tokens")):
        run = uuid.uuid4().hex
        order = [*texts[4:], *texts[:4]][::-1]
        before, prompt = torch.cat(texts, 1), torch.cat([*order, new], 1)
        arms = {
            "no cache": {},
            "anywhere": {"reuse": "anywhere", "namespace": f"{run} anywhere"},
            "prefix, 95 % known": {"namespace": f"{run} prefix"},
            "prefix, all known": {"namespace": f"{run} all"},
        }
        first_token(model, before, url, **arms["anywhere"])
        first_token(model, prompt[:, : before.shape[1]], url, **arms["prefix, 95 % known"])
        first_token(model, prompt, url, **arms["prefix, all known"])
        for arm, settings in arms.items():
            elapsed, report = first_token(model, prompt, url if settings else "", **settings)
            if repeat:  # the first one warms up
                computed = report.computed + report.recomputed if report else prompt.shape[1]
                rows.append({"arm": arm, "first_token_ms": round(elapsed, 1), "computed": computed})
    return rows


def show(rows: list[dict[str, Any]], single: list[dict[str, Any]]) -> None:
    """Print both tables."""
    console = Console()
    prompts = 1 + max(row["prompt"] for row in rows)
    view = Table(title=f"stream of {prompts} prompts, SmolLM2-135M, float32: by quarter")
    for column in ("", *(f"{part}. quarter: median, found" for part in range(1, 5))):
        view.add_column(column, justify="right" if column else "left")
    for arm in ARMS:
        cells = []
        for part in range(4):
            mine = [r for r in rows if r["arm"] == arm and 4 * r["prompt"] // prompts == part]
            share = sum(r["found"] for r in mine) / sum(r["tokens"] for r in mine)
            median = statistics.median(r["first_token_ms"] for r in mine)
            cells.append(f"{median:,.0f} ms, {100 * share:.0f} %")
        view.add_row(arm, *cells)
    console.print(view)
    times = defaultdict(list)
    for row in single:
        times[row["arm"], row["computed"] if row["arm"] != "anywhere" else ""].append(
            row["first_token_ms"]
        )
    base = statistics.median(times[next(key for key in times if key[0] == "no cache")])
    view = Table(title="2,000 tokens, medians")
    for column in ("", "first token", "× faster than no cache", "tokens computed"):
        view.add_column(column, justify="right" if column else "left")
    for (arm, computed), values in times.items():
        median = statistics.median(values)
        view.add_row(arm, f"{median:,.0f} ms", f"{base / median:.1f}", str(computed or "see CSV"))
    console.print(view)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Time to the first token and share found, over the stream."""
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True)
    for arm in ARMS:
        mine = [row for row in rows if row["arm"] == arm]
        index = [row["prompt"] for row in mine]
        above.plot(index, [r["first_token_ms"] / r["tokens"] for r in mine], ".-", label=arm)
        if arm != "no cache":
            below.plot(index, [100 * r["share"] for r in mine], ".-", label=arm)
    above.set(
        ylabel="ms per prompt token to first token", title="4 to 8 of 50 documents, any order"
    )
    below.set(xlabel="prompt", ylabel="prompt tokens found, %", ylim=(0, 100))
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=120)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--server", choices=("redis", "valkey"), default="redis")
    parser.add_argument("--quick", action="store_true", help="16 prompts, 3 repeats")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.quick:
        options.prompts, options.repeats = 16, 3
    model, tokenizer = load_smollm2()
    binary = redis_binary() if options.server == "redis" else valkey_binary()
    with Server(binary) as server:
        single = two_thousand(model, tokenizer, server.unix_url, options.repeats)
        rows = stream(model, tokenizer, server.unix_url, options.prompts, options.seed)
    show(rows, single)
    options.out.mkdir(parents=True, exist_ok=True)
    write(rows, options.out / "rag.csv")
    write(single, options.out / "rag_2000.csv")
    plot(rows, options.out / "rag.png")
    print(f"written to {options.out}: rag.csv, rag_2000.csv, rag.png")


if __name__ == "__main__":
    main()

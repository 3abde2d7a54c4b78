"""Time to the first token, and of decoding, with and without chunkcache, in one run.

    python -m benchmarks.ttft            # about 15 minutes on 2 cores
    python -m benchmarks.ttft --quick    # about 1 minute, for a first look

All arms see the same prompts and take turns, so that a machine that gets slower or faster in the
course of the run does so for all of them. What is compared are medians of one run; times of
different runs or machines are not.

    no cache      plain generate()
    floor         the whole prefix is in a DynamicCache in RAM and is deep-copied, as Transformers'
                  documentation teaches; only the last token is computed
    cold          chunkcache with a namespace nobody has used; writing happens behind
    unix, tcp     chunkcache warm, from Redis or Valkey, no tier in RAM, a new cache object
    embedded      the same from the server that comes with chunkcache
    file          the same from files

Prints a table and writes `ttft.csv` and `ttft.png` to benchmarks/results.
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import DynamicCache

from chunkcache import RedisChunkCache
from chunkcache.samples import document, load_smollm2
from chunkcache.stores.embedded import start_embedded, stop_embedded
from tests.servers import Server, redis_binary, valkey_binary

RESULTS = Path(__file__).parent / "results"
DECODED = 128
Arm = Callable[[], tuple[float, torch.Tensor]]


def timed(model, ids, make_cache, new_tokens=1) -> tuple[float, torch.Tensor]:
    """Seconds from making the cache to having the tokens, and the tokens."""
    begin = time.perf_counter()
    out = model.generate(
        ids, past_key_values=make_cache(), max_new_tokens=new_tokens, do_sample=False
    )
    return time.perf_counter() - begin, out


def arms(model, ids, servers: dict[str, str]) -> Iterator[tuple[str, Arm]]:
    """Name and measurement of each arm, for one prompt."""
    yield "no cache", lambda: timed(model, ids, lambda: None)

    prefix = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=prefix, logits_to_keep=1)
    yield "floor", lambda: timed(model, ids, lambda: copy.deepcopy(prefix))

    first = next(iter(servers.values()))

    def cold() -> tuple[float, torch.Tensor]:
        cache = RedisChunkCache(model, first, namespace=uuid.uuid4().hex)
        result = timed(model, ids, lambda: cache)
        cache.flush()
        return result

    yield "cold", cold
    for name, url in servers.items():
        with RedisChunkCache(model, url) as filler:
            model.generate(ids, past_key_values=filler, max_new_tokens=1)

        def warm(url: str = url) -> tuple[float, torch.Tensor]:
            caches = []

            def make() -> RedisChunkCache:
                caches.append(RedisChunkCache(model, url))
                return caches[0]

            result = timed(model, ids, make)
            assert caches[0].report.computed == 1, caches[0].report
            return result

        yield name, warm


def decode_arms(model, ids, url: str) -> Iterator[tuple[str, Arm]]:
    """Seconds for 128 tokens after the first, plain and with chunkcache (warm)."""

    def decoding(make_cache) -> tuple[float, torch.Tensor]:
        first, _ = timed(model, ids, make_cache)
        whole, out = timed(model, ids, make_cache, 1 + DECODED)
        return whole - first, out

    prefix = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=prefix, logits_to_keep=1)
    yield "decode, DynamicCache", lambda: decoding(lambda: copy.deepcopy(prefix))
    yield "decode, chunkcache", lambda: decoding(lambda: RedisChunkCache(model, url))


def measure(all_arms: dict[str, Arm], repeats: int, what: str) -> dict[str, list[float]]:
    """Run the arms in turn; every arm must give the same tokens."""
    times = defaultdict(list)
    tokens: dict[int, torch.Tensor] = {}
    for repeat in track(range(repeats + 1), description=what, transient=True):
        for name, arm in all_arms.items():
            seconds, out = arm()
            expected = tokens.setdefault(out.shape[1], out)
            if not torch.equal(out, expected):
                raise SystemExit(f"{name} gave other tokens than {next(iter(all_arms))}")
            if repeat:  # the first round warms up
                times[name].append(seconds)
    return times


def show(rows: list[dict[str, object]]) -> None:
    """Print one table per prompt length, with ratios to the first arm and to the floor."""
    console = Console()
    for length in dict.fromkeys(row["tokens"] for row in rows):
        mine = [row for row in rows if row["tokens"] == length]
        base = {row["arm"]: float(row["median_s"]) for row in mine}
        table = Table(title=f"{length:,} tokens, SmolLM2-135M, float32")
        for column in ("", "median", "min – max", "× faster than no cache", "÷ floor"):
            table.add_column(column, justify="left" if not column else "right")
        for row in mine:
            seconds = float(row["median_s"])
            decode = str(row["arm"]).startswith("decode")
            table.add_row(
                str(row["arm"]),
                f"{1e3 * seconds:,.0f} ms",
                f"{1e3 * float(row['min_s']):,.0f} – {1e3 * float(row['max_s']):,.0f}",
                "" if decode else f"{base['no cache'] / seconds:.1f}",
                f"{seconds / base['decode, DynamicCache']:.2f} (÷ DynamicCache)"
                if decode
                else f"{seconds / base['floor']:.2f}",
            )
        console.print(table)


PLOTTED = {
    "no cache": ("no cache", "tab:orange"),
    "Redis 7, unix": ("chunkcache, warm", "tab:blue"),
    "floor": ("a copy in RAM, the floor", "tab:gray"),
}


def plot(rows: list[dict[str, object]], path: Path) -> None:
    """Median time to the first token over the length of the prompt, for the arms that tell most."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.6))
    for arm, (label, color) in PLOTTED.items():
        points = [
            (int(str(row["tokens"])), 1e3 * float(str(row["median_s"])))
            for row in rows
            if row["arm"] == arm
        ]
        axes.plot(*zip(*points, strict=True), marker="o", color=color)
        above = 9 if arm != "floor" else -16
        for tokens, ms in points:
            axes.annotate(
                f"{ms:,.0f} ms", (tokens, ms), (0, above), textcoords="offset points",
                ha="center", color=color, fontsize=8,
            )  # fmt: skip
        axes.annotate(
            label, points[-1], (28, -3), textcoords="offset points", color=color, fontsize=10
        )
    lengths = sorted({int(str(row["tokens"])) for row in rows})
    axes.set(xlabel="prompt tokens", ylabel="time to the first token", yscale="log", ylim=(50, 4e4))
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.set_yticks([100, 1000, 10_000], ["0.1 s", "1 s", "10 s"])
    axes.set_xlim(lengths[0] / 1.3, lengths[-1] * 1.15)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="512 and 1,024 tokens, 3 repeats")
    options = parser.parse_args()
    if options.quick:
        options.lengths, options.repeats = [512, 1024], 3
    model, tokenizer = load_smollm2()
    text = document(max(options.lengths) + 500, tokenizer)
    all_ids = tokenizer(text, return_tensors="pt").input_ids
    rows: list[dict[str, object]] = []
    with (
        Server(redis_binary()) as redis,
        Server(valkey_binary()) as valkey,
        tempfile.TemporaryDirectory() as folder,
    ):
        embedded = start_embedded(Path(folder) / "embedded")
        servers = {
            "Redis 7, unix": redis.unix_url,
            "Redis 7, tcp": redis.tcp_url,
            "Valkey 9, unix": valkey.unix_url,
            "Valkey 9, tcp": valkey.tcp_url,
            "embedded": embedded,
            "file": f"file://{folder}/files",
        }
        try:
            for length in options.lengths:
                ids = all_ids[:, :length]
                assert ids.shape[1] == length, "the sample text is too short"
                found = measure(
                    dict(arms(model, ids, servers)), options.repeats, f"{length} tokens"
                )
                found |= measure(
                    dict(decode_arms(model, ids, redis.unix_url)), options.repeats, "decoding"
                )
                for arm, seconds in found.items():
                    rows.append(
                        {
                            "tokens": length,
                            "arm": arm,
                            "median_s": statistics.median(seconds),
                            "min_s": min(seconds),
                            "max_s": max(seconds),
                            "runs": len(seconds),
                        }
                    )
        finally:
            stop_embedded(Path(folder) / "embedded")
    show(rows)
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / "ttft.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, RESULTS / "ttft.png")
    print(f"written to {RESULTS}/ttft.csv and ttft.png")


if __name__ == "__main__":
    main()

"""A new question about a known document, against the very same prompt again: the first token.

    python -m benchmarks.questions            # 5 minutes on 2 cores
    python -m benchmarks.questions --quick    # 2 minutes

Documents of 1,856 to 1,984 tokens, each asked once, in a Redis on a unix socket; then asked the
same once more (one token is computed) and asked something else in 10 tokens (these are computed,
and what the last stored chunk does not tell). Arms take turns; what is told is the median over
documents of each document's least time. Answers are compared with those of no cache. Writes
`results/questions.csv`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from transformers import DynamicCache

from benchmarks.quality import write
from chunkcache import RedisChunkCache
from chunkcache.samples import document, load_smollm2
from tests.servers import Server, redis_binary

RESULTS = Path(__file__).parent / "results"
LENGTHS = tuple(range(1856, 1985, 16))
QUESTION = 10  # tokens


def first_token(model: Any, ids: torch.Tensor, cache: Any) -> tuple[float, torch.Tensor]:
    """Milliseconds until it is there, and its logits."""
    began = time.perf_counter()
    out = model.generate(
        ids, past_key_values=cache, max_new_tokens=1, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return 1e3 * (time.perf_counter() - began), out.logits[0]


def measure(model: Any, tokenizer: Any, url: str, rounds: int) -> list[dict[str, Any]]:
    """A row for each document."""
    rows = []
    for seed, length in enumerate(track(LENGTHS)):
        text = tokenizer(document(2100, tokenizer, seed), return_tensors="pt").input_ids
        known, asked, new = text[:, :length], text[:, 2000:2010], text[:, 2020:2030]
        prompts = {
            "the same": torch.cat([known, asked], 1),
            "new question": torch.cat([known, new], 1),
        }
        with RedisChunkCache(model, url) as cache:
            first_token(model, prompts["the same"], cache)
        times, computed = defaultdict(list), {}
        for number in range(rounds + 1):
            for arm, ids in prompts.items():
                cache = RedisChunkCache(model, url, write=False)
                took, logits = first_token(model, ids, cache)
                computed[arm] = cache.report.computed
                if number:
                    times[arm].append(took)
                elif arm == "new question":
                    plain, expected = first_token(model, ids, DynamicCache(config=model.config))
                    assert torch.allclose(logits, expected, atol=1e-3)
        row: dict[str, Any] = {"tokens": length + QUESTION, "no cache, ms": round(plain)}
        for arm in prompts:
            row |= {f"{arm}, computed": computed[arm], f"{arm}, ms": round(min(times[arm]), 1)}
        rows.append(row | {"ratio": round(row["new question, ms"] / row["the same, ms"], 3)})
    return rows


def main() -> None:
    """Parse the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds")
    options = parser.parse_args()
    model, tokenizer = load_smollm2()
    with Server(redis_binary()) as server:
        rows = measure(model, tokenizer, server.unix_url, 3 if options.quick else 10)
    for row in rows:
        Console().print(row)
    median = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    Console().print("medians", median)
    write(rows, RESULTS / "questions.csv")


if __name__ == "__main__":
    main()

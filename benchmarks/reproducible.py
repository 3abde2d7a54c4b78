"""`reproducible=True`: are the bits the same whatever the store has, and what do pieces cost?

    python -m benchmarks.reproducible            # about an hour on 2 cores
    python -m benchmarks.reproducible --quick    # a few prompts

For each model, random prompts are answered from an empty store, a full one, one that has lost a
drawn half of its chunks, and in another process on a store in files. Logits of all tokens of the
answer are compared bit by bit, also without the setting: where nothing differs then, the machine
rounds alike in all shapes, and the comparison proves nothing. Then the CPU time of one forward
against the same in pieces, arms in turns, the least of several rounds.

Writes `reproducible.csv` and `pieces.csv` to benchmarks/results.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from chunkcache import RedisChunkCache, open_store
from chunkcache.samples import document, load_smollm2
from chunkcache.stores.memory import MemoryStore
from tests.models import tiny, tokens

RESULTS = Path(__file__).parent / "results"
KINDS = (
    "llama", "qwen3", "gemma2", "gemma3_text", "gpt2", "bloom", "opt", "falcon", "gptj",
    "gpt_neox", "phi", "mistral", "mixtral", "qwen3_moe", "deepseek_v3", "cohere", "granite",
    "olmo2", "starcoder2", "gpt_oss",
)  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16)
LENGTHS, SIZES = (512, 1024, 2048, 4096, 8192), (256, 512, 1024)
Prompts = list[torch.Tensor]


def load(name: str, dtype: torch.dtype, count: int) -> tuple[Any, Prompts, int]:
    """A model, prompts for it, and the tokens of a piece."""
    source = random.Random(name)
    if name != "SmolLM2-135M":
        lengths = [source.randint(30, 400) for _ in range(count)]
        model = tiny(name, dtype=dtype, max_position_embeddings=2048)
        return model, [tokens(length, seed=source.randint(0, 9999)) for length in lengths], 64
    model, tokenizer = load_smollm2(dtype)
    texts = [
        tokenizer(document(420, tokenizer, seed), return_tensors="pt").input_ids
        for seed in range(count)
    ]
    return model, [text[:, : source.randint(150, 400)] for text in texts], 128


def logits(model: Any, ids: torch.Tensor, store: Any, **settings: Any) -> torch.Tensor:
    """`[answer, rows, vocabulary]`, of 4 tokens."""
    cache = RedisChunkCache(model, store, min_gain=0, **settings)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=4,
        do_sample=False, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    cache.flush()
    return torch.stack(out.logits)


def evict_half(store: MemoryStore, seed: int) -> None:
    keys = sorted(entry.key for page in store.scan("safetensors") for entry in page)
    store.delete(random.Random(seed).sample(keys, len(keys) // 2))


def elsewhere(name: str, dtype: torch.dtype, count: int, folder: str, given: int) -> Any:
    """The logits of all prompts from a store in files, computed in the process that calls."""
    torch.set_num_threads(given)
    model, prompts, piece = load(name, dtype, count)
    with open_store(Path(folder).as_uri()) as store:
        return [
            logits(model, ids, store, reproducible=True, piece_tokens=piece).float().numpy()
            for ids in prompts
        ]


def bits(name: str, dtype: torch.dtype, count: int) -> dict[str, Any]:
    """A row: in how many prompts and store states bits differ."""
    model, prompts, piece = load(name, dtype, count)
    row: dict[str, Any] = {"model": name, "dtype": str(dtype).removeprefix("torch.")}
    row |= {"prompts": count, "states": 0}
    settings = {
        "with": {"reproducible": True, "piece_tokens": piece},
        "without": {"chunk_size": piece},
    }
    cold: dict[str, Prompts] = {"with": [], "without": []}
    for arm, chosen in settings.items():
        differing = 0
        for seed, ids in enumerate(prompts):
            store = MemoryStore(1 << 30)
            first = logits(model, ids, store, **chosen)
            cold[arm].append(first)
            differing += not torch.equal(first, logits(model, ids, store, **chosen))
            evict_half(store, seed)
            differing += not torch.equal(first, logits(model, ids, store, **chosen))
            row["states"] += 2 if arm == "with" else 0
        row[f"differing {arm}"] = differing
    with tempfile.TemporaryDirectory() as folder:
        asked = (name, dtype, count, folder, torch.get_num_threads())
        with multiprocessing.get_context("spawn").Pool(1) as other:
            theirs = other.apply(elsewhere, asked)
        for found in (theirs, elsewhere(*asked)):  # the second reads what the first has stored
            row["states"] += count
            row["differing with"] += sum(
                not torch.equal(mine.float(), torch.from_numpy(other))
                for mine, other in zip(cold["with"], found, strict=True)
            )
    return row


def cost(rounds: int, lengths: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Rows: CPU seconds of a prefill at once and in pieces, and the ratio."""
    model, tokenizer = load_smollm2()
    text = tokenizer(document(max(lengths) + 9, tokenizer, 1), return_tensors="pt").input_ids
    for length in lengths:
        ids = text[:, :length]
        arms = {0: [], **{size: [] for size in SIZES}}
        for turn in range(rounds):
            for size in sorted(arms, reverse=bool(turn % 2)):
                cache = RedisChunkCache(model, MemoryStore(), piece_tokens=size, write=False)
                began = time.process_time()
                with torch.no_grad():
                    model(ids, past_key_values=cache, logits_to_keep=1)
                arms[size].append(time.process_time() - began)
        whole = min(arms[0])
        yield {"tokens": length, "at once, s": round(whole, 3)} | {
            f"pieces of {size}": round(min(arms[size]) / whole, 3) for size in SIZES
        }


def show(rows: Iterator[dict[str, Any]], title: str, file: str) -> None:
    found = []
    for row in rows:
        found.append(row)
        Console().print(row)
    table = Table(*map(str, found[0]), title=title)
    for row in found:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    with (RESULTS / file).open("w", newline="") as out:
        writer = csv.DictWriter(out, found[0])
        writer.writeheader()
        writer.writerows(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few prompts")
    parser.add_argument("--only", choices=["bits", "cost"], help="one part")
    chosen = parser.parse_args()
    of_tiny, of_smollm2 = (2, 3) if chosen.quick else (10, 50)
    rows = (
        bits(name, dtype, of_smollm2 if name == "SmolLM2-135M" else of_tiny)
        for name in ("SmolLM2-135M", *KINDS)
        for dtype in DTYPES
    )
    if chosen.only != "cost":
        show(rows, "prompts and store states with differing bits", "reproducible.csv")
    if chosen.only != "bits":
        lengths = LENGTHS[:3] if chosen.quick else LENGTHS
        show(
            cost(2 if chosen.quick else 5, lengths), "CPU time, ratio to one forward", "pieces.csv"
        )


if __name__ == "__main__":
    main()

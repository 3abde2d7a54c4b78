"""What is found in a store that is too small: hits over a stream of prompts, for each store.

    python -m benchmarks.eviction                        # about 3 minutes on 2 cores
    python -m benchmarks.eviction --before OTHER/TREE    # the code of another checkout, too

No model: prompts are chains of chunks of random bytes, written and looked up as the cache does.
Which prompt comes next follows Zipf's law, over documents that share the first chunks of a group
("shared"), over documents of all lengths ("lengths"), and over documents whose popularity changes
half way ("drift"). The store holds 25, 50 or 75 % of the bytes of all prompts. A hit is a chunk
that is there together with all chunks before it; given is the share of all chunks asked for.

All prompts of a stream come in equal times, as the clock by which servers evict counts seconds.

"Belady" knows the future, and evicts what is needed last.

Prints a table and writes `eviction.csv` to benchmarks/results.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from chunkcache.stores import open_store
from chunkcache.stores.base import ChunkStore, Entry, read_blobs
from tests.servers import Server, redis_binary, valkey_binary

RESULTS = Path(__file__).parent / "results"
BLOB_BYTES = 114_000  # what allocators round up by no more than a hundredth
CHUNK = 128  # tokens
PAUSE = 0.25  # seconds from one prompt to the next
AT_ONCE = 2  # kinds of stores
SHARES = (0.25, 0.5, 0.75)
SERVERS = {
    "Redis 7, allkeys-lru": (redis_binary, "allkeys-lru"),
    "Redis 7, allkeys-lfu": (redis_binary, "allkeys-lfu"),
    "Valkey, allkeys-lru": (valkey_binary, "allkeys-lru"),
    "Valkey, allkeys-lfu": (valkey_binary, "allkeys-lfu"),
}
STORES = ("memory", "file", *SERVERS)

Prompt = list[str]
Hits = Callable[[list[Prompt], int], int]


def workloads(length: int) -> dict[str, list[Prompt]]:
    """Streams of prompts, each a list of the keys of its chunks."""
    rng = random.Random(5)
    found = {}
    for name, common in (("shared", 3), ("lengths", 0), ("drift", 0)):
        documents = []
        for number in range(40):
            own = 6 if name == "shared" else rng.randrange(2, 15)
            group = [f"group{rng.randrange(10)}-{n}" for n in range(common)]
            documents.append([*group, *(f"document{number}-{n}" for n in range(own))])
        weights = [1 / rank for rank in range(1, len(documents) + 1)]
        picks = rng.choices(range(len(documents)), weights, k=length)
        if name == "drift":
            picks = [(n * 7 + 13) % 40 if at >= length // 2 else n for at, n in enumerate(picks)]
        found[name] = [[key_of(key) for key in documents[n]] for n in picks]
    return found


def key_of(name: str) -> str:
    """A key as chunks have it."""
    return f"safetensors@m@1@0@{sha256(name.encode()).hexdigest()}"


def belady(stream: list[Prompt], room: int) -> int:
    """Hits of a store that knows what comes, and evicts what is needed last."""
    later: dict[str, list[int]] = {}
    for at in range(len(stream) - 1, -1, -1):
        for key in stream[at]:
            later.setdefault(key, []).append(at)
    held: dict[str, tuple[float, int]] = {}
    hits = 0
    for prompt in stream:
        hits += hits_of(prompt, held)
        for depth, key in enumerate(prompt):
            later[key].pop()
            held[key] = (later[key][-1] if later[key] else float("inf"), depth)
        while len(held) > room:
            del held[max(held, key=held.__getitem__)]
    return hits


def hits_of(prompt: Prompt, held: Any) -> int:
    """How many chunks are there together with all before them."""
    return next((n for n, key in enumerate(prompt) if key not in held), len(prompt))


@contextmanager
def store_of(kind: str, room: int) -> Iterator[ChunkStore]:
    """A store with room for so many chunks."""
    nbytes = room * (BLOB_BYTES + 1500)
    if kind == "memory":
        yield open_store(f"memory://?bytes={nbytes}")
    elif kind == "file":
        with tempfile.TemporaryDirectory() as folder:
            yield open_store(f"file://{folder}?bytes={nbytes}")
    else:
        binary, policy = SERVERS[kind]
        with Server(binary()) as server, server.client() as client:
            store = open_store(server.unix_url)
            store.sizes(["nothing"])
            used = client.info("memory")["used_memory"]
            client.config_set("maxmemory-policy", policy)
            # With what a connection takes that has sent a blob.
            client.config_set("maxmemory", used + room * (BLOB_BYTES + 2500) + 2 * BLOB_BYTES)
            yield store


def play(kind: str, stream: list[Prompt], room: int, pause: float) -> int:
    """Hits of a real store, used as the cache uses it."""
    knows_prompts = "before" in {field.name for field in fields(Entry)}  # not of every checkout
    blob = memoryview(random.Random(1).randbytes(BLOB_BYTES))
    hits = 0
    with store_of(kind, room) as store:
        begun = time.monotonic()
        for at, prompt in enumerate(stream):
            time.sleep(max(0.0, begun + at * pause - time.monotonic()))
            there = [key for key, size in zip(prompt, store.sizes(prompt), strict=True) if size]
            usable = prompt[: hits_of(prompt, set(there))]
            hits += sum(view is not None for view in read_blobs(store, usable))
            new = []
            for n, key in enumerate(prompt):
                if key not in there:
                    metadata = {
                        "positions": f"{n * CHUNK}-{(n + 1) * CHUNK}",
                        "token_ids": "12345 " * CHUNK,
                    }
                    more: dict[str, Any] = {"before": prompt[:n]} if knows_prompts else {}
                    new.append(Entry(key, metadata, blob, **more))
            store.write(new)
            store.flush()
        store.close()
    return hits


def measure(kind: str, length: int, tree: Path) -> list[dict[str, Any]]:
    """The hits of a kind of store, by the code of a checkout, in a process of its own."""
    command = [sys.executable, __file__, "--play", kind, "--length", str(length)]
    here = Path(__file__).parents[1]
    paths = os.pathsep.join(map(str, (tree, here)))  # this file and the tests from here
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, check=True
    )
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def rows_of(name: str, hits: Hits, length: int) -> list[dict[str, Any]]:
    """A row for each workload and size of the store; all streams are played at the same time."""

    def row(case: tuple[str, list[Prompt], float]) -> dict[str, Any]:
        workload, stream, share = case
        chunks = len({key for prompt in stream for key in prompt})
        found = hits(stream, int(chunks * share))
        return {
            "store": name, "workload": workload, "holds_percent": round(100 * share),
            "hits_percent": round(100 * found / sum(map(len, stream)), 1),
        }  # fmt: skip

    cases = [(*each, share) for each in workloads(length).items() for share in SHARES]
    with ThreadPoolExecutor(len(cases)) as threads:
        return list(threads.map(row, cases))


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=300, help="prompts in a stream")
    parser.add_argument("--before", type=Path, help="another checkout to compare with")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--play", choices=STORES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.play:

        def hits(stream: list[Prompt], room: int) -> int:
            return play(options.play, stream, room, PAUSE if options.play in SERVERS else 0.0)

        print(json.dumps(rows_of(options.play, hits, options.length)))
        return
    rows = rows_of("Belady", belady, options.length)
    here = Path(__file__).parents[1]
    cases = [(kind, tree) for kind in STORES for tree in (options.before, here) if tree]
    with ThreadPoolExecutor(AT_ONCE) as threads:
        measured = threads.map(lambda case: measure(case[0], options.length, case[1]), cases)
        for (_, tree), found in zip(cases, measured, strict=True):
            code = "before" if tree != here else "now" if options.before else ""
            rows += [{**row, "code": code} for row in found]
    show(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "eviction.csv").open("w", newline="") as file:
        names = ["store", "code", "workload", "holds_percent", "hits_percent"]
        writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"written to {options.out / 'eviction.csv'}")


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    view = Table(title="chunks found in a store that holds a share of all (%)")
    cases = dict.fromkeys((row["workload"], row["holds_percent"]) for row in rows)
    for column in ("store", "code", *(f"{name} {percent}" for name, percent in cases)):
        view.add_column(column)
    for store, code in dict.fromkeys((row["store"], row.get("code", "")) for row in rows):
        mine = [row for row in rows if (row["store"], row.get("code", "")) == (store, code)]
        view.add_row(store, code, *(f"{row['hits_percent']:.1f}" for row in mine))
    Console(width=140).print(view)


if __name__ == "__main__":
    main()

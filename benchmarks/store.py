"""From the server into the layers and back, as a share of what the socket can carry, in one run.

    python -m benchmarks.store            # about 5 minutes on 2 cores
    python -m benchmarks.store --quick    # about 1 minute, for a first look

The floor is a process that sends from memory with `sendall` to a `recv_into` here: the same bytes
over the same kind of socket, with no server and no protocol. All arms of a table take turns, so
that a machine that gets slower or faster does so for all of them. What is compared are medians of
one run.

    load                from blobs in the server to checked K/V in the layers, which are there
    load, new layers    the same into layers made for this prompt, from the second of a process on:
                        in memory of an earlier one
    load, new pages     the same for the first one: the system maps pages as they are filled
    peer                redis-py with hiredis at their defaults, `safetensors.torch.load`, and the
                        copy into the layers
    store               from layers to blobs in the server: encoding, and writing behind; the
                        server has the memory, of chunks that were deleted
    store, server grows the same into a server that was emptied, and maps pages as it takes them
    load, unchecked     `load` without its checksums, which are taken of bytes as they arrive
    checksum            xxh3 over the loaded K/V alone, from memory
    AES-256-GCM         opening sealed blobs of that size, which only sealed stores do

A prompt's keys and sizes are known beforehand, as they are when a lookup has found them. Prints
tables and writes `store.csv` and `store.png` to benchmarks/results.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import socket
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import redis
import safetensors.torch
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from chunkcache import open_store
from chunkcache.kv.codec import Codec
from chunkcache.kv.layers import GrowingLayer, allocate_all
from chunkcache.kv.layout import BufferPool, KVLayout, LayerShape, TensorFile
from chunkcache.kv.seal import Seal
from chunkcache.model.identity import ModelIdentity
from chunkcache.reuse import blobs
from chunkcache.reuse.blobs import BlobReader
from chunkcache.reuse.harvest import blob_of
from chunkcache.reuse.keyspace import KeySpace
from chunkcache.reuse.load import ChunkLoader
from chunkcache.stores.base import KV_BYTES, METADATA, ChunkStore, Entry
from chunkcache.tokens.chunking import Grid, cut
from chunkcache.tokens.plan import plan_row
from tests.servers import Server, free_port, redis_binary, valkey_binary

RESULTS = Path(__file__).parent / "results"
CHUNK = 128  # tokens
SHAPES = {
    "small": KVLayout(torch.float32, (LayerShape(2, 32, 2, 32),) * 5),
    "SmolLM2-135M, float32": KVLayout(torch.float32, (LayerShape(3, 64, 3, 64),) * 30),
    "Llama-3-8B, bfloat16": KVLayout(torch.bfloat16, (LayerShape(8, 128, 8, 128),) * 32),
}
FLOOR, PEER, UNCHECKED = "floor", "peer", "load, unchecked"
TRANSFERS = (
    FLOOR, "load", "load, new layers", "load, new pages", PEER, "store", "store, server grows",
)  # fmt: skip
PATIENCE = {"connect_timeout": 5.0, "read_timeout": 5.0, "max_delay": 5.0}  # seconds
SEAL = Seal((bytes(32),))


class Floor:
    """A process that sends `nbytes` as often as it is asked, over a Unix socket and over TCP."""

    def __init__(self, folder: Path, nbytes: int) -> None:
        self.path, self.port, self.nbytes = str(folder / "floor"), free_port(), nbytes
        self.target = memoryview(np.zeros(nbytes, dtype=np.uint8))
        self.process = multiprocessing.get_context("spawn").Process(
            target=send_from_memory, args=(self.path, self.port, nbytes), daemon=True
        )
        self.process.start()

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.join()
        Path(self.path).unlink()

    def connect(self, transport: str) -> socket.socket:
        """A connection to it, as soon as it listens."""
        deadline = time.monotonic() + 60.0
        while True:
            connection = socket.socket(socket.AF_UNIX if transport == "unix" else socket.AF_INET)
            try:
                connection.connect(self.path if transport == "unix" else ("127.0.0.1", self.port))
                return connection
            except OSError:
                connection.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def receive(self, connection: socket.socket) -> None:
        """Let it send, into memory that is there."""
        connection.sendall(b"!")
        at = 0
        while at < self.nbytes:
            at += connection.recv_into(self.target[at:])


def send_from_memory(path: str, port: int, nbytes: int) -> None:
    """The life of that process."""
    data = memoryview(np.ones(nbytes, dtype=np.uint8))

    def serve(listener: socket.socket) -> None:
        while True:
            connection = listener.accept()[0]
            while connection.recv(1):
                connection.sendall(data)
            connection.close()

    unix = socket.socket(socket.AF_UNIX)
    unix.bind(path)
    unix.listen()
    threading.Thread(target=serve, args=(unix,), daemon=True).start()
    serve(socket.create_server(("127.0.0.1", port)))


class Prompt:
    """Random K/V of a prompt in layers, its chunks, and ways between layers and a store."""

    def __init__(self, layout: KVLayout, nbytes: int) -> None:
        count = max(1, round(nbytes / (CHUNK * layout.token_bytes)))
        self.layout, self.tokens = layout, count * CHUNK
        self.nbytes = self.tokens * layout.token_bytes
        ids = np.random.default_rng(0).integers(0, 49_152, self.tokens)
        self.chunks = cut(ids, Grid(CHUNK), b"benchmark")
        self.identity = ModelIdentity("benchmark", "", "", "0" * 64, (("class", "Benchmark"),))
        self.layers = self.new_layers()
        for layer in self.layers:
            layer.hold(self.tokens)
            layer.keys.normal_()
            layer.values.normal_()
        keys = KeySpace(self.identity, layout, b"benchmark", Codec())
        self.forms = [
            keys.form(ids[c.start : c.stop].tolist(), c.start, c.hash) for c in self.chunks
        ]
        self.sealed = SEAL.seal(self.encode(0), "benchmark")
        self.sizes = {c.hash: f.file.size for c, f in zip(self.chunks, self.forms, strict=True)}
        self.truth = [(layer.keys.clone(), layer.values.clone()) for layer in self.layers]

    def encode(self, number: int) -> memoryview:
        """The blob of a chunk, as it is in the layers."""
        chunk = self.chunks[number]
        return blob_of(self.forms[number], self.layers, 0, chunk.start, chunk.stop)

    def new_layers(self, memory: BufferPool | None = None) -> list[Any]:
        """Layers with room for the prompt, in memory of an earlier one if there is any."""
        layers = [GrowingLayer() for _ in self.layout.layers]
        allocate_all(layers, self.layout, 1, self.tokens, torch.device("cpu"), memory)
        return layers

    def store(self, store: ChunkStore) -> None:
        """Encode each chunk as it is in the layers, and wait until all are written."""
        for number, form in enumerate(self.forms):
            store.write([Entry(form.key, {"tokens": str(CHUNK)}, self.encode(number))])
        assert store.flush(60.0)
        stats = store.stats()
        assert not stats.failed_entries + stats.dropped_entries, stats

    def load(self, store: ChunkStore, layers: Sequence[Any] = ()) -> None:
        """Read all chunks into these layers, or into those that are there."""
        layers = layers or self.layers
        plans = [plan_row(self.chunks, self.tokens, 0, self.sizes, "")]
        forms = {c.hash: form for c, form in zip(self.chunks, self.forms, strict=True)}
        loader = ChunkLoader(BlobReader(store, fail), layers, [0], True)
        loader.load(plans, [plans[0].reach], self.sizes, forms)
        assert plans[0].reach == self.tokens, "not all was found"

    def load_unchecked(self, store: ChunkStore) -> None:
        """The same as `load`, but for the checksums."""
        with (
            mock.patch.object(blobs, "Checksum", NoChecksum),
            mock.patch.object(TensorFile, "check_sum"),
        ):
            self.load(store)

    def load_as_a_peer(self, client: redis.Redis) -> None:
        """The same with what everybody has at hand."""
        for chunk, form in zip(self.chunks, self.forms, strict=True):
            tensors = safetensors.torch.load(client.get(f"{form.key}@kv_bytes"))
            for index, layer in enumerate(self.layers):
                keys, values = (tensors[f"layers.{index}.{part}"] for part in ("keys", "values"))
                layer.place(0, chunk.start, keys, values)

    def check(self) -> None:
        """The checksums alone."""
        for chunk, form in zip(self.chunks, self.forms, strict=True):
            runs = [run for layer in self.layers for run in layer.runs(0, chunk.start, CHUNK)]
            form.file.with_checksum(runs)

    def open_sealed(self) -> None:
        """As many sealed blobs as there are chunks, opened."""
        for _ in self.chunks:
            SEAL.open(self.sealed, "benchmark")

    def blank(self) -> None:
        """Forget what the layers hold."""
        for layer in self.layers:
            layer.blank(0, 0, self.tokens)

    def is_as_it_was(self) -> bool:
        """Whether the layers hold what they held at first."""
        return all(
            torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
            for layer, (keys, values) in zip(self.layers, self.truth, strict=True)
        )


class NoChecksum:
    """Takes what a checksum takes."""

    def update(self, piece: memoryview) -> None:
        """Do nothing."""


def fail(error: Exception) -> None:
    """A benchmark of failures says nothing."""
    raise error


class Arm(NamedTuple):
    """What is timed, and what comes before."""

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


@contextmanager
def arms(prompt: Prompt, server: Server, transport: str, floor: Floor) -> Iterator[dict[str, Arm]]:
    """What is measured on one server, over one kind of socket, with one kind of chunk."""
    url = server.url(transport)
    with (
        open_store(url, **PATIENCE) as store,
        redis.Redis.from_url(url) as client,
        closing(floor.connect(transport)) as connection,
    ):
        client.flushdb()
        prompt.store(store)
        for way in (lambda: prompt.load(store), lambda: prompt.load_as_a_peer(client)):
            prompt.blank()
            way()
            assert prompt.is_as_it_was(), "the layers do not hold what was stored"
        memory = BufferPool()  # as `RedisChunkCache` has it for the prompts of one model

        # What is there already would not be written again.
        def delete() -> None:
            names = (f.key for f in prompt.forms)
            client.delete(*(name + half for name in names for half in (METADATA, KV_BYTES)))

        yield {
            FLOOR: Arm(lambda: floor.receive(connection)),
            "load": Arm(lambda: prompt.load(store)),
            "load, new layers": Arm(lambda: prompt.load(store, prompt.new_layers(memory))),
            "load, new pages": Arm(lambda: prompt.load(store, prompt.new_layers())),
            UNCHECKED: Arm(lambda: prompt.load_unchecked(store)),
            PEER: Arm(lambda: prompt.load_as_a_peer(client)),
            "store": Arm(lambda: prompt.store(store), delete),
            "store, server grows": Arm(lambda: prompt.store(store), client.flushdb),
            "checksum": Arm(prompt.check),
            "AES-256-GCM": Arm(prompt.open_sealed),
        }


def measure(all_arms: dict[str, Arm], rounds: int, what: str) -> dict[str, list[float]]:
    """Seconds of each arm, round by round."""
    times = defaultdict(list)
    for number in track(range(rounds + 1), description=what, transient=True):
        for name, arm in all_arms.items():
            arm.prepare()
            begin = time.perf_counter()
            arm.run()
            if number:  # the first round warms up
                times[name].append(time.perf_counter() - begin)
    return times


def rows_of(prompt: Prompt, times: dict[str, list[float]], **where: object) -> list[dict[str, Any]]:
    """One row of the results per arm."""
    floor, peer = (statistics.median(times[name]) for name in (FLOOR, PEER))
    rows = []
    for name, seconds in times.items():
        median = statistics.median(seconds)
        rows.append(
            where
            | {
                "arm": name,
                "median_s": median,
                "min_s": min(seconds),
                "max_s": max(seconds),
                "runs": len(seconds),
                "bytes": prompt.nbytes,
                "gb_per_s": prompt.nbytes / median / 1e9,
                "share_of_floor": floor / median,
                "times_peer": peer / median,
            }
        )
    return rows


def show(rows: list[dict[str, Any]], title: str, console: Console) -> None:
    """Print one table."""
    table = Table(title=title)
    for column in ("", "GB/s", "min – max", "share of the floor", "× peer"):
        table.add_column(column, justify="right" if column else "left")
    for row in rows:
        rates = [row["bytes"] / row[each] / 1e9 for each in ("max_s", "min_s")]
        alone = row["arm"] not in TRANSFERS
        table.add_row(
            row["arm"],
            f"{row['gb_per_s']:.2f}",
            " – ".join(f"{rate:.2f}" for rate in rates),
            "" if alone else f"{row['share_of_floor']:.0%}",
            "" if alone or row["arm"].startswith("store") else f"{row['times_peer']:.1f}",
        )
    median = {row["arm"]: row["median_s"] for row in rows}
    table.caption = f"checksums are {1 - median[UNCHECKED] / median['load']:.0%} of loading"
    console.print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Shares of the floor: one panel per kind of chunk, one group of bars per server and socket."""
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(row["model"] for row in rows))
    places = list(dict.fromkeys((row["server"], row["transport"]) for row in rows))
    figure, panels = plt.subplots(
        1, len(models), figsize=(4.5 * len(models), 4), sharey=True, squeeze=False
    )
    width = 0.8 / len(TRANSFERS[1:])
    for panel, model in zip(panels[0], models, strict=True):
        for number, arm in enumerate(TRANSFERS[1:]):
            mine = [row for row in rows if (row["model"], row["arm"]) == (model, arm)]
            at = [index + number * width for index in range(len(mine))]
            panel.bar(at, [row["share_of_floor"] for row in mine], width, label=arm)
        size = next(row["chunk_bytes"] for row in rows if row["model"] == model)
        panel.set_title(f"{model}: {size / 1e6:.2g} MB a chunk", fontsize=9)
        panel.set_xticks(
            [index + 2.5 * width for index in range(len(places))],
            [f"{server}\n{transport}" for server, transport in places],
            fontsize=8,
        )
        panel.grid(axis="y", alpha=0.3)
    panels[0][0].set_ylabel("share of a bare socket's rate")
    panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--megabytes", type=int, default=200, help="K/V of a prompt")
    parser.add_argument("--quick", action="store_true", help="3 rounds of 100 MB")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to write")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.megabytes = 3, 100
    console = Console()
    rows: list[dict[str, Any]] = []
    with Server(redis_binary()) as seven, Server(valkey_binary()) as nine:
        servers = {"Redis 7": seven, "Valkey 9": nine}
        for model, layout in SHAPES.items():
            prompt = Prompt(layout, options.megabytes * 1_000_000)
            size = CHUNK * layout.token_bytes
            with closing(Floor(seven.folder, prompt.nbytes)) as floor:
                for transport in ("unix", "tcp"):
                    for name, server in servers.items():
                        title = f"{model}, chunks of {size / 1e6:.2g} MB, {name}, {transport}"
                        with arms(prompt, server, transport, floor) as all_arms:
                            times = measure(all_arms, options.rounds, title)
                        server.reset()
                        where = {"model": model, "chunk_bytes": size, "server": name}
                        new = rows_of(prompt, times, **where, transport=transport)
                        show(new, title, console)
                        rows += new
    options.results.mkdir(exist_ok=True)
    with (options.results / "store.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, options.results / "store.png")
    console.print(f"written to {options.results}/store.csv and store.png")


if __name__ == "__main__":
    main()

"""How much of reading is hidden behind computing, when the model begins before all K/V are here.

    python -m benchmarks.ahead            # about 5 minutes on 2 cores
    python -m benchmarks.ahead --quick    # about 1 minute

Prompts of 2,048 tokens, whose first 1,792 a Redis has; time to the first token with the model
running ahead of the store, as it does by default, and waiting for it, in turns. The link between
both is as fast as this machine makes it, or held back by a proxy to a network's rate. On two cores,
server, reader and model share them: then hiding the way gains nothing but what the link waits.

Prints a table and writes `ahead.csv` to benchmarks/results.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.corpus import documents
from benchmarks.quality import write
from benchmarks.rag import first_token
from chunkcache.reuse import load
from chunkcache.samples import load_smollm2
from tests.servers import Server, redis_binary

RESULTS = Path(__file__).parent / "results"
TOKENS, KNOWN = 2048, 1792
RATES = (None, 1000, 500, 250)  # MB/s; None: whatever comes
NEVER = 1 << 60
PIECE = 1 << 18


def throttled(source: socket.socket, target: socket.socket, rate: float) -> None:
    """Pass on what comes, at most `rate` bytes per second."""
    due = time.perf_counter()
    while data := source.recv(PIECE):
        target.sendall(data)
        due = max(due, time.perf_counter() - 0.002) + len(data) / rate
        time.sleep(max(0.0, due - time.perf_counter()))


@contextmanager
def link(server: Server, rate: int | None) -> Iterator[str]:
    """A URL of the server behind a link of so many MB/s."""
    if rate is None:
        yield server.unix_url
        return
    listener = socket.create_server(("127.0.0.1", 0))
    path = server.unix_url.removeprefix("unix://")

    def serve() -> None:
        while True:
            try:
                client = listener.accept()[0]
            except OSError:
                return
            there = socket.socket(socket.AF_UNIX)
            there.connect(path)
            for way in ((there, client), (client, there)):
                threading.Thread(target=throttled, args=(*way, rate * 1e6), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()


def main() -> None:
    """Parse the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="3 repeats, 2 links")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    repeats = 3 if options.quick else options.repeats
    model, tokenizer = load_smollm2()
    text = "\n\n".join(d.text for d in documents("encyclopedia", "test", tokenizer))
    ids = tokenizer(text, return_tensors="pt").input_ids
    rows: list[dict[str, Any]] = []
    with Server(redis_binary()) as server:
        for rate in RATES[:: 2 if options.quick else 1]:
            with link(server, rate) as url:
                for repeat in track(range(repeats + 1), description=f"{rate} MB/s"):
                    prompt = ids[:, repeat * TOKENS : (repeat + 1) * TOKENS]
                    run = uuid.uuid4().hex
                    first_token(model, prompt[:, :KNOWN], server.unix_url, namespace=run)
                    for ahead in (True, False) if repeat % 2 else (False, True):
                        least = load.LEAST_BYTES if ahead else NEVER
                        with mock.patch.object(load, "LEAST_BYTES", least):
                            took, report = first_token(
                                model, prompt, url, namespace=run, write=False
                            )
                        assert report
                        assert report.reused == KNOWN, report
                        if repeat:  # the first one warms up
                            rows.append(
                                {
                                    "link_mb_per_s": rate or "", "ahead": ahead,
                                    "first_token_ms": round(took, 1),
                                    "waited_ms": round(report.read_ms, 1),
                                    "overlapped_ms": round(report.overlapped_ms, 1),
                                }
                            )  # fmt: skip
    show(rows)
    options.out.mkdir(parents=True, exist_ok=True)
    write(rows, options.out / "ahead.csv")
    print(f"written to {options.out / 'ahead.csv'}")


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    view = Table(title=f"{TOKENS:,} tokens, {KNOWN:,} of them in Redis, SmolLM2-135M: medians")
    for column in ("link", "", "first token", "waited for the store", "hidden"):
        view.add_column(column, justify="right" if column else "left")
    for rate, ahead in dict.fromkeys((row["link_mb_per_s"], row["ahead"]) for row in rows):
        mine = [r for r in rows if (r["link_mb_per_s"], r["ahead"]) == (rate, ahead)]
        took, waited, hidden = (
            statistics.median(row[name] for row in mine)
            for name in ("first_token_ms", "waited_ms", "overlapped_ms")
        )
        view.add_row(
            f"{rate} MB/s" if rate else "unix socket",
            "running ahead" if ahead else "waiting",
            f"{took:,.0f} ms",
            f"{waited:,.0f} ms",
            f"{hidden / max(waited + hidden, 1e-9):.0%}",
        )
    Console().print(view)


if __name__ == "__main__":
    main()

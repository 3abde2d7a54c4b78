"""Soak: processes that generate while their server is killed, restarted and short of memory,
prompts are interrupted, and children forked.

    python -m benchmarks.soak                # 8 processes, 5 minutes
    python -m benchmarks.soak --seconds 3600 --processes 4

Tiny models with random weights; prompts of shared and own texts, in both modes, in batches and in
conversations. One Redis with `allkeys-lru` is killed (SIGKILL) every few seconds; it comes back as
it was or with nothing. Some prompts are interrupted as by Ctrl-C, and asked again with the same
cache object; some processes fork, also amid a prompt, and the child asks too, with that very
object. What
must hold:

- the tokens are those of a run without the cache, wherever the report says so or all that moved was
  computed again (except where the plain run's two best tokens are within rounding);
- nothing is raised, nothing hangs (all stacks are dumped), and no process grows once it is warm;
- when the server stays up, hits return;
- `catalog.sweep` leaves whole chunks alone and no halves, and no mention of a chunk that is gone.

Prints what was done; ends with 1 if something did not hold.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import multiprocessing
import os
import queue
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from datetime import timedelta
from functools import partial
from random import Random
from unittest.mock import patch

import torch
from torch import Tensor

from chunkcache import RedisChunkCache, catalog, open_store
from chunkcache.keys import FORMAT, INDEX_FORMAT
from tests.interrupting import after
from tests.models import PAD, VOCABULARY, tiny
from tests.servers import Server, redis_binary

NEW_TOKENS = 6
MODES = [("prefix", "none"), ("prefix", "none"), ("anywhere", "full"), ("anywhere", "head:4")]
CHUNK = 32
SHARED_TEXTS = 12
WARM_UP = 20  # prompts after which a process should have the memory that it needs
MOST_GROWTH = 48 << 20  # bytes of RAM of one process, behind the warm-up
TIE = 1e-3  # difference of two logits that rounding may turn round
RETURN_SECONDS = 60.0  # for hits to return; a store in trouble is left alone for 5 s
STUCK_SECONDS = 120.0
CHILD_SECONDS = 60
KEPT_RUNS = 256
INTERRUPTED = 0.15  # share of the prompts
FORKED = 0.04


class Worker:
    """One process: its model, its store, and what it has seen."""

    def __init__(self, number: int, url: str) -> None:
        self.source = Random(number)
        self.number, self.url = number, url
        self.model = tiny("llama", head_dim=64)  # 4 KB of K/V per token, to fill a server
        self.store = open_store(url, write_queue_bytes=8 << 20)
        self.seen: Counter[str] = Counter()
        self.runs: OrderedDict[bytes, Tensor] = OrderedDict()

    def text(self, name: str, tokens: int = 0) -> list[int]:
        """The text of that name, the same in all processes; of so many tokens, or as it comes.

        Many are as long as some chunks: then the next text is cut where it is cut elsewhere, too.
        """
        source = Random(name)
        tokens = tokens or source.choice([CHUNK, 2 * CHUNK, 3 * CHUNK, source.randint(40, 100)])
        return [source.randrange(3, VOCABULARY) for _ in range(tokens)]

    def prompt(self) -> list[int]:
        """Two or three texts, most of them shared, in any order, and an end of its own."""
        ids: list[int] = []
        for _ in range(self.source.randint(2, 3)):
            shared = self.source.random() < 0.7
            owner = "all" if shared else f"process {self.number}"
            which = self.source.randrange(SHARED_TEXTS if shared else 10**9)
            ids += self.text(f"{owner}, text {which}")
        return ids + self.text(f"{self.source.random()}", self.source.randint(2, 20))

    def turn(self) -> None:
        """One prompt, or a conversation of two."""
        rows = [self.prompt() for _ in range(self.source.choice([1, 1, 1, 2]))]
        width = max(map(len, rows))
        pads = [width - len(row) for row in rows]
        ids = torch.tensor([[PAD] * pad + row for pad, row in zip(pads, rows, strict=True)])
        reuse, repair = self.source.choice(
            [
                ("prefix", "head:4"),
                ("prefix", "head:4"),
                ("anywhere", "full"),
                ("anywhere", "head:4"),
            ]
        )
        # Now and then a store that is opened and closed again: nothing of it may stay.
        place = self.url if self.source.random() < 0.1 else self.store
        with RedisChunkCache(
            self.model, place, reuse=reuse, repair=repair, chunk_size=CHUNK
        ) as cache:
            out = self.ask(ids, pads, cache)
            if self.source.random() < 0.3:
                more = torch.tensor([self.text("and then?", 5)] * len(rows))
                self.ask(torch.cat([out, more], dim=1), pads, cache)

    def ask(self, ids: Tensor, pads: Sequence[int], cache: RedisChunkCache) -> Tensor:
        """Generate, and compare. `ids` is `[rows, tokens]`, `pads` the padding left of each."""
        while self.source.random() < INTERRUPTED:
            moment = self.source.uniform(0.0005, 0.03)
            self.seen["interrupts"] += after(moment, partial(self.generate, ids, pads, cache))
        forks = self.source.random() < FORKED
        child = Child(self, ids, pads, cache) if forks else None
        out = self.generate(ids, pads, cache)
        if child:
            child.check()
        report = cache.report
        kinds = {kind: getattr(report, kind) for kind in ("reused", "moved", "recomputed")}
        self.seen.update(kinds, prompts=1, tokens=report.prompt_tokens, errors=report.store_errors)
        assert report.skipped == "", report.skipped
        assert report.prompt_tokens == ids.numel() - sum(pads), "the report lacks tokens"
        assert report.computed + sum(kinds.values()) == report.prompt_tokens
        if report.exact or cache.settings.repair == "full":
            self.compare(out, self.plain(ids, pads), pads, str(report))
        else:
            self.seen["approximate"] += 1
            assert out.shape[1] == ids.shape[1] + NEW_TOKENS
        return out

    def plain(self, ids: Tensor, pads: Sequence[int]) -> Tensor:
        """What comes of a run without the cache."""
        key = ids.numpy().tobytes() + bytes(str(pads), "ascii")
        if key not in self.runs:
            self.runs[key] = self.generate(ids, pads, None)
        self.runs.move_to_end(key)
        if len(self.runs) > KEPT_RUNS:
            self.runs.popitem(last=False)
        return self.runs[key]

    def generate(self, ids: Tensor, pads: Sequence[int], cache: RedisChunkCache | None) -> Tensor:
        mask = (torch.arange(ids.shape[1]) >= torch.tensor(pads)[:, None]).long()
        return self.model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=NEW_TOKENS,
            do_sample=False,
        )  # fmt: skip

    def compare(self, out: Tensor, plain: Tensor, pads: Sequence[int], report: str) -> None:
        """Raise unless the tokens are alike, as far as the plain run had a choice to make."""
        for row, pad in enumerate(pads):
            differing = (out[row] != plain[row]).nonzero()
            if not len(differing):
                continue
            with torch.no_grad():
                before = plain[row : row + 1, pad : int(differing[0])]
                best = self.model(before).logits[0, -1].topk(2).values
            if best[0] - best[1] > TIE:
                raise AssertionError(f"other tokens: {out[row]}, not {plain[row]}\n{report}")
            self.seen["ties"] += 1

    def see_hits_return(self) -> None:
        """Ask what was just stored, until it is found where it was, and where it was not."""
        deadline = time.monotonic() + RETURN_SECONDS
        wanted = {"prefix": "reused", "anywhere": "recomputed"}
        while wanted and time.monotonic() < deadline:
            first, second = (self.text(f"{self.source.random()}", 80) for _ in range(2))
            for reuse, kind in list(wanted.items()):
                for ids in ([*first, *second, 5], [*first, *second, 7], [*second, *first, 5]):
                    with RedisChunkCache(
                        self.model, self.store, reuse=reuse, repair="full", chunk_size=CHUNK
                    ) as cache:
                        self.ask(torch.tensor([ids]), [0], cache)
                        cache.flush(5)
                    if getattr(cache.report, kind) > 0:
                        wanted.pop(reuse, None)
            time.sleep(0.2 if wanted else 0)
        assert not wanted, f"no hits with reuse={list(wanted)} though the server is back"


class Child:
    """A forked process that asks what its parent asks meanwhile, with the same cache object.

    `check` waits for it, and raises if it did not get the right tokens.
    """

    def __init__(
        self, worker: Worker, ids: Tensor, pads: Sequence[int], cache: RedisChunkCache
    ) -> None:
        self.asked = worker, ids, pads, cache
        worker.plain(ids, pads)  # known before
        self.status = -1
        # At once, or from another thread amid the parent's prompt.
        self.moment = worker.source.choice([0.0, worker.source.uniform(0.0, 0.03)])
        self.thread = threading.Thread(target=self.live)
        self.thread.start()
        if not self.moment:
            self.thread.join()

    def check(self) -> None:
        self.thread.join()
        self.asked[0].seen["forks"] += 1
        assert self.status == 0, f"a forked child ended with {self.status}"

    def live(self) -> None:
        time.sleep(self.moment)
        pid = os.fork()
        if not pid:
            self.ask()
        self.status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def ask(self) -> None:
        """The child's life."""
        signal.alarm(CHILD_SECONDS)  # faulthandler would wait for a thread of the parent
        worker, ids, pads, cache = self.asked
        try:
            fresh = RedisChunkCache(worker.model, worker.store, chunk_size=CHUNK)
            for each in (cache, fresh):
                exact = each.settings.reuse == "prefix" or each.settings.repair == "full"
                out = worker.generate(ids, pads, each)
                if exact:
                    worker.compare(out, worker.plain(ids, pads), pads, str(each.report))
            worker.store.flush(5)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)


def resident() -> int:
    """Bytes of RAM of this process now."""
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def work(number: int, url: str, calm, answers) -> None:
    """The life of one process: tells what it has seen, or how it failed."""
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(STUCK_SECONDS, repeat=True)
    failure = ""
    worker = Worker(number, url)
    try:
        turns = base = 0
        while turns <= WARM_UP or not calm.is_set():
            worker.turn()
            turns += 1
            if turns == WARM_UP:
                base = resident()
            faulthandler.dump_traceback_later(STUCK_SECONDS, repeat=True)
        worker.seen["hits amid faults"] = worker.seen["reused"] + worker.seen["recomputed"]
        growth = resident() - base
        worker.seen["growth"] = growth
        assert growth <= MOST_GROWTH, f"grew by {growth >> 20} MiB in {turns - WARM_UP} prompts"
        worker.see_hits_return()
        worker.store.close()
    except BaseException:
        failure = f"process {number}: {traceback.format_exc()}"
    faulthandler.cancel_dump_traceback_later()
    answers.put((dict(worker.seen), failure))


def torment(server: Server, seconds: float, source: Random, seen: Counter[str]) -> None:
    """Kill the server every few seconds, for so long, and let it come back."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, source.uniform(2.0, 9.0)))
        count_evictions(server, seen)
        server.stop()
        seen["kills"] += 1
        if source.random() < 0.15:
            shutil.rmtree(server.folder / "appendonlydir", ignore_errors=True)
        time.sleep(source.uniform(0.1, 1.5))
        server.start()


def count_evictions(server: Server, seen: Counter[str]) -> None:
    with server.client() as client:
        seen["evicted keys"] += client.info("stats")["evicted_keys"]


def inventory(server: Server) -> tuple[set[bytes], list[str]]:
    """Keys of whole chunks; and halves of chunks, and mentions of chunks that are gone."""
    with server.client() as client:
        names = set(client.scan_iter(count=1000))
        described = halves(names, b"@metadata", FORMAT)
        blobs = halves(names, b"@kv_bytes", FORMAT)
        orphans = [f"a half: {name!r}" for name in described ^ blobs]
        hashes = {name.rpartition(b"@")[2] for name in blobs}
        for name in halves(names, b"@metadata", INDEX_FORMAT):
            mentions = client.hkeys(name + b"@metadata")
            orphans += [f"{name!r} mentions {each!r}" for each in mentions if each not in hashes]
    return described & blobs, orphans


def halves(names: Iterable[bytes], half: bytes, format: str) -> set[bytes]:
    """Keys of a format's entries that have this half."""
    start = f"{format}@".encode()
    return {n.removesuffix(half) for n in names if n.startswith(start) and n.endswith(half)}


def sweep(server: Server, seen: Counter[str]) -> list[str]:
    """What is wrong with what `catalog.sweep` leaves behind."""
    before, _ = inventory(server)
    # Mentions this young may be of chunks on their way; all is quiet here.
    with (
        open_store(server.unix_url, read_timeout=5.0) as store,
        patch.object(catalog, "SETTLED", timedelta(seconds=-5)),
    ):
        deleted = catalog.sweep(store)
    after, orphans = inventory(server)
    seen["chunks"] = len(after)
    seen.update({"halves swept": deleted.chunks, "mentions swept": deleted.mentions})
    problems = [f"left by the sweep: {orphan}" for orphan in orphans]
    return problems + [f"swept though whole: {key!r}" for key in before - after]


def wait_for_signs(server: Server) -> None:
    """Wait until what a dead connection has announced and never written has lapsed."""
    with server.client() as client:
        while any(
            client.type(name) == b"string" for name in client.scan_iter("*@metadata", count=1000)
        ):
            time.sleep(0.5)


def soak(
    processes: int, seconds: float, memory: str = "200mb", seed: int = 0
) -> tuple[Counter[str], list[str]]:
    """Run it all. Returns what was counted, and what did not hold.

    `memory` is the server's `maxmemory`.
    """
    options = ["--maxmemory", memory, "--maxmemory-policy", "allkeys-lru"]
    options += ["--appendonly", "yes", "--appendfsync", "no"]  # it may come back as it was
    context = multiprocessing.get_context("spawn")
    calm, answers = context.Event(), context.Queue()
    seen: Counter[str] = Counter()
    problems: list[str] = []
    with Server(redis_binary(), *options) as server:
        workers = [
            context.Process(target=work, args=(number, server.unix_url, calm, answers), daemon=True)
            for number in range(processes)
        ]
        for worker in workers:
            worker.start()
        torment(server, seconds, Random(seed), seen)
        calm.set()
        problems += gather(workers, answers, seen)
        count_evictions(server, seen)
        with server.client() as client:
            client.config_set("maxmemory", 0)  # what is looked at shall stay
        wait_for_signs(server)
        problems += sweep(server, seen)
    return seen, problems


def gather(workers: Sequence, answers, seen: Counter[str]) -> list[str]:
    """Wait for all processes: what did not hold in them."""
    problems = []
    deadline = time.monotonic() + RETURN_SECONDS + STUCK_SECONDS
    waiting = len(workers)
    while waiting and time.monotonic() < deadline:
        try:
            counted, failure = answers.get(timeout=1.0)
        except queue.Empty:
            if any(worker.exitcode for worker in workers):
                break
            continue
        waiting -= 1
        growth = max(seen["growth"], counted.pop("growth", 0))
        seen.update(counted)
        seen["growth"] = growth
        problems += [failure] if failure else []
    for worker in workers:
        worker.join(STUCK_SECONDS)
        if worker.exitcode != 0:
            problems.append(f"a process ended with {worker.exitcode}, or not at all")
            worker.kill()
    return problems


def main() -> None:
    """Parse the command line, soak, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--memory", default="200mb", help="the server's maxmemory")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    seen, problems = soak(options.processes, options.seconds, options.memory, options.seed)
    for name, count in seen.items():
        print(f"{count:>14,} {name}")
    for problem in problems[:20]:
        print(problem)
    print(f"{len(problems)} problems")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()

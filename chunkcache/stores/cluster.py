"""Chunks spread over the servers of a Redis or Valkey cluster, which are asked at the same time.

Both halves of an entry are on one server: the last part of a key, the chunk's hash, stands in
braces there, `format@model@1@0@{hash}@kv_bytes`, and only what is in braces chooses the server.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, TypeVar

from chunkcache.errors import StoreError
from chunkcache.stores.address import CLUSTER, read_url
from chunkcache.stores.base import ChunkStore, Entry, Listed, Part, StaysHere, note_partial
from chunkcache.stores.breaker import MAX_DELAY
from chunkcache.stores.locks import Latch, start_thread
from chunkcache.stores.redis import CONNECT_TIMEOUT, READ_TIMEOUT
from chunkcache.stores.topology import Server, Topology

T = TypeVar("T")
Work = Callable[[ChunkStore, list[int]], None]


class ClusterStore(StaysHere, ChunkStore):
    """A store on all servers of a cluster.

    `url` is `redis+cluster://user:password@host1:6379,host2:6379`, `rediss+cluster://` for TLS;
    one of the servers named must answer. A server whose answer to a lookup takes longer than
    `max_delay` seconds is not asked for a while. The other arguments are those of `RedisStore`.

    What belongs to a server that fails is missing and is not taken, and the prompt is told with
    `note_partial`. StoreError is raised when all servers fail, and by `delete` when one does.
    """

    def __init__(
        self,
        url: str,
        *,
        connect_timeout: float = CONNECT_TIMEOUT,
        read_timeout: float = READ_TIMEOUT,
        max_delay: float = MAX_DELAY,
        **options: Any,
    ) -> None:
        self._address = read_url(url, CLUSTER, connect_timeout, read_timeout)
        self._topology = Topology(self._address, max_delay, **options)

    def __repr__(self) -> str:
        return f"ClusterStore({self._address.label!r})"

    def sizes(self, keys: Sequence[str]) -> list[int]:
        return self._look_up(keys, lambda node, some: node.sizes(some), 0)

    def read_metadata(self, keys: Sequence[str]) -> list[dict[str, str] | None]:
        return self._look_up(keys, lambda node, some: node.read_metadata(some), None)

    def fetch(self, parts: Sequence[Part]) -> Generator[bool]:
        """As in `ChunkStore`.

        Places are filled in any order, so they are the caller's again only when the iteration has
        ended, early or not.
        """
        here = [Latch() for _ in parts]
        found = [False] * len(parts)
        ended = Latch()

        def fill(node: ChunkStore, positions: list[int]) -> None:
            try:
                with closing(node.fetch([parts[at] for at in positions])) as answers:
                    for at, arrived in zip(positions, answers, strict=True):
                        found[at] = arrived
                        here[at].open()
                        if ended.is_open:
                            return
            finally:
                _give_up(here, positions)

        team = _Team(self._topology, [part.key for part in parts], fill)
        _give_up(here, set(range(len(parts))).difference(*team.shares.values()))
        try:
            team.start(list(team.shares))
            for at, latch in enumerate(here):
                latch.wait()
                yield found[at]
        finally:
            ended.open()
            for error in team.join():
                note_partial(error)

    def write(self, entries: Sequence[Entry]) -> int:
        taken: list[int] = []
        replaced = [key for entry in entries for key in entry.replaces]
        entries = [replace(entry, replaces=()) for entry in entries]  # which other nodes have

        def write(node: ChunkStore, positions: list[int]) -> None:
            taken.append(node.write([entries[at] for at in positions]))

        self.sizes(list({key for entry in entries for key in entry.before}))  # which counts as use
        # A second time after a move; what is there by then is not sent again.
        self._note(self._ask_all([entry.key for entry in entries], write, taken.clear))
        if replaced and sum(taken) == sum(entry.nbytes for entry in entries):
            self.delete(replaced)
        return sum(taken)

    def check_writable(self) -> None:
        refusals = []
        primaries = self._topology.primaries
        for server in primaries:
            try:
                server.breaker.check_writable()
            except StoreError as error:
                refusals.append(error)
        if refusals and len(refusals) == len(primaries):
            raise refusals[0]

    def delete(self, keys: Sequence[str]) -> int:
        counts: list[int] = []

        def delete(node: ChunkStore, positions: list[int]) -> None:
            counts.append(node.delete([keys[at] for at in positions]))

        for error in self._ask_all(keys, delete):
            raise error
        return sum(counts)

    def scan(self, prefix: str = "") -> Iterator[list[Listed]]:
        """As in `ChunkStore`, one server after the other."""
        self._topology.refresh()
        pages = (server.breaker.scan(prefix) for server in self._topology.primaries)
        return chain.from_iterable(pages)

    def server_info(self) -> list[dict[str, Any]]:
        self._topology.refresh()
        primaries = self._topology.primaries
        return [info for server in primaries for info in server.breaker.server_info()]

    def flush(self, timeout: float | None = None) -> bool:
        deadline = None if timeout is None else time.monotonic() + timeout
        done = True
        for server in self._topology.primaries:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            done &= server.breaker.flush(left)
        return done

    def close(self) -> None:
        self._topology.close()

    def _look_up(
        self,
        keys: Sequence[str],
        verb: Callable[[ChunkStore, list[str]], list[T]],
        missing: T,
    ) -> list[T]:
        """The answer to each key, from the server that should have it."""
        answers = [missing] * len(keys)

        def ask(node: ChunkStore, positions: list[int]) -> None:
            found = verb(node, [keys[at] for at in positions])
            for at, answer in zip(positions, found, strict=True):
                answers[at] = answer

        self._note(self._ask_all(keys, ask))
        return answers

    def _ask_all(
        self, keys: Sequence[str], work: Work, begin_again: Callable[[], object] = bool
    ) -> list[StoreError]:
        """Do `work` for each server's share of the keys, twice if some keys have moved."""
        errors = _Team(self._topology, keys, work).run()
        if self._topology.moved:
            self._topology.refresh()
            begin_again()
            errors = _Team(self._topology, keys, work).run()
        return errors

    def _note(self, errors: Sequence[StoreError]) -> None:
        """Tell the prompt what failed, or raise it if there is nothing else."""
        if errors and self._topology.failing >= self._topology.primaries:
            raise errors[0]
        for error in errors:
            note_partial(error)


def _give_up(latches: Sequence[Latch], positions: Iterable[int]) -> None:
    for at in positions:
        latches[at].open()


class _Team:
    """The servers that have a call's keys, each with a thread for its share of the work."""

    def __init__(self, topology: Topology, keys: Sequence[str], work: Work) -> None:
        self.shares = topology.share_out(keys)
        self._topology = topology
        self._work = work
        self._errors: dict[Server, StoreError] = {}
        self._ends: list[Latch] = []  # of each thread

    def run(self) -> list[StoreError]:
        """Do all of the work, and return what failed."""
        for server in list(self.shares)[:1]:  # in this thread; often there is no other
            self.start(list(self.shares)[1:])
            self._serve(server, Latch())
        return self.join()

    def start(self, servers: Sequence[Server]) -> None:
        """Begin with the shares of these servers."""
        for server in servers:
            end = Latch()
            try:
                start_thread(partial(self._serve, server, end), "chunkcache-node")
                self._ends.append(end)
            except RuntimeError:  # no more threads, or the interpreter is ending
                self._serve(server, end)

    def join(self) -> list[StoreError]:
        """Wait until all is done, and return what failed."""
        for end in self._ends:
            end.wait()
        self._topology.note(self.shares, self._errors)
        return list(self._errors.values())

    def _serve(self, server: Server, end: Latch) -> None:
        try:
            self._work(server.breaker, self.shares[server])
        except StoreError as error:
            self._errors[server] = error
        finally:
            end.open()

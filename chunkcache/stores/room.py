"""Room on a server that is full, made by whoever writes, in the order of `eviction.py`.

A server's own eviction looks at a few keys, one by one, and its clock counts seconds: of a prompt
that was just written or read any chunk may leave, and without the first one the others are of no
use. So who is about to write looks how much room there is, and where it is too little, deletes
those chunks that leave first among some that it has looked at. Of anything else on the server, and
for whoever may not look, the server's own policy decides.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import redis

from chunkcache.stores.address import Address
from chunkcache.stores.base import KV_BYTES, METADATA, Entry
from chunkcache.stores.commands import Commands
from chunkcache.stores.eviction import leaving
from chunkcache.stores.stream import WINDOW_BYTES

LOOKED_AT = 64  # random keys; each chunk has two
ROUNDS = 3  # of looking, while all that was seen has to leave
KNOWN_SECONDS = 1.0  # how long the room that was there is relied on
REFUSED_SECONDS = 60.0  # until an account that may not look tries again
SMALL = 64  # the share of a server's memory that replies may take
OVERHEAD = 2048  # bytes of metadata, and of two keys
# What is ours to delete: chunks by their names, whose metadata are a hash with positions.
NAME = re.compile(rb"([^@]+@[^@]+@[0-9]+@[0-9]+@\{?[0-9a-f]{64}\}?)@(?:metadata|kv_bytes)")


class Stored(NamedTuple):
    """A chunk on the server: how early it leaves (the least first), its name, its memory."""

    rank: tuple[float, int]
    name: bytes
    nbytes: int


class Room(Commands):
    """Commands that make room."""

    def __init__(self, address: Address) -> None:
        super().__init__(address)
        self._free = math.inf  # bytes that may be written until `_known_until`
        self._known_until = -math.inf
        self._policy = ""
        self._rounds_up = True
        self._window = WINDOW_BYTES  # bytes of replies that may be under way

    def _without_room(self, entries: Sequence[Entry]) -> set[str]:
        """Make room for new blobs. Returns the keys of those that would be the first to leave.

        Raises StoreError if the server is full and evicts nothing, so that no blob is sent in vain.
        """
        left = list(entries)
        refused: set[str] = set()
        for _ in range(ROUNDS):
            if sum(map(self._cost, left)) > self._free or time.monotonic() > self._known_until:
                self._look(max(map(self._cost, left), default=0))
            if not left or sum(map(self._cost, left)) <= self._free:
                break
            leave, left, more = self._choose(left, self._seen())
            refused |= more
            if not leave:
                break  # the rest is for the server to choose
            self._ask([("UNLINK", *_halves(each.name)) for each in leave])
            self._known_until = -math.inf
        self._free -= sum(map(self._cost, left))
        return refused

    def _choose(
        self, entries: Sequence[Entry], seen: list[Stored]
    ) -> tuple[list[Stored], list[Entry], set[str]]:
        """Which chunks leave for which entries, and the keys of those that have no place."""
        free = self._free
        leave: list[Stored] = []
        kept: list[Entry] = []
        refused: set[str] = set()
        for entry in entries:
            own = {self._names(key)[1] for key in entry.before}
            follows = not {each.key for each in kept}.isdisjoint(entry.before)
            rank = (math.inf if entry.pinned or self._counts_uses else 0.0, -_depth(entry))
            may_leave = (
                (each, each.nbytes)
                for each in seen
                if each.name + KV_BYTES.encode() not in own and each.rank < rank
            )
            found, is_enough = leaving(may_leave, math.ceil(self._cost(entry) - free))
            stays = follows or len(found) < len(seen)
            if not is_enough and stays and not entry.pinned:
                refused.add(entry.key)
                continue
            kept.append(entry)
            leave += found
            seen = [each for each in seen if each not in found]
            free += sum(each.nbytes for each in found) - self._cost(entry)
        return leave, kept, refused

    @property
    def _counts_uses(self) -> bool:
        return self._policy.endswith("lfu")

    def _cost(self, entry: Entry) -> int:
        """Bytes that a blob takes: jemalloc has four sizes from a power of 2 to the next."""
        step = 1 << max(entry.nbytes.bit_length() - 3, 4) if self._rounds_up else 1
        return -(-entry.nbytes // step) * step + OVERHEAD

    def _look(self, largest: int) -> None:
        """Ask the server how much may be written, if no blob takes more than `largest` bytes."""
        self._free = math.inf
        self._known_until = time.monotonic() + KNOWN_SECONDS
        with self._store_errors():
            try:
                info: Any = self._client.info("memory")
            except redis.ResponseError:  # some may not ask
                self._known_until += REFUSED_SECONDS
                return
            most, used = int(info.get("maxmemory", 0)), int(info.get("used_memory", 0))
            used -= int(info.get("mem_not_counted_for_evict", 0))
            self._policy = str(info.get("maxmemory_policy", ""))
            self._rounds_up = "jemalloc" in str(info.get("mem_allocator", "jemalloc"))
            if most and self._policy == "noeviction" and used > most:
                self._known_until = -math.inf
                raise redis.OutOfMemoryError("used memory > 'maxmemory'")
            if most and self._policy != "noeviction":
                self._window = min(WINDOW_BYTES, max(most // SMALL, 1))
                # The server evicts for what connections take, too: a blob that comes, replies.
                spare = largest + self._window - int(info.get("mem_clients_normal", 0))
                self._free = most - used - max(spare, 0)

    def _seen(self) -> list[Stored]:
        """Some chunks that may leave, in that order."""
        replies = self._ask([("RANDOMKEY",)] * LOOKED_AT)
        found = {found[1] for name in replies if (found := _named(name))}
        clock = "FREQ" if self._counts_uses else "IDLETIME"
        looks: list[tuple[str | bytes, ...]] = []
        for name in found:
            metadata, blob = _halves(name)
            looks += [
                ("OBJECT", clock, blob),
                ("MEMORY", "USAGE", blob),
                ("PTTL", blob),
                ("HMGET", metadata, "positions", "pinned"),
            ]
        replies = self._ask(looks)
        return sorted(self._stored(found, replies))

    def _stored(self, names: set[bytes], replies: list[Any]) -> Iterator[Stored]:
        for name, used, nbytes, expires, fields in zip(
            names, *(replies[n::4] for n in range(4)), strict=True
        ):
            if isinstance(used, int) and isinstance(nbytes, int) and isinstance(fields, list):
                place, pinned = fields
                lasts = self._policy.startswith("volatile") and expires == -1
                if pinned != b"yes" and not lasts:
                    rank = used if self._counts_uses else -used
                    yield Stored((rank, -_start(place or b"")), name, nbytes)


def _named(name: object) -> re.Match[bytes] | None:
    return NAME.fullmatch(name) if isinstance(name, bytes) else None


def _halves(name: bytes) -> tuple[bytes, bytes]:
    return name + METADATA.encode(), name + KV_BYTES.encode()


def _depth(entry: Entry) -> int:
    return _start(entry.metadata.get("positions", "").encode())


def _start(positions: bytes) -> int:
    """Tokens before a chunk, by what its metadata say."""
    start = positions.partition(b"-")[0]
    return int(start) if start.isdigit() else 0

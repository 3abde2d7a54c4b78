"""Room on a server that is full, made by whoever writes, in the order of `eviction.py`.

A server's own eviction looks at a few keys, one by one, and its clock counts seconds: of a prompt
that was just written or read any chunk may leave, and without the first one the others are of no
use. So who is about to write looks how much room there is, and where it is too little, deletes
those chunks that leave first among some that it has looked at. Of anything else on the server, and
for whoever may not look, the server's own policy decides.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import redis

from chunkcache.errors import SettingError
from chunkcache.keys import VALUES, ChunkKey
from chunkcache.stores.address import Address
from chunkcache.stores.base import EXTRAS, Entry, chunk_of, first_position
from chunkcache.stores.commands import Commands
from chunkcache.stores.eviction import leaving, roughly
from chunkcache.stores.stream import WINDOW_BYTES

LOOKED_AT = 64  # random keys; each chunk has two
ROUNDS = 3  # of looking, while all that was seen has to leave
KNOWN_SECONDS = 1.0  # how long the room that was there is relied on
REFUSED_SECONDS = 60.0  # until an account that may not look tries again
SMALL = 256  # the share of a server's memory that replies may take
OVERHEAD = 2048  # bytes of metadata, and of two keys


class Stored(NamedTuple):
    """A chunk on the server: how early it leaves (the least first), its key, its memory."""

    rank: tuple[float, int]
    key: str
    nbytes: int


class Room(Commands):
    """Commands that make room."""

    def __init__(self, address: Address) -> None:
        super().__init__(address)
        self._free = math.inf  # bytes that may be written until `_known_until`
        self._known_until = -math.inf
        self._sent = -math.inf  # when a blob was sent last
        self._policy = ""
        self._rounds_up = True
        self._window = WINDOW_BYTES  # bytes of replies that may be under way

    def _without_room(self, entries: Sequence[Entry]) -> set[str]:
        """Make room for new blobs. Returns the keys of those that would be the first to leave.

        Raises StoreError if the server is full and evicts nothing, so that no blob is sent in vain.
        """
        left = list(entries)
        refused: set[str] = set()
        for _ in range(ROUNDS if left else 0):
            costs = [self._cost(entry) for entry in left]
            if sum(costs) > self._free or time.monotonic() > self._known_until:
                self._look(max(costs))
            if sum(costs) <= self._free:
                break
            leave, without = self._choose(left)
            refused |= without
            left = [entry for entry in left if entry.key not in without]
            if not leave or not left:
                break  # the rest is for the server to choose
            self._ask([("UNLINK", *self._values(each.key)) for each in leave])
            self._known_until = -math.inf
        if left:
            self._free -= sum(self._cost(entry) for entry in left)
            self._sent = time.monotonic()
        return refused

    def _choose(self, entries: Sequence[Entry]) -> tuple[list[Stored], set[str]]:
        """Which chunks leave for the entries, and the keys of those that have no place."""
        seen, server_chooses = self._seen()
        own = {key for entry in entries for key in (*entry.before, chunk_of(entry.key))}
        free = self._free
        leave: list[Stored] = []
        refused: set[str] = set()
        for entry in entries:
            cost = self._cost(entry)
            depth = first_position(entry.metadata.get("positions", "")) or 0
            rank = (math.inf if entry.pinned or self._counts_uses else 0.0, -depth)
            may_leave = (
                (each, each.nbytes)
                for each in seen
                if each.rank <= rank and (each.key not in own or each.rank[1] < rank[1])
            )
            found, is_enough = leaving(may_leave, math.ceil(cost - free))
            is_first = len(found) < len(seen) or not seen  # to leave
            if is_first and not (is_enough or entry.pinned or server_chooses):
                refused.add(entry.key)
                continue
            leave += found
            seen = [each for each in seen if each not in found]
            free += sum(each.nbytes for each in found) - cost
        return leave, refused

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
                # The server evicts for what connections take, too: replies, a blob that comes, and
                # for two seconds as much again, in case that another one follows.
                is_counted = time.monotonic() - self._sent < 1
                spare = (1.5 if is_counted else 3) * largest + self._window
                self._free = most - used - spare

    def _seen(self) -> tuple[list[Stored], bool]:
        """Some chunks that may leave, in that order, and whether it is for the server to choose.

        So it is where most bytes are not ours, where all our chunks are to stay or the server is
        full without them, and if we may not look.
        """
        replies = self._ask([("RANDOMKEY",)] * LOOKED_AT)
        refused = isinstance(replies[0], Exception)
        names = {name: self._chunk_of(name) for name in replies if isinstance(name, bytes)}
        found = list({key for key in names.values() if key})
        looks: list[tuple[str | bytes, ...]] = []
        for key in found:
            metadata, *blobs = self._values(key)
            looks.append(("HMGET", metadata, "positions", "copied", "pinned"))
            for blob in blobs:
                use = ("OBJECT", "FREQ" if self._counts_uses else "IDLETIME", blob)
                looks += [use, ("PTTL", blob), ("MEMORY", "USAGE", blob)]
        others = [name for name, key in names.items() if not key]
        replies = self._ask([*looks, *(("MEMORY", "USAGE", name) for name in others)])
        each = 1 + 3 * (1 + len(EXTRAS))
        told = [replies[at : at + each] for at in range(0, len(looks), each)]
        seen = sorted(self._stored(zip(found, told, strict=True)))
        used = [use for replies_of_key in told for use in replies_of_key[1::3]]
        refused |= any(isinstance(use, Exception) for use in used)
        ours = sum(_sum(replies_of_key[3::3]) for replies_of_key in told)
        is_shared = _sum(replies[len(looks) :]) > ours
        all_stay = not seen and any(isinstance(use, int) for use in used)
        is_full = not seen and self._free <= 0
        return seen, refused or is_shared or all_stay or is_full

    def _chunk_of(self, name: bytes) -> str | None:
        """The key to whose halves this one belongs, if it is named like one of ours."""
        halves = (self._key(name, half) for half in VALUES)
        key = next(filter(None, halves), None)
        try:
            return key and str(ChunkKey.parse(key))
        except SettingError:
            return None

    def _stored(self, looked_at: Iterable[tuple[str, list[Any]]]) -> Iterator[Stored]:
        """Those that are ours to delete: their metadata say where they stand in a prompt, or that
        they were copied from another tier. Of which only extra values are left, these tell the use.
        """
        for key, (fields, *told) in looked_at:
            values = zip(told[::3], told[1::3], told[2::3], strict=True)
            there = (value for value in values if isinstance(value[0], int))
            used, expires, nbytes = next(there, (None, None, None))
            if isinstance(used, int) and isinstance(nbytes, int) and isinstance(fields, list):
                place, copied, pinned = fields
                lasts = self._policy.startswith("volatile") and expires == -1
                if (place or copied) and pinned != b"yes" and not lasts:
                    rank = used if self._counts_uses else -roughly(used)
                    depth = first_position((place or b"").decode(errors="replace")) or 0
                    yield Stored((rank, -depth), key, _sum(told[2::3]))


def _sum(replies: Iterable[Any]) -> int:
    return sum(reply for reply in replies if isinstance(reply, int))

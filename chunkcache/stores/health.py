"""Health: what can be told of an open store, measured with data of its own, and what to change."""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

from chunkcache.errors import StoreError
from chunkcache.stores.base import ChunkStore, Entry, Part

LOOKS = 20
BLOBS, BLOB_BYTES = 8, 4 << 20
FULL = 0.9  # of maxmemory


@dataclass(frozen=True, slots=True)
class Speed:
    """What a store does now.

    Attributes:
        round_trip_ms: Time of one lookup, median.
        write: Bytes per second, until others can read them.
        read: Bytes per second.
    """

    round_trip_ms: float
    write: float
    read: float


@dataclass(frozen=True, slots=True)
class Server:
    """What a server says of itself.

    Attributes:
        product: `"Redis 7.0.15"`.
        memory: Bytes in use.
        max_memory: Bytes that it may use, 0 for no bound.
        policy: What it does then.
        persistence: `"none"`, `"snapshots"`, `"append-only file"`, both of them, or `"unknown"`.
        advice: What should be changed, and how.
    """

    product: str
    memory: int
    max_memory: int
    policy: str
    persistence: str
    advice: tuple[str, ...]


def measure_speed(store: ChunkStore) -> Speed:
    """Look up nothing, write 32 MiB of noise, read it back, and delete it, if the store lets us.

    Raises:
        StoreError: The store failed, has not kept the data, or gives back something else.
    """
    name = uuid.uuid4().hex
    keys = [
        f"doctor@speed@1@0@{hashlib.sha256(f'{name} {n}'.encode()).hexdigest()}"
        for n in range(BLOBS)
    ]
    looks = []
    for _ in range(LOOKS):
        started = perf_counter()
        store.sizes(keys[:1])
        looks.append(perf_counter() - started)
    noise = [memoryview(os.urandom(BLOB_BYTES)) for _ in keys]
    entries = [Entry(key, {"doctor": name}, blob) for key, blob in zip(keys, noise, strict=True)]
    places = [memoryview(bytearray(BLOB_BYTES)) for _ in keys]
    parts = [Part(key, 0, [place]) for key, place in zip(keys, places, strict=True)]
    try:
        started = perf_counter()
        store.write(entries)
        store.flush()
        written = perf_counter()
        there = list(store.fetch(parts))
        read = perf_counter()
    finally:
        retry_until(lambda: store.delete(keys))
    if not all(there):
        store.check_writable()  # knows why
        raise StoreError(
            f"of {BLOBS} blobs written, {sum(there)} came back: the store is full, or smaller than "
            f"{BLOBS * BLOB_BYTES >> 20} MiB: make it larger, or let it evict (allkeys-lru)",
            "full",
        )
    if places != noise:
        raise StoreError("the store gives back other bytes than were written: do not use it")
    total = BLOBS * BLOB_BYTES
    return Speed(1e3 * median(looks), total / (written - started), total / (read - written))


def retry_until(work: Callable[[], object], seconds: float = 8.0) -> None:
    """Do what a store refuses for a while, such as changes after an error; give up in the end.

    For cleaning up: nothing is raised.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            work()
            return
        except StoreError:
            if time.monotonic() > end:
                return
            time.sleep(0.5)


def read_info(info: Mapping[str, Any], ttl: float = 0.0, is_ours: bool = False) -> Server:
    """What the reply to INFO means for chunks that live `ttl` seconds (0: for ever).

    A server that is ours, the embedded one, is set up as it is meant to be.
    """
    product = (
        f"Valkey {info['valkey_version']}"
        if "valkey_version" in info
        else f"Redis {info.get('redis_version', 'of an unknown version')}"
    )
    memory, most = int(info.get("used_memory", 0)), int(info.get("maxmemory", 0))
    policy = str(info.get("maxmemory_policy", "unknown"))
    save, append = info.get("save"), bool(int(info.get("aof_enabled", 0)))
    kinds = [*(["snapshots"] if save else []), *(["append-only file"] if append else [])]
    persistence = " and ".join(kinds) or ("none" if save == "" else "unknown")
    advice = [*_on_memory(memory, most, policy, ttl), *_on_state(info)]
    if "snapshots" in kinds and not is_ours:
        advice.append(
            'it writes snapshots of all K/V to disk; if those may be lost, CONFIG SET save ""'
        )
    return Server(product, memory, most, policy, persistence, tuple(advice))


def _on_memory(memory: int, most: int, policy: str, ttl: float) -> list[str]:
    if not most:
        return [
            "maxmemory is not set: the server takes memory until the system ends it; "
            "CONFIG SET maxmemory 16gb, or what the machine has to spare"
        ]
    remedy = "CONFIG SET maxmemory-policy allkeys-lru"
    full = f", and {memory / most:.0%} are in use" if memory > FULL * most else ""
    if policy == "noeviction" or (policy.startswith("volatile") and not ttl):
        why = "" if policy == "noeviction" else " and no ttl"
        return [
            f"with maxmemory-policy {policy}{why}, nothing new is kept once the memory is "
            f"full{full}; {remedy}"
        ]
    if policy == "allkeys-random":
        return [f"with maxmemory-policy {policy}, a part of any prompt may leave; {remedy}"]
    return []


def _on_state(info: Mapping[str, Any]) -> list[str]:
    said = []
    if info.get("role") == "slave":
        said.append("it is a replica, which takes no writes; use the URL of the primary")
    if int(info.get("loading", 0)):
        said.append("it is loading its data, and answers when it has; wait")
    if info.get("rdb_last_bgsave_status", "ok") != "ok":
        said.append(
            "its last snapshot failed, and it may refuse writes; free disk space, or "
            'CONFIG SET save ""'
        )
    return said

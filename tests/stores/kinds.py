"""Stores of each kind, for tests of what all of them do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from chunkcache.stores.base import ChunkStore
from chunkcache.stores.disk import DiskStore
from chunkcache.stores.memory import MemoryStore
from chunkcache.stores.redis import RedisStore
from chunkcache.stores.tiered import TieredStore
from chunkcache.stores.writer import WriteBehind

KINDS = ("memory", "disk", "redis", "queue", "tiers")


def open_kind(kind: str, request: pytest.FixtureRequest, folder: Path) -> ChunkStore:
    """An empty store; that in Redis is the one of the fixture `redis_server`."""
    kinds: dict[str, Callable[[], ChunkStore]] = {
        "memory": MemoryStore,
        "disk": lambda: DiskStore(folder),
        "redis": lambda: RedisStore(request.getfixturevalue("redis_server").unix_url),
        "queue": lambda: WriteBehind(MemoryStore()),
        "tiers": lambda: TieredStore([MemoryStore(), WriteBehind(DiskStore(folder))]),
    }
    return kinds[kind]()

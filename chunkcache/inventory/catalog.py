"""Catalog: what a store has, counted, chosen and deleted by its metadata.

```python
from chunkcache import catalog, open_store

with open_store("redis://localhost:6379/0") as store:
    print(catalog.stats(store))
    old = catalog.Filter(namespace="team-a", min_age=7 * 86_400)
    print(catalog.delete(store, old, dry_run=True))
```

Everything here goes through all keys of the store, a page at a time; no blob is read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from chunkcache.errors import SettingError
from chunkcache.inventory.filters import Filter, split_tags
from chunkcache.keys import FORMAT, INDEX_FORMAT, ChunkKey
from chunkcache.stores.base import ChunkStore, Entry, Listed
from chunkcache.tokens.token_text import shown

__all__ = ["Deleted", "Filter", "Group", "Stats", "delete", "entries", "stats", "sweep"]

# An index entry may name a chunk that another process is still writing.
SETTLED = timedelta(minutes=1)
WRITTEN_SECONDS = 0.5  # from one half of a chunk to the other
AT_ONCE = 1000  # chunks that are asked for in one round trip
ALL = Filter()


@dataclass(slots=True)
class Group:
    """Chunks that have something in common; `bytes` are those of all their blobs.

    `states` of them have a state, with so many `state_bytes` among the `bytes`.

    `oldest` and `newest` say when the first and the last of them was made (ISO 8601, UTC).
    """

    chunks: int = 0
    tokens: int = 0
    bytes: int = 0
    oldest: str = ""
    newest: str = ""
    states: int = 0
    state_bytes: int = 0

    def add(self, entry: Listed) -> None:
        """Count one more chunk."""
        self.chunks += 1
        self.tokens += tokens_of(entry)
        self.bytes += entry.total_bytes
        self.states += entry.state > 0
        self.state_bytes += entry.state
        if created := (entry.metadata or {}).get("created", ""):
            self.oldest = min(self.oldest or created, created)
            self.newest = max(self.newest, created)

    def __str__(self) -> str:
        text = f"{self.chunks:,} chunks, {self.tokens:,} tokens, {self.bytes / 1e6:,.1f} MB"
        if self.states:
            text += f" ({self.state_bytes / 1e6:,.1f} MB of it {self.states:,} states)"
        return f"{text}, made {self.oldest} to {self.newest}" if self.oldest else text


@dataclass(slots=True)
class Stats:
    """What a store has: all of it, and by model, namespace and tag.

    A chunk with several tags counts for each of them.
    """

    total: Group = field(default_factory=Group)
    models: dict[str, Group] = field(default_factory=dict)
    namespaces: dict[str, Group] = field(default_factory=dict)
    tags: dict[str, Group] = field(default_factory=dict)

    def add(self, key: ChunkKey, entry: Listed) -> None:
        """Count one more chunk."""
        fields = entry.metadata or {}
        self.total.add(entry)
        self.models.setdefault(fields.get("model", key.model), Group()).add(entry)
        self.namespaces.setdefault(fields.get("namespace", ""), Group()).add(entry)
        for tag in split_tags(fields.get("tags", "")):
            self.tags.setdefault(tag, Group()).add(entry)

    def to_dict(self) -> dict[str, Any]:
        """All numbers, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [str(self.total)]
        for title in ("models", "namespaces", "tags"):
            groups: Mapping[str, Group] = getattr(self, title)
            lines += [f"{title}:"] if groups else []
            lines += [f"  {shown(name) or '(none)'}: {groups[name]}" for name in sorted(groups)]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Deleted:
    """What was deleted, or would be.

    Attributes:
        chunks: Entries of chunks, also those of which only a half was there.
        tokens: Their tokens, where the metadata say how many.
        bytes: Bytes of their blobs.
        mentions: Mentions of chunks in the index of `reuse="anywhere"`.
        dry_run: Whether nothing was done.
    """

    chunks: int
    tokens: int
    bytes: int
    mentions: int
    dry_run: bool

    def __str__(self) -> str:
        verb = "would be deleted" if self.dry_run else "deleted"
        return (
            f"{self.chunks:,} chunks {verb}: {self.tokens:,} tokens, {self.bytes / 1e6:,.1f} MB, "
            f"{self.mentions:,} mentions in the index"
        )


def entries(store: ChunkStore, chosen: Filter = ALL) -> Iterator[Listed]:
    """Yield key, metadata and blob sizes of the chunks that are meant, in no order.

    Chunks of which only a half is there are among them. Looking renews no time to live and, on
    Redis 7.2 and later, is no use that eviction would count.

    Raises:
        StoreError: The store failed.
    """
    for page in _pages(store):
        for key, entry in page:
            if chosen.matches(key, entry.metadata or {}):
                yield entry


def stats(store: ChunkStore, chosen: Filter = ALL) -> Stats:
    """Count the chunks that are meant and have a blob.

    Raises:
        StoreError: The store failed.
    """
    counted = Stats()
    for page in _pages(store):
        for key, entry in page:
            fields = entry.metadata or {}
            if entry.nbytes and chosen.matches(key, fields):
                counted.add(key, entry)
    return counted


def delete(store: ChunkStore, chosen: Filter, *, dry_run: bool = False) -> Deleted:
    """Delete the chunks that are meant: blobs, metadata, and what the index says of them.

    What is written in the meantime may stay, and so may copies in the RAM of other processes. A
    mention that is added to an index entry at the same moment may be lost, and with it a find of
    `reuse="anywhere"`.

    Args:
        store: The store.
        chosen: Which chunks. `Filter()` means all of them.
        dry_run: Only count.

    Raises:
        StoreError: The store failed, or takes no changes.
    """
    return _delete(store, lambda key, e: chosen.matches(key, e.metadata or {}), dry_run)


def sweep(store: ChunkStore, *, dry_run: bool = False) -> Deleted:
    """Delete halves of chunks whose other half was evicted, and mentions of chunks that are gone.

    Raises:
        StoreError: The store failed, or takes no changes.
    """
    return _delete(store, lambda key, e: not (e.metadata and e.nbytes), dry_run, _still_halves)


def _still_halves(store: ChunkStore, keys: list[str]) -> set[str]:
    """A second look: what was being written at the first one is whole by then."""
    return {
        key
        for key, fields, size in zip(
            keys, store.read_metadata(keys), store.sizes(keys), strict=True
        )
        if not (fields and size)
    }


def _pages(store: ChunkStore) -> Iterator[list[tuple[ChunkKey, Listed]]]:
    """All chunks, each once, with their keys read."""
    seen: set[str] = set()
    for page in store.scan(FORMAT):
        chunks = []
        for entry in page:
            if entry.key not in seen:
                seen.add(entry.key)
                with suppress(SettingError):  # not ours
                    chunks.append((ChunkKey.parse(entry.key), entry))
        yield chunks


def _delete(
    store: ChunkStore,
    is_meant: Callable[[ChunkKey, Listed], bool],
    dry_run: bool,
    still_meant: Callable[[ChunkStore, list[str]], set[str]] | None = None,
) -> Deleted:
    """As `delete`. What is meant is looked at again by `still_meant`, a moment later."""
    if not dry_run:
        store.check_writable()
    settled = (datetime.now(UTC) - SETTLED).isoformat(timespec="seconds")
    total = Group()
    gone, live, pinned = set[str](), set[str](), set[str]()
    later: list[tuple[ChunkKey, Listed]] = []

    def take(chosen: list[tuple[ChunkKey, Listed]]) -> None:
        for key, entry in chosen:
            total.add(entry)
            gone.add(key.chunk_hash)
        if chosen and not dry_run:
            store.delete([entry.key for _, entry in chosen])

    for page in _pages(store):
        chosen = []
        for key, entry in page:
            if is_meant(key, entry):
                chosen.append((key, entry))
                continue
            live.add(key.chunk_hash)
            if (entry.metadata or {}).get("pinned") == "yes":
                pinned.add(key.chunk_hash)
        if still_meant:
            later += chosen
        else:
            take(chosen)
    if later and still_meant:
        time.sleep(WRITTEN_SECONDS)
        for at in range(0, len(later), AT_ONCE):
            some = later[at : at + AT_ONCE]
            still = still_meant(store, [entry.key for _, entry in some])
            take([(key, entry) for key, entry in some if entry.key in still])
            live |= {key.chunk_hash for key, entry in some if entry.key not in still}
    gone -= live  # the same chunk may be kept in several formats

    def is_dead(chunk_hash: str, place: str) -> bool:
        created = place.partition(" ")[2]
        return chunk_hash in gone or (chunk_hash not in live and created < settled)

    mentions = 0
    for listed in store.scan(f"{INDEX_FORMAT}@"):
        changed = []
        for mention in listed:
            there = mention.metadata or {}
            rest = {name: place for name, place in there.items() if not is_dead(name, place)}
            if len(rest) < len(there):
                mentions += len(there) - len(rest)
                is_pinned = not pinned.isdisjoint(rest)
                changed.append(Entry(mention.key, rest, memoryview(b""), pinned=is_pinned))
        if changed and not dry_run:
            _replace(store, changed)
    return Deleted(total.chunks, total.tokens, total.bytes, mentions, dry_run)


def _replace(store: ChunkStore, changed: list[Entry]) -> None:
    """Write index entries as they shall be now; those that name nothing are deleted."""
    if empty := [entry.key for entry in changed if not entry.metadata]:
        store.delete(empty)
    if rest := [entry for entry in changed if entry.metadata]:
        store.write(rest)
        store.flush()  # a queue takes so many, and no more
        store.check_writable()


def tokens_of(entry: Listed) -> int:
    """A chunk's tokens as its metadata count them; 0 where they do not."""
    count = (entry.metadata or {}).get("tokens", "")
    return int(count) if count.isdecimal() and len(count) < 10 else 0

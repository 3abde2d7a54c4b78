"""Copy: chunks from one store to another, with the index entries that name them.

Blobs are copied as they are, so sealed, compressed and rounded ones like any other. What the
destination has already is not sent again: a copy that was interrupted is run again as it was.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import chain, islice, repeat

from chunkcache.errors import BlobError, SettingError, StoreError
from chunkcache.inventory import catalog
from chunkcache.inventory.filters import Filter
from chunkcache.inventory.inspection import check_blob
from chunkcache.keys import INDEX_FORMAT, ChunkKey
from chunkcache.stores.base import EXTRAS, ChunkStore, Entry, Listed, read_blobs
from chunkcache.stores.writer import PatientStore

AT_ONCE, ANCHORS_AT_ONCE = 64, 256  # entries asked for together
MOST_WAITING = 32_000_000  # bytes of blobs that wait to be written
MOST_BLOB, MOST_METADATA = 1 << 30, 1 << 20  # bytes; more is garbage
MOST_TOLD = 20  # reasons that are kept
CLOCKS = timedelta(days=1)  # by so much may those of two machines differ
# An index entry keeps the newest mentions only, so one of the future would push out all others.
MENTION = re.compile(r"-?\d{1,7} (\d{4}-[0-9T:.+-]{1,40})(?: .*)?", re.ASCII | re.DOTALL)


@dataclass(slots=True)
class Copied:
    """What was copied, or would be.

    Attributes:
        chunks: Chunks sent.
        tokens: Their tokens.
        bytes: Bytes of their blobs.
        present: Chunks that the destination had already.
        left_out: Chunks that are damaged or too large, or that left the source meanwhile.
        mentions: Mentions of chunks that were added to the destination's index.
        dry_run: Whether nothing was written.
        reasons: Why chunks were left out, by key; of the first 20.
    """

    chunks: int = 0
    tokens: int = 0
    bytes: int = 0
    present: int = 0
    left_out: int = 0
    mentions: int = 0
    dry_run: bool = False
    reasons: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        verb = "would be copied" if self.dry_run else "copied"
        return (
            f"{self.chunks:,} chunks {verb}: {self.tokens:,} tokens, {self.bytes / 1e6:,.1f} MB, "
            f"{self.mentions:,} mentions in the index; {self.present:,} were there already"
        ) + (f"; {self.left_out:,} left out as damaged or gone" if self.left_out else "")


def copy_chunks(
    source: ChunkStore,
    target: ChunkStore,
    chosen: Filter = catalog.ALL,
    *,
    verify: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Copied:
    """Copy chunks, with all metadata, and the index entries by which `reuse="anywhere"` finds them.

    A chunk that the destination has with the same size and metadata is not sent again; one with
    other metadata is replaced. Outputs and states come along with their chunks. At most 32 MB of
    blobs, or one larger blob, wait to be written.

    Args:
        source: An open store.
        target: The destination, another open store.
        chosen: Which chunks.
        verify: Leave out blobs that are not what key and metadata say, as `check_blob` finds out.
        dry_run: Write nothing. With `verify`, blobs are read and checked all the same.
        progress: Told the bytes of blobs that are done, and of all of them.

    Raises:
        SettingError: No chunk matches.
        StoreError: A store failed, or the destination does not keep what it is given.
    """
    total = catalog.stats(source, chosen).total.bytes
    if not total:
        raise SettingError("no chunk of the source matches: check its URL and the terms")
    if not dry_run:
        target.check_writable()
    copy = _Copy(source, PatientStore(target), verify, Copied(dry_run=dry_run))
    found = (entry for entry in catalog.entries(source, chosen) if entry.metadata and entry.nbytes)
    done = 0
    while page := list(islice(found, AT_ONCE)):
        copy.chunks(page)
        done += sum(entry.total_bytes for entry in page)
        progress(done, total)
    copy.index()
    copy.settle(last=True)
    return copy.told


class _Copy:
    """A copy under way."""

    def __init__(
        self, source: ChunkStore, target: PatientStore, verify: bool, told: Copied
    ) -> None:
        self.source, self.target, self.verify, self.told = source, target, verify, told
        self.pins: dict[str, bool] = {}  # of what the destination has: by hash, whether pinned
        self.written: list[str] = []  # keys
        self.waiting = 0  # bytes

    def chunks(self, page: list[Listed]) -> None:
        """Copy some chunks."""
        lacking = self.lacking(page)
        sent = [entry for entry in page if entry.key in lacking and self.is_fit(entry)]
        kept = [entry for entry in page if entry.key not in lacking]
        for entry in kept:
            self.told.present += 1
            self.pins[_hash(entry)] = _is_pinned(entry)
        for entry, blob in zip(sent, self.blobs([entry.key for entry in sent]), strict=True):
            try:
                if blob is None:
                    raise BlobError("it has left the source")
                if self.verify:
                    check_blob(entry, blob)
            except BlobError as error:
                self.leave_out(entry, str(error))
                continue
            self.told.chunks += 1
            self.told.tokens += catalog.tokens_of(entry)
            self.told.bytes += entry.nbytes
            self.pins[_hash(entry)] = pinned = _is_pinned(entry)
            whole = Entry(entry.key, entry.metadata or {}, memoryview(bytes(blob)), pinned=pinned)
            self.write(whole, replaces=lacking[entry.key])
            kept.append(entry)
        self.extras(kept, {key for key, replaces in lacking.items() if replaces})

    def extras(self, chunks: list[Listed], replaced: set[str]) -> None:
        """Copy those extra values of chunks that the destination lacks, or lost with the chunk."""
        asked = [(entry, ending) for entry in chunks for ending in entry.extras]
        there = self.target.sizes([entry.key + ending for entry, ending in asked])
        lacking = [
            (entry, ending)
            for (entry, ending), size in zip(asked, there, strict=True)
            if size != entry.extras[ending] or entry.key in replaced
        ]
        blobs = self.blobs([entry.key + ending for entry, ending in lacking])
        for (entry, ending), blob in zip(lacking, blobs, strict=True):
            name, fields = ending[1:], entry.metadata or {}
            nbytes = fields.get(name, str(entry.extras[ending]))  # K/V written anew say nothing
            try:
                if blob is None:
                    continue  # it is computed again
                if self.verify:
                    check_blob(replace(entry, metadata={**fields, "bytes": nbytes}), blob)
            except BlobError as error:
                self.leave_out(entry, f"{name}: {error}")
                continue
            self.told.bytes += entry.extras[ending]
            told = {name: nbytes, "positions": fields.get("positions", "")}
            pinned, own = _is_pinned(entry), memoryview(bytes(blob))
            self.write(Entry(entry.key + ending, told, own, merge=True, pinned=pinned))

    def index(self) -> None:
        """Add what the source's index says of the chunks that the destination has now."""
        latest = (datetime.now(UTC) + CLOCKS).isoformat()
        for page in self.source.scan(f"{INDEX_FORMAT}@"):
            named = []
            for entry in page:
                mentions = {
                    name: place
                    for name, place in (entry.metadata or {}).items()
                    if name in self.pins
                    if (match := MENTION.fullmatch(place)) and match[1] <= latest
                }
                with suppress(SettingError):  # the key is not ours
                    if mentions and _hash(entry):
                        named.append(Listed(entry.key, mentions, 0))
            for at in range(0, len(named), ANCHORS_AT_ONCE):
                some = named[at : at + ANCHORS_AT_ONCE]
                lacking = self.lacking(some)
                for key, mentions in ((e.key, e.metadata or {}) for e in some if e.key in lacking):
                    self.told.mentions += len(mentions)
                    pinned = any(self.pins[name] for name in mentions)
                    self.write(Entry(key, mentions, memoryview(b""), merge=True, pinned=pinned))
                self.settle()

    def lacking(self, entries: list[Listed]) -> dict[str, bool]:
        """Keys of those that the destination lacks; whether it has a blob of that size instead."""
        keys = [entry.key for entry in entries]
        found = zip(entries, self.target.sizes(keys), self.target.read_metadata(keys), strict=True)
        return {
            entry.key: size == entry.nbytes
            for entry, size, fields in found
            if size != entry.nbytes or not _of_chunk(entry.metadata) <= _of_chunk(fields)
        }

    def blobs(self, keys: list[str]) -> Iterator[memoryview | None]:
        """The source's blobs, each valid until the next; empty ones where none is needed."""
        is_read = self.verify or not self.told.dry_run
        return read_blobs(self.source, keys) if is_read else repeat(memoryview(b""), len(keys))

    def write(self, entry: Entry, replaces: bool = False) -> None:
        if self.told.dry_run:
            return
        if self.waiting + entry.nbytes > MOST_WAITING:
            self.settle()
        self.waiting += entry.nbytes
        if replaces:  # a server does not take a blob again that it has
            self.target.delete([entry.key])
        self.target.write([entry])
        self.written += [entry.key] if entry.nbytes else []

    def settle(self, last: bool = False) -> None:
        """Wait for what was written. Raise StoreError if some, or at `last` any, is not there."""
        self.waiting = 0
        if self.told.dry_run:
            return
        self.target.flush()
        some = random.sample(self.written, min(AT_ONCE, len(self.written)))
        asked = self.written if last else self.written[-AT_ONCE:] + some
        parts = (asked[at : at + AT_ONCE] for at in range(0, len(asked), AT_ONCE))
        if lost := sum(not size for part in parts for size in self.target.sizes(part)):
            raise StoreError(
                f"the destination has not kept {lost:,} of {len(asked):,} chunks: it is full (give "
                "it more room, or choose fewer chunks by terms), or they have expired (ttl)",
                "full",
            )

    def is_fit(self, entry: Listed) -> bool:
        """Whether any store can keep it; if not, it is left out."""
        try:
            nbytes = len("".join(chain(*(entry.metadata or {}).items())).encode())
        except UnicodeEncodeError:  # a half of a surrogate pair, which JSON can name
            nbytes = MOST_METADATA + 1
        fits = nbytes <= MOST_METADATA and entry.nbytes <= MOST_BLOB
        if not fits:
            self.leave_out(entry, "it is too large, or its metadata are no text")
        return fits

    def leave_out(self, entry: Listed, why: str) -> None:
        self.told.left_out += 1
        if len(self.told.reasons) < MOST_TOLD:
            self.told.reasons[entry.key] = why


def _hash(entry: Listed) -> str:
    return ChunkKey.parse(entry.key).chunk_hash


def _of_chunk(metadata: dict[str, str] | None) -> set[tuple[str, str]]:
    """Fields, without those that come with an extra value."""
    return {item for item in (metadata or {}).items() if f"@{item[0]}" not in EXTRAS}


def _is_pinned(entry: Listed) -> bool:
    return (entry.metadata or {}).get("pinned") == "yes"
